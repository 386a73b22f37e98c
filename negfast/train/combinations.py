"""Which settings go together: contradictions are refused, and so is a setting that does nothing beside the others."""

from negfast.config import Config
from negfast.errors import InputError
from negfast.runtime import distributed
from negfast.train.grpo.loss import check_full, objective_of

IDLE = (  # where a condition (in words, as a function) holds, these settings do nothing
    ("grpo.schedule=mixed", lambda c: c.grpo.schedule == "mixed", ("grpo.negative_phase", "grpo.mixed_share")),
    ("grpo.schedule=static", lambda c: c.grpo.schedule == "static", ("grpo.negative_phase",)),
    ("grpo.epochs=1", lambda c: c.grpo.epochs == 1, ("grpo.clip_low", "grpo.clip_high")),
    ("grpo.beta=0", lambda c: c.grpo.beta == 0, ("grpo.kl",)),
    ("reward.collab_weight=0", lambda c: c.reward.collab_weight == 0, ("reward.collab_cap",)),
    ("prior.weight=0", lambda c: c.prior.weight == 0, ("prior.eps",)),
)


def check_combinations(config: Config) -> None:
    """InputError where settings contradict each other, or one does nothing beside the others."""
    settings, prior_weight = config.grpo, config.prior.weight
    if (views := config.sft.negative_view + config.sft.positive_view) > 1:
        raise InputError(f"sft.negative_view + sft.positive_view: found {views:g}, expected at most 1")
    if config.train.checkpoint_every % settings.epochs:
        found = config.train.checkpoint_every
        raise InputError(f"train.checkpoint_every: found {found}, expected a multiple of grpo.epochs={settings.epochs}")
    micro_batches = config.train.accumulate * distributed.planned_size()
    if settings.loss == "dapo" and micro_batches > 1:
        raise InputError(
            f"grpo.loss: found dapo with {micro_batches} micro-batches (ranks x train.accumulate), expected dr_grpo or "
            "grpo: a micro-batch does not know how many tokens the others count"
        )
    if config.train.token_budget and not settings.can_be_split:
        raise InputError(
            f"train.token_budget: found {config.train.token_budget} with grpo.loss={settings.loss} and "
            f"grpo.epochs={settings.epochs}, expected 0: such a batch cannot be split"
        )
    objective = objective_of(settings)
    if settings.objective == "full":
        try:
            check_full(objective, prior_weight)
        except ValueError as error:
            raise InputError(f"grpo.objective=full: {error}") from error
        if settings.epochs > 1:
            raise InputError(f"grpo.epochs={settings.epochs}: found grpo.objective=full, expected trie")
    if settings.set_size > settings.group:
        raise InputError(f"grpo.set_size: found {settings.set_size}, expected at most grpo.group={settings.group}")
    _refuse_idle(config)


def _refuse_idle(config: Config) -> None:
    """InputError for a setting that was changed and does nothing beside the others."""
    default = Config()
    for words, holds, settings in IDLE:
        for setting in settings if holds(config) else ():
            section, _, key = setting.partition(".")
            found, usual = (getattr(getattr(of, section), key) for of in (config, default))
            if found != usual:
                raise InputError(f"{setting}: found {found}, but it does nothing with {words}; leave it at {usual}")
