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
    """B histories on the device, and A branches of them, sorted by history.

    ``requests`` are the R branches of which items are generated or given as targets; pruning and prior are theirs.
    """

    tokens: Tensor  # int64 [T, S] of sums, or [T], as `Policy.embed` takes them
    layout: GroupLayout
    history: np.ndarray  # int64 [A], of each branch
    prefix: np.ndarray  # int64 [A], tokens of its history that the branch sees
    gap: Tensor  # int64 [A], token of the time since the last event that it sees
    requests: np.ndarray  # int64 [R], places among the branches
    make_prior: Callable[[], RequestPrior] | None = None
    has_text: bool = False  # whether any token is the decoder's own
    item_text: Tensor | None = None  # float16 [T, D], what each position carries of its item's text

    @classmethod
    def of_prompts(cls, prompts: Sequence[np.ndarray], gap: int, device: torch.device, has_text: bool) -> "Histories":
        """Prompts of tokens int64, with a branch at the end of each; ``gap`` is the token of no time."""
        lengths = np.array([len(prompt) for prompt in prompts])
        layout = GroupLayout.build(np.concatenate([[0], np.cumsum(lengths)]), device)
        gaps = torch.full((len(prompts),), gap, device=device)
        every = np.arange(len(prompts))
        return cls(put(np.concatenate(prompts), device), layout, every, lengths, gaps, every, None, has_text)

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

    def states(self, policy: Policy, branches: np.ndarray, tokens: Tensor, item_text: Tensor | None = None) -> Tensor:
        """Hidden states [N, n, d] of tokens [N, n, S] that continue ``branches`` int [N], ascending; ``item_text``
        [N, n, D] is what these carry of their items' text.

        The first call computes the histories; later ones find their keys and values in the layout.
        """
        self.layout.ask(self.history[branches], self.prefix[branches])
        prompts = None if self.layout.keys else self.tokens
        hidden = policy.hidden(self.layout, prompts, tokens, self.has_text, self.item_text, item_text)
        return hidden.view(*tokens.shape[:2], -1)

    def start(self, policy: Policy, marker: str) -> Tensor:
        """Hidden states [R, d] of the requests' marker, from which `GroupLayout.branch` goes on."""
        gap = self.gap[put(self.requests, self.gap.device)]
        tokens = torch.stack([torch.full_like(gap, policy.vocabulary.marker(marker)), gap], dim=-1)
        return self.states(policy, self.requests, tokens.unsqueeze(1)).squeeze(1)


