"""``python -m bench.experiments.language_model MODEL``: a real language model beside the built-in one, on valid.

Both go through the whole pipeline with the same settings, steps and examples (`language_model.toml`: short prompts and
few steps, for a CPU); MODEL with adapters, the small model whole. A language model takes its time to answer all of
valid, so a share of its users is measured. Runs are found again, and trained on where they were cut off; the test
split is left alone.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.command import Experiment
from bench.experiments.semantic_id_runs import METRICS, policy_samples
from bench.machine import write_result
from bench.runs import trained
from negfast.evaluate.bootstrap import interval
from negfast.evaluate.metrics import Samples
from negfast.evaluate.sets import EvalSet, evaluation_set
from negfast.evaluate.table import paired_differences
from negfast.runtime.checkpoint import load_weights
from negfast.runtime.run_folder import RunFolder

RESULT = Path(__file__).parents[1] / "results" / "language_model.json"
REQUEST_COLUMNS = ("primary", "next_dislike", "past_dislike")
FILTER_COLUMNS = ("filter_user", "filter_item", "filter_day", "filter_dislike", "filter_past_dislike")
SETTINGS = Path(__file__).with_name("language_model.toml")


@click.command(cls=Experiment)
@click.argument("model", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--runs", default=Path("runs/language_model"), type=click.Path(path_type=Path), show_default=True)
@click.option("--config", default=SETTINGS, type=click.Path(path_type=Path), show_default=True)
@click.option("--data", type=click.Path(path_type=Path), help="Prepared data set; the built-in MovieTweetings else.")
@click.option("--share", default=0.2, show_default=True, help="Of valid's users, to measure on.")
@click.option("--set", "overrides", multiple=True, help="section.key=value, of both runs.")
@click.option("--out", default=RESULT, type=click.Path(path_type=Path), show_default=True)
def main(
    model: Path, runs: Path, config: Path, data: Path | None, share: float, overrides: tuple[str, ...], out: Path
) -> None:
    """Trains and measures both."""
    samples: dict[str, Samples] = {}
    learned: dict[str, dict[str, float]] = {}
    for name, folder, settings in (("small", None, ("model.lora_rank=0",)), ("language", model, ())):
        run = trained(runs / name, config, None, data, (*overrides, *settings), folder)
        data = data or run.data
        learned[name] = align_outcome(run)
        steps = {stage: getattr(run.config, stage).steps for stage in ("align", "sft", "grpo")}
        samples |= {f"{name} {stage}": found for stage, found in stage_samples(run, share).items()}
    pairs = [(f"language {stage}", f"small {stage}") for stage in ("sft", "grpo")]
    pairs += [(f"{name} grpo", f"{name} sft") for name in ("language", "small")]
    result: dict[str, Any] = {
        "model": model.name,
        "share": share,
        "steps": steps,
        "align": learned,
        "rows": [
            {"name": name, **{metric: interval(found[metric]) for metric in METRICS}} for name, found in samples.items()
        ],
        "differences": paired_differences(samples, pairs, METRICS),
    }
    write_result(out, result)
    print(json.dumps(result, indent=1))


def align_outcome(run: RunFolder) -> dict[str, float]:
    """What align noted of what was held out."""
    events = map(json.loads, (run.path / "events.jsonl").read_text().splitlines())
    [found] = [event for event in events if event["event"] == "outcome" and event["stage"] == "align"]
    return {key: value for key, value in found.items() if key not in ("event", "stage")}


def stage_samples(run: RunFolder, share: float) -> dict[str, Samples]:
    """``METRICS`` of the weights after each stage on a share of valid's users, each float64 [1 + resamples]."""
    engine = run.finished_engine(None)
    valid = of_users(evaluation_set(engine.log, engine.split, "valid"), share)
    found = {}
    for stage in ("sft", "grpo"):
        load_weights(run.weights(stage), engine.policy)
        found[stage] = policy_samples(engine, valid)
    return found


def of_users(valid: EvalSet, share: float, seed: int = 0) -> EvalSet:
    """The questions about a random share of the users."""
    users = np.unique(np.concatenate([valid.requests.user, valid.filter_user]))
    kept = np.random.default_rng(seed).permutation(users)[: max(round(share * len(users)), 1)]
    requests, events = np.isin(valid.requests.user, kept), np.isin(valid.filter_user, kept)
    pools = requests[valid.pool_request]
    place = np.cumsum(requests) - 1
    return replace(
        valid,
        requests=valid.requests.take(requests),
        **{name: getattr(valid, name)[requests] for name in REQUEST_COLUMNS},
        **{name: getattr(valid, name)[events] for name in FILTER_COLUMNS},
        pool_request=place[valid.pool_request[pools]].astype(np.int32),
        pool_items=valid.pool_items[pools],
    )


if __name__ == "__main__":
    main()
