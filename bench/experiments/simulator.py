"""``python -m bench.experiments.simulator``: what targets and filters are worth where the truth is known.

- ``targets``: how much of a user's top dislikes the next negative, the negatives of the next 7 days, and *as many
  negatives drawn from all later ones* say; on a simulated log against the truth, and on MovieTweetings.
- ``filter``: what withholding the worst-scored 10 % does to the true dislike rate: the truth, the estimate from told
  feedback, and the estimates that use the known propensities (IPS, doubly robust).
- ``recovery``: whether negfast trained on the window finds the true dislikes better than negfast trained on the next
  negative alone, or on as many drawn from all later ones. It trains three models a seed.

Every part is kept in the result file under its name; intervals are 95 % bootstrap intervals over users.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.command import Experiment, numbers
from bench.experiments.recovery import later_dislikes, recovery
from bench.simulate import FIRST_DAY, Simulation, SimulationSettings, exposure_policy, simulate
from negfast.data.dataset import Dataset
from negfast.data.log import DISLIKE, EventLog
from negfast.data.split import Requests, all_requests
from negfast.evaluate.baselines.rates import fit_scorers
from negfast.evaluate.bootstrap import interval, ranked_totals, ratio, resample_users, weighted_sums
from negfast.evaluate.metrics import FILTER_SHARE
from negfast.files import atomic_file

RESULT = Path(__file__).parents[1] / "results" / "simulator.json"
HORIZON = 7
RESAMPLES = 1000
TOP_INTERESTS = 5
LEAST_LATER = 10  # dislikes after t that a request must have, else "top interests" mean nothing
DRAWS = 10  # of the random control

Result = dict[str, Any]


@click.command(cls=Experiment)
@click.option("--parts", default="targets,filter", show_default=True, help="Of targets, filter and recovery.")
@click.option("--data", type=click.Path(path_type=Path), help="Prepared MovieTweetings, also measured by `targets`.")
@click.option("--users", default=5_000, show_default=True)
@click.option("--items", default=2_000, show_default=True)
@click.option("--days", default=60, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--runs", default=Path("runs/simulator"), type=click.Path(path_type=Path), show_default=True)
@click.option("--preset", default="smoke", show_default=True, help="Of the runs that `recovery` trains.")
@click.option("--steps", default=300, show_default=True, help="Of SFT in the runs that `recovery` trains.")
@click.option("--seeds", default="0", show_default=True, help="Of the runs that `recovery` trains.")
@click.option("--out", default=RESULT, type=click.Path(path_type=Path), show_default=True)
def main(
    parts: str,
    data: Path | None,
    users: int,
    items: int,
    days: int,
    seed: int,
    runs: Path,
    preset: str,
    steps: int,
    seeds: str,
    out: Path,
) -> None:
    """Runs the parts asked for and adds them to the result file."""
    settings = SimulationSettings(users=users, items=items, days=days, seed=seed)
    simulation = simulate(settings)
    results: Result = json.loads(out.read_text()) if out.exists() else {}
    for part in parts.split(","):
        if part == "targets":
            results["targets"] = {"settings": asdict(settings), "simulated": simulated_targets(simulation)}
            if data is not None:
                results["targets"]["movietweetings"] = logged_targets(Dataset.open(data))
        elif part == "filter":
            results["filter"] = {"settings": asdict(settings), **filter_effects(simulation)}
        elif part == "recovery":
            found = recovery(simulation, runs, preset, steps, numbers(seeds, "--seeds"))
            results["recovery"] = {"settings": asdict(settings), **found}
        else:
            raise click.BadParameter(f"--parts: found {part!r}, expected targets, filter or recovery")
        print(json.dumps(results[part], indent=1))
        with atomic_file(out) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")


def simulated_targets(simulation: Simulation, sample: int = 4_000) -> Result:
    """Targets of random requests against the truth, and against later dislikes as a log alone would have it.

    A user's true interests are the topics in which the unseen items are most probably disliked. Because a set that
    is larger covers more of anything, the window is compared with as many items drawn from all later dislikes that
    were told, and from all unseen items by their true probabilities, as if nobody had chosen what is shown.
    """
    log, truth, topics = simulation.log, simulation.truth, simulation.settings.topics
    requests, rng = sampled_requests(log, sample)
    everyone = np.arange(log.n_items)
    values: dict[str, list[float]] = {}
    for r in range(len(requests)):
        user, day = int(requests.user[r]), int(requests.day[r])
        later = later_dislikes(log, user, day)
        window = requests.dislikes[requests.dislike_offsets[r] : requests.dislike_offsets[r + 1]]
        own = slice(log.user_offsets[user], log.user_offsets[user + 1])
        unseen = truth.release <= day - FIRST_DAY
        unseen[log.item[own][log.day[own] <= day]] = False
        p = truth.dislike_probability(np.full(log.n_items, user), everyone)
        count = np.bincount(truth.topic[unseen], minlength=topics)
        mean = np.divide(
            np.bincount(truth.topic[unseen], p[unseen], topics), count, where=count > 0, out=np.zeros(topics)
        )
        interests = set(np.argsort(-mean, kind="stable")[:TOP_INTERESTS].tolist())
        rank = np.full(log.n_items, np.nan)  # share of the unseen items that the user would dislike less
        rank[unseen] = np.argsort(np.argsort(p[unseen])) / max(unseen.sum() - 1, 1)
        shown = p * unseen
        sets = {
            "next": [later[:1]],
            "window": [window],
            "random_later": [rng.choice(later, len(window), replace=False) for _ in range(DRAWS)],
            "random_true": [
                rng.choice(log.n_items, len(window), replace=False, p=shown / shown.sum()) for _ in range(DRAWS)
            ],
        }
        for name, drawn in sets.items():
            covered = [len(interests & set(truth.topic[items].tolist())) / len(interests) for items in drawn]
            values.setdefault(f"{name}/covers_true_interests", []).append(float(np.mean(covered)))
            values.setdefault(f"{name}/true_probability", []).append(float(np.mean([p[i].mean() for i in drawn])))
            ranks = np.concatenate([rank[items] for items in drawn])
            released = ranks[~np.isnan(ranks)]  # a later item may not have been released by t
            values.setdefault(f"{name}/true_rank", []).append(float(released.mean()) if len(released) else np.nan)
    return summarise(requests, values)


def logged_targets(data: Dataset, sample: int = 4_000) -> Result:
    """The same without a truth: interests are the level-1 semantic IDs most frequent among a user's later dislikes."""
    log, cluster = data.log, data.codes[:, 0].astype(np.int64)
    requests, rng = sampled_requests(log, sample)
    values: dict[str, list[float]] = {}
    for r in range(len(requests)):
        later = later_dislikes(log, int(requests.user[r]), int(requests.day[r]))
        window = requests.dislikes[requests.dislike_offsets[r] : requests.dislike_offsets[r + 1]]
        kinds, count = np.unique(cluster[later], return_counts=True)
        interests = set(kinds[np.argsort(-count, kind="stable")[:TOP_INTERESTS]].tolist())
        sets = {
            "next": [later[:1]],
            "window": [window],
            "random_later": [rng.choice(later, len(window), replace=False) for _ in range(DRAWS)],
        }
        for name, drawn in sets.items():
            covered = [len(interests & set(cluster[items].tolist())) / len(interests) for items in drawn]
            values.setdefault(f"{name}/covers_later_interests", []).append(float(np.mean(covered)))
    return summarise(requests, values)


