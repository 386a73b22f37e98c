"""From users and moments to what the policy reads: their histories, and what is asked of them.

A user's events in order of time are a history: a start position, then one position an event. What is asked at a moment
branches off the history where it stands: it sees the positions of events before the moment, and its own tokens. So a
history runs once, whatever is asked of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from negfast import _core
from negfast.config import History
from negfast.data.dataset import Dataset
from negfast.data.features import text_vectors
from negfast.data.log import DAY, EventLog, events_before
from negfast.data.shards import PackedHistories, Shard
from negfast.model.layout import GroupLayout
from negfast.model.policy import Policy
from negfast.sid.prior import DevicePrior, RequestPrior
from negfast.sid.tokens import FEEDBACK, CodeVocabulary
from negfast.sid.trie import SeenNodes, Trie
from negfast.staging import put

NEGATIVE_ONLY, POSITIVE_ONLY, MIXED = 2, 1, 3  # views: bit 0 shows the likes, bit 1 the dislikes


@dataclass(frozen=True)
class Histories:
    """B histories on the device, and R requests that branch off them, sorted by history."""

    tokens: Tensor  # int64 [T, S] of sums, or [T], as `Policy.embed` takes them
    layout: GroupLayout
    history: np.ndarray  # int64 [R], of each request
    prefix: np.ndarray  # int64 [R], tokens of its history that the request sees
    gap: Tensor  # int64 [R], token of the time since the last event that it sees
    make_prior: Callable[[], RequestPrior] | None = None
    has_text: bool = False  # whether any token is the decoder's own
    item_text: Tensor | None = None  # float16 [T, D], what each position carries of its item's text

    @classmethod
    def of_prompts(cls, prompts: Sequence[np.ndarray], gap: int, device: torch.device, has_text: bool) -> "Histories":
        """Prompts of tokens int64, with a request at the end of each; ``gap`` is the token of no time."""
        lengths = np.array([len(prompt) for prompt in prompts])
        layout = GroupLayout.build(np.concatenate([[0], np.cumsum(lengths)]), device)
        gaps = torch.full((len(prompts),), gap, device=device)
        return cls(put(np.concatenate(prompts), device), layout, np.arange(len(prompts)), lengths, gaps, None, has_text)

    def __len__(self) -> int:
        return len(self.history)

    @cached_property
    def prior(self) -> RequestPrior | None:
        """Pruning and prior of the requests, made when first asked for."""
        return None if self.make_prior is None else self.make_prior()

    def with_prior(self) -> "Histories":
        """The same with its prior made."""
        _ = self.prior
        return self

    def fresh(self) -> "Histories":
        """The same with nothing computed yet."""
        return replace(self, layout=self.layout.fresh())

    def states(self, policy: Policy, requests: np.ndarray, tokens: Tensor) -> Tensor:
        """Hidden states [N, n, d] of tokens [N, n, S] that continue ``requests`` int [N], ascending.

        The first call computes the histories; later ones find their keys and values in the layout.
        """
        self.layout.ask(self.history[requests], self.prefix[requests])
        prompts = None if self.layout.keys else self.tokens
        hidden = policy.hidden(self.layout, prompts, tokens, self.has_text, self.item_text)
        return hidden.view(*tokens.shape[:2], -1)

    def start(self, policy: Policy, marker: str) -> Tensor:
        """Hidden states [R, d] of the requests' marker, from which `GroupLayout.branch` goes on."""
        tokens = torch.stack([torch.full_like(self.gap, policy.vocabulary.marker(marker)), self.gap], dim=-1)
        return self.states(policy, np.arange(len(self)), tokens.unsqueeze(1)).squeeze(1)


