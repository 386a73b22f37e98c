"""The training configuration: frozen dataclasses from defaults, a preset, a TOML file and ``section.key=value``.

A new setting is one line in its section: name, type, default, bounds, help. Everything else (reading, checking,
writing, error messages) follows from that line.
"""

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from negfast.errors import InputError

Tree = Mapping[str, Mapping[str, Any]]

ENCODERS = ("auto", "minilm", "tfidf")  # of item texts
SAMPLES = ("movietweetings", "polis")  # logs that the package carries
QUANTIZERS = ("rq-kmeans", "balanced", "rq-vae", "random")  # of item embeddings


def setting(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: Sequence[str] = (),
    help: str = "",
) -> Any:
    """A field with its bounds: ``low`` and ``high`` belong to the range, ``above`` does not."""
    bounds = {"low": low, "high": high, "above": above, "choices": tuple(choices), "help": help}
    return field(default=default, metadata=bounds)


@dataclass(frozen=True)
class Sample:
    """The embedded log, prepared where no --data is given; --sample says which."""

    encoder: str = setting("auto", choices=ENCODERS, help="of the item texts")


@dataclass(frozen=True)
class Sid:
    """The semantic IDs of the embedded log; other data gets its own from `negfast prepare`."""

    quantizer: str = setting(
        "rq-kmeans",
        choices=QUANTIZERS,
        help="of the item embeddings; random: a control",
    )


@dataclass(frozen=True)
class Model:
    """The built-in Qwen3, where no --model is given, and what of a decoder is trained."""

    hidden: int = setting(128, low=8, help="width of the residual stream")
    layers: int = setting(4, low=1)
    heads: int = setting(4, low=1)
    kv_heads: int = setting(2, low=1)
    head_dim: int = setting(32, low=2)
    intermediate: int = setting(384, low=8, help="width of the MLP")
    text_vocab: int = setting(2048, low=257, help="byte-level BPE tokens trained on the item texts")
    lora_rank: int = setting(0, low=0, help="of LoRA adapters; 0 trains all of the decoder's weights")


@dataclass(frozen=True)
class History:
    """What of a user's past is seen."""

    context: str = setting(
        "day",
        choices=("day", "event"),
        help="of a verdict: all events up to the end of the day before, or all before the second",
    )
    window: int = setting(512, low=4, help="events of a user that the decoder sees at once; a quarter of them overlap")
    positions: str = setting(
        "events", choices=("events", "codes"), help="events: one position an event; codes: its codes and feedback"
    )
    text: bool = setting(False, help="positions carry the text vectors of their items beside the codes")


@dataclass(frozen=True)
class Prior:
    """The community prior on the trie."""

    weight: float = setting(1.0, low=0.0, help="0 switches it off")
    half_life_days: float = setting(4.0, above=0.0, help="of a dislike's weight")
    eps: float = setting(0.01, above=0.0, help="mass of an unseen item without events")


@dataclass(frozen=True)
class Stage:
    """What every training stage has."""

    steps: int = setting(300, low=0)
    lr: float = setting(1e-3, above=0.0, help="peak of a linear warm-up and a cosine")
    warmup: int = setting(20, low=0, help="steps")

    @property
    def round_steps(self) -> int:
        """Steps that belong together: a checkpoint lies between rounds, where nothing but weights is carried on."""
        return 1

    @property
    def can_be_split(self) -> bool:
        """Whether a part of a batch may fall into smaller ones (`train.token_budget`)."""
        return True


@dataclass(frozen=True)
class Align(Stage):
    """Item-level SFT; a task with 0 examples a step is switched off."""

    steps: int = setting(100, low=0)
    titles: int = setting(24, low=0, help="title -> SID examples a step")
    sid_titles: int = setting(8, low=0, help="SID -> title examples a step")
    attributes: int = setting(8, low=0, help="SID -> attribute examples a step")
    pairs: int = setting(48, low=0, help="co-disliked pairs a step")
    held_out: float = setting(
        0.05, low=0.0, high=0.5, help="share of the items, and of the pairs' users, to measure on"
    )


@dataclass(frozen=True)
class Sft(Stage):
    """Next dislikes and likes of every active user-day."""

    steps: int = setting(400, low=0)
    lr: float = setting(5e-4, above=0.0, help="peak of a linear warm-up and a cosine")
    warmup: int = setting(50, low=0, help="steps")
    validate_every: int = setting(100, low=1, help="steps; the best weights on valid are kept")
    reset_head: bool = setting(True, help="start as the community prior alone, whatever align taught the code head")
    histories: int = setting(64, low=1, help="histories a step; requests branch off each")
    requests_per_history: int = setting(4, low=1, help="requests drawn of a history, at most")
    target: str = setting("window", choices=("window", "next"), help="F, or only the item of F disliked first")
    targets: int = setting(4, low=1, help="items drawn from F, and from P, for a request")
    like_weight: float = setting(0.3, low=0.0, help="of the loss after <|next-like|>")
    negative_view: float = setting(0.2, low=0.0, high=1.0, help="share of histories that show no likes")
    positive_view: float = setting(0.05, low=0.0, high=1.0, help="share of histories that show no dislikes")


