"""The group layout: ragged prompts packed without padding, and the completions that branch off them.

One `GroupLayout` travels with a call of a stock transformers decoder (`model(..., layout=layout)` hands it to the
registered attention function) and holds, layer by layer, the keys and values that later calls attend to. Rows of a
call are packed: first the prompts' tokens, if the call holds prompts, then the tokens of one completion after the
other. Linear layers, norms and MLPs therefore touch no padding. Eager attention works on buckets of prompts of similar
length, each padded to its largest.

A prompt is whatever is shared: a user's history, or text. A completion sees the first `prefix` tokens of its prompt and
its own: a target of SFT, what a rollout samples.
"""

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from negfast import staging

FILL = 0.75  # a bucket's shortest prompt is at least this share of its longest,
SLACK = 16  # or this many tokens shorter
TILE = 256  # queries of a prompt and kv head that the CPU attends with at once


@dataclass(frozen=True)
class Bucket:
    """b prompts of similar length, padded to P places. Rows count within the bucket's own packed tokens."""

    pad_index: Tensor | None  # int64 [b * P], packed row of each place; padding points at its prompt's first row
    unpad_index: Tensor | None  # int64 [t], place of each packed row; both None where nothing is padded
    prompts: int
    longest: int
    tokens: int


@dataclass(frozen=True)
class Tile:
    """Queries of a bucket's prompts, and the prompt places that any of them sees."""

    queries: slice
    keys: int
    mask: Tensor  # [b, 1, queries, keys]: 0 where a query sees a place, else -inf


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


@dataclass(frozen=True)
class Completions:
    """A completions, sorted by (prompt, prefix).

    prompt  int64 [A]  the prompt of each
    prefix  int32 [A]  tokens of it that the completion sees
    cell    int64 [A]  its place in the grid of all buckets, in which a bucket's prompts have equally many cells
    sizes   list[int]  cells of a bucket
    most    int        at least the most completions of a prompt
    seen    float      tokens of their prefixes together
    """

    prompt: Tensor
    prefix: Tensor
    cell: Tensor
    sizes: list[int]
    most: int
    seen: float

    def __len__(self) -> int:
        return self.prompt.shape[0]

    def repeated(self, times: int) -> "Completions":
        """``times`` of each, side by side."""
        copy = torch.arange(times, device=self.cell.device)
        return Completions(
            self.prompt.repeat_interleave(times),
            self.prefix.repeat_interleave(times),
            (self.cell[:, None] * times + copy).flatten(),
            [size * times for size in self.sizes],
            self.most * times,
            self.seen * times,
        )

    def take(self, rows: Tensor) -> "Completions":
        """Those at ``rows`` int64, still sorted; the others' cells stay empty. ``seen`` shrinks by their number."""
        seen = self.seen * len(rows) / max(len(self), 1)
        return replace(self, prompt=self.prompt[rows], prefix=self.prefix[rows], cell=self.cell[rows], seen=seen)


