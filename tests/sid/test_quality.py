import numpy as np

from negfast.sid.quality import NEIGHBOURS, neighbour_overlap, usage


def test_neighbour_overlap_against_a_plain_search():
    rng = np.random.default_rng()
    vectors = rng.normal(size=(80, 5)).astype(np.float32)
    vectors[3] = 0  # neither asked nor found
    codes = rng.integers(0, 3, (80, 3)).astype(np.uint16)
    shared, count = np.zeros(2), 0
    for item in range(80):
        if item == 3:
            continue
        cosine = (vectors @ vectors[item]) / (
            np.linalg.norm(vectors, axis=1).clip(1e-9) * np.linalg.norm(vectors[item])
        )
        cosine[[item, 3]] = -2
        for other in np.argsort(-cosine)[:NEIGHBOURS]:
            shared += [codes[item, 0] == codes[other, 0], (codes[item, :2] == codes[other, :2]).all()]
            count += 1
    np.testing.assert_allclose(neighbour_overlap(vectors, codes), shared / count, atol=1e-4)


def test_twins_do_not_count_an_item_as_its_own_neighbour():
    vectors = np.repeat(np.eye(4, dtype=np.float32), 30, axis=0)  # 30 twins of each: an item may not find itself
    codes = np.stack([np.arange(120), np.zeros(120)], axis=1).astype(np.uint16)  # no two share a code
    assert neighbour_overlap(vectors, codes) == [0.0]
    codes[:, 0] = np.repeat(np.arange(4), 30)
    assert neighbour_overlap(vectors, codes) == [1.0]


def test_too_few_items_have_no_overlap():
    assert neighbour_overlap(np.eye(NEIGHBOURS, dtype=np.float32), np.zeros((NEIGHBOURS, 2), np.uint16)) == []


def test_usage():
    codes = np.array([[0, 5], [1, 5], [2, 5], [3, 5]], np.uint16)
    assert usage(codes, 8) == [{"used": 4, "perplexity": 4.0}, {"used": 1, "perplexity": 1.0}]
