"""What a user dislikes beyond what rates say: groups of items, each with its evidence and a name.

The rates of a user and of an item lead to expect a dislike with the probability e, logit e = logit(user rate) +
logit(item rate) + a constant. In a group of n items that the user judged, m is the mean of e: the dislike rate there of
a user whose taste is all in the rates. The user's own is drawn from Beta(k m, k (1 - m)), so after d dislikes its
posterior is Beta(k m + d, k (1 - m) + n - d). k is the one under which the dislikes of all users are most probable
(empirical Bayes). Lift is the posterior mean over m, its interval the posterior's 2.5 and 97.5 percentiles over m
(negfast's choice).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.special import betaln, expit, logit
from scipy.stats import beta

from negfast.data.features import PSEUDO_EVENTS
from negfast.data.items import ItemTable
from negfast.sid.kmeans import fit_rq_kmeans
from negfast.sid.quantize import encode

CLUSTERS = 32  # of item vectors, as california's valid days chose among 8 to 64 and the first code
STRENGTHS = np.geomspace(1.0, 500.0, 25)  # k is one of them
WORDS = 3  # of a name
LEAST, MOST = 1e-4, 1 - 1e-4  # of any probability


@dataclass(frozen=True)
class Evidence:
    """The P pairs of a user and a group in which the user judged an item."""

    user: np.ndarray  # int64 [P], ascending
    group: np.ndarray  # int64 [P], ascending within a user
    items: np.ndarray  # float64 [P], judged
    dislikes: np.ndarray  # float64 [P]
    expected: np.ndarray  # float64 [P], dislikes that the rates lead to expect

    @property
    def mean(self) -> np.ndarray:
        """m of each pair, float64 [P]."""
        return np.clip(self.expected / np.maximum(self.items, 1), LEAST, MOST)


@dataclass(frozen=True)
class Posterior:
    """Dislike rates of pairs, float64 [P] each."""

    rate: np.ndarray
    lift: np.ndarray
    low: np.ndarray  # of the lift
    high: np.ndarray


def expected_dislikes(disliked: sp.csr_matrix, liked: sp.csr_matrix) -> sp.csr_matrix:
    """e of every judged pair, [U, I] with the pairs of both matrices [U, I] of 0 and 1.

    Rates leave the pair itself out and have `PSEUDO_EVENTS` at everyone's rate mixed in; the constant makes the e of
    all pairs add up to their dislikes.
    """
    judged = (disliked + liked).tocsr()
    judged.sort_indices()
    user, item = judged.nonzero()
    bad = np.asarray(disliked[user, item]).ravel()
    overall = np.clip(bad.mean(), LEAST, MOST) if len(bad) else 0.5
    terms = np.zeros(len(bad))
    for key in (user, item):
        events, dislikes = np.bincount(key)[key] - 1, np.bincount(key, bad)[key] - bad
        terms += logit(np.clip((dislikes + PSEUDO_EVENTS * overall) / (events + PSEUDO_EVENTS), LEAST, MOST))
    constant = -logit(overall)
    for _ in range(20):  # Newton's steps; the sum rises with the constant
        e = expit(terms + constant)
        constant += np.clip((bad.sum() - e.sum()) / max((e * (1 - e)).sum(), 1e-9), -1.0, 1.0)
    e = np.clip(expit(terms + constant), LEAST, MOST)
    return sp.csr_matrix((e, judged.indices, judged.indptr), judged.shape)


def gather(disliked: sp.csr_matrix, liked: sp.csr_matrix, expected: sp.csr_matrix, of_item: sp.csr_matrix) -> Evidence:
    """The evidence of groups; ``of_item`` [I, C] of 0 and 1 says which item is in which, several or none."""
    judged = ((disliked + liked) @ of_item).tocsr()
    judged.sort_indices()
    user, group = judged.nonzero()
    columns = ((matrix @ of_item)[user, group] for matrix in (disliked, expected))
    bad, due = (np.asarray(column, dtype=np.float64).ravel() for column in columns)
    return Evidence(user, group, judged.data.astype(np.float64), bad, due)


def strength(evidence: Evidence) -> float:
    """k: how many judgements the expected rate weighs as much as, by maximum marginal likelihood (beta-binomial)."""
    m, n, d = evidence.mean, evidence.items, evidence.dislikes
    found = [(betaln(k * m + d, k * (1 - m) + n - d) - betaln(k * m, k * (1 - m))).sum() for k in STRENGTHS]
    return float(STRENGTHS[int(np.argmax(found))])


def posterior(mean: np.ndarray, items: np.ndarray, dislikes: np.ndarray, k: float) -> Posterior:
    """Of pairs with ``dislikes`` among ``items`` and a rate of ``mean`` expected, float64 [P] each."""
    a, b = k * mean + dislikes, k * (1 - mean) + items - dislikes
    rate = a / (a + b)
    return Posterior(rate, rate / mean, beta.ppf(0.025, a, b) / mean, beta.ppf(0.975, a, b) / mean)


def item_clusters(vectors: np.ndarray) -> sp.csr_matrix:
    """Items [I, C] by k-means of their vectors float32 [I, D]; one of no vector (a row of zeros) is in none."""
    known = np.flatnonzero(vectors.any(axis=1))
    count = min(CLUSTERS, len(known))
    if not count:
        return sp.csr_matrix((len(vectors), 1))
    found = encode(vectors[known], fit_rq_kmeans(vectors[known], [count], count, seed=0))[:, 0].astype(np.int64)
    return sp.csr_matrix((np.ones(len(known)), (known, found)), (len(vectors), count))


def cluster_names(items: ItemTable, of_item: sp.csr_matrix) -> list[str]:
    """The number of each cluster and the words and attribute values most typical of it, such as "7: war, soldier".

    With p the share of the cluster's items that have a term and q that of all items, those of largest p log(p / q).
    """
    terms = [_terms(items, row) for row in range(len(items))]
    number: dict[str, int] = {}
    column = [number.setdefault(term, len(number)) for of_row in terms for term in of_row]
    row = np.repeat(np.arange(len(terms)), [len(of_row) for of_row in terms])
    has = sp.csr_matrix((np.ones(len(row)), (row, column)), (len(terms), max(len(number), 1)))
    overall, words, names = np.asarray(has.mean(0)).ravel(), list(number), []
    for cluster in range(of_item.shape[1]):
        inside = has[of_item[:, cluster].nonzero()[0]]
        share = np.asarray(inside.mean(0)).ravel() if inside.shape[0] else np.zeros(has.shape[1])
        typical = share * np.log(np.maximum(share, 1e-12) / np.maximum(overall, 1e-12))
        best = np.argsort(-typical, kind="stable")[:WORDS]
        names.append(f"{cluster}: " + ", ".join(words[term] for term in best if typical[term] > 0))
    return names


def _terms(items: ItemTable, row: int) -> Sequence[str]:
    """The distinct words of an item's text, lower case and of two letters at least, and its attribute values."""
    words = re.findall(r"[^\W\d_]{2,}", items.text[row].lower())
    values = (value.lower() for column in items.attributes.values() for value in column[row])
    return list(dict.fromkeys([*words, *values]))
