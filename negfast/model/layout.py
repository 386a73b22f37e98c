"""The group layout: ragged prompts packed without padding, and the completions that share each of them.

One `GroupLayout` travels with a call of a stock transformers decoder (`model(..., layout=layout)` hands it to the
registered attention function) and holds, layer by layer, the keys and values that later calls attend to. Rows of a
call are packed: first the prompts' tokens, if the call holds prompts, then the tokens of one completion after the
other. Linear layers, norms and MLPs therefore touch no padding. Attention works on buckets of prompts of similar length
and similar number of completions, each padded to its largest.

A completion is whatever follows a shared prompt: what a rollout samples, a target of SFT, a candidate of a verdict.
"""

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from negfast import staging

FILL = 0.75  # a bucket's shortest prompt is at least this share of its longest
CROWD = 4.0  # a bucket's numbers of completions differ by less than this factor

PromptRows = Literal["all", "last", "none"]


@dataclass(frozen=True)
class Bucket:
    """b prompts of similar length, padded to P places. Rows count within the bucket's own packed tokens."""

    pad_index: Tensor  # int64 [b * P], packed row of each place; padding points at its prompt's first row
    unpad_index: Tensor | None  # int64 [t], place of each packed row; None where nothing is padded
    mask: Tensor | None  # bool [b, P]; None where nothing is padded
    prompts: int
    longest: int
    tokens: int


@dataclass
class LayerKeys:
    """What one layer keeps: the prompts' keys and values, per bucket [b, Hk, P, D], or where kernels compute all of
    them packed, [T, Hk, D]; the completions' own [A, n, Hk, D]."""

    prompt_key: list[Tensor]
    prompt_value: list[Tensor]
    own_key: Tensor | None = None
    own_value: Tensor | None = None

    def append_own(self, key: Tensor, value: Tensor) -> None:
        """Keys and values [A, n, Hk, D] of the completions' new tokens."""
        if self.own_key is not None and self.own_value is not None:
            key, value = torch.cat([self.own_key, key], dim=1), torch.cat([self.own_value, value], dim=1)
        self.own_key, self.own_value = key, value

    def own(self) -> tuple[Tensor, Tensor]:
        assert self.own_key is not None and self.own_value is not None
        return self.own_key, self.own_value


class Keys(UserDict[int, LayerKeys]):
    """What every layer keeps, by the layer's number. Not a dict: FSDP2 looks into those of a layer's arguments and goes
    on with a copy where tensors have gradients."""