def sampled_requests(log: EventLog, sample: int) -> tuple[Requests, np.random.Generator]:
    """Random requests with a non-empty window and at least `LEAST_LATER` dislikes of unseen items after t."""
    rng = np.random.default_rng(0)
    requests = all_requests(log, HORIZON)
    requests = requests.take(requests.has_dislikes & (requests.day + HORIZON <= log.day.max()))
    counts = np.array(
        [len(later_dislikes(log, int(u), int(d))) for u, d in zip(requests.user, requests.day, strict=True)]
    )
    rows = np.flatnonzero(counts >= LEAST_LATER)
    return requests.take(np.sort(rng.permutation(rows)[:sample])), rng


def summarise(requests: Requests, values: dict[str, list[float]]) -> Result:
    """Means over requests, and the paired differences of window and next, and of window and its control."""
    users, owner = np.unique(requests.user, return_inverse=True)
    weights = resample_users(len(users), RESAMPLES, 0)
    samples = {}
    for name, column in values.items():
        value = np.array(column)
        there = ~np.isnan(value)
        sums = weighted_sums(weights, owner[there], np.stack([value[there], np.ones(there.sum())], axis=1))
        samples[name] = ratio(sums[:, 0], sums[:, 1])
    rows: dict[str, Any] = {"requests": len(requests), "users": len(users)}
    rows["mean_window_size"] = float(np.diff(requests.dislike_offsets).mean())
    rows |= {name: interval(sample) for name, sample in samples.items()}
    for metric in {name.partition("/")[2] for name in samples}:
        for other in ("next", "random_later", "random_true"):
            if f"{other}/{metric}" in samples:
                difference = samples[f"window/{metric}"] - samples[f"{other}/{metric}"]
                rows[f"window-{other}/{metric}"] = interval(difference)
    return rows