@dataclass(frozen=True)
class Grpo(Stage):
    """Group policy optimisation on the trie."""

    steps: int = setting(120, low=0)
    lr: float = setting(2e-4, above=0.0, help="peak of a linear warm-up and a cosine")
    warmup: int = setting(10, low=0, help="steps")
    validate_every: int = setting(50, low=1, help="steps; the best weights on valid are kept")
    histories: int = setting(16, low=1, help="histories a step")
    requests_per_history: int = setting(4, low=1, help="requests (groups) drawn of a history, at most")
    group: int = setting(64, low=2, help="completions a request")
    epochs: int = setting(1, low=1, help="updates from one rollout; more than 1 need a second pass each")
    objective: str = setting("trie", choices=("trie", "full"), help="what log-probabilities are taken over")
    loss: str = setting("dr_grpo", choices=("grpo", "dr_grpo", "dapo"))
    scale_rewards: bool = setting(False, help="divide the advantage by the group's standard deviation")
    set_size: int = setting(4, low=0, help="k of the max@k advantage; 0: each completion for itself")
    clip_low: float = setting(0.2, low=0.0, high=0.99)
    clip_high: float = setting(0.2, low=0.0)
    beta: float = setting(0.04, low=0.0, help="weight of the KL to the SFT policy")
    kl: str = setting("exact", choices=("exact", "k3"))
    temperature: float = setting(1.0, above=0.0)
    schedule: str = setting(
        "mixed",
        choices=("progressive", "mixed", "static"),
        help="of mixed histories: rising to mixed_share where they were measured not to be worse, all of them from the "
        "first step, or mixed_share throughout",
    )
    negative_phase: float = setting(
        0.4, low=0.0, high=1.0, help="of progressive: share of the steps on negative-only histories"
    )
    mixed_share: float = setting(
        0.7, low=0.0, high=1.0, help="share of mixed histories at the end of progressive, and of static"
    )
    sft_weight: float = setting(0.0, low=0.0, help="of the SFT loss on the same requests, both branches")

    @property
    def round_steps(self) -> int:
        return self.epochs

    @property
    def can_be_split(self) -> bool:
        """dapo divides by the tokens of the whole batch; the steps of a round, whose SFT terms differ in length, share
        one rollout."""
        return self.loss != "dapo" and self.epochs == 1


@dataclass(frozen=True)
class Reward:
    """1 for a hit, less for collaborative neighbours of a hit, negative for a like."""

    collab_weight: float = setting(0.2, low=0.0, help="lambda; 0 switches the term off")
    collab_cap: float = setting(0.1, low=0.0, high=1.0, help="most that the term may earn")
    like_penalty: float = setting(0.1, low=0.0, help="mu; the break-even dislike rate is mu / (1 + mu)")
    target: str = setting("window", choices=("window", "next"), help="F, or only the item of F disliked first")


@dataclass(frozen=True)
class Train:
    seed: int = setting(0, low=0, high=2**32 - 1)
    weight_decay: float = setting(0.01, low=0.0, help="of the decoder's matrices")
    clip_norm: float = setting(1.0, above=0.0, help="largest gradient norm")
    device: str = setting("auto", help="auto, cpu, cuda, cuda:1, ...")
    threads: int = setting(0, low=0, help="CPU threads; 0: OMP_NUM_THREADS, else all CPUs that the process may use")
    dtype: str = setting(
        "auto",
        choices=("auto", "float32", "bfloat16"),
        help="matmul dtype of the decoder; weights and optimiser are float32. auto: bfloat16 on CUDA",
    )
    stream: str = setting(
        "float32",
        choices=("float32", "bfloat16"),
        help="dtype of the residual stream where the matmul dtype is bfloat16; bfloat16 moves fewer bytes",
    )
    accumulate: int = setting(1, low=1, help="parts of a rank's batch, one after the other; the result is the same")
    token_budget: int = setting(
        0, low=0, help="most tokens of a part; larger ones are halved, with the same result. 0: no bound"
    )
    recompute: bool = setting(
        False, help="keep the inputs of layers alone and compute the rest anew in the backward: less memory, more time"
    )
    shard: str = setting(
        "auto",
        choices=("auto", "none", "fsdp"),
        help="spread layers' weights, gradients and moments over ranks. auto: where they would fill a GPU",
    )
    prefetch: str = setting(
        "auto", choices=("auto", "on", "off"), help="read a step's batch while the one before computes. auto: on CUDA"
    )
    checkpoint_every: int = setting(100, low=1, help="steps")
    tensorboard: bool = setting(False, help="write RUN/tensorboard too; needs the package tensorboard")