@dataclass
class GroupLayout:
    """B prompts of ragged length and the completions that branch off them at the moment.

    lengths       int64 [B]     tokens of each prompt; ``host_lengths`` the same on the host
    cu_seqlens    int32 [B + 1] their offsets
    positions     int64 [T]     position of each packed prompt token
    buckets                     of prompts
    token_order   int64 [T]     packed rows in the order of buckets; None where that is their order anyway
    bucket_order  int64 [B]     prompts in the order of buckets, on the host
    """

    lengths: Tensor
    host_lengths: np.ndarray
    cu_seqlens: Tensor
    positions: Tensor
    buckets: list[Bucket]
    token_order: Tensor | None
    bucket_order: np.ndarray
    holds_prompts: bool = True  # whether the rows of the current call begin with the prompts
    keys_only: bool = False  # while a layer gives nothing but the prompts' keys and values
    new_tokens: int = 0  # tokens that each completion adds in the current call
    past_tokens: int = 0  # tokens that each completion added in earlier calls
    keys: Keys = field(default_factory=Keys)
    _asked: Completions | None = None
    _completions: Completions | None = None
    _offsets: Tensor | None = None  # once asked for
    _tiles: tuple[tuple[int, torch.dtype], list[list[Tile]]] | None = None  # once asked for

    @classmethod
    def build(cls, cu_seqlens: np.ndarray, device: torch.device) -> "GroupLayout":
        """Layout of prompts with offsets ``cu_seqlens`` int [B + 1]."""
        lengths = np.diff(cu_seqlens).astype(np.int64)
        if len(lengths) == 0 or lengths.min() < 1:
            raise ValueError(f"prompt lengths: found {lengths.min() if len(lengths) else 'none'}, expected at least 1")

        def put(array: np.ndarray) -> Tensor:
            return staging.put(array, device)

        order = np.argsort(lengths, kind="stable")
        in_order = bool((order == np.arange(len(order))).all())
        place = np.argsort(order)
        starts = np.repeat(np.asarray(cu_seqlens[:-1], dtype=np.int64), lengths)
        return cls(
            lengths=put(lengths),
            host_lengths=lengths,
            cu_seqlens=put(np.asarray(cu_seqlens, dtype=np.int32)),
            positions=put(np.arange(cu_seqlens[-1]) - starts),
            buckets=[_bucket(lengths[part], put) for part in _similar(order, lengths)],
            token_order=None if in_order else put(np.argsort(np.repeat(place, lengths), kind="stable")),
            bucket_order=order,
        )

    @classmethod
    def of_tensors(cls, cu_seqlens: Tensor, positions: Tensor, longest: int) -> "GroupLayout":
        """Layout for kernels of prompts that the device alone knows: offsets int32 [B + 1], positions int64 [T], at
        most ``longest`` tokens each. Tokens beyond the last offset are of no prompt."""
        prompts = len(cu_seqlens) - 1
        bucket = Bucket(None, None, prompts, longest, len(positions))
        lengths, none = cu_seqlens.diff().long(), np.zeros(0, dtype=np.int64)
        return cls(lengths, none, cu_seqlens, positions, [bucket], None, np.arange(prompts))

    def ask_tensors(self, prompt: Tensor, prefix: Tensor, most: int) -> None:
        """`ask` of such a layout: ``prompt`` int64 [A] ascending (B: of none), ``prefix`` int32 [A], at most ``most`` a
        prompt."""
        self._asked = Completions(prompt, prefix, torch.arange(len(prompt), device=prompt.device), [], most, 0.0)
        self._set(self._asked)

    def ask(self, prompt: np.ndarray, prefix: np.ndarray | None = None) -> None:
        """New completions without tokens: of the prompts ``prompt`` int [A], ascending, each of which sees the first
        ``prefix`` int [A] tokens; all by default. Those of a prompt are best sorted by prefix."""
        device, counts = self.lengths.device, np.bincount(prompt, minlength=self.prompts)
        sizes: list[int] = []
        base = np.empty(self.prompts, dtype=np.int64)
        for part in np.split(self.bucket_order, np.cumsum([bucket.prompts for bucket in self.buckets])[:-1]):
            most = max(int(counts[part].max()), 1)
            base[part] = sum(sizes) + np.arange(len(part)) * most
            sizes.append(len(part) * most)
        number = np.arange(len(prompt)) - (np.cumsum(counts) - counts)[prompt]
        if prefix is None:
            prefix = self.host_lengths[prompt]
        self._asked = Completions(
            staging.put(prompt.astype(np.int64), device),
            staging.put(prefix.astype(np.int32), device),
            staging.put(base[prompt] + number, device),
            sizes,
            max(int(counts.max()), 1),
            float(prefix.sum()),
        )
        self._set(self._asked)
        self._drop_own()

    def branch(self, parents: Tensor, times: int, rows: Tensor | None = None) -> None:
        """Completions that continue the present ones at ``parents`` int64 [A']: of ``times`` of each that was asked for
        those at ``rows`` int64 [A'], or all."""
        assert self._asked is not None
        repeated = self._asked.repeated(times)
        self._set(repeated if rows is None else repeated.take(rows))
        for layer in self.keys.values():
            if layer.own_key is not None and layer.own_value is not None:
                layer.own_key, layer.own_value = layer.own_key[parents], layer.own_value[parents]

    def fresh(self) -> "GroupLayout":
        """A layout of the same prompts, and the completions that were asked for, with nothing computed yet."""
        layout = replace(self, keys=Keys(), past_tokens=0, new_tokens=0)
        if self._asked is not None:
            layout._set(self._asked)
        return layout

    def _drop_own(self) -> None:
        self.past_tokens = self.new_tokens = 0
        for layer in self.keys.values():
            layer.own_key = layer.own_value = None

    def _set(self, completions: Completions) -> None:
        self._completions, self._offsets, self._tiles = completions, None, None

    @property
    def completions(self) -> Completions:
        assert self._completions is not None, "layout.ask comes first"
        return self._completions

    @property
    def prompts(self) -> int:
        return self.lengths.shape[0]

    @property
    def prompt_tokens(self) -> int:
        return self.positions.shape[0]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(bucket.longest for bucket in self.buckets)

    @property
    def completion_offsets(self) -> Tensor:
        """Where each prompt's completions begin, int32 [B + 1] from 0 to A."""
        if self._offsets is None:
            prompts = torch.arange(self.prompts + 1, device=self.lengths.device)
            self._offsets = torch.searchsorted(self.completions.prompt, prompts, out_int32=True)
        return self._offsets

    def tiles(self, queries: int, dtype: torch.dtype) -> list[list[Tile]]:
        """Of every bucket the queries of all cells side by side, ``queries`` of each, cut as prefixes grow: on the CPU
        a tile leaves out the keys that none of its queries sees. An empty cell sees the first place."""
        if self._tiles is None or self._tiles[0] != (queries, dtype):
            completions, tiles = self.completions, []
            prefix = torch.ones(sum(completions.sizes), dtype=torch.int32, device=self.lengths.device)
            prefix.index_copy_(0, completions.cell, completions.prefix)
            for bucket, of_bucket in zip(self.buckets, prefix.split(completions.sizes), strict=True):
                seen = of_bucket.view(bucket.prompts, -1).repeat_interleave(queries, dim=1)
                tiles.append([_tile(part, start, bucket.longest, dtype) for start, part in _parts(seen)])
            self._tiles = (queries, dtype), tiles
        return self._tiles[1]

    def completion_positions(self) -> Tensor:
        """Position of each completion token of the current call, int64 [A * n]: they follow the prefix."""
        step = torch.arange(self.past_tokens, self.past_tokens + self.new_tokens, device=self.lengths.device)
        return (self.completions.prefix[:, None] + step).reshape(-1)


