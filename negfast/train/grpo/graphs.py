"""The forwards of a rollout and of the reference policy as CUDA graphs: a launch each, where eager code makes hundreds.

They compute no gradients, and their inputs are padded to a few sizes: tensors at fixed addresses, which a graph reads
anew at each replay. Rows beyond the last history or request belong to none: attention leaves them out, and what they
hold is never read. What is sampled and everything with gradients stays eager.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from negfast.kernels.dispatch import HEAD_DIMS, runs_triton
from negfast.model.histories import Histories, marked_codes
from negfast.model.layout import GroupLayout
from negfast.model.policy import Policy
from negfast.sid.prior import MARKERS, NEXT_DISLIKE
from negfast.staging import put

MOST = 16  # sizes that graphs are kept for; batches of others run eagerly


class Sizes(NamedTuple):
    """What the shapes and grids of a rollout's launches depend on, rounded up except ``histories``."""

    tokens: int
    requests: int
    histories: int
    longest: int
    most: int  # requests of a history

    @classmethod
    def of(cls, histories: Histories) -> "Sizes":
        layout = histories.layout
        most = np.bincount(histories.history).max()
        return cls(
            eighths(layout.prompt_tokens),
            eighths(len(histories)),
            layout.prompts,
            1 << (layout.longest - 1).bit_length(),
            1 << int(most - 1).bit_length(),
        )


