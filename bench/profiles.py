"""``python -m bench profiles``: how well profiles of dislikes predict what is disliked next.

A profile is made of the feedback before valid begins: by each item attribute, by clusters of item vectors, and by the
first code of the semantic IDs. In a group it replaces the user's rate by the rate outside the group and the posterior's
log odds over the expected; of several groups of an item the mean counts. Measured on the first feedback of valid,
beside the rates of user and item alone: AUC within users, of all pairs of a dislike and a like of the same user, and
log loss.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.special import expit, logit
from scipy.stats import rankdata

from negfast.data.dataset import Dataset
from negfast.data.log import DISLIKE, EventLog
from negfast.data.split import first_feedback
from negfast.evaluate.bootstrap import interval, ratio, resample_users, weighted_sums
from negfast.serve.profiles import category_matrix
from negfast.serve.reasons import LEAST, MOST, gather, item_clusters, posterior, smoothed_logit, strength

CLUSTERED = "clusters"


def run(data: str = "runs/quickstart/data", resamples: int = 1000) -> dict[str, Any]:
    """Rows for each of the data sets ``data``, comma-separated paths."""
    return {"split": "valid", "logs": [measured(Path(path), resamples) for path in data.split(",")]}


def measured(data: Path, resamples: int) -> dict[str, Any]:
    """Rows of a data set: each grouping's AUC and log loss, and gains over the rates and the clusters, paired."""
    dataset = Dataset.open(data)
    asked = ValidFeedback(dataset)
    samples = {"rates": asked.samples(np.zeros(len(asked.user)), resamples)}
    rows: list[dict[str, Any]] = [{"name": "rates"}]
    for name, of_item in groupings(dataset).items():
        evidence = gather(asked.disliked, asked.liked, of_item)
        k = strength(evidence)
        known = posterior(evidence.mean, evidence.items, evidence.dislikes, k)
        effect = logit(np.clip(known.rate, LEAST, MOST)) - logit(evidence.mean)
        effect += evidence.elsewhere - asked.user_logit[evidence.user]
        of_user = sp.csr_matrix((effect, (evidence.user, evidence.group)), (dataset.log.n_users, of_item.shape[1]))
        samples[name] = asked.samples(asked.of_groups(of_user, of_item), resamples)
        clear = {"above": float((known.low > 1).mean()), "below": float((known.high < 1).mean())}
        rows.append({"name": name, "groups": of_item.shape[1], "strength": k, "lift_clear": clear})
    for row in rows:
        name = row["name"]
        row |= {metric: interval(values) for metric, values in samples[name].items()}
        for other in ("rates", CLUSTERED):
            if name != "rates" and name != other:
                against = samples[other].items() if other in samples else ()
                row[f"minus_{other}"] = {metric: interval(samples[name][metric] - values) for metric, values in against}
        print(row)
    return {"data": data.resolve().name, "events": len(asked.user), "users": asked.users, "rows": rows}


def groupings(dataset: Dataset) -> Mapping[str, sp.csr_matrix]:
    """Items in groups [I, C]: by k-means of the vectors, by the first code, by each attribute."""
    codes: list[tuple[str, ...]] = [(str(code),) for code in dataset.codes[:, 0]]
    found = {CLUSTERED: item_clusters(dataset.embedding), "first code": category_matrix(codes)[1]}
    return found | {name: category_matrix(values)[1] for name, values in dataset.items.attributes.items()}


class ValidFeedback:
    """First feedback of valid by users with any before it, and what the rates before it lead to expect."""

    def __init__(self, dataset: Dataset) -> None:
        log = dataset.log
        early = log.before(dataset.valid_day)
        self.disliked, self.liked = last_feedback(log, early)
        rows = first_feedback(log)
        bad, good = (np.asarray(matrix.sum(1)).ravel() for matrix in (self.disliked, self.liked))
        item_bad, item_good = (np.asarray(matrix.sum(0)).ravel() for matrix in (self.disliked, self.liked))
        rows = rows[(log.before(dataset.test_day) & ~early)[rows] & ((bad + good) > 0)[log.user[rows]]]
        self.user, self.item, self.dislike = log.user[rows], log.item[rows], log.feedback[rows] == DISLIKE
        self.place = np.unique(self.user, return_inverse=True)[1]
        self.users = int(self.place.max()) + 1
        overall = bad.sum() / (bad.sum() + good.sum())
        self.user_logit = smoothed_logit(bad, bad + good, overall)
        item_logit = smoothed_logit(item_bad, item_bad + item_good, overall)
        self.logit = self.user_logit[self.user] + item_logit[self.item] - logit(overall)

    def of_groups(self, of_user: sp.csr_matrix, of_item: sp.csr_matrix) -> np.ndarray:
        """The mean of the user's numbers [U, C] over the groups of the item, of each event, float64 [E]."""
        total = np.asarray(of_user[self.user].multiply(of_item[self.item]).sum(1)).ravel()
        return total / np.maximum(np.asarray(of_item.sum(1)).ravel()[self.item], 1)

    def samples(self, effect: np.ndarray, resamples: int) -> dict[str, np.ndarray]:
        """AUC within users and log loss under resamples of users, float64 [1 + resamples] each, the figure first."""
        score = self.logit + effect
        order = np.lexsort((score, self.place))
        columns = np.zeros((self.users, 4))  # wins, pairs, loss, events
        for rows in np.split(order, np.flatnonzero(np.diff(self.place[order])) + 1):
            dislike, p = self.dislike[rows], np.clip(expit(score[rows]), LEAST, MOST)
            bad, good = int(dislike.sum()), int((~dislike).sum())
            wins = rankdata(score[rows])[dislike].sum() - bad * (bad + 1) / 2
            loss = -np.log(np.where(dislike, p, 1 - p)).sum()
            columns[self.place[rows[0]]] = wins, bad * good, loss, len(rows)
        sums = weighted_sums(resample_users(self.users, resamples, 0), np.arange(self.users), columns)
        return {"auc_within_user": ratio(sums[:, 0], sums[:, 1]), "log_loss": ratio(sums[:, 2], sums[:, 3])}


def last_feedback(log: EventLog, early: np.ndarray) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Which items each user's last like or dislike of ``early`` bool [N] dislikes, and likes: [U, I] of 0 and 1."""
    rows = np.flatnonzero(early & log.judged)
    pair = log.user[rows].astype(np.int64) * log.n_items + log.item[rows]
    rows = rows[len(rows) - 1 - np.unique(pair[::-1], return_index=True)[1]]
    bad, shape = log.feedback[rows] == DISLIKE, (log.n_users, log.n_items)
    one, other = (
        sp.csr_matrix((np.ones(len(part)), (log.user[part], log.item[part])), shape) for part in (rows[bad], rows[~bad])
    )
    return one, other
