"""``python -m bench.simulate``: logs of any size whose truth is known, as a platform would have made them.

Every user has a true probability of disliking every item. A recommender decides what is shown, one impression after
the other: of the released items that the user has not seen, item i of topic k with probability proportional to

    weight(i, day) * exp(personal * affinity(user, k) - suppression * dislikes that the user reported in k)

where the weight grows with the likes that i had lately and falls with its age. What was shown never comes again, and
the topics that a user complains about fade: the later log knows less and less of what the user dislikes most. Users
report a part of their dislikes and likes, and now and then a dislike by mistake; the rest is mere exposure.
All of it is negfast's choice.
"""

import csv
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numba
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from safetensors.numpy import save_file

from negfast.data.items import ItemTable
from negfast.data.log import DAY, DISLIKE, EXPOSED, LIKE, EventLog
from negfast.errors import InputError
from negfast.files import atomic_directory

FIRST_DAY = 18_262  # 2020-01-01, in days since 1970
_NAMES = {EXPOSED: "exposed", LIKE: "like", DISLIKE: "dislike"}
_WORDS = ("quiet", "loud", "dark", "bright", "slow", "fast", "plain", "odd", "warm", "cold", "young", "old")


@dataclass(frozen=True)
class SimulationSettings:
    """Sizes, tastes, the recommender and the feedback."""

    users: int = 5_000
    items: int = 2_000
    days: int = 60
    seed: int = 0
    impressions: float = 2.0  # mean per user and day; users differ, and most days are idle for most
    topics: int = 20
    dimensions: int = 6  # of tastes
    dislike_rate: float = 0.15  # mean true probability over all user-item pairs
    taste: float = 1.5  # scale of what the person adds to the logit; 0: only items and users differ
    popularity: float = 0.6  # exponent of (1 + recent likes)
    freshness: float = 14.0  # days in which an item's weight halves
    personal: float = 1.0
    suppression: float = 0.5
    report_dislike: float = 0.5  # probability that a true dislike is reported
    report_like: float = 0.4  # probability that a like is reported
    false_dislike: float = 0.01  # probability that an impression which was no dislike is reported as one

    def __post_init__(self) -> None:
        for name in ("users", "items", "days", "topics", "dimensions"):
            if getattr(self, name) < 1:
                raise InputError(f"simulation: {name}: found {getattr(self, name)}, expected at least 1")
        if self.topics > self.items:
            raise InputError(f"simulation: topics: found {self.topics}, expected at most {self.items} items")
        if not 0 < self.dislike_rate < 1:
            raise InputError(f"simulation: dislike_rate: found {self.dislike_rate}, expected above 0 and below 1")
        if self.report_like + self.false_dislike > 1:
            raise InputError("simulation: report_like + false_dislike: found above 1, expected at most 1")