def eighths(size: int) -> int:
    """``size`` rounded up to a multiple of an eighth of the power of two below it."""
    unit = max((1 << size.bit_length() - 1) // 8, 1)
    return -(-size // unit) * unit


@dataclass
class RolloutGraphs:
    """Graphs for groups of ``group`` completions. To be asked within `Policy.weights_cast_once`, whose copies of the
    weights they read."""

    policy: Policy
    reference: Policy | None
    group: int
    kept: dict[Any, "StaticForwards"] = field(default_factory=dict)
    failed: bool = False

    def load(self, histories: Histories) -> "StaticForwards | None":
        """The forwards of histories, whose inputs are in place; None where they are to run eagerly."""
        if self.failed or not self._possible(histories.tokens.device):
            return None
        sizes = Sizes.of(histories)
        key = sizes, histories.tokens.shape[1:]
        if key in self.kept:
            self.kept[key].load(histories)
        elif len(self.kept) < MOST:
            forwards = StaticForwards(self.policy, self.reference, self.group, sizes, histories)
            try:
                forwards.capture()
            except RuntimeError as error:
                self.failed = True
                print(f"GRPO rolls out without CUDA graphs: {str(error).splitlines()[0]}", file=sys.stderr)
                return None
            self.kept[key] = forwards
        return self.kept.get(key)

    def _possible(self, device: torch.device) -> bool:
        """Whether all that the forwards launch can be captured and finds its weights where they were."""
        policy = self.policy
        casts = not policy.in_bfloat16 or any(copies.used for copies in policy.copies)
        kernels = runs_triton(device, "attention") and policy.decoder.config.head_dim in HEAD_DIMS
        return device.type == "cuda" and kernels and casts and not policy.bare_layers


class StaticForwards:
    """The rollout's forwards and the reference policy's for histories of certain sizes.

    tokens      int64 [T, S] or [T], cu_seqlens int32 [B + 1], positions int64 [T]   of the histories
    prompt      int64 [R]   the history of each request; B of padding
    prefix      int32 [R]   positions of it that the request sees; gap int64 [R] the token of the time since
    codes       int64 [R * G, L - 1]   tokens of the completions' codes, level by level as they are sampled
    """

    def __init__(
        self, policy: Policy, reference: Policy | None, group: int, sizes: Sizes, histories: Histories
    ) -> None:
        device, vocabulary = histories.tokens.device, policy.vocabulary

        def filled(value: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.policy, self.reference, self.group, self.sizes = policy, reference, group, sizes
        self.none = vocabulary.marker("none")
        self.tokens = filled(self.none, sizes.tokens, *histories.tokens.shape[1:])
        self.positions = filled(0, sizes.tokens)
        self.cu_seqlens = filled(0, sizes.histories + 1, dtype=torch.int32)
        self.prompt, self.gap = filled(sizes.histories, sizes.requests), filled(self.none, sizes.requests)
        self.prefix = filled(0, sizes.requests, dtype=torch.int32)
        self.codes = filled(vocabulary.code_base(1), sizes.requests * group, vocabulary.levels - 1)
        self.owner = torch.arange(sizes.requests * group, device=device) // group
        self.forwards: list[Callable[[], Tensor]] = []
        self.load(histories)

    def load(self, histories: Histories) -> None:
        """Puts the inputs of a batch in place."""
        layout, requests = histories.layout, len(histories)
        self.tokens[: len(histories.tokens)].copy_(histories.tokens)
        self.positions[: layout.prompt_tokens].copy_(layout.positions)
        self.cu_seqlens.copy_(layout.cu_seqlens)
        rows = np.zeros((2, self.sizes.requests), dtype=np.int64)
        rows[0, requests:] = self.sizes.histories
        rows[:, :requests] = histories.history, histories.prefix
        prompt, prefix = put(rows, self.gap.device)
        self.prompt.copy_(prompt)
        self.prefix.copy_(prefix)
        self.gap[:requests].copy_(histories.gap)
        self.requests = requests

    def capture(self) -> None:
        levels = range(2, self.policy.vocabulary.levels + 1)
        parts: list[Callable[[], Tensor]] = [self._start, *(partial(self._level, level) for level in levels)]
        if self.reference is not None:
            parts.append(self._reference)
        with torch.no_grad():
            self.forwards = replayed(parts)

    def start(self) -> Tensor:
        """Hidden states [R, d] after the marker of each request."""
        return self.forwards[0]()[: self.requests]

    def level(self, level: int, tokens: Tensor) -> Tensor:
        """Hidden states [R * G, d] after the codes before a level in 2..L, of which ``tokens`` int64 [R * G] are the
        last."""
        self.codes[: len(tokens), level - 2].copy_(tokens)
        return self.forwards[level - 1]()[: len(tokens)]

    def of_reference(self) -> Tensor:
        """Hidden states [R * G, L, d] of the reference policy before each code."""
        return self.forwards[-1]()[: self.requests * self.group]

    def _layout(self) -> GroupLayout:
        layout = GroupLayout.of_tensors(self.cu_seqlens, self.positions, self.sizes.longest)
        layout.ask_tensors(self.prompt, self.prefix, self.sizes.most)
        return layout

    def _start(self) -> Tensor:
        self.layout = self._layout()
        marker = torch.full_like(self.gap, self.policy.vocabulary.marker(MARKERS[NEXT_DISLIKE]))
        return self.policy.hidden(self.layout, self.tokens, torch.stack([marker, self.gap], dim=-1).unsqueeze(1))

    def _level(self, level: int) -> Tensor:
        if level == 2:  # before it a request is one row
            self.layout.branch(self.owner, self.group)
        return self.policy.hidden(self.layout, None, self.codes[:, level - 2 : level - 1])

    def _reference(self) -> Tensor:
        assert self.reference is not None
        layout, gap = self._layout(), self.gap[self.owner]
        layout.branch(self.owner, self.group)
        marker = torch.full_like(gap, self.policy.vocabulary.marker(MARKERS[NEXT_DISLIKE]))
        fed = marked_codes(self.policy.vocabulary, marker, gap, self.codes)
        return self.reference.hidden(layout, self.tokens, fed).unflatten(0, fed.shape[:2])


def replayed(parts: Sequence[Callable[[], Tensor]]) -> list[Callable[[], Tensor]]:
    """Each of ``parts``, functions of tensors that stay where they are, as a replay of its CUDA graph. They run once
    before, in order, so that kernels are compiled. Raises RuntimeError where a part cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for part in parts:
            part()
    torch.cuda.current_stream().wait_stream(stream)
    found: list[Callable[[], Tensor]] = []
    for part in parts:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=_pool(), capture_error_mode="thread_local"):  # other threads read ahead
            out = part()
        found.append(partial(_replay, graph, out))
    return found


@cache
def _pool() -> Any:
    """Memory of all graphs: those of one size run from first to last before those of another, so they may share it."""
    return torch.cuda.graph_pool_handle()


def _replay(graph: torch.cuda.CUDAGraph, out: Tensor) -> Tensor:
    graph.replay()
    return out
