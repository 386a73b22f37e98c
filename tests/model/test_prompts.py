"""Context dropout: which items a prompt loses, and what stays."""

import numpy as np
import pytest

from negfast.model.prompts import drop_history
from negfast.sid.tokens import CodeVocabulary

VOCABULARY = CodeVocabulary(50, 3, 8)


def random_prompts(rng, count):
    """Prompts as lists of (marker, items), and their packed tokens; the last segment has no items."""
    prompts = []
    for _ in range(count):
        kinds = [kind for kind in ("likes", "dislikes", "trending") if rng.random() < 0.8] or ["likes"]
        prompts.append([(kind, rng.integers(0, 8, (int(rng.integers(0, 6)), 3))) for kind in kinds] + [("item", [])])
    return prompts


def pack(prompts):
    tokens, cu = [], [0]
    for prompt in prompts:
        for kind, items in prompt:
            tokens.append(VOCABULARY.marker(kind))
            tokens += VOCABULARY.item_tokens(np.asarray(items, dtype=np.int64).reshape(-1, 3)).ravel().tolist()
        cu.append(len(tokens))
    return np.array(tokens, dtype=np.int32), np.array(cu)


def test_dropped_items_are_whole_and_of_the_history():
    rng = np.random.default_rng()
    prompts = random_prompts(rng, 40)
    seeds = rng.integers(2**32, size=40)
    share = 0.4
    expected = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        draws = iter(np.random.default_rng(int(seed)).random(1000))
        expected.append(
            [(kind, [i for i in items if kind == "trending" or next(draws) >= share]) for kind, items in prompt]
        )
    found = drop_history(*pack(prompts), VOCABULARY, share, seeds)
    for left, right in zip(found, pack(expected), strict=True):
        np.testing.assert_array_equal(left, right)
    assert len(found[0]) < len(pack(prompts)[0])
    part = drop_history(*pack(prompts[10:25]), VOCABULARY, share, seeds[10:25])
    np.testing.assert_array_equal(part[0], found[0][found[1][10] : found[1][25]])  # no other prompt matters


@pytest.mark.parametrize(("share", "left"), [(0.0, 1.0), (1.0, 0.0)])
def test_none_or_all(share, left):
    prompts = [[("likes", np.zeros((5, 3))), ("dislikes", np.ones((4, 3))), ("item", [])]]
    tokens, cu = drop_history(*pack(prompts), VOCABULARY, share, np.array([1]))
    assert len(tokens) == 3 + 27 * left and cu.tolist() == [0, len(tokens)]
