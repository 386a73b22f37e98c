"""``python -m bench.experiments.ablations``: each part of the method changed alone, measured on valid.

Every entry of `ABLATIONS` is the default run with some settings changed. It is compared with the default under the same
resamples of valid's users: below zero, the change makes it worse. Runs and their predictions are kept, so the command
can be stopped and called again. Stages that a change does not affect are not trained again: GRPO's settings start from
the default's SFT weights, SFT's from its align weights. ``--budget 0.25`` trains every run, the default too, for that
share of the steps of each stage, and validates on that share of the requests. The test split is not used.
"""

import json
from pathlib import Path
from typing import Any

import click

from bench.command import Experiment
from bench.machine import write_result
from bench.predictions import predictions_of
from bench.runs import branch, trained
from negfast.config import Config, load_config
from negfast.evaluate.bootstrap import interval
from negfast.evaluate.eval import similarity_of
from negfast.evaluate.metrics import Samples
from negfast.evaluate.sets import engine_set
from negfast.evaluate.table import metric_samples, paired_differences
from negfast.runtime.run_folder import RunFolder

RESULT = Path(__file__).parents[1] / "results" / "ablations.json"
DEFAULT = "default"
METRICS = ("mean_reward", "FHR@20")

ABLATIONS: dict[str, tuple[str, ...]] = {  # in the order in which they are run
    "random-sids": ("sid.quantizer=random",),
    "no-align": ("align.steps=0",),
    "no-prior": ("prior.weight=0",),
    "flat-prior": ("prior.eps=0.05",),
    "progressive": ("grpo.schedule=progressive",),
    "next-reward": ("reward.target=next",),
    "no-collaborative-term": ("reward.collab_weight=0",),
    "no-like-penalty": ("reward.like_penalty=0",),
    "mixed-view-only": ("sft.negative_view=0", "sft.positive_view=0"),
    "window-64": ("history.window=64",),
    "codes": ("history.positions=codes",),
    "next-only": ("sft.target=next", "reward.target=next"),
    "single-advantage": ("grpo.set_size=0",),
    "group-16": ("grpo.group=16", "grpo.histories=64"),  # as many completions a step
    "sft-term": ("grpo.sft_weight=0.3",),
    "window-16": ("history.window=16",),
    "window-2048": ("history.window=2048",),
    "no-like-branch": ("sft.like_weight=0",),
    "static-share": ("grpo.schedule=static",),
    "static-share-0.4": ("grpo.schedule=static", "grpo.mixed_share=0.4"),
    "like-penalty-0.3": ("reward.like_penalty=0.3",),
    "no-kl": ("grpo.beta=0",),
    "k3-kl": ("grpo.kl=k3",),
    "scaled-advantage": ("grpo.scale_rewards=true", "grpo.set_size=0"),
    "group-256": ("grpo.group=256", "grpo.histories=4"),
}
GRPO_ONLY, SFT_ONLY = ("grpo.", "reward."), ("grpo.", "reward.", "sft.")  # settings of these stages alone
STAGES = ("sft", "grpo")


