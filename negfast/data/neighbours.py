"""Which items are disliked by the same people: co-dislike neighbours that never count the user in question.

For user u and items i, j: c users other than u dislike both before the cut, c_i and c_j users other than u either:

    s_u(i, j) = c / (c + 5) * c / sqrt((c_i + 3) (c_j + 3))    if c >= 2, else 0        (negfast's choice)

With u counted in, whatever u disliked twice would look like a discovery, and copying u's history would pay. Where
co-dislikes say nothing, the content similarity of the embeddings stands in.
"""

from dataclasses import dataclass

import faiss
import numpy as np
from numba import njit

from negfast.data.log import DISLIKE, EXPOSED, EventLog

TOP = 50
MIN_USERS = 2
EXACT_ITEMS = 1 << 15
CELLS_VISITED, CELL_ROUNDS, POINTS_PER_CELL = 8, 5, 40  # of the k-means cells of more items (negfast's choice)
ADDED_AT_ONCE = 1 << 16  # items, to the index
CONTENT_THRESHOLD = 0.8  # least cosine of content neighbours (negfast's choice)
_COUNT_SHRINKAGE, _MARGIN_SHRINKAGE = 5.0, 3.0


@dataclass(frozen=True)
class Neighbours:
    """Co-dislike neighbours of every item, counted over all users; ``similarity_rows`` takes the user out.

    Neighbours of j are the ``top`` items of highest similarity with all users counted in, among those that at
    least two users disliked together with j; ties go to the lower index. Taking u out changes similarities, not
    this list.
    """

    ids: np.ndarray  # int32 [I, top], -1 where there are fewer
    count: np.ndarray  # int32 [I, top], users who dislike both
    dislikes: np.ndarray  # int32 [I], users who dislike the item
    pairs: np.ndarray  # int64 [M] ascending, user * I + item of every dislike counted


def co_dislike_neighbours(log: EventLog, valid_day: int, top: int = TOP) -> Neighbours:
    """Count co-dislikes before ``valid_day`` (days since 1970); of a pair, the last feedback before it counts."""
    found = [np.zeros(0, np.int64)]
    for first, block in log.blocks():
        pair, row = block.by_pair(np.flatnonzero(block.before(valid_day) & (block.feedback != EXPOSED)))
        last = np.append(pair[1:] != pair[:-1], True)[: len(pair)]
        found.append(pair[last & (block.feedback[row] == DISLIKE)] + first * log.n_items)
    pairs = np.concatenate(found)
    user, item = pairs // log.n_items, (pairs % log.n_items).astype(np.int32)
    by_item = np.argsort(item, kind="stable")
    dislikes = np.bincount(item, minlength=log.n_items).astype(np.int32)
    item_offsets = np.concatenate([[0], np.cumsum(dislikes, dtype=np.int64)])
    user_offsets = np.searchsorted(user, np.arange(log.n_users + 1))
    ids, count = _count(user_offsets, item, item_offsets, user[by_item], top)
    return Neighbours(ids, count, dislikes, pairs)


