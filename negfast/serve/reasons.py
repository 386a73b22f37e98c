"""What a user dislikes beyond what rates say: groups of items, each with its evidence and a name.

The rates lead to expect a dislike of an item with the probability e, logit e = logit(item rate) + logit(user rate) + a
constant; the item's without the user, the user's without the group. In a group of n items that the user judged, m is
the mean of e. The user's own rate there is drawn from Beta(k m, k (1 - m)), so after d dislikes its posterior is
Beta(k m + d, k (1 - m) + n - d). k is the one under which the dislikes of all users are most probable (empirical
Bayes), so it also makes up for how little is known of m. Lift is the posterior mean over m, its interval the
posterior's 2.5 and 97.5 percentiles over m (negfast's choice).
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
NEWTON_STEPS = 20
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
    elsewhere: np.ndarray  # float64 [P], logit of the user's dislike rate outside the group

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


def gather(disliked: sp.csr_matrix, liked: sp.csr_matrix, of_item: sp.csr_matrix) -> Evidence:
    """The evidence of groups from the items that users dislike and like, [U, I] of 0 and 1; ``of_item`` [I, C] of 0 and
    1 says which item is in which group, several or none.

    Rates have `PSEUDO_EVENTS` at everyone's rate mixed in; the constant makes expected dislikes add up to the found.
    """
    user, item = (np.concatenate(both) for both in zip(disliked.nonzero(), liked.nonzero(), strict=True))
    bad = (np.arange(len(user)) < disliked.nnz).astype(np.float64)
    overall = np.clip(bad.mean(), LEAST, MOST) if len(bad) else 0.5
    counts = np.diff(of_item.indptr)[item]
    row = np.repeat(np.arange(len(item)), counts)  # one for each group of an item that was judged
    place = np.arange(len(row)) + np.repeat(of_item.indptr[item] - np.cumsum(counts) + counts, counts)
    keys, pair = np.unique(user[row].astype(np.int64) * of_item.shape[1] + of_item.indices[place], return_inverse=True)
    of_user, group = keys // of_item.shape[1], keys % of_item.shape[1]
    n, d = np.bincount(pair, minlength=len(keys)), np.bincount(pair, bad[row], len(keys))
    events, dislikes = np.bincount(user, minlength=disliked.shape[0]), np.bincount(user, bad, disliked.shape[0])
    elsewhere = smoothed_logit(dislikes[of_user] - d, events[of_user] - n, overall)
    alone = smoothed_logit(np.bincount(item, bad)[item] - bad, np.bincount(item)[item] - 1, overall)
    terms, constant = elsewhere[pair] + alone[row], -logit(overall)
    for _ in range(NEWTON_STEPS):
        e = expit(terms + constant)
        constant += np.clip((d.sum() - e.sum()) / max((e * (1 - e)).sum(), 1e-9), -1.0, 1.0)
    expected = np.bincount(pair, expit(terms + constant), len(keys))
    return Evidence(of_user, group, n.astype(np.float64), d, expected, elsewhere)


def smoothed_logit(dislikes: np.ndarray, events: np.ndarray, overall: float) -> np.ndarray:
    """logit of dislike rates with `PSEUDO_EVENTS` at the rate ``overall`` mixed in."""
    return logit(np.clip((dislikes + PSEUDO_EVENTS * overall) / (events + PSEUDO_EVENTS), LEAST, MOST))


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
