"""What users dislike beyond what rates say: expectations, intervals that cover, and names."""

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.integrate import quad
from scipy.optimize import brentq

from negfast.data.items import ItemTable
from negfast.serve.reasons import (
    Evidence,
    cluster_names,
    gather,
    item_clusters,
    posterior,
    strength,
)

PSEUDO = 5


def simulated(k: float, users: int = 400, each: int = 60) -> tuple[sp.csr_matrix, sp.csr_matrix, sp.csr_matrix, dict]:
    """Feedback of users whose rate in each of four groups of items is drawn around what user and item lead to expect:
    disliked, liked, of_item, and the true mean rate of every (user, group) by its judged items."""
    rng = np.random.default_rng(int(k))
    n_items = 200
    group = np.arange(n_items) % 4
    of_user, of_item = rng.normal(-1, 0.7, users), rng.normal(0, 0.7, n_items)
    bad, good = np.zeros((users, n_items)), np.zeros((users, n_items))
    truth = {}
    for user in range(users):
        items = rng.choice(n_items, each, replace=False)
        base = 1 / (1 + np.exp(-of_user[user] - of_item[items]))
        for g in range(4):
            own = items[group[items] == g]
            m = base[group[items] == g].mean()
            rate = rng.beta(k * m, k * (1 - m))
            label = rng.random(len(own)) < rate
            bad[user, own[label]], good[user, own[~label]] = 1, 1
            truth[user, g] = rate
    return sp.csr_matrix(bad), sp.csr_matrix(good), sp.csr_matrix(np.eye(4)[group]), truth


def test_expected_dislikes_leave_the_pair_and_the_group_out_and_add_up():
    bad, good, of_item, _ = simulated(20.0, users=30)
    of_item = of_item.tolil()
    of_item[3, :] = 1  # an item may be in several groups
    of_item[4, :] = 0  # or in none
    of_item = of_item.tocsr()
    found = gather(bad, good, of_item)
    bad, good, member = bad.toarray(), good.toarray(), of_item.toarray() > 0
    overall = bad.sum() / (bad + good).sum()

    def log_odds(dislikes: float, events: float) -> float:
        rate = (dislikes + PSEUDO * overall) / (events + PSEUDO)
        return np.log(rate / (1 - rate))

    terms = []  # of every pair its judged items
    for user, group in zip(found.user, found.group, strict=True):
        inside = ((bad + good)[user] > 0) & member[:, group]
        elsewhere = log_odds(bad[user, ~member[:, group]].sum(), (bad + good)[user, ~member[:, group]].sum())
        others = np.arange(len(bad)) != user
        terms.append(
            [elsewhere + log_odds(bad[others, i].sum(), (bad + good)[others, i].sum()) for i in np.flatnonzero(inside)]
        )
        assert (len(terms[-1]), bad[user, inside].sum()) == (
            found.items[len(terms) - 1],
            found.dislikes[len(terms) - 1],
        )
    flat = np.concatenate(terms)
    constant = brentq(lambda c: (1 / (1 + np.exp(-flat - c))).sum() - found.dislikes.sum(), -10, 10, xtol=1e-12)
    expected = np.array([(1 / (1 + np.exp(-np.array(t) - constant))).sum() for t in terms])
    assert np.abs(found.expected / expected - 1).max() < 1e-8


def test_the_posterior_is_that_of_bayes_by_integration():
    m, n, d, k = 0.2, 7, 4, 10.0

    def density(p: float) -> float:
        return p ** (k * m - 1 + d) * (1 - p) ** (k * (1 - m) - 1 + n - d)

    total = quad(density, 0, 1)[0]
    found = posterior(np.array([m]), np.array([n]), np.array([d]), k)
    assert found.rate[0] == pytest.approx(quad(lambda p: p * density(p), 0, 1)[0] / total, rel=1e-8)
    assert found.lift[0] == pytest.approx(found.rate[0] / m, rel=1e-12)
    assert quad(density, 0, found.low[0] * m)[0] / total == pytest.approx(0.025, rel=1e-6)
    assert quad(density, found.high[0] * m, 1)[0] / total == pytest.approx(0.025, rel=1e-6)


