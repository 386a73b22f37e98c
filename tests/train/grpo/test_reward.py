"""The reward against a slow reading of its definition, and against policies that would exploit it."""

import numpy as np
import pytest
import torch

from negfast.config import Reward
from negfast.data.log import DISLIKE, LIKE, EventLog, history_ends
from negfast.data.neighbours import ContentNeighbours, co_dislike_neighbours, similarity_rows
from negfast.data.split import split_requests
from negfast.sid.embed import embed_tfidf, item_texts
from negfast.train.grpo.reward import TERMS, RewardSources, build_reward_table
from tests.sid.reference import dense_mass

CPU = torch.device("cpu")
COLLAB = [term.name for term in TERMS].index("collab")


def random_log(rng: np.random.Generator, users: int = 25, items: int = 30, days: int = 40) -> EventLog:
    counts = rng.integers(3, 25, users)
    time = [np.sort(rng.integers(0, days * 86_400, n)) for n in counts]
    feedback = rng.choice([LIKE, DISLIKE], counts.sum(), p=[0.4, 0.6]).astype(np.uint8)
    item = rng.integers(0, items, counts.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return EventLog(offsets, item, feedback, np.concatenate(time), None, items)


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_definition_item_by_item(seed):
    rng = np.random.default_rng(seed)
    log = random_log(rng)
    requests = split_requests(log, 4, 20, 30).train.take()
    config = Reward(collab_weight=0.7, collab_cap=0.15, like_penalty=0.2)
    neighbours = co_dislike_neighbours(log, 20)
    content = ContentNeighbours(rng.normal(size=(log.n_items, 4)).astype(np.float32), 0.5)
    table = build_reward_table(requests, RewardSources(config, log.n_items, neighbours, content), CPU)
    rows = torch.arange(len(requests))[:, None]
    found = table.look_up(rows, torch.arange(log.n_items).expand(len(requests), -1)).sum(-1).numpy()

    for r in range(len(requests)):
        future = requests.dislikes[requests.dislike_offsets[r] : requests.dislike_offsets[r + 1]]
        liked = requests.likes[requests.like_offsets[r] : requests.like_offsets[r + 1]]
        near_dislike, near_content = np.zeros(log.n_items), np.zeros(log.n_items)
        for j in future:
            ids, similarity = similarity_rows(neighbours, requests.user[r : r + 1], np.array([j], dtype=np.int32))
            for i, s in zip(ids[0], similarity[0], strict=True):
                if i >= 0:
                    near_dislike[i] = max(near_dislike[i], s)
            for i, s in zip(*(column[0] for column in content(np.array([j]))), strict=True):
                if i >= 0:
                    near_content[i] = max(near_content[i], s)
        for i in range(log.n_items):
            near = near_dislike[i] if near_dislike[i] > 0 else near_content[i]
            expected = 1.0 if i in future else min(0.7 * near, 0.15)
            assert abs(found[r, i] - (expected - 0.2 * (i in liked))) < 1e-6


def test_copying_history_hubs_and_chance_earn_less_than_recency(movietweetings):
    """On train requests, whose events the co-dislikes were counted over: that is where counting naively would pay."""
    log, items = movietweetings
    valid, test = (int(np.datetime64(day, "D").astype(int)) for day in ("2013-06-17", "2013-07-15"))
    requests = split_requests(log, 7, valid, test).train.take()
    requests = requests.take(requests.has_dislikes)
    neighbours = co_dislike_neighbours(log, valid)
    content = ContentNeighbours(embed_tfidf(item_texts(items)))
    table = build_reward_table(requests, RewardSources(Reward(), log.n_items, neighbours, content), CPU)
    rng = np.random.default_rng()
    size = 20

    mass = dense_mass(log, DISLIKE, 4.0, int(log.day.min()), valid)
    ends = history_ends(log, requests.user, requests.day)
    item_of_key = (table.key[:-1] % log.n_items).numpy()
    near_reward = np.bincount(item_of_key, table.terms[:-1, COLLAB].numpy(), log.n_items)
    hubs = np.argsort(-near_reward)[:size]  # the constant answer that the collaborative term pays best
    lists = {name: np.full((len(requests), size), -1) for name in ("recency", "copy", "near copy", "hubs", "random")}
    for r, (user, day) in enumerate(zip(requests.user, requests.day, strict=True)):
        past = slice(log.user_offsets[user], ends[r])
        seen = np.unique(log.item[past])
        score = mass[day - int(log.day.min())].copy()
        score[seen] = -1
        lists["recency"][r] = np.argsort(-score, kind="stable")[:size]
        disliked = log.item[past][log.feedback[past] == DISLIKE][-size:]
        lists["copy"][r, : len(disliked)] = disliked
        ids, similarity = similarity_rows(neighbours, np.full(len(disliked), user, np.int32), disliked)
        near = np.setdiff1d(ids[similarity > 0], seen)[:size]
        lists["near copy"][r, : len(near)] = near
        lists["hubs"][r] = hubs
        lists["random"][r] = rng.choice(np.setdiff1d(np.arange(log.n_items), seen), size, replace=False)
    rows = torch.arange(len(requests))[:, None]
    earned = {
        name: float(table.look_up(rows, torch.from_numpy(chosen.astype(np.int64))).sum(-1).mean())
        for name, chosen in lists.items()
    }
    assert all(earned[name] < 0.7 * earned["recency"] for name in earned if name != "recency"), earned
