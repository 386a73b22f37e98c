import numpy as np
import pytest
import torch

from negfast.sid.prior import NEXT_DISLIKE, NEXT_LIKE
from tests.model.all_items import all_item_log_probs
from tests.train.small import make_small


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("branch", [NEXT_DISLIKE, NEXT_LIKE])
def test_all_items_by_one_walk_and_by_separate_forwards(levels, branch):
    small = make_small(20 + levels, levels=levels, codebook=[48, 8, 6, 4][levels - 1])
    with torch.no_grad():
        found = all_item_log_probs(small.policy, small.chooser, small.histories(), branch).numpy()
    expected = small.leaf_log_probs(branch)
    unseen = np.isfinite(expected)
    assert (np.isfinite(found) == unseen).all()
    assert np.abs(found[unseen] - expected[unseen]).max() < 1e-9
    assert np.abs(np.exp(found).sum(1) - 1).max() < 1e-10
