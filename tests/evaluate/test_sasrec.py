"""SASRec learns an order that is there, sees nothing after its context, and answers in the shapes of the table."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from negfast.data.log import DAY, DISLIKE, LIKE, EventLog
from negfast.data.split import split_requests
from negfast.evaluate.baselines import sasrec
from negfast.evaluate.baselines.sasrec import (
    KINDS,
    SasRec,
    SasRecSettings,
    Sequences,
    fit_sasrec,
    padded,
    predict_sasrec,
    sasrec_predictions,
    training_windows,
)
from negfast.evaluate.metrics import future_hits
from negfast.evaluate.predictions import check_generated
from negfast.evaluate.sets import EvalSet, evaluation_set

MakeLog = Callable[..., EventLog]
VALID, TEST = 15_025, 15_042
SMALL = SasRecSettings(width=16, layers=1, length=6, epochs=2, negatives=50)


@pytest.fixture(autouse=True)
def small_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"sasrec-dislikes": replace(SMALL, recency=0.5), "sasrec-all": SMALL}
    monkeypatch.setattr(sasrec, "DEFAULTS", chosen)


def sets_of(log: EventLog) -> list[EvalSet]:
    split = split_requests(log, 5, VALID, TEST)
    return [evaluation_set(log, split, name) for name in ("valid", "test")]


def test_sequences_hold_first_events_in_order(random_log: MakeLog) -> None:
    log = random_log(0)
    for name, kinds in KINDS.items():
        sequences = Sequences.of(log, kinds)
        for user in range(log.n_users):
            own = slice(log.user_offsets[user], log.user_offsets[user + 1])
            first: dict[int, int] = {}
            for item, feedback, day in zip(log.item[own], log.feedback[own], log.day[own], strict=True):
                if feedback in kinds:
                    first.setdefault(int(item), int(day))
            found = slice(sequences.offsets[user], sequences.offsets[user + 1])
            assert list(zip(sequences.item[found], sequences.day[found], strict=True)) == list(first.items()), name


def test_windows_cover_every_known_event_once(random_log: MakeLog) -> None:
    sequences = Sequences.of(random_log(1), KINDS["sasrec-all"])
    windows = training_windows(sequences, VALID, 4)
    events = np.concatenate([np.arange(start, stop) for start, stop in windows])
    assert np.sort(events).tolist() == np.flatnonzero(sequences.day < VALID).tolist()
    size = np.diff(windows, axis=1)
    assert size.min() >= 1 and size.max() == 4
    owner = np.searchsorted(sequences.offsets, windows, side="right")
    assert (owner[:, 0] == np.searchsorted(sequences.offsets, windows[:, 1] - 1, side="right")).all()
    tokens, event = padded(sequences, windows[:, 0], windows[:, 1], 60)
    assert (tokens[:, 0] == 60).all() and (event[:, 0] == -1).all()
    assert (tokens[:, 1:][event[:, 1:] < 0] == 61).all()
    assert (tokens[event >= 0] == sequences.item[event[event >= 0]]).all()


def test_hidden_states_are_causal() -> None:
    torch.manual_seed(0)
    model = SasRec(30, SMALL).eval()
    tokens = torch.randint(30, (3, 7))
    changed = tokens.clone()
    changed[:, 4:] = torch.randint(30, (3, 3))
    with torch.no_grad():
        a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :4], b[:, :4])
    assert not torch.allclose(a[:, 4:], b[:, 4:])


def test_it_learns_what_follows_what() -> None:
    """Everybody dislikes items in the order of their numbers, starting anywhere: the next item is certain."""
    rng = np.random.default_rng(0)
    n_users, n_items, size = 300, 60, 8
    start = rng.integers(0, n_items - size, n_users)
    item = (start[:, None] + np.arange(size)).ravel().astype(np.int32)
    day = np.tile(15_000 + 7 * np.arange(size), n_users)
    log = EventLog(size * np.arange(n_users + 1), item, np.full(len(item), DISLIKE, np.uint8), day * DAY, None, n_items)
    split = split_requests(log, 7, 15_000 + 28, 15_000 + 42)
    test = evaluation_set(log, split, "test")
    sequences = Sequences.of(log, (DISLIKE,))
    fitted = fit_sasrec(sequences, split.valid_day, replace(SMALL, epochs=40, width=32, lr=3e-3, dropout=0.1), 0)
    generated = predict_sasrec(log, sequences, fitted, test).generated
    assert generated is not None
    offsets, dislikes = test.requests.dislike_offsets, test.requests.dislikes
    assert future_hits(offsets, dislikes, generated[:, :3]).any(1).mean() > 0.8


def test_nothing_after_the_context_is_seen(random_log: MakeLog) -> None:
    log = random_log(2)
    _, test = sets_of(log)
    day = int(np.median(test.requests.day))
    rng = np.random.default_rng(0)
    late = log.day > day
    altered = replace(
        log,
        item=np.where(late, rng.integers(0, log.n_items, len(log)), log.item).astype(np.int32),
        feedback=np.where(late, rng.choice([LIKE, DISLIKE], len(log)), log.feedback).astype(np.uint8),
    )
    (truth,), (other,) = (sasrec_predictions(x, [test], VALID) for x in (log, altered))
    known = test.requests.day <= day
    assert 0 < known.sum() < len(known)
    for name in truth:
        a, b = truth[name], other[name]
        assert a.generated is not None and b.generated is not None
        assert a.pool_score is not None and b.pool_score is not None
        assert (a.generated[known] == b.generated[known]).all()
        pools = known[test.pool_request]
        np.testing.assert_array_equal(a.pool_score[pools], b.pool_score[pools])
        assert (a.generated != b.generated).any()


def test_rows_are_admissible_and_repeatable(random_log: MakeLog) -> None:
    log = random_log(3, n_items=90)
    evalsets = sets_of(log)
    first, again = sasrec_predictions(log, evalsets, VALID), sasrec_predictions(log, evalsets, VALID)
    for evalset, a, b in zip(evalsets, first, again, strict=True):
        assert list(a) == ["sasrec-dislikes", "sasrec-all"]
        for name in a:
            generated, pool_score = a[name].generated, a[name].pool_score
            assert generated is not None and pool_score is not None
            check_generated(log, evalset.requests, generated)
            repeated = b[name].generated
            assert repeated is not None and np.array_equal(generated, repeated)
            assert pool_score.shape == evalset.pool_items.shape and np.isfinite(pool_score).all()
            assert (np.diff(pool_score, axis=1) != 0).any()


def test_a_row_without_events_to_train_on_is_left_out(random_log: MakeLog) -> None:
    log = random_log(4)
    valid, _ = sets_of(log)
    first_dislike = int(log.day[log.feedback == DISLIKE].min())
    log = replace(log, feedback=np.where(log.day == first_dislike, LIKE, log.feedback).astype(np.uint8))
    (answers,) = sasrec_predictions(log, [valid], first_dislike + 1)
    assert list(answers) == ["sasrec-all"]