@dataclass(frozen=True)
class Eval:
    beam: int = setting(64, low=1, help="beams kept above the last level")
    valid_requests: int = setting(1250, low=1, help="requests of the validation during training")
    requests: int = setting(
        6000, low=0, help="requests of the tables, about; of a split with more, users are drawn. 0: all"
    )
    resamples: int = setting(1000, low=1, help="of the paired bootstrap over users")


@dataclass(frozen=True)
class Config:
    sample: Sample = Sample()
    sid: Sid = Sid()
    model: Model = Model()
    history: History = History()
    prior: Prior = Prior()
    align: Align = Align()
    sft: Sft = Sft()
    grpo: Grpo = Grpo()
    reward: Reward = Reward()
    train: Train = Train()
    eval: Eval = Eval()


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "quickstart": {},
    "smoke": {
        "sample": {"encoder": "tfidf"},
        "model": {"hidden": 64, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate": 192},
        "align": {"steps": 10},
        "sft": {"steps": 20, "warmup": 5, "histories": 32},
        "grpo": {"steps": 5, "warmup": 2, "histories": 4, "group": 8},
        "eval": {"beam": 50, "valid_requests": 64, "resamples": 100},
    },
    "nightly": {  # with --init: starts from yesterday's weights, which know the items already
        "align": {"steps": 0},
        "sft": {"steps": 100, "lr": 2e-4, "warmup": 10, "reset_head": False, "validate_every": 50},
        "grpo": {"steps": 30, "lr": 1e-4, "warmup": 5, "validate_every": 15},
    },
}


def load_config(path: Path | None = None, preset: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the preset, then the TOML file, then ``section.key=value`` overrides; the last one wins.

    Raises InputError naming the key, what was found and what was expected.
    """
    config = Config()
    if preset is not None:
        if preset not in PRESETS:
            raise InputError(f"--preset {preset!r}: expected one of {', '.join(PRESETS)}")
        config = _apply(config, PRESETS[preset], f"preset {preset}")
    if path is not None:
        config = _apply(config, _read_toml(path), str(path))
    for override in overrides:
        config = _apply(config, _parse_override(override), "--set")
    return config


def to_toml(config: Config) -> str:
    """The whole configuration as TOML; ``load_config`` reads it back unchanged."""
    lines: list[str] = []
    for section, values in asdict(config).items():
        lines += [f"[{section}]", *(f"{key} = {_toml_value(value)}" for key, value in values.items()), ""]
    return "\n".join(lines)


def _apply(config: Config, tree: Tree, source: str) -> Config:
    sections = {f.name: f for f in fields(config)}
    for name, values in tree.items():
        if name not in sections:
            raise InputError(f"{source}: unknown section {name!r}{_hint(name, list(sections))}")
        if not isinstance(values, Mapping):
            raise InputError(f"{source}: {name} is {values!r}, expected a section [{name}]")
        section = getattr(config, name)
        known = {f.name: f for f in fields(section)}
        for key, value in values.items():
            if key not in known:
                raise InputError(f"{source}: unknown key '{name}.{key}'{_hint(key, list(known), name + '.')}")
            checked = _check(value, known[key].type, known[key].metadata, f"{source}: {name}.{key}")
            section = replace(section, **{key: checked})
        config = replace(config, **{name: section})
    return config


def _check(value: Any, kind: Any, bounds: Mapping[str, Any], where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        expected = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}[kind]
        raise InputError(f"{where} is {value!r}, expected {expected}")
    if bounds["choices"] and value not in bounds["choices"]:
        raise InputError(f"{where} is {value!r}, expected one of {', '.join(bounds['choices'])}")
    low, high, above = bounds["low"], bounds["high"], bounds["above"]
    if low is not None and value < low:
        raise InputError(f"{where} is {value}, expected at least {low}")
    if high is not None and value > high:
        raise InputError(f"{where} is {value}, expected at most {high}")
    if above is not None and value <= above:
        raise InputError(f"{where} is {value}, expected more than {above}")
    if kind is float and not math.isfinite(value):
        raise InputError(f"{where} is {value}, expected a finite number")
    return value


def _hint(name: str, known: list[str], prefix: str = "") -> str:
    close = get_close_matches(name, known, 1)
    return f", did you mean '{prefix}{close[0]}'?" if close else f", expected one of {', '.join(known)}"


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from error


def _parse_override(text: str) -> dict[str, dict[str, Any]]:
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise InputError(f"--set {text!r}: expected section.key=value")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()  # a bare word is a string
    return {section: {key: parsed}}


def _toml_value(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return str(value).lower() if isinstance(value, bool) else repr(value)
