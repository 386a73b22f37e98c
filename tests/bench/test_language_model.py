"""A share of an evaluation set's users has all of their questions and no others'."""

import numpy as np

from bench.experiments.language_model import of_users
from bench.simulate import FIRST_DAY, SimulationSettings, simulate
from negfast.data.split import split_requests
from negfast.evaluate.sets import evaluation_set


def test_a_share_of_the_users_keeps_their_questions_whole() -> None:
    log = simulate(SimulationSettings(users=250, items=300, days=50, impressions=3.0, topics=10, dislike_rate=0.3)).log
    valid = evaluation_set(log, split_requests(log, 7, FIRST_DAY + 25, FIRST_DAY + 36), "valid")
    part = of_users(valid, 0.4)
    kept = np.unique(np.concatenate([part.requests.user, part.filter_user]))
    everyone = np.unique(np.concatenate([valid.requests.user, valid.filter_user]))
    assert len(kept) == round(0.4 * len(everyone))
    asked, told = np.isin(valid.requests.user, kept), np.isin(valid.filter_user, kept)
    assert (len(part.requests), len(part.primary), len(part.past_dislike)) == (asked.sum(),) * 3
    assert np.array_equal(part.next_dislike, valid.next_dislike[asked])
    assert np.array_equal(part.filter_item, valid.filter_item[told])
    assert np.array_equal(part.filter_dislike, valid.filter_dislike[told])
    pools = np.isin(valid.pool_user, kept)
    assert 0 < pools.sum() < len(pools) and np.array_equal(part.pool_items, valid.pool_items[pools])
    assert np.array_equal(part.pool_user, valid.pool_user[pools])
    assert np.array_equal(part.pool_day, valid.pool_day[pools])
