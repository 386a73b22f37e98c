"""The per-request logits processors of vLLM's V1 engine."""

from typing import Any, NamedTuple

import torch


class BatchUpdate(NamedTuple):
    batch_size: int
    removed: list[int]
    added: list[tuple[int, Any, list[int] | None, list[int]]]  # row, params, prompt, output that goes on growing
    moved: list[tuple]


class AdapterLogitsProcessor:
    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.of_row: dict[int, tuple[Any, list[int]]] = {}

    def update_state(self, update: BatchUpdate | None) -> None:
        for row in [] if update is None else update.removed:
            self.of_row.pop(row, None)
        for row, params, _, output in [] if update is None else update.added:
            processor = self.new_req_logits_processor(params)
            if processor is not None:
                self.of_row[row] = processor, output

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, (processor, output) in self.of_row.items():
            logits[row] = processor(output, logits[row])
        return logits

    def new_req_logits_processor(self, params: Any) -> Any:
        raise NotImplementedError
