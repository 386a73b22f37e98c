"""From (user, day) to what the policy reads: packed prompts, their group layout, pruning and prior."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from negfast.config import Prompt
from negfast.data.log import DAY
from negfast.data.shards import Shard
from negfast.model.layout import GroupLayout
from negfast.sid.prior import DevicePrior, RequestPrior
from negfast.sid.tokens import CodeVocabulary
from negfast.sid.trie import SeenNodes, Trie
from negfast.staging import put

NEGATIVE_ONLY, POSITIVE_ONLY, MIXED = 2, 1, 3  # views: bit 0 shows the likes, bit 1 the dislikes


@dataclass(frozen=True)
class PromptBatch:
    """B prompts on the device, ready for a call of the policy."""

    tokens: Tensor  # int64 [T]
    layout: GroupLayout
    make_prior: Callable[[], RequestPrior]

    @cached_property
    def prior(self) -> RequestPrior:
        """Pruning and prior of the requests, made when first asked for (verdicts need neither)."""
        return self.make_prior()

    def with_prior(self) -> "PromptBatch":
        """The same with its prior made."""
        _ = self.prior
        return self


class PromptBuilder:
    """Packs prompts of (user, day) by the C++ packer: context is every event up to the end of that day."""

    def __init__(
        self,
        shard: Shard,
        trie: Trie,
        vocabulary: CodeVocabulary,
        prior: DevicePrior,
        trending: np.ndarray,
        config: Prompt,
        device: torch.device,
        threads: int,
    ) -> None:
        """``trending`` int32 [D, T]: the most disliked items at the end of each of the prior's days, -1 padded."""
        self.shard, self.trie, self.vocabulary, self.prior = shard, trie, vocabulary, prior
        self.trending, self.config, self.device, self.threads = trending, config, device, threads
        self.item_tokens = vocabulary.item_tokens(trie.codes)  # int32 [I, L], for the packer
        self.item_token_ids = torch.from_numpy(self.item_tokens).to(device).long()

    def build(
        self,
        users: np.ndarray,
        days: np.ndarray,
        views: np.ndarray | int,
        completions_per_prompt: np.ndarray | int,
        tail: str | None = None,
        trending: bool = True,
    ) -> PromptBatch:
        """Prompts of ``users`` int [B] at the end of ``days`` int [B], each seen through its view.

        ``tail`` names the marker that ends every prompt; ``trending`` says whether the trending segment is shown.
        Pruning and prior know the whole history whatever is shown.
        """
        size = len(users)
        rows = np.asarray(days, dtype=np.int64) - self.prior.first_day
        shown = trending and self.config.trending_cap > 0
        packed = self.shard.pack(
            users=np.asarray(users, dtype=np.int32),
            cut=(np.asarray(days, dtype=np.int64) + 1) * DAY,
            views=np.broadcast_to(np.asarray(views, dtype=np.uint8), size).copy(),
            like_cap=self.config.like_cap,
            dislike_cap=self.config.dislike_cap,
            item_tokens=self.item_tokens,
            item_nodes=self.trie.item_nodes,
            markers=(
                self.vocabulary.marker("likes"),
                self.vocabulary.marker("dislikes"),
                self.vocabulary.marker("trending"),
            ),
            trending=self.trending,
            trending_row=rows.astype(np.int32) if shown else np.full(size, -1, dtype=np.int32),
            tail=np.full(size, -1 if tail is None else self.vocabulary.marker(tail), dtype=np.int32),
            timeline=self.config.layout == "timeline",
            threads=self.threads,
        )
        tokens = put(packed.tokens, self.device).long()
        layout = GroupLayout.build(packed.cu_seqlens, completions_per_prompt, self.device)

        def make_prior() -> RequestPrior:
            return self.prior.for_requests(days, SeenNodes.from_packed(packed, self.trie, self.device))

        return PromptBatch(tokens, layout, make_prior)


def trending_items(dislike_mass: np.ndarray, top: int) -> np.ndarray:
    """The ``top`` items of largest dislike mass at the end of each day, int32 [D, top], best first, -1 padded.

    ``dislike_mass`` float64 [D, I] as from `negfast.sid.prior.decayed_mass`. Ties go to the lower item
    index.
    """
    top = min(top, dislike_mass.shape[1])
    best = np.argsort(-dislike_mass, axis=1, kind="stable")[:, :top].astype(np.int32)
    return np.where(np.take_along_axis(dislike_mass, best, 1) > 0, best, -1).astype(np.int32)