@click.command(cls=Experiment)
@click.option("--runs", default=Path("runs/ablations"), type=click.Path(path_type=Path), show_default=True)
@click.option("--config", type=click.Path(path_type=Path), help="TOML file of the default run.")
@click.option("--preset", default="quickstart", show_default=True)
@click.option("--data", type=click.Path(path_type=Path), help="Data set; the embedded one is prepared without.")
@click.option("--seed", default=0, show_default=True)
@click.option("--budget", default=1.0, show_default=True, help="Share of the steps of every stage.")
@click.option("--only", multiple=True, type=click.Choice(list(ABLATIONS)), help="Names; all of them without.")
@click.option("--out", default=RESULT, type=click.Path(path_type=Path), show_default=True)
def main(
    runs: Path,
    config: Path | None,
    preset: str,
    data: Path | None,
    seed: int,
    budget: float,
    only: tuple[str, ...],
    out: Path,
) -> None:
    """Trains and measures the ablations and keeps their rows in the result file."""
    shared = (f"train.seed={seed}", *shortened(load_config(config, preset), budget))
    names = [name for name in only or ABLATIONS if data is None or not other_data(name)]
    if data is not None and len(names) < len(only):
        raise click.UsageError(f"--only {', '.join(set(only) - set(names))}: needs the embedded data set, found --data")
    default = trained(runs / f"{DEFAULT}-{seed}", config, preset, data, shared)
    steps = {stage: getattr(default.config, stage).steps for stage in ("align", *STAGES)}
    made_by = {"split": "valid", "budget": budget, "steps": steps, "valid_requests": default.config.eval.valid_requests}
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else made_by | {"rows": []}
    if any(results[key] != value for key, value in made_by.items()):
        raise click.UsageError(f"{out}: holds rows of another budget ({results['steps']} steps); give another --out")

    engine = default.finished_engine(None)
    valid = engine_set(engine, "valid")
    similarity = similarity_of(engine)

    def measured(run: RunFolder) -> dict[str, Samples]:
        return metric_samples(valid, predictions_of(run, STAGES, valid, engine.config.reward), similarity)

    reference = measured(default)
    for name in (DEFAULT, *names):
        overrides = (*shared, *ABLATIONS.get(name, ()))
        run = default if name == DEFAULT else ablated(name, runs, default, config, preset, overrides, seed)
        row = {"name": name, "seed": seed, "changed": list(ABLATIONS.get(name, ()))}
        row |= compared(reference, reference if name == DEFAULT else measured(run))
        results["rows"] = [kept for kept in results["rows"] if (kept["name"], kept["seed"]) != (name, seed)] + [row]
        print_row(row)
        write_result(out, results)


def shortened(config: Config, budget: float) -> tuple[str, ...]:
    """Settings that train this share of each stage's steps, validated before and after; none for a share of 1.

    UsageError for a share outside (0, 1].
    """
    if not 0 < budget <= 1:
        raise click.UsageError(f"--budget {budget}: expected more than 0 and at most 1")
    if budget == 1:
        return ()
    overrides = [f"eval.valid_requests={max(1, round(config.eval.valid_requests * budget))}"]
    for stage in ("align", *STAGES):
        settings = getattr(config, stage)
        steps, warmup = (max(int(count > 0), round(count * budget)) for count in (settings.steps, settings.warmup))
        overrides += [f"{stage}.steps={steps}", f"{stage}.warmup={warmup}"]
        if stage in STAGES:
            overrides.append(f"{stage}.validate_every={max(1, steps)}")
    return tuple(overrides)


def ablated(
    name: str, runs: Path, default: RunFolder, config: Path | None, preset: str, overrides: tuple[str, ...], seed: int
) -> RunFolder:
    """The finished run of one ablation."""
    folder, changed = runs / f"{name}-{seed}", ABLATIONS[name]
    if all(key.startswith(SFT_ONLY) for key in changed):
        only_grpo = all(key.startswith(GRPO_ONLY) for key in changed)
        branch(default, folder, load_config(config, preset, overrides), ("align", "sft") if only_grpo else ("align",))
    return trained(folder, config, preset, None if other_data(name) else default.data, overrides)


def other_data(name: str) -> bool:
    """Whether an ablation has other semantic IDs, so a data set of its own."""
    return any(key.startswith("sid.") for key in ABLATIONS[name])


def compared(reference: dict[str, Samples], found: dict[str, Samples]) -> dict[str, Any]:
    """Figures of both stages and their paired differences from the reference."""
    samples = found | {f"{DEFAULT} {stage}": reference[stage] for stage in STAGES}
    pairs = [(stage, f"{DEFAULT} {stage}") for stage in STAGES]
    return {
        **{stage: {metric: interval(found[stage][metric]) for metric in METRICS} for stage in STAGES},
        "differences": paired_differences(samples, pairs, METRICS),
    }


def print_row(row: dict[str, Any]) -> None:
    """The final weights' differences from the default's."""
    shown = []
    for d in row["differences"]:
        if d["a"] == "grpo":
            known = d["low"] is not None and d["high"] is not None
            figures = f"{d['mean']:+.5f} [{d['low']:+.5f}, {d['high']:+.5f}]" if known else "-"
            shown.append(f"{d['metric']} {figures}")
    print(f"{row['name']:<24} {'  '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