def similarity_rows(neighbours: Neighbours, users: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours i of j = ``items[r]`` for u = ``users[r]``: ids int32 [R, top] (-1 padded), s_u float32 [R, top].

    s_u is 0 where fewer than two other users dislike both.
    """
    return neighbours.ids[items], _without_user(
        neighbours.ids,
        neighbours.count,
        neighbours.dislikes,
        neighbours.pairs,
        np.asarray(users, dtype=np.int64),
        np.asarray(items, dtype=np.int64),
    )


class ContentNeighbours:
    """Items of cosine >= ``threshold``, best first: asked with items int [N], it tells ids int32 [N, top] (-1 padded)
    and cosine float32 [N, top] (0 padded).

    Exact search up to `EXACT_ITEMS` items, whose time is quadratic in them. Among more, neighbours are searched when
    asked for, in the nearest `CELLS_VISITED` of k-means cells, which misses some. An item with a zero embedding has no
    neighbours.
    """

    def __init__(self, embedding: np.ndarray, threshold: float = CONTENT_THRESHOLD, top: int = TOP) -> None:
        """``embedding`` float32 [I, D]."""
        self.embedding, self.threshold, self.top = embedding, threshold, top
        self.norm = np.linalg.norm(embedding, axis=1)
        self.index: faiss.Index = faiss.IndexFlatIP(embedding.shape[1])
        known = np.flatnonzero(self.norm)
        if len(known) <= EXACT_ITEMS:
            self.index = faiss.IndexIDMap(self.index)
        else:
            cells = faiss.IndexIVFFlat(
                self.index, embedding.shape[1], 2 * int(len(known) ** 0.5), faiss.METRIC_INNER_PRODUCT
            )
            cells.cp.niter, cells.nprobe = CELL_ROUNDS, CELLS_VISITED
            cells.train(self._unit(known[:: max(1, len(known) // (POINTS_PER_CELL * cells.nlist))]))
            self.index = cells
        for first in range(0, len(known), ADDED_AT_ONCE):
            some = known[first : first + ADDED_AT_ONCE]
            self.index.add_with_ids(self._unit(some), some)
        self._table = self._search(np.arange(len(embedding))) if len(known) <= EXACT_ITEMS else None

    def __call__(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self._table is not None:
            return self._table[0][items], self._table[1][items]
        distinct, place = np.unique(items, return_inverse=True)
        ids, cosine = self._search(distinct)
        return ids[place], cosine[place]

    def _unit(self, items: np.ndarray) -> np.ndarray:
        norm = self.norm[items, None]
        return np.ascontiguousarray(self.embedding[items] / np.where(norm > 0, norm, 1), dtype=np.float32)

    def _search(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cosine, ids = self.index.search(self._unit(items), min(self.top + 1, len(self.norm)))
        near = (ids >= 0) & (cosine >= self.threshold) & (self.norm[items, None] > 0) & (ids != items[:, None])
        order = np.argsort(~near, axis=1, kind="stable")[:, : self.top]  # those that stay, in their order
        out_ids = np.full((len(items), self.top), -1, dtype=np.int32)
        out_cosine = np.zeros((len(items), self.top), dtype=np.float32)
        kept = np.take_along_axis(near, order, axis=1)
        width = order.shape[1]
        out_ids[:, :width] = np.where(kept, np.take_along_axis(ids, order, axis=1), -1)
        out_cosine[:, :width] = np.where(kept, np.take_along_axis(cosine, order, axis=1), 0)
        return out_ids, np.minimum(out_cosine, np.float32(1))


def soft_similarity(
    neighbours: Neighbours,
    content: ContentNeighbours | None,
    users: np.ndarray,
    generated: np.ndarray,
    dislike_offsets: np.ndarray,
    dislikes: np.ndarray,
) -> np.ndarray:
    """The largest s_u(i, j) over j in the request's F, float32 [R, K], for generated items i int32 [R, K] (-1: 0).

    F of request r is ``dislikes[dislike_offsets[r]:dislike_offsets[r + 1]]``. A pair whose s_u is 0 takes its
    content similarity from ``content``, if given and there; an item is no neighbour of itself.
    """
    row = np.repeat(np.arange(len(users)), np.diff(dislike_offsets))
    ids, similarity = similarity_rows(neighbours, users[row], dislikes)
    near, cosine = np.empty((len(dislikes), 0), np.int32), np.empty((len(dislikes), 0), np.float32)
    if content is not None:
        near, cosine = content(dislikes)
    offsets = np.asarray(dislike_offsets, dtype=np.int64)
    return _best_of_future(ids, similarity, near, cosine, offsets, generated, len(neighbours.ids))


@njit(cache=True, nogil=True)
def _shrunk(both, one, other):
    if both < MIN_USERS:
        return 0.0
    margins = np.sqrt((one + _MARGIN_SHRINKAGE) * (other + _MARGIN_SHRINKAGE))
    return both / (both + _COUNT_SHRINKAGE) * both / margins


@njit(cache=True, nogil=True)
def _count(user_offsets, item_of_user, item_offsets, user_of_item, top):
    n_items = len(item_offsets) - 1
    ids = np.full((n_items, top), -1, dtype=np.int32)
    count = np.zeros((n_items, top), dtype=np.int32)
    both = np.zeros(n_items, dtype=np.int32)  # of the item at hand; zero again after each item
    touched = np.empty(n_items, dtype=np.int32)
    for j in range(n_items):
        n_touched = 0
        for user in user_of_item[item_offsets[j] : item_offsets[j + 1]]:
            for i in item_of_user[user_offsets[user] : user_offsets[user + 1]]:
                if both[i] == 0:
                    touched[n_touched] = i
                    n_touched += 1
                both[i] += 1
        both_j = both[j]
        both[j] = 0
        candidates = np.sort(touched[:n_touched])
        similarity = np.empty(n_touched, dtype=np.float64)
        for k, i in enumerate(candidates):
            similarity[k] = _shrunk(both[i], item_offsets[i + 1] - item_offsets[i], both_j)
        order = np.argsort(-similarity, kind="mergesort")  # stable: ties to the lower index
        for k in range(min(top, n_touched)):
            if similarity[order[k]] == 0:
                break
            ids[j, k] = candidates[order[k]]
            count[j, k] = both[ids[j, k]]
        for i in candidates:
            both[i] = 0
    return ids, count


@njit(cache=True, nogil=True)
def _without_user(ids, count, dislikes, pairs, users, items):
    n_items, top = ids.shape
    out = np.zeros((len(users), top), dtype=np.float32)
    for r in range(len(users)):
        j = items[r]
        own = _holds(pairs, users[r] * n_items + j)
        for k in range(top):
            i = ids[j, k]
            if i < 0:
                break
            own_i = _holds(pairs, users[r] * n_items + i)
            out[r, k] = _shrunk(count[j, k] - (own and own_i), dislikes[i] - own_i, dislikes[j] - own)
    return out


@njit(cache=True, nogil=True)
def _holds(pairs, pair):
    place = np.searchsorted(pairs, pair)
    return place < len(pairs) and pairs[place] == pair


@njit(cache=True, nogil=True)
def _best_of_future(ids, similarity, content_ids, content, offsets, generated, n_items):
    out = np.zeros(generated.shape, dtype=np.float32)
    column = np.full(n_items, -1, dtype=np.int64)  # of an item in the request's generated list
    for r in range(len(generated)):
        for k in range(generated.shape[1]):
            if generated[r, k] >= 0:
                column[generated[r, k]] = k
        for f in range(offsets[r], offsets[r + 1]):
            counted = np.zeros(generated.shape[1], dtype=np.bool_)
            for n in range(ids.shape[1]):
                if ids[f, n] >= 0 and similarity[f, n] > 0 and column[ids[f, n]] >= 0:
                    k = column[ids[f, n]]
                    counted[k] = True
                    out[r, k] = max(out[r, k], similarity[f, n])
            for n in range(content_ids.shape[1]):
                if content_ids[f, n] >= 0 and column[content_ids[f, n]] >= 0:
                    k = column[content_ids[f, n]]
                    if not counted[k]:
                        out[r, k] = max(out[r, k], content[f, n])
        for k in range(generated.shape[1]):
            if generated[r, k] >= 0:
                column[generated[r, k]] = -1
    return out