def _similar(rows: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Splits ``rows``, ascending in length, where padding to the longest would waste more than is allowed."""
    parts, end = [], len(rows)
    while end:
        longest = lengths[rows[end - 1]]
        start = int(np.searchsorted(lengths[rows[:end]], min(FILL * longest, longest - SLACK)))
        parts.append(rows[start:end])
        end = start
    return parts[::-1]


def _bucket(lengths: np.ndarray, put: Callable[[np.ndarray], Tensor]) -> Bucket:
    longest, tokens = int(lengths[-1]), int(lengths.sum())
    real = np.arange(longest) < lengths[:, None]
    first = np.cumsum(lengths) - lengths
    full = bool(real.all())
    return Bucket(
        pad_index=None if full else put((first[:, None] + np.where(real, np.arange(longest), 0)).reshape(-1)),
        unpad_index=None if full else put(np.flatnonzero(real)),
        prompts=len(lengths),
        longest=longest,
        tokens=tokens,
    )


def _parts(seen: Tensor) -> list[tuple[int, Tensor]]:
    """Queries [b, Q] cut into tiles [b, q], with the first query of each."""
    if seen.device.type != "cpu":  # elsewhere to know how far a tile sees would make the host wait
        return [(0, seen)]
    return [(start, seen[:, start : start + TILE]) for start in range(0, seen.shape[1], TILE)]


def _tile(seen: Tensor, start: int, longest: int, dtype: torch.dtype) -> Tile:
    """The tile of queries that see the first ``seen`` [b, q] places of their prompts."""
    keys = int(seen.max()) if seen.device.type == "cpu" else longest
    hidden = torch.arange(max(keys, 1), device=seen.device) >= seen[:, None, :, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=seen.device).masked_fill_(hidden, -torch.inf)
    return Tile(slice(start, start + seen.shape[1]), max(keys, 1), mask)