def test_without_judgements_the_lift_is_one():
    found = posterior(np.array([0.3]), np.zeros(1), np.zeros(1), 20.0)
    assert found.lift[0] == pytest.approx(1, rel=1e-12) and found.low[0] < 1 < found.high[0]


@pytest.mark.parametrize("k", [5.0, 40.0])
def test_the_strength_of_the_prior_is_found_again(k):
    rng = np.random.default_rng(3)
    m, n = rng.uniform(0.05, 0.6, 20_000), rng.integers(1, 40, 20_000).astype(float)
    d = rng.binomial(n.astype(int), rng.beta(k * m, k * (1 - m))).astype(float)
    found = strength(Evidence(np.arange(20_000), np.zeros(20_000, int), n, d, n * m, np.zeros(20_000)))
    assert k / 1.4 < found < k * 1.4  # STRENGTHS is a grid of steps of 1.3


@pytest.mark.parametrize("k", [8.0, 40.0])
def test_intervals_cover_the_true_rate_95_times_in_100(k):
    """End to end: rates, strength and posterior are all made of the simulated feedback."""
    bad, good, of_item, truth = simulated(k)
    evidence = gather(bad, good, of_item)
    found = posterior(evidence.mean, evidence.items, evidence.dislikes, strength(evidence))
    rate = np.array([truth[pair] for pair in zip(evidence.user.tolist(), evidence.group.tolist(), strict=True)])
    covered = (found.low * evidence.mean <= rate) & (rate <= found.high * evidence.mean)
    assert 0.93 < covered.mean() < 0.97


def test_a_user_without_taste_beyond_the_rates_has_no_clear_lift():
    bad, good, of_item, _ = simulated(1e6)
    evidence = gather(bad, good, of_item)
    found = posterior(evidence.mean, evidence.items, evidence.dislikes, strength(evidence))
    assert ((found.low > 1) | (found.high < 1)).mean() < 0.01


def test_what_one_user_alone_dislikes_is_clear():
    bad, good, of_item, _ = simulated(1e6)
    hated = of_item[:, 2].toarray().ravel() > 0
    bad, good = bad.toarray(), good.toarray()
    judged = (bad + good)[5] > 0
    bad[5, judged & hated], good[5, judged & hated] = 1, 0
    bad, good = sp.csr_matrix(bad), sp.csr_matrix(good)
    evidence = gather(bad, good, of_item)
    found = posterior(evidence.mean, evidence.items, evidence.dislikes, 30.0)
    row = np.flatnonzero((evidence.user == 5) & (evidence.group == 2))
    assert found.low[row] > 1 and found.low[row] == found.low.max()


def test_items_of_like_vectors_share_a_cluster_and_give_it_its_name():
    words = ["grim war", "sweet song", "wild river", "quiet garden"]
    text = [f"The {words[i % 4]} {i}" for i in range(400)]
    vectors = np.eye(8, dtype=np.float32)[np.arange(400) % 4]
    vectors += np.random.default_rng(0).normal(0, 0.001, vectors.shape).astype(np.float32)
    text.append("nothing known")
    genres: list[tuple[str, ...]] = [("Film-Noir",) if i % 4 == 0 else ("Other", "Other") for i in range(400)] + [()]
    items = ItemTable([str(i) for i in range(401)], text, {"genres": genres})
    of_item = item_clusters(np.concatenate([vectors, np.zeros((1, 8), np.float32)]))
    assert of_item.shape[0] == 401 and not of_item[400].nnz  # without a vector in none
    assert (np.asarray(of_item.sum(1)).ravel()[:400] == 1).all()
    names = cluster_names(items, of_item)
    for cluster in range(of_item.shape[1]):
        kinds = {row % 4 for row in of_item[:, cluster].nonzero()[0]}
        assert len(kinds) == 1
        typical = set(words[kinds.pop()].split())
        said = names[cluster].removeprefix(f"{cluster}: ").split(", ")
        assert typical <= set(said) and "the" not in said
        assert ("film-noir" in said) == ("war" in said)


def test_items_without_vectors_and_text_make_one_empty_cluster():
    of_item = item_clusters(np.zeros((3, 4), np.float32))
    assert of_item.shape == (3, 1) and not of_item.nnz
    assert cluster_names(ItemTable(["a", "b", "c"], ["", "", ""]), of_item) == ["0: "]
