"""Lists: the items that users will most probably dislike, by beam search on the trie."""

import numpy as np

from negfast.data.log import history_ends
from negfast.data.split import Requests
from negfast.model.beam import beam_search
from negfast.model.prompts import MIXED
from negfast.runtime.engine import Engine
from negfast.sid.prior import NEXT_DISLIKE

REQUESTS_AT_ONCE = 64


def generate(engine: Engine, requests: Requests, top: int, with_policy: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The ``top`` items that each request's user will most probably dislike: int32 [R, top] and log p float32 [R, top].

    -1 and -inf pad rows with fewer unseen items. Without the policy the community prior alone answers.
    """
    items = np.full((len(requests), top), -1, dtype=np.int32)
    scores = np.full((len(requests), top), -np.inf, dtype=np.float32)
    # requests of similar length together: attention pads a batch's prompts to its longest
    ends = history_ends(engine.log, requests.user, requests.day)
    order = np.argsort(ends - engine.log.user_offsets[requests.user], kind="stable")
    for start in range(0, len(order), REQUESTS_AT_ONCE):
        rows = order[start : start + REQUESTS_AT_ONCE]
        batch = engine.prompts.build(requests.user[rows], requests.day[rows], MIXED, 0, tail="next-dislike")
        found, log_p = beam_search(
            engine.policy if with_policy else None,
            engine.chooser,
            batch.layout,
            batch.tokens,
            batch.prior,
            NEXT_DISLIKE,
            max(engine.config.eval.beam, top),
            top,
        )
        items[rows], scores[rows] = found.cpu().numpy(), log_p.cpu().numpy()
    return items, scores