@dataclass(frozen=True)
class Truth:
    """What no platform knows. Item i belongs to topic ``topic[i]``; topics are ascending in i."""

    user_taste: np.ndarray  # float64 [U, D]
    item_taste: np.ndarray  # float64 [I, D]
    user_bias: np.ndarray  # float64 [U]
    item_bias: np.ndarray  # float64 [I], with the intercept
    topic: np.ndarray  # int32 [I]
    affinity: np.ndarray  # float64 [U, K], what the recommender believes of users and topics
    release: np.ndarray  # int32 [I], the day from which an item can be shown, counted from the log's first

    def dislike_probability(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """P(dislike | shown), float64 of the broadcast shape of user and item indices."""
        liking = (self.user_taste[user] * self.item_taste[item]).sum(-1)
        return _sigmoid(self.user_bias[user] + self.item_bias[item] - liking)


@dataclass(frozen=True)
class Simulation:
    """A log, what is known of its items, and the truth behind both."""

    settings: SimulationSettings
    log: EventLog  # every impression is an event; each user-item pair occurs at most once
    items: ItemTable
    propensity: np.ndarray  # float64 [N], probability of the item shown, given all that was shown before
    disliked: np.ndarray  # bool [N], whether the user truly disliked it, reported or not
    weight: np.ndarray  # float32 [days, I], 0 before an item's release
    truth: Truth


def simulate(settings: SimulationSettings) -> Simulation:
    """Draws a simulation; the same settings give the same bits."""
    rng = np.random.default_rng(settings.seed)
    truth = draw_truth(settings, rng)
    activity = rng.gamma(0.5, 2.0, settings.users) * settings.impressions
    bursts = rng.random((settings.users, settings.days), dtype=np.float32) < 0.25  # active days
    counts = rng.poisson(np.minimum(4 * activity, 200.0)[:, None] * bursts).astype(np.int16)
    counts = counts * (np.cumsum(counts, axis=1) <= settings.items)  # nobody can be shown more than there is
    begin = np.concatenate([[0], np.cumsum(counts.sum(1, dtype=np.int64))])
    size = int(begin[-1])
    item, feedback, disliked = np.empty(size, np.int32), np.empty(size, np.uint8), np.empty(size, np.bool_)
    time, propensity = np.empty(size, np.int64), np.empty(size)
    filled = np.zeros(settings.users, np.int64)
    starts = np.searchsorted(truth.topic, np.arange(settings.topics + 1))
    weight = np.zeros((settings.days, settings.items), np.float32)
    likes = np.zeros(settings.items)
    rates = np.array([settings.report_dislike, settings.report_like, settings.false_dislike])
    for day in range(settings.days):
        age = day - truth.release
        fresh = np.exp2(-np.maximum(age, 0) / settings.freshness)
        weight[day] = np.where(age >= 0, (1 + likes) ** settings.popularity * fresh, 0.0)
        users = np.flatnonzero(counts[:, day])
        first = np.concatenate([[0], np.cumsum(counts[users, day], dtype=np.int64)])
        draws = rng.random((int(first[-1]), 5))
        before = begin[users] + filled[users]
        _show(
            users,
            counts[users, day],
            first,
            draws,
            begin,
            filled,
            (item, feedback, disliked, time, propensity),
            starts,
            weight[day].astype(np.float64),
            truth.topic,
            truth.affinity * settings.personal,
            settings.suppression,
            (truth.user_taste, truth.item_taste, truth.user_bias, truth.item_bias),
            rates,
            (FIRST_DAY + day) * DAY,
        )
        likes *= 0.8
        today = begin[users] + filled[users] - before
        event = np.arange(today.sum()) + np.repeat(before - np.cumsum(today) + today, today)
        likes += np.bincount(item[event[feedback[event] == LIKE]], minlength=settings.items)
    shown = np.arange(size) < np.repeat(begin[:-1] + filled, np.diff(begin))
    log = EventLog(
        user_offsets=np.concatenate([[0], np.cumsum(filled)]),
        item=item[shown],
        feedback=feedback[shown],
        time=time[shown],
        value=None,
        n_items=settings.items,
    )
    return Simulation(settings, log, item_table(truth), propensity[shown], disliked[shown], weight, truth)


def draw_truth(settings: SimulationSettings, rng: np.random.Generator) -> Truth:
    """Tastes by topic and item, biases, beliefs and release days; half of the items are there from the start."""
    k, d = settings.topics, settings.dimensions
    topic = np.sort(np.concatenate([np.arange(k), rng.integers(0, k, settings.items - k)])).astype(np.int32)
    centre = rng.normal(size=(k, d)) / np.sqrt(d)
    item_taste = settings.taste * (centre[topic] + 0.6 * rng.normal(size=(settings.items, d)) / np.sqrt(d))
    user_taste = rng.normal(size=(settings.users, d))
    user_bias, item_bias = 0.7 * rng.normal(size=settings.users), 0.7 * rng.normal(size=settings.items)
    affinity = user_taste @ centre.T + 0.5 * rng.normal(size=(settings.users, k))
    latest = max(settings.days - 1, 1)
    release = np.where(rng.random(settings.items) < 0.5, 0, rng.integers(0, latest, settings.items)).astype(np.int32)
    release[rng.integers(settings.items)] = 0  # there is something to show on the first day
    user, item = rng.integers(0, settings.users, 20_000), rng.integers(0, settings.items, 20_000)
    logit = user_bias[user] + item_bias[item] - (user_taste[user] * item_taste[item]).sum(1)
    low, high = -30.0, 30.0
    for _ in range(60):  # bisection: the mean probability grows with the intercept
        middle = (low + high) / 2
        low, high = (middle, high) if _sigmoid(logit + middle).mean() < settings.dislike_rate else (low, middle)
    return Truth(user_taste, item_taste, user_bias, item_bias + low, topic, affinity, release)


def exposure_policy(simulation: Simulation, user: int, day: int, before: int) -> np.ndarray:
    """The recommender's probabilities float64 [I] of the user's next impression on a day (counted from the log's
    first), after the first ``before`` events of that user."""
    log, truth, settings = simulation.log, simulation.truth, simulation.settings
    past = slice(log.user_offsets[user], log.user_offsets[user] + before)
    item, feedback = log.item[past], log.feedback[past]
    complaints = np.bincount(truth.topic[item[feedback == DISLIKE]], minlength=settings.topics)
    logit = settings.personal * truth.affinity[user] - settings.suppression * complaints
    mass = simulation.weight[day].astype(np.float64) * np.exp(logit - logit.max())[truth.topic]
    mass[item] = 0.0
    return mass / mass.sum()


def item_table(truth: Truth) -> ItemTable:
    """Titles that say what an item is like: the two strongest dimensions of its taste, and its topic."""
    strongest = np.argsort(-np.abs(truth.item_taste), axis=1)[:, :2]
    texts = []
    for i, dimensions in enumerate(strongest):
        words = [_word(d, truth.item_taste[i, d] > 0) for d in dimensions]
        texts.append(f"{' '.join(words)} topic{truth.topic[i]} {i}")
    ids = [f"i{i}" for i in range(len(truth.topic))]
    return ItemTable(ids, texts, {"topic": [(f"topic{t}",) for t in truth.topic]})


def write_simulation(simulation: Simulation, out: Path) -> None:
    """OUT/events.parquet, items.csv, truth.safetensors and simulation.json; InputError if OUT is there already."""
    if out.exists():
        raise InputError(f"{out}: exists already; choose another --out")
    log, items = simulation.log, simulation.items
    names = pa.array([_NAMES[kind] for kind in sorted(_NAMES)])
    columns = {
        "user": pa.DictionaryArray.from_arrays(log.user, pa.array([f"u{u}" for u in range(log.n_users)])),
        "item": pa.DictionaryArray.from_arrays(log.item, pa.array(items.ids)),
        "time": pa.array(log.time),
        "feedback": pa.DictionaryArray.from_arrays(log.feedback.astype(np.int32), names),
        "propensity": pa.array(simulation.propensity),
        "truly_disliked": pa.array(simulation.disliked),
    }
    columns = {k: c.dictionary_decode() if isinstance(c, pa.DictionaryArray) else c for k, c in columns.items()}
    with atomic_directory(out) as folder:
        parquet.write_table(pa.table(columns), folder / "events.parquet", compression="zstd")
        with (folder / "items.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["item", "title", "topic"])
            writer.writerows(
                (i, text, *topic)
                for i, text, topic in zip(items.ids, items.text, items.attributes["topic"], strict=True)
            )
        save_file({**vars(simulation.truth), "weight": simulation.weight}, folder / "truth.safetensors")
        (folder / "simulation.json").write_text(json.dumps(asdict(simulation.settings), indent=1) + "\n")


@numba.njit(cache=True)
def _show(users, counts, first, draws, begin, filled, out, starts, weight, topic, pull, suppression, truth, rates, now):
    """One day's impressions of every active user, into the user's slots of ``out``; ``filled`` counts them."""
    item, feedback, disliked, time, propensity = out
    user_taste, item_taste, user_bias, item_bias = truth
    n_topics = len(starts) - 1
    total = np.concatenate((np.zeros(1), np.cumsum(weight)))  # up to an item, those before it
    released = np.concatenate((np.zeros(1), np.cumsum((weight > 0).astype(np.float64))))
    for row in range(len(users)):
        u = users[row]
        base, past, today = begin[u], filled[u], counts[row]
        seen = np.empty(past + today, np.int32)  # ascending
        seen[:past] = np.sort(item[base : base + past])
        logit = pull[u].copy()
        mass, left = np.empty(n_topics), np.empty(n_topics)
        for k in range(n_topics):
            mass[k] = total[starts[k + 1]] - total[starts[k]]
            left[k] = released[starts[k + 1]] - released[starts[k]]
        for event in range(base, base + past):
            mass[topic[item[event]]] -= weight[item[event]]
            left[topic[item[event]]] -= 1
            if feedback[event] == DISLIKE:
                logit[topic[item[event]]] -= suppression
        for place in range(today):
            best = -np.inf
            for k in range(n_topics):
                if left[k] > 0:
                    best = max(best, logit[k])
            if best == -np.inf:
                break  # everything released has been shown
            share = np.zeros(n_topics)
            for k in range(n_topics):
                if left[k] > 0:
                    share[k] = max(mass[k], 1e-300) * np.exp(logit[k] - best)
            whole = share.sum()
            draw = draws[first[row] + place]
            k = min(np.searchsorted(np.cumsum(share), draw[0] * whole, side="right"), n_topics - 1)
            while left[k] <= 0:  # the last place of a sum that was rounded up
                k -= 1
            i = _unseen_at(draw[1] * mass[k], starts[k], starts[k + 1], total, weight, seen[: past + place])
            event = base + past + place
            item[event] = i
            propensity[event] = share[k] / whole * weight[i] / mass[k]
            time[event] = now + np.int64((place + draw[2]) * DAY / today)
            p = user_bias[u] + item_bias[i]
            for d in range(user_taste.shape[1]):
                p -= user_taste[u, d] * item_taste[i, d]
            p = 1 / (1 + np.exp(-p))
            disliked[event] = draw[3] < p
            feedback[event] = EXPOSED
            if disliked[event]:
                if draw[4] < rates[0]:
                    feedback[event] = DISLIKE
            elif draw[4] < rates[1]:
                feedback[event] = LIKE
            elif draw[4] < rates[1] + rates[2]:
                feedback[event] = DISLIKE
            if feedback[event] == DISLIKE:
                logit[k] -= suppression
            mass[k] -= weight[i]
            left[k] -= 1
            where = past + place
            while where > 0 and seen[where - 1] > i:
                seen[where] = seen[where - 1]
                where -= 1
            seen[where] = i
            filled[u] += 1


@numba.njit(cache=True)
def _unseen_at(point, start, stop, total, weight, seen):
    """The item of [start, stop) at ``point`` of the cumulative weight of those not in ``seen`` (ascending)."""
    point += total[start]
    for place in range(np.searchsorted(seen, start), np.searchsorted(seen, stop)):
        if point < total[seen[place]]:
            break
        point += weight[seen[place]]
    i = min(max(np.searchsorted(total, point, side="right") - 1, start), stop - 1)
    # Rounding may lead to a seen or unreleased neighbour: the nearest one that can be shown, downwards, then upwards.
    for step in (-1, 1):
        j = i
        while start <= j < stop:
            at = np.searchsorted(seen, j)
            if weight[j] > 0 and not (at < len(seen) and seen[at] == j):
                return j
            j += step
    return i


def _sigmoid(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit))


def _word(dimension: int, positive: bool) -> str:
    place = 2 * dimension + positive
    return _WORDS[place] if place < len(_WORDS) else f"trait{place}"


@click.command()
@click.option("--users", default=SimulationSettings.users, show_default=True)
@click.option("--items", default=SimulationSettings.items, show_default=True)
@click.option("--days", default=SimulationSettings.days, show_default=True)
@click.option("--seed", default=SimulationSettings.seed, show_default=True)
@click.option("--impressions", default=SimulationSettings.impressions, show_default=True, help="A user and day.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to write.")
def main(users: int, items: int, days: int, seed: int, impressions: float, out: Path) -> None:
    """Write a simulated log that `negfast prepare` reads, and the truth beside it."""
    settings = SimulationSettings(users=users, items=items, days=days, seed=seed, impressions=impressions)
    simulation = simulate(settings)
    write_simulation(simulation, out)
    log = simulation.log
    click.echo(
        f"{len(log):,} events, {(log.feedback == DISLIKE).mean():.1%} dislikes, {simulation.disliked.mean():.1%} true"
    )
    click.echo(
        f"negfast prepare {out}/events.parquet --dislike feedback==dislike --like-rule feedback==like "
        f"--items {out}/items.csv --item-text-column title --item-attributes topic --out {out}/data"
    )


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"simulate: {error}") from None