class HistoryBuilder:
    """Packs histories and branches by the C++ packer."""

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

    def build(
        self,
        users: np.ndarray,
        moments: np.ndarray,
        views: np.ndarray | int = MIXED,
        requests: np.ndarray | None = None,
    ) -> Histories:
        """Branches of ``users`` int [A] at ``moments`` int64 [A] (seconds), each through its view; rows sorted by user
        and moment share histories. ``requests`` bool [A] are those that need pruning and prior; all by default."""
        size = len(users)
        users, moments = users.astype(np.int32), moments.astype(np.int64)
        views = np.broadcast_to(np.asarray(views, dtype=np.uint8), size).copy()
        asked = np.ones(size, dtype=bool) if requests is None else requests
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
            requests=asked,
            item_nodes=self.trie.item_nodes,
            threads=self.threads,
        )

        def make_prior() -> RequestPrior:
            days = moments[asked] // DAY - 1  # the last whole day before each moment: nothing of the moment's own day
            return self.prior.for_requests(days, SeenNodes.from_packed(packed, self.trie, self.device))

        tokens, item_text, cu_seqlens, prefix = self._tokens(packed)
        gap = put(packed.branch_gap, self.device).long() + self.vocabulary.marker("gap-0")
        layout = GroupLayout.build(cu_seqlens, self.device)
        requests_at = np.flatnonzero(asked)
        return Histories(tokens, layout, history, prefix, gap, requests_at, make_prior, item_text=item_text)

    def _tokens(self, packed: PackedHistories) -> tuple[Tensor, Tensor | None, np.ndarray, np.ndarray]:
        """Tokens [T, S], item texts [T, D], the offsets of both [B + 1] and the branches' prefixes [A]."""
        tokens, text = self.tokens_of(packed.item, packed.feedback, packed.gap)
        prefix = packed.prefix.astype(np.int64)
        if self.config.positions == "events":
            return tokens, text, packed.cu_seqlens, prefix
        starts = np.concatenate([[0], np.cumsum(packed.item < 0)])  # of which there is one position
        an_event = self.trie.levels + 1  # codes, then the feedback; of a start the last alone
        offsets = packed.cu_seqlens.astype(np.int64) * an_event - starts[packed.cu_seqlens] * self.trie.levels
        return tokens, text, offsets, 1 + (prefix - 1) * an_event

    def tokens_of(self, item: np.ndarray, feedback: np.ndarray, gap: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Tokens [T, S] and item texts [T, D] of events and starts, columns of `PackedHistories`."""
        is_start = item < 0
        items, feedback_rows, gaps = (put(x, self.device).long() for x in (item, feedback, gap))
        marks = [feedback_rows + self.vocabulary.marker(FEEDBACK[0]), gaps + self.vocabulary.marker("gap-0")]
        codes, text = self.item_token_ids[items], self.text_of(items)
        text = None if text is None else text.flatten(0, 1)
        if self.config.positions == "events":
            return torch.cat([codes, torch.stack(marks, dim=-1)], dim=1), text
        none = torch.full_like(codes, self.vocabulary.marker("none"))
        spelt = torch.cat([torch.stack([codes, none], dim=-1), torch.stack(marks, dim=-1).unsqueeze(1)], dim=1)
        real = np.ones((len(item), self.trie.levels + 1), dtype=bool)
        real[is_start, :-1] = False
        rows = put(np.flatnonzero(real), self.device)
        return spelt.flatten(0, 1)[rows], None if text is None else text[rows]

    def text_of(self, items: Tensor) -> Tensor | None:
        """What the positions of ``items`` int64 [E], -1 for none, carry of their text, float16 [E, n, D]: the vectors,
        at an item's last position; None where texts are left out."""
        if self.item_vectors is None:
            return None
        text = self.item_vectors[items].unsqueeze(1)
        return text if self.config.positions == "events" else F.pad(text, (0, 0, self.trie.levels, 0))

    def add_items(self, codes: np.ndarray, text: np.ndarray | None) -> None:
        """Makes later items known, with codes uint16 [N, L] and, where positions carry texts, their vectors [N, D]:
        histories and candidates may hold them. No list does, as the trie does not have them."""
        tokens = put(self.vocabulary.item_tokens(codes), self.device).long()
        self.item_token_ids = torch.cat([self.item_token_ids[:-1], tokens, self.item_token_ids[-1:]])
        if self.item_vectors is not None:
            assert text is not None
            vectors = put(text, self.device).to(self.item_vectors.dtype)
            self.item_vectors = torch.cat([self.item_vectors[:-1], vectors, self.item_vectors[-1:]])

    def candidate_tokens(self, items: Tensor, gap: Tensor) -> Tensor:
        """Tokens [E, n, S] that ask for a verdict on ``items`` int64 [E], ``gap`` int64 [E] their branches': one
        position, or the item spelt in its codes."""
        verdict = torch.full_like(items, self.vocabulary.marker("verdict"))
        marks, codes = torch.stack([verdict, gap], dim=-1), self.item_token_ids[items]
        if self.config.positions == "events":
            return torch.cat([codes, marks], dim=1).unsqueeze(1)
        none = torch.full_like(codes, self.vocabulary.marker("none"))
        return torch.cat([torch.stack([codes, none], dim=-1), marks.unsqueeze(1)], dim=1)

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


def item_text(data: Dataset, later: np.ndarray | None = None) -> np.ndarray:
    """Vectors of the items' texts and own embeddings: units along their principal axes, or zeros, float16 [I, D].

    Co-occurrence, the third of what semantic IDs are made of, is left out: it was counted over all train days, so it
    knows what comes after a moment of training (negfast's choice). ``later`` [N, E] are embeddings of items that come
    after the data set's.
    """
    items, embedding = data.items, data.embedding
    if later is not None:
        items = replace(items.extended([""] * len(later)), original=items.original or len(items))
        embedding = np.concatenate([embedding, later])
    return text_vectors(replace(items, vectors=embedding[:, _of_text(data)])).astype(np.float16)


def _of_text(data: Dataset) -> np.ndarray:
    """Which columns of the data set's embedding come from texts or own embeddings, bool [D]."""
    blocks = data.manifest["semantic_ids"]["report"]["blocks"]
    return np.concatenate([np.full(width, name != "co-occurrence") for name, width in blocks.items()])


def window_start(events: np.ndarray, window: int) -> np.ndarray:
    """The first event of the history of a branch that has ``events`` int [A] of its user before it, int64 [A].

    Histories of more than ``window`` events are cut into windows that overlap by a quarter, so a branch sees at least
    that many of the latest events (negfast's choice).
    """
    stride = window - window // 4
    return np.maximum(-(-(events - window) // stride), 0) * stride
