import json

import numpy as np
import pytest

from negfast.config import QUANTIZERS
from negfast.data.items import ItemTable
from negfast.data.log import DAY, LIKE, EventLog
from negfast.errors import InputError
from negfast.sid import rqvae
from negfast.sid.build import build_semantic_ids, choose_shape

VALID = 100


def silent(_: str) -> None:
    pass


def make_case(rng, n_items, n_known, text=True):
    """Items of which the first n_known have an event before VALID, and all have one after it."""
    early, late = rng.permutation(n_known), rng.permutation(n_items)
    log = EventLog(
        np.array([0, n_known // 2, n_known + n_items]),
        np.concatenate([early, late]).astype(np.int32),
        np.full(n_known + n_items, LIKE, dtype=np.uint8),
        np.repeat([10 * DAY, VALID * DAY], [n_known, n_items]),
        None,
        n_items,
    )
    words = ["war", "love", "space", "bread", "crime", "robot", "king", "night"]
    texts = [" ".join(rng.choice(words, 3)) if text else "" for _ in range(n_items)]
    return ItemTable([str(i) for i in range(n_items)], texts), log


def test_report_adds_up():
    rng = np.random.default_rng()
    items, log = make_case(rng, 300, 200)  # 8^3 texts: many items share theirs
    said: list[str] = []
    sids = build_semantic_ids(items, log, VALID, codebook=16, encoder="tfidf", report=said.append)
    assert sids.codes.shape == (300, 3) and sids.codes.dtype == np.uint16
    assert len(np.unique(sids.codes, axis=0)) == 300
    assert sids.quantizer.codebooks.shape == (3, 16, sids.embedding.shape[1]) and len(sids.embedding) == 300
    facts = json.loads(json.dumps(sids.report))
    n_distinct_texts = len(set(" ".join(sorted(text.split())) for text in items.text))
    assert facts["collisions_before"] >= 300 - len(set(items.text)) > 0
    assert facts["moved"] >= facts["collisions_before"] and facts["collisions_after"] == 0
    assert 0 <= facts["error_before"] <= facts["error_after"] < 1 and n_distinct_texts > 16
    for level, usage in enumerate(facts["level"]):
        counts = np.bincount(sids.codes[:, level])
        share = counts[counts > 0] / 300
        assert usage["used"] == len(share)
        assert usage["perplexity"] == pytest.approx(np.prod(share**-share), abs=0.06)
    assert facts["level"][0]["used"] <= 15 and facts["cold_items"] == 0  # code 15 is kept for cold items
    assert any("collisions" in line for line in said)


def test_same_seed_same_codes_and_random_is_random():
    rng = np.random.default_rng()
    items, log = make_case(rng, 120, 120)
    make = lambda **kw: build_semantic_ids(items, log, VALID, codebook=8, encoder="tfidf", report=silent, **kw)  # noqa: E731
    assert np.array_equal(make(seed=3).codes, make(seed=3).codes)
    control = make(quantizer="random", seed=3)
    assert np.array_equal(control.codes, make(quantizer="random", seed=3).codes)
    assert not np.array_equal(control.codes, make(quantizer="random", seed=4).codes)
    assert len(np.unique(control.codes, axis=0)) == 120 and control.quantizer.codebooks.shape == (3, 8, 0)
    assert np.array_equal(control.embedding, make(seed=3).embedding)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_quantizer_names_items_apart_and_says_how_well(quantizer, monkeypatch):
    monkeypatch.setattr(rqvae, "STEPS", 200)
    rng = np.random.default_rng()
    items, log = make_case(rng, 150, 150)
    sids = build_semantic_ids(items, log, VALID, codebook=8, encoder="tfidf", quantizer=quantizer, report=silent)
    assert len(np.unique(sids.codes, axis=0)) == 150 and sids.report["quantizer"] == quantizer
    assert ("error_after" in sids.report) == (quantizer != "random")
    first, first_two = sids.report["neighbour_overlap"]
    assert first >= first_two and (first < 0.3 if quantizer == "random" else first > 0.3)
    assert all(level["used"] <= 8 and 1 <= level["perplexity"] <= 8 for level in sids.report["level"])


def test_cold_items_share_the_reserved_prefix_and_later_events_do_not_warm_them():
    rng = np.random.default_rng()
    items, log = make_case(rng, 50, 40, text=False)
    sids = build_semantic_ids(items, log, VALID, codebook=8, levels=2, report=silent)
    assert sids.report["blocks"].keys() == {"co-occurrence"} and sids.report["cold_items"] == 10
    # 10 cold items need two codes of the first level, which no other item may have
    assert set(sids.codes[40:, 0].tolist()) == {6, 7} and sids.codes[:40, 0].max() < 6
    assert len(np.unique(sids.codes, axis=0)) == 50


def test_a_table_of_cold_items_alone():
    rng = np.random.default_rng()
    items, log = make_case(rng, 20, 0, text=False)
    sids = build_semantic_ids(items, log, VALID, codebook=8, report=silent)
    assert len(np.unique(sids.codes, axis=0)) == 20 and set(sids.codes[:, 0].tolist()) == {7}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantizer": "vq"}, "expected quantizer rq-kmeans, balanced, rq-vae, random, found 'vq'"),
        ({"encoder": "bert"}, "found 'bert'"),
        ({"levels": 2, "codebook": 7}, "2 levels of 7 codes cannot name 50 items apart"),
        ({"levels": 1, "codebook": 50}, "1 of the first level kept for cold items, cannot name 50 items apart"),
        ({"levels": 0}, "expected levels >= 1"),
        ({"codebook": 70_000}, r"codebook in 2\.\.65536"),
    ],
)
def test_bad_settings(settings, message):
    items, log = make_case(np.random.default_rng(), 50, 50)
    with pytest.raises(InputError, match=message):
        build_semantic_ids(items, log, VALID, **{"encoder": "tfidf", "report": str, **settings})


@pytest.mark.parametrize(
    ("n_items", "levels", "codebook", "expected"),
    [
        (100, None, None, (3, 256)),
        (10_506, None, None, (3, 256)),
        (1_000_000, None, None, (3, 256)),
        (2_097_152, None, None, (3, 256)),  # an eighth of 256^3
        (2_097_153, None, None, (4, 256)),
        (1_000_000, None, 64, (4, 64)),
        (1_000_000, 2, None, (2, 4096)),
        (1_000_000, 1, None, (1, 65_536)),
    ],
)
def test_levels_and_codes_follow_from_the_number_of_items(n_items, levels, codebook, expected):
    said: list[str] = []
    assert choose_shape(n_items, levels, codebook, said.append) == expected
    [line] = said
    assert line.startswith(f"semantic IDs: {n_items:,} items: {expected[0]} levels of {expected[1]} codes")


def test_a_shape_that_is_given_stays():
    assert choose_shape(10**9, 2, 4, pytest.fail) == (2, 4)