@dataclass
class GroupLayout:
    """B prompts of ragged length, A completions, each belonging to one prompt.

    lengths       int64 [B]     tokens of each prompt
    cu_seqlens    int32 [B + 1] their offsets
    positions     int64 [T]     position of each packed prompt token
    buckets                     of prompts
    token_order   int64 [T]     packed rows in the order of buckets; None where that is their order anyway
    place         int64 [B]     place of each prompt in the order of buckets
    slots         int64 [A]     prompt * group + number of each completion; ascending
    group         int           at least the largest number of completions of a prompt
    cells         list[int]     cells that each bucket's grid has for a prompt's completions
    grid_base     int64 [B]     first cell of each prompt in the grid of all buckets
    """

    lengths: Tensor
    cu_seqlens: Tensor
    positions: Tensor
    buckets: list[Bucket]
    token_order: Tensor | None
    place: Tensor
    slots: Tensor
    group: int
    cells: list[int]
    grid_base: Tensor
    holds_prompts: bool = True  # whether the rows of the current call begin with the prompts
    prompt_rows: PromptRows = "all"  # of the current call's prompts, the rows whose hidden states it gives
    keys_only: bool = False  # while a layer gives nothing but the prompts' keys and values
    new_tokens: int = 0  # tokens that each completion adds in the current call
    past_tokens: int = 0  # tokens that each completion added in earlier calls
    keys: Keys = field(default_factory=Keys)
    _completion_offsets: Tensor | None = None  # once asked for

    @classmethod
    def build(
        cls, cu_seqlens: np.ndarray, completions_per_prompt: np.ndarray | int, device: torch.device
    ) -> "GroupLayout":
        """Layout of prompts with offsets ``cu_seqlens`` int [B + 1] and 0 or more completions each."""
        lengths = np.diff(cu_seqlens).astype(np.int64)
        if len(lengths) == 0 or lengths.min() < 1:
            raise ValueError(f"prompt lengths: found {lengths.min() if len(lengths) else 'none'}, expected at least 1")

        def put(array: np.ndarray) -> Tensor:
            return staging.put(array, device)

        counts = np.broadcast_to(np.asarray(completions_per_prompt, dtype=np.int64), len(lengths))
        crowd = np.log(np.maximum(counts, 1)) // np.log(CROWD)
        order = np.lexsort((lengths, crowd))
        parts = [part for c in np.unique(crowd) for part in _similar(order[crowd[order] == c], lengths)]
        cells = [max(int(counts[part].max()), 1) for part in parts]
        starts = np.repeat(np.asarray(cu_seqlens[:-1], dtype=np.int64), lengths)
        in_order = bool((order == np.arange(len(order))).all())
        place = np.argsort(order)
        token_order = np.argsort(np.repeat(place, lengths), kind="stable")
        of_bucket = np.repeat(cells, [len(part) for part in parts])
        group = max(cells)
        return cls(
            lengths=put(lengths),
            cu_seqlens=put(np.asarray(cu_seqlens, dtype=np.int32)),
            positions=put(np.arange(cu_seqlens[-1]) - starts),
            buckets=[_bucket(lengths[part], put) for part in parts],
            token_order=None if in_order else put(token_order),
            place=put(place),
            slots=put(np.flatnonzero(np.arange(group) < counts[:, None])),
            group=group,
            cells=cells,
            grid_base=put((np.cumsum(of_bucket) - of_bucket)[place]),
        )

    def fresh(self, slots: Tensor, group: int) -> "GroupLayout":
        """A layout of the same prompts for other completions, with nothing computed yet."""
        layout = replace(self, keys=Keys(), past_tokens=0, new_tokens=0)
        layout.set_completions(slots, group)
        return layout

    def set_completions(self, slots: Tensor, group: int) -> None:
        """New completions at ``slots`` int64 [A], up to ``group`` of each prompt."""
        self.slots, self.group, self._completion_offsets = slots, group, None
        self.cells = [group] * len(self.buckets)
        self.grid_base = self.place * group

    @property
    def prompts(self) -> int:
        return self.lengths.shape[0]

    @property
    def prompt_tokens(self) -> int:
        return self.positions.shape[0]

    @property
    def completions(self) -> int:
        return self.slots.shape[0]

    @property
    def completion_prompt(self) -> Tensor:
        """The prompt of each completion, int64 [A]."""
        return self.slots // self.group

    @property
    def completion_offsets(self) -> Tensor:
        """Where each prompt's completions begin, int32 [B + 1] from 0 to A."""
        if self._completion_offsets is None:
            first_slots = torch.arange(self.prompts + 1, device=self.slots.device) * self.group
            self._completion_offsets = torch.searchsorted(self.slots, first_slots, out_int32=True)
        return self._completion_offsets

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(bucket.longest for bucket in self.buckets)

    @property
    def last_prompt_row(self) -> Tensor:
        """The packed row of each prompt's last token, int64 [B]."""
        return self.lengths.cumsum(0) - 1

    @property
    def grid_size(self) -> int:
        return sum(bucket.prompts * cells for bucket, cells in zip(self.buckets, self.cells, strict=True))

    def grid_places(self) -> Tensor | None:
        """The cell of each completion in the grid of all buckets, int64 [A]; None where they fill it in order."""
        if self.token_order is None and self.completions == self.grid_size:
            return None
        return self.grid_base[self.completion_prompt] + self.slots % self.group

    def completion_positions(self) -> Tensor:
        """Position of each completion token of the current call, int64 [A * n]: a completion follows its prompt."""
        step = torch.arange(self.past_tokens, self.past_tokens + self.new_tokens, device=self.slots.device)
        return (self.lengths[self.completion_prompt][:, None] + step).reshape(-1)

    def keep(self, rows: Tensor) -> None:
        """Keeps the completions ``rows`` int64 [A'] only, ascending indices into the present ones."""
        self.slots, self._completion_offsets = self.slots[rows], None
        for layer in self.keys.values():
            if layer.own_key is not None and layer.own_value is not None:
                layer.own_key, layer.own_value = layer.own_key[rows], layer.own_value[rows]

    def branch(self, parents: Tensor, slots: Tensor, group: int) -> None:
        """New completions that extend the completions ``parents`` int64 [A'], at ``slots`` int64 [A']."""
        self.keep(parents)
        self.set_completions(slots, group)


def _similar(rows: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Splits ``rows``, ascending in length, where padding to the longest would waste more than ``FILL`` allows."""
    parts, end = [], len(rows)
    while end:
        start = int(np.searchsorted(lengths[rows[:end]], FILL * lengths[rows[end - 1]]))
        parts.append(rows[start:end])
        end = start
    return parts[::-1]


def _bucket(lengths: np.ndarray, put: Callable[[np.ndarray], Tensor]) -> Bucket:
    longest, tokens = int(lengths[-1]), int(lengths.sum())
    place = np.arange(longest)
    mask = place < lengths[:, None]
    first = np.cumsum(lengths) - lengths
    pad_index = (first[:, None] + np.where(mask, place, 0)).reshape(-1)
    full = bool(mask.all())
    return Bucket(
        pad_index=put(pad_index),
        unpad_index=None if full else put(np.flatnonzero(mask)),
        mask=None if full else put(mask),
        prompts=len(lengths),
        longest=longest,
        tokens=tokens,
    )