class HistoryBuilder:
    """Packs histories and requests by the C++ packer."""

    def __init__(
        self,
        shard: Shard,
        log: EventLog,
        trie: Trie,
        vocabulary: CodeVocabulary,
        prior: DevicePrior,
        config: History,
        device: torch.device,
        threads: int,
        text: np.ndarray | None = None,
    ) -> None:
        """``text`` float16 [I, D]: vectors of `item_text`, where positions carry them."""
        self.shard, self.log, self.trie, self.vocabulary, self.prior = shard, log, trie, vocabulary, prior
        self.config, self.device, self.threads = config, device, threads
        self.item_tokens = vocabulary.item_tokens(trie.codes)  # int32 [I, L]
        none = np.full((1, trie.levels), vocabulary.marker("none"), dtype=np.int32)
        self.item_token_ids = put(np.concatenate([self.item_tokens, none]), device).long()  # the last: of no item
        self.item_vectors = None
        if text is not None:
            self.item_vectors = put(np.concatenate([text, np.zeros_like(text[:1])]), device)

    def build(self, users: np.ndarray, moments: np.ndarray, views: np.ndarray | int = MIXED) -> Histories:
        """Requests of ``users`` int [R] at ``moments`` int64 [R] (seconds), each through its view; rows sorted by user
        and moment share histories."""
        size = len(users)
        users, moments = users.astype(np.int32), moments.astype(np.int64)
        views = np.broadcast_to(np.asarray(views, dtype=np.uint8), size).copy()
        first = window_start(events_before(self.log, users, moments) - self.log.user_offsets[users], self.config.window)
        key = np.stack([users, first, views])
        begins = np.ones(size, dtype=bool)
        begins[1:] = (key[:, 1:] != key[:, :-1]).any(0)
        history = np.cumsum(begins) - 1
        packed = self.shard.pack(
            users=users[begins],
            first=first[begins],
            views=views[begins],
            branch_history=history.astype(np.int32),
            moments=moments,
            item_nodes=self.trie.item_nodes,
            threads=self.threads,
        )

        def make_prior() -> RequestPrior:
            days = moments // DAY - 1  # the last whole day before each moment: nothing of the moment's own day
            return self.prior.for_requests(days, SeenNodes.from_packed(packed, self.trie, self.device))

        tokens, item_text, cu_seqlens, prefix = self._tokens(packed)
        gap = put(packed.branch_gap, self.device).long() + self.vocabulary.marker("gap-0")
        layout = GroupLayout.build(cu_seqlens, self.device)
        return Histories(tokens, layout, history, prefix, gap, make_prior, item_text=item_text)

    def _tokens(self, packed: PackedHistories) -> tuple[Tensor, Tensor | None, np.ndarray, np.ndarray]:
        """Tokens [T, S], item texts [T, D], the offsets of both [B + 1] and the requests' prefixes [R]."""
        columns = packed.item, packed.feedback, packed.gap  # item -1: a start
        items, feedback, gaps = (put(column, self.device).long() for column in columns)
        marks = [feedback + self.vocabulary.marker(FEEDBACK[0]), gaps + self.vocabulary.marker("gap-0")]
        codes, prefix = self.item_token_ids[items], packed.prefix.astype(np.int64)
        text = None if self.item_vectors is None else self.item_vectors[items]
        if self.config.positions == "events":
            return torch.cat([codes, torch.stack(marks, dim=-1)], dim=1), text, packed.cu_seqlens, prefix
        an_event = self.trie.levels + 1  # codes, then the feedback, which has the text; of a start the last alone
        none = torch.full_like(codes, self.vocabulary.marker("none"))
        spelt = torch.cat([torch.stack([codes, none], dim=-1), torch.stack(marks, dim=-1).unsqueeze(1)], dim=1)
        is_start = packed.item < 0
        real = np.ones((len(is_start), an_event), dtype=bool)
        real[is_start, :-1] = False
        rows = put(np.flatnonzero(real), self.device)
        if text is not None:
            text = F.pad(text.unsqueeze(1), (0, 0, self.trie.levels, 0)).flatten(0, 1)[rows]
        starts = np.concatenate([[0], np.cumsum(is_start)])
        offsets = packed.cu_seqlens.astype(np.int64) * an_event - starts[packed.cu_seqlens] * self.trie.levels
        return spelt.flatten(0, 1)[rows], text, offsets, 1 + (prefix - 1) * an_event

    def target_tokens(self, markers: Tensor, gap: Tensor, items: Tensor) -> Tensor:
        """Tokens [A, L, 2] after which the codes of ``items`` int64 [A] come: a marker, then all codes but the last."""
        return marked_codes(self.vocabulary, markers, gap, self.item_token_ids[items][:, :-1])


def marked_codes(vocabulary: CodeVocabulary, markers: Tensor, gap: Tensor, codes: Tensor) -> Tensor:
    """Tokens [A, n + 1, 2] of codes int64 [A, n] behind a marker int64 [A], which stands with its ``gap`` int64 [A]."""
    fed = torch.cat([markers.unsqueeze(1), codes], dim=1)
    second = torch.full_like(fed, vocabulary.marker("none"))
    second[:, 0] = gap
    return torch.stack([fed, second], dim=-1)


def text_width(data: Dataset, config: History) -> int:
    """Columns of `item_text` where the settings want it and items have a text or an embedding; else 0."""
    return _core.FEATURE_TEXT if config.text and _of_text(data).any() else 0


def item_text(data: Dataset) -> np.ndarray:
    """Vectors of the items' texts and own embeddings: units along their principal axes, or zeros, float16 [I, D].

    Co-occurrence, the third of what semantic IDs are made of, is left out: it was counted over all train days, so it
    knows what comes after a moment of training (negfast's choice).
    """
    return text_vectors(replace(data.items, vectors=data.embedding[:, _of_text(data)])).astype(np.float16)


def _of_text(data: Dataset) -> np.ndarray:
    """Which columns of the data set's embedding come from texts or own embeddings, bool [D]."""
    blocks = data.manifest["semantic_ids"]["report"]["blocks"]
    return np.concatenate([np.full(width, name != "co-occurrence") for name, width in blocks.items()])


def window_start(events: np.ndarray, window: int) -> np.ndarray:
    """The first event of the history of a request that has ``events`` int [R] of its user before it, int64 [R].

    Histories of more than ``window`` events are cut into windows that overlap by a quarter, so a request sees at least
    that many of the latest events (negfast's choice).
    """
    stride = window - window // 4
    return np.maximum(-(-(events - window) // stride), 0) * stride
