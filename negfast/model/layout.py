"""The group layout: ragged prompts packed without padding, and the answers that share each of them.

One `GroupLayout` travels with a call of a stock transformers decoder (`model(..., layout=layout)` hands it to the
registered attention function) and holds, layer by layer, the keys and values that later calls attend to. Rows of a
call are packed: first the prompts' tokens, if the call holds prompts, then the answers' tokens, answer by answer.
Linear layers, norms and MLPs therefore touch no padding; only attention works on padded grids.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass
class LayerKeys:
    """What one layer keeps: the prompts' keys and values [B, Hk, P, D], and the answers' own [A, n, Hk, D]."""

    prompt_key: Tensor
    prompt_value: Tensor
    own_key: Tensor | None = None
    own_value: Tensor | None = None


@dataclass
class GroupLayout:
    """B prompts of ragged length, A answers, each belonging to one prompt.

    lengths       int64 [B]     tokens of each prompt
    pad_index     int64 [B, P]  packed row of each padded place; padding points at the prompt's first row
    unpad_index   int64 [T]     place in [B * P] of each packed row
    prompt_mask   bool  [B, P]
    slots         int64 [A]     place of each answer in the padded grid [B, G], flattened
    group         int           G, the largest number of answers of a prompt
    """

    lengths: Tensor
    pad_index: Tensor
    unpad_index: Tensor
    prompt_mask: Tensor
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
        prompts, longest = len(lengths), int(lengths.max())
        place = np.arange(longest)
        mask = place < lengths[:, None]
        pad_index = np.asarray(cu_seqlens[:-1], dtype=np.int64)[:, None] + np.where(mask, place, 0)
        unpad_index = np.flatnonzero(mask)
        counts = np.broadcast_to(np.asarray(answers_per_prompt, dtype=np.int64), prompts)
        group = max(int(counts.max()), 1)
        slots = np.flatnonzero(np.arange(group) < counts[:, None])

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

        return cls(put(lengths), put(pad_index), put(unpad_index), put(mask), put(slots), group)

    @property
    def prompts(self) -> int:
        return self.prompt_mask.shape[0]

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

    def prompt_positions(self) -> Tensor:
        """Position of each packed prompt token, int64 [T]."""
        return self.unpad_index % self.prompt_mask.shape[1]

    def answer_positions(self) -> Tensor:
        """Position of each answer token of the current call, int64 [A * n]: an answer follows its prompt."""
        step = torch.arange(self.past_tokens, self.past_tokens + self.new_tokens, device=self.slots.device)
        return (self.lengths[self.answer_prompt][:, None] + step).reshape(-1)

    def keep(self, rows: Tensor) -> None:
        """Keep only the answers ``rows`` (int64 [A'], indices into the present ones, repeats allowed for beams
        of the same prompt as long as each has a slot of its own: see ``replace``)."""
        self.slots = self.slots[rows]
        for layer in self.keys.values():
            if layer.own_key is not None and layer.own_value is not None:
                layer.own_key, layer.own_value = layer.own_key[rows], layer.own_value[rows]

    def replace(self, parents: Tensor, slots: Tensor, group: int) -> None:
        """New answers that go on from the answers ``parents`` int64 [A'], in new ``slots`` int64 [A'] of [B, group]."""
        self.keep(parents)
        self.slots, self.group = slots, group
