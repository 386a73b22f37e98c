"""``python -m bench.experiments.ablations``: each part of the method switched off alone, measured on valid.

Every entry of `ABLATIONS` is the default run with some settings changed, and compared with it under the same resamples
of valid's users: a difference below zero says that the part helps. Runs lie in a folder of their own and are found
again, so the command can be stopped and called again; what concerns GRPO alone starts from the default's SFT weights.
The test split is left alone.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import click
import numpy as np
from safetensors.numpy import load_file, save_file

from bench.quality import mean_reward
from bench.runs import trained
from negfast.config import Config, load_config, to_toml
from negfast.evaluate.bootstrap import interval
from negfast.evaluate.metrics import Similarity
from negfast.evaluate.predictions import Predictions
from negfast.evaluate.report import HEADLINE, metric_samples, paired_differences
from negfast.evaluate.run import model_predictions, similarity_of
from negfast.evaluate.sets import EvalSet, evaluation_set
from negfast.files import atomic_file
from negfast.run_folder import RunFolder
from negfast.train.checkpoint import load_weights

RESULT = Path(__file__).parents[1] / "results" / "ablations.json"
DEFAULT = "default"
METRICS = (*HEADLINE, "soft_FHR@20", "filter_auc/cold", "filter_auc/no_past_dislike", "pool_auc/cold")

ABLATIONS: dict[str, tuple[str, ...]] = {
    "random-sids": ("sid.quantizer=random",),
    "no-align": ("align.steps=0",),
    "no-prior": ("prior.weight=0",),
    "no-trending": ("prompt.trending_cap=0",),
    "no-likes": ("prompt.like_cap=0",),
    "likes-10": ("prompt.like_cap=10",),
    "likes-200": ("prompt.like_cap=200",),
    "plain-mixing": ("sft.negative_view=0", "sft.positive_view=0", "grpo.schedule=mixed"),
    "next-only": ("sft.target=next", "reward.target=next"),
    "no-like-branch": ("sft.like_weight=0",),
    "no-verdict-loss": ("sft.verdict_weight=0",),
    "next-reward": ("reward.target=next",),
    "one-shot-mixing": ("grpo.schedule=mixed",),
    "static-share": ("grpo.schedule=static",),
    "no-collaborative-term": ("reward.collab_weight=0",),
    "no-like-penalty": ("reward.like_penalty=0",),
    "like-penalty-0.3": ("reward.like_penalty=0.3",),
    "no-sft-term": ("grpo.sft_weight=0",),
    "no-kl": ("grpo.beta=0",),
    "k3-kl": ("grpo.kl=k3",),
    "scaled-advantage": ("grpo.scale_rewards=true",),
    "set-advantage": ("grpo.set_size=4",),
    "group-8": ("grpo.group=8", "grpo.requests=64"),  # as many answers a step
    "group-64": ("grpo.group=64", "grpo.requests=8"),
    "without-replacement": ("grpo.sampling=without_replacement",),
}
GRPO_ONLY = ("grpo.", "reward.")
FIELDS = ("generated", "filter_score", "pool_score")


@click.command()
@click.option("--runs", default=Path("runs/ablations"), type=click.Path(path_type=Path), show_default=True)
@click.option("--config", type=click.Path(path_type=Path), help="TOML file of the default run.")
@click.option("--preset", default="quickstart", show_default=True)
@click.option("--data", type=click.Path(path_type=Path), help="Data set; the embedded one is prepared without.")
@click.option("--seed", default=0, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(ABLATIONS)), help="Names; all of them without.")
@click.option("--out", default=RESULT, type=click.Path(path_type=Path), show_default=True)
def main(
    runs: Path, config: Path | None, preset: str, data: Path | None, seed: int, only: tuple[str, ...], out: Path
) -> None:
    """Trains and measures the ablations and keeps their rows in the result file."""
    seeded = f"train.seed={seed}"
    names = [name for name in only or ABLATIONS if data is None or not other_data(name)]
    if data is not None and len(names) < len(only):
        raise click.UsageError(f"--only {', '.join(set(only) - set(names))}: needs the embedded data set, found --data")
    default = trained(runs / f"{DEFAULT}-{seed}", config, preset, data, (seeded,))
    engine = default.finished_engine(None)
    valid = evaluation_set(engine.log, engine.split, "valid")
    similarity = similarity_of(engine)
    reference = measured(default, valid, engine.config)
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    for name in (DEFAULT, *names):
        run = default
        if name != DEFAULT:
            overrides = ABLATIONS[name]
            folder = runs / f"{name}-{seed}"
            settings = load_config(config, preset, (seeded, *overrides))
            if all(key.startswith(GRPO_ONLY) for key in overrides):
                branch(default, folder, settings)
            source = None if other_data(name) else default.data
            run = trained(folder, config, preset, source, (seeded, *overrides))
        results[f"{name}-{seed}"] = {
            "name": name,
            "seed": seed,
            "changed": list(ABLATIONS.get(name, ())),
            **compared(reference, measured(run, valid, engine.config), valid, similarity),
        }
        print_row(results[f"{name}-{seed}"])
        with atomic_file(out) as temporary:
            temporary.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")


def other_data(name: str) -> bool:
    """Whether an ablation has other semantic IDs, so a data set of its own."""
    return any(key.startswith("sid.") for key in ABLATIONS[name])


def branch(default: RunFolder, folder: Path, settings: Config) -> None:
    """Makes ``folder`` a run with other settings that has the stages up to SFT of ``default`` behind it."""
    if folder.exists():
        return
    made = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.copytree(default.path / "model", made / "model")
    for stage in ("initial", "align", "sft"):
        shutil.copytree(default.checkpoints / stage, made / "checkpoints" / stage)
    (made / "config.toml").write_text(to_toml(settings))
    description = default.read() | {"data": os.path.relpath(default.data, folder)}
    (made / "run.json").write_text(json.dumps(description, indent=1) + "\n")
    os.rename(made, folder)


def measured(run: RunFolder, valid: EvalSet, reference: Config) -> dict[str, Any]:
    """A run's answers to valid and its mean rewards by the reference's reward, kept in RUN/valid.safetensors."""
    kept = run.path / "valid.safetensors"
    if not kept.exists():
        engine = run.finished_engine(None)
        answers = model_predictions(run, engine, valid, valid)
        tensors = {}
        for name, weights in (("sft", run.checkpoints / "sft"), ("grpo", run.final)):
            answer = answers[name]
            for field in FIELDS:
                tensors[f"{name}.{field}"] = np.ascontiguousarray(getattr(answer, field))
            load_weights(weights, engine.policy)
            tensors[f"{name}.reward"] = np.array([mean_reward(engine, valid.requests, reference.reward)])
        with atomic_file(kept) as temporary:
            save_file(tensors, temporary)
    tensors = load_file(kept)
    found: dict[str, Any] = {"reward": {name: float(tensors[f"{name}.reward"][0]) for name in ("sft", "grpo")}}
    for name in ("sft", "grpo"):
        generated, filter_score, pool_score = (tensors[f"{name}.{field}"] for field in FIELDS)
        found[name] = Predictions(generated, filter_score, True, pool_score=pool_score)
    return found


def compared(
    reference: dict[str, Any], found: dict[str, Any], valid: EvalSet, similarity: Similarity
) -> dict[str, Any]:
    """Figures of both stages, their mean rewards, and the paired differences from the reference."""
    predictions = {name: found[name] for name in ("sft", "grpo")}
    predictions |= {f"{DEFAULT} {name}": reference[name] for name in ("sft", "grpo")}
    samples = metric_samples(valid, predictions, similarity)
    pairs = [(name, f"{DEFAULT} {name}") for name in ("sft", "grpo")]
    return {
        **{name: {metric: interval(samples[name][metric]) for metric in METRICS} for name in ("sft", "grpo")},
        "reward": found["reward"],
        "differences": paired_differences(samples, [*pairs, ("grpo", "sft")], METRICS),
        "reward_differences": {name: found["reward"][name] - reference["reward"][name] for name in ("sft", "grpo")},
    }


def print_row(row: dict[str, Any]) -> None:
    shown = [
        f"{d['metric']} {d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]"
        for d in row["differences"]
        if d["a"] == "grpo" and d["b"] == f"{DEFAULT} grpo" and d["metric"] in ("FHR@20", "filter_auc", "pool_auc")
    ]
    print(f"{row['name']:<24} reward {row['reward_differences']['grpo']:+.5f}  {'  '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
