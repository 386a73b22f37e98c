"""``python -m bench.experiments.likes RUN``: do likes in the prompt help or hurt a finished run?

The run's final weights answer valid with at most so many of the latest likes in every prompt, all else alike; every
figure is compared with the prompts that show none, under the same resamples of users. Pruning, prior and features know
the whole history all the same, so what changes is what the policy reads. By the number of likes that a user has, the
prompts as the run shows them are compared with those without any.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.command import Experiment
from bench.machine import write_result
from negfast.data.log import LIKE, history_ends
from negfast.evaluate.bootstrap import interval, ranked_totals, ratio, resample_users, weighted_sums
from negfast.evaluate.metrics import FILTER_SHARE, Samples
from negfast.evaluate.predictions import filter_logits
from negfast.evaluate.sets import EvalSet, evaluation_set
from negfast.model.prompts import MIXED, NEGATIVE_ONLY
from negfast.runtime.engine import Engine
from negfast.runtime.run_folder import RunFolder
from negfast.train.expected import expected_rewards, item_log_probs, reward_table

RESULT = Path(__file__).parents[1] / "results" / "likes.json"
SHOWN = (0, 5, 10, 20, 50, 100, 200)
HISTORIES = ((0, 0), (1, 5), (6, 20), (21, 50), (51, None))  # likes so far, both ends included


@click.command(cls=Experiment)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--resamples", default=1000, show_default=True)
@click.option("--out", default=RESULT, type=click.Path(path_type=Path), show_default=True)
def main(run: Path, resamples: int, out: Path) -> None:
    """Measures a finished run on valid."""
    engine = RunFolder(run).finished_engine(None)
    valid = evaluation_set(engine.log, engine.split, "valid")
    trained_with = engine.config.prompt.like_cap
    found = {shown: answered(engine, valid, shown) for shown in sorted({*SHOWN, trained_with})}
    samples = {shown: figures(valid, answer, resamples) for shown, answer in found.items()}
    rows = []
    for shown, drawn in samples.items():
        row: dict[str, Any] = {"likes_shown": shown, **{name: interval(values) for name, values in drawn.items()}}
        row["minus_none"] = {name: interval(values - samples[0][name]) for name, values in drawn.items()}
        rows.append(row)
    by_history = []
    liked = [likes_so_far(engine, user, day) for user, day in _asked(valid)]
    for low, high in HISTORIES:
        requests, events = ((count >= low) & (count <= (np.inf if high is None else high)) for count in liked)
        parts = [figures(valid, found[shown], resamples, requests, events) for shown in (trained_with, 0)]
        by_history.append(
            {
                "likes": [low, high],
                "requests": int(requests.sum()),
                "events": int(events.sum()),
                "minus_none": {name: interval(parts[0][name] - parts[1][name]) for name in parts[0]},
            }
        )
    result = {"split": "valid", "trained_with": trained_with, "rows": rows, "by_history": by_history}
    for row in (*rows, *by_history):
        shown = "  ".join(f"{name} {value['mean']:+.4f}" for name, value in row["minus_none"].items() if value["mean"])
        print(row.get("likes_shown", row.get("likes")), shown)
    write_result(out, result)


def answered(engine: Engine, valid: EvalSet, shown: int) -> dict[str, np.ndarray]:
    """nll of F and expected reward of every request [R], verdict logit of every event [E], with ``shown`` likes; with
    none as training shows it, without the segment."""
    prompts, requests, view = engine.prompts, valid.requests, MIXED if shown else NEGATIVE_ONLY
    before, prompts.config = prompts.config, replace(prompts.config, like_cap=shown)
    try:
        future = requests.dislike_offsets, requests.dislikes
        owner = np.repeat(np.arange(len(requests)), np.diff(future[0]))
        log_p = item_log_probs(engine, requests.user, requests.day, *future, view)
        nll = -np.bincount(owner, log_p) / np.bincount(owner)
        reward = expected_rewards(engine, requests, reward_table(engine, requests), view)
        return {"nll": nll, "mean_reward": reward, "logit": filter_logits(engine, valid, view)}
    finally:
        prompts.config = before


def figures(
    valid: EvalSet,
    answer: dict[str, np.ndarray],
    resamples: int,
    requests: np.ndarray | None = None,
    events: np.ndarray | None = None,
) -> Samples:
    """nll, mean reward and filter AUC under the resamples, of the chosen requests and events (bool; None: all)."""
    requests = np.ones(len(answer["nll"]), dtype=bool) if requests is None else requests
    events = np.ones(len(answer["logit"]), dtype=bool) if events is None else events
    users = np.unique(np.concatenate([valid.requests.user, valid.filter_user]))
    weights = resample_users(len(users), resamples, 0)
    of_request = np.searchsorted(users, valid.requests.user[requests])
    of_event = np.searchsorted(users, valid.filter_user[events])
    columns = np.stack([answer["nll"][requests], answer["mean_reward"][requests], np.ones(requests.sum())], axis=1)
    sums = weighted_sums(weights, of_request, columns)
    logit, dislike = answer["logit"][events], valid.filter_dislike[events]
    return {
        "nll": ratio(sums[:, 0], sums[:, 2]),
        "mean_reward": ratio(sums[:, 1], sums[:, 2]),
        "filter_auc": ranked_totals(weights, of_event, logit, dislike, FILTER_SHARE).auc,
    }


def likes_so_far(engine: Engine, user: np.ndarray, day: np.ndarray) -> np.ndarray:
    """Likes of each user up to the end of each day, int64."""
    likes = np.concatenate([[0], np.cumsum(engine.log.feedback == LIKE)])
    return likes[history_ends(engine.log, user, day)] - likes[engine.log.user_offsets[user]]


def _asked(valid: EvalSet) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(users, last days of their contexts) of the requests and of the filter events."""
    return (valid.requests.user, valid.requests.day), (valid.filter_user, valid.filter_day - 1)


if __name__ == "__main__":
    main()