def filter_effects(simulation: Simulation, user_days: int = 4_000) -> Result:
    """Relative reductions of the dislike rate by a filter, true and estimated.

    The score is the logistic baseline, fitted on told feedback of the first two thirds of the days. It withholds an
    item where its score is among the highest 10 % of the scores of the impressions of the days before the test days.
    Then either the slot stays empty, or the recommender fills it with an item that it would show and the filter lets
    pass, with probabilities in proportion. Histories are as logged: what the next impression would be, not what a
    year of filtering would make of the log. The estimates see told feedback and propensities only; they know how
    often dislikes are told, which a platform can ask its users.
    """
    log, settings, truth = simulation.log, simulation.settings, simulation.truth
    day = log.day
    fit_until, test_from = (FIRST_DAY + settings.days * k // 6 for k in (4, 5))
    score = fit_scorers(log, simulation.items, fit_until)["logistic"]
    rng = np.random.default_rng(0)
    before = np.flatnonzero((day >= fit_until) & (day < test_from))
    before = np.sort(rng.permutation(before)[:50_000])
    threshold = float(np.quantile(score(log.user[before], log.item[before], day[before]), 1 - FILTER_SHARE))
    key = log.user.astype(np.int64) * 2**32 + day
    chosen = rng.permutation(np.unique(key[day >= test_from]))[:user_days]
    rows = np.flatnonzero(np.isin(key, chosen))

    everyone = np.arange(log.n_items)
    columns = np.ones((len(rows), 8))
    last, kept, model = -1, np.zeros(0, dtype=bool), np.zeros(0)
    for place, row in enumerate(rows):
        user, item = int(log.user[row]), int(log.item[row])
        if key[row] != last:
            last = key[row]
            scores = score(np.full(log.n_items, user), everyone, np.full(log.n_items, day[row]))
            kept, model = scores < threshold, told_to_true(scores, settings)
            p = truth.dislike_probability(np.full(log.n_items, user), everyone)
        policy = exposure_policy(simulation, user, int(day[row]) - FIRST_DAY, int(row - log.user_offsets[user]))
        passing = float(policy[kept].sum())
        filled = policy * kept / passing if passing > 0 else policy
        reported = float(log.feedback[row] == DISLIKE)
        shown = (reported - settings.false_dislike) / (settings.report_dislike - settings.false_dislike)
        weight = filled[item] / policy[item]
        direct = float(filled @ model)
        columns[place] = (
            policy @ p,  # the true rate as things are
            filled @ p,  # with the filter, slots filled
            (policy * kept) @ p,  # with the filter, slots left empty: dislikes an impression now
            passing,
            shown,  # an unbiased reading of the first column from what was told
            weight * shown,
            direct + weight * (shown - model[item]),
            1.0,
        )
    told = log.feedback[rows] > 0
    scored = score(log.user[rows], log.item[rows], day[rows])
    cut = scored >= threshold
    disliked = log.feedback[rows] == DISLIKE
    observed = np.stack([told, told & disliked, told & ~cut, told & ~cut & disliked], axis=1).astype(float)
    users, owner = np.unique(log.user[rows], return_inverse=True)
    weights = resample_users(len(users), RESAMPLES, 0)
    sums = weighted_sums(weights, owner, np.concatenate([columns, observed], axis=1))
    now, filled_rate, left, passing_, shown_, ips, robust, impressions = sums[:, :8].T
    told_, told_dislikes, kept_told, kept_dislikes = sums[:, 8:].T
    true_filled = 1 - ratio(filled_rate, now)
    aucs = {
        name: ranked_totals(weights, owner[told], values[told], disliked[told], FILTER_SHARE).auc
        for name, values in (("score", scored), ("truth", truth.dislike_probability(log.user[rows], log.item[rows])))
    }
    estimates = {
        "truth, slots filled": true_filled,
        "truth, slots left empty": 1 - ratio(ratio(left, passing_), ratio(now, impressions)),
        "told feedback": 1 - ratio(ratio(kept_dislikes, kept_told), ratio(told_dislikes, told_)),
        "IPS, slots filled": 1 - ratio(ips, shown_),
        "doubly robust, slots filled": 1 - ratio(robust, shown_),
    }
    return {
        "impressions": len(rows),
        "users": len(users),
        "true_dislike_rate": float(columns[:, 0].mean()),
        "told_dislike_rate": float(disliked[told].mean()),
        "share_withheld": float(1 - columns[:, 3].mean()),
        "told_auc": {name: interval(auc) for name, auc in aucs.items()},  # the truth's is the ceiling of any score
        "reduction": {name: interval(values) for name, values in estimates.items()},
        "reduction_minus_truth_filled": {
            name: interval(values - true_filled) for name, values in estimates.items() if not name.startswith("truth")
        },
    }


def told_to_true(score: np.ndarray, settings: SimulationSettings) -> np.ndarray:
    """P(dislike) from P(dislike | told), by the rates at which dislikes and likes are told."""
    odds = score / (1 - score) * settings.report_like - settings.false_dislike
    odds = np.maximum(odds, 0) / settings.report_dislike
    return odds / (1 + odds)


if __name__ == "__main__":
    main()
