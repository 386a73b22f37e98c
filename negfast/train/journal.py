"""What a run writes about itself: metrics.jsonl (reproducible to the bit), speed.jsonl (not), events.jsonl."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from negfast.files import atomic_file

if TYPE_CHECKING:
    from negfast.train.loop import StepResult

ALWAYS = ("loss", "reward", "kl")  # in every line, null where a stage has none
SMOOTH = 0.9  # of the figures shown in the progress line


class Journal:
    """Appends a line a step. Times stay out of metrics.jsonl, so that a resumed run repeats it to the bit."""

    def __init__(self, run_dir: Path, stages: list[str], resumed_from: dict | None) -> None:
        """``resumed_from`` {"stage", "step"} of the checkpoint: lines of later steps are dropped."""
        self._stages, self._folder = stages, run_dir
        self._shown: dict[str, float] = {}
        for name in ("metrics.jsonl", "speed.jsonl"):
            self._drop_after(run_dir / name, resumed_from)
        self.event("start", resumed_from=resumed_from)

    def step(self, stage: str, step: int, result: "StepResult", norm: Tensor, rate: float, seconds: float) -> None:
        metrics = {"loss": result.loss, "grad_norm": norm} | result.metrics
        figures = {name: _number(value) for name, value in metrics.items()}
        line = {"stage": stage, "step": step} | {name: figures.get(name) for name in ALWAYS} | figures | {"lr": rate}
        self._append("metrics.jsonl", line)
        speed = {"stage": stage, "step": step, "seconds": seconds, "tokens": result.tokens}
        self._append("speed.jsonl", speed | {"tokens_per_s": result.tokens / seconds})
        for name in ("loss", "reward", "kl", "tokens/s"):
            value = result.tokens / seconds if name == "tokens/s" else figures.get(name)
            if value is None:
                continue
            self._shown[name] = SMOOTH * self._shown.get(name, value) + (1 - SMOOTH) * value

    def summary(self) -> str:
        """Smoothed figures for the progress line."""
        return ", ".join(f"{n} {v:,.0f}" if n == "tokens/s" else f"{n} {v:.4f}" for n, v in self._shown.items())

    def event(self, kind: str, **fields: object) -> None:
        self._append("events.jsonl", {"event": kind} | fields)

    def _append(self, name: str, line: dict) -> None:
        with open(self._folder / name, "a") as file:
            file.write(json.dumps(line) + "\n")

    def _drop_after(self, path: Path, resumed_from: dict | None) -> None:
        """Keeps the lines up to the checkpoint; a line cut short by a crash goes too."""
        if not path.exists():
            return
        limit = (-1, 0) if resumed_from is None else (self._stages.index(resumed_from["stage"]), resumed_from["step"])
        kept = []
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if (self._stages.index(line["stage"]), line["step"]) <= limit:
                kept.append(text + "\n")
        with atomic_file(path) as temporary:
            temporary.write_text("".join(kept))


def _number(value: Tensor | float | None) -> float | None:
    return value.item() if isinstance(value, Tensor) else value
