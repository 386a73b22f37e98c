"""The group layout: ragged prompts packed without padding, and the answers that share each of them.

One `GroupLayout` travels with a call of a stock transformers decoder (`model(..., layout=layout)` hands it to the
registered attention function) and holds, layer by layer, the keys and values that later calls attend to. Rows of a
call are packed: first the prompts' tokens, if the call holds prompts, then the answers' tokens, answer by answer.
Linear layers, norms and MLPs therefore touch no padding. Attention works on buckets of prompts of similar length,
each padded to its longest.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

FILL = 0.75  # a bucket's shortest prompt is at least this share of its longest


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
    """What one layer keeps: per bucket the prompts' keys and values [b, Hk, P, D], and the answers' own [A, n, Hk, D]."""

    prompt_key: list[Tensor]
    prompt_value: list[Tensor]
    own_key: Tensor | None = None
    own_value: Tensor | None = None


@dataclass
class GroupLayout:
    """B prompts of ragged length, A answers, each belonging to one prompt.

    lengths       int64 [B]     tokens of each prompt
    positions     int64 [T]     position of each packed prompt token
    buckets                     of prompts, ascending in length
    token_order   int64 [T]     packed rows in the order of buckets; None where that is their order anyway
    bucket_place  int64 [B]     place of each prompt in the order of buckets
    slots         int64 [A]     place of each answer in the grid [B, G], flattened; ascending
    group         int           G, at least the largest number of answers of a prompt
    """

    lengths: Tensor
    positions: Tensor
    buckets: list[Bucket]
    token_order: Tensor | None
    bucket_place: Tensor | None
    slots: Tensor
    group: int
    holds_prompts: bool = True  # whether the rows of the current call begin with the prompts
    new_tokens: int = 0  # tokens that each answer adds in the current call
    past_tokens: int = 0  # tokens that each answer added in earlier calls
    keys: dict[int, LayerKeys] = field(default_factory=dict)

    @classmethod
    def build(cls, cu_seqlens: np.ndarray, answers_per_prompt: np.ndarray | int, device: torch.device) -> "GroupLayout":
        """Layout of prompts with offsets ``cu_seqlens`` int [B + 1] and 0 or more answers each."""
        lengths = np.diff(cu_seqlens).astype(np.int64)
        if len(lengths) == 0 or lengths.min() < 1:
            raise ValueError(f"prompt lengths: found {lengths.min() if len(lengths) else 'none'}, expected at least 1")

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

        order = np.argsort(lengths, kind="stable")
        starts = np.repeat(np.asarray(cu_seqlens[:-1], dtype=np.int64), lengths)
        positions = np.arange(cu_seqlens[-1]) - starts
        in_order = bool((order == np.arange(len(order))).all())
        token_order = np.argsort(np.repeat(np.argsort(order), lengths), kind="stable")
        counts = np.broadcast_to(np.asarray(answers_per_prompt, dtype=np.int64), len(lengths))
        group = max(int(counts.max()), 1)
        return cls(
            lengths=put(lengths),
            positions=put(positions),
            buckets=[_bucket(part, put) for part in _similar(lengths[order])],
            token_order=None if in_order else put(token_order),
            bucket_place=None if in_order else put(np.argsort(order)),
            slots=put(np.flatnonzero(np.arange(group) < counts[:, None])),
            group=group,
        )

    def fresh(self, slots: Tensor, group: int) -> "GroupLayout":
        """A layout of the same prompts for other answers, with nothing computed yet."""
        return GroupLayout(
            self.lengths, self.positions, self.buckets, self.token_order, self.bucket_place, slots, group
        )

    @property
    def prompts(self) -> int:
        return self.lengths.shape[0]

    @property
    def prompt_tokens(self) -> int:
        return self.positions.shape[0]

    @property
    def answers(self) -> int:
        return self.slots.shape[0]

    @property
    def answer_prompt(self) -> Tensor:
        """The prompt of each answer, int64 [A]."""
        return self.slots // self.group

    @property
    def last_prompt_row(self) -> Tensor:
        """The packed row of each prompt's last token, int64 [B]."""
        return self.lengths.cumsum(0) - 1

    def grid_places(self) -> Tensor | None:
        """The place of each answer in the grid of prompts in the order of buckets, int64 [A]; None where answers fill
        the grid in that order already."""
        if self.bucket_place is not None:
            return self.bucket_place[self.answer_prompt] * self.group + self.slots % self.group
        return None if self.answers == self.prompts * self.group else self.slots

    def answer_positions(self) -> Tensor:
        """Position of each answer token of the current call, int64 [A * n]: an answer follows its prompt."""
        step = torch.arange(self.past_tokens, self.past_tokens + self.new_tokens, device=self.slots.device)
        return (self.lengths[self.answer_prompt][:, None] + step).reshape(-1)

    def keep(self, rows: Tensor) -> None:
        """Go on with the answers ``rows`` int64 [A'] only, ascending indices into the present ones."""
        self.slots = self.slots[rows]
        for layer in self.keys.values():
            if layer.own_key is not None and layer.own_value is not None:
                layer.own_key, layer.own_value = layer.own_key[rows], layer.own_value[rows]

    def replace(self, parents: Tensor, slots: Tensor, group: int) -> None:
        """New answers that go on from the answers ``parents`` int64 [A'], in new ``slots`` int64 [A'] of [B, group]."""
        self.keep(parents)
        self.slots, self.group = slots, group


def _similar(ascending: np.ndarray) -> list[np.ndarray]:
    """Splits ascending lengths where padding to the longest would waste more than ``FILL`` allows."""
    parts, end = [], len(ascending)
    while end:
        start = int(np.searchsorted(ascending[:end], FILL * ascending[end - 1]))
        parts.append(ascending[start:end])
        end = start
    return parts[::-1]


def _bucket(lengths: np.ndarray, put) -> Bucket:  # noqa: ANN001
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
