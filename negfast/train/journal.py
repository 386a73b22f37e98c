"""What a run writes about itself: metrics.jsonl (reproducible to the bit), speed.jsonl (not), events.jsonl."""

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from negfast.errors import InputError
from negfast.files import atomic_file
from negfast.runtime import distributed
from negfast.train.step import Figures

ALWAYS = ("loss", "reward", "kl")  # in every line, null where a stage has none
SHOWN = {  # of the speed, beside those
    "tokens_per_s": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "data_wait": "data {:.1%}",
    "peak_mib": "{:,.0f} MiB",
}
SMOOTH = 0.9  # of the figures shown in the progress line


class Journal:
    """Appends a line a step. Times stay out of metrics.jsonl, so that a resumed run repeats it to the bit.

    Rank 0 writes; on other ranks nothing is written.
    """

    def __init__(
        self, run_dir: Path, stages: dict[str, int], resumed_from: dict | None, tensorboard: bool = False
    ) -> None:
        """``stages`` in their order with their steps; ``resumed_from`` {"stage", "step"} of the checkpoint: lines of
        later steps are dropped. ``tensorboard`` writes the same figures as events to RUN/tensorboard.
        """
        self._stages, self._folder = list(stages), run_dir
        before = [sum(list(stages.values())[:number]) for number in range(len(stages))]
        self._first = dict(zip(stages, before, strict=True))  # TensorBoard counts steps through all stages
        self._writes = distributed.rank() == 0
        self._shown: dict[str, float] = {}
        if self._writes:
            for name in ("metrics.jsonl", "speed.jsonl"):
                self._drop_after(run_dir / name, resumed_from)
            _keep(run_dir / "events.jsonl", lambda _: True)
        done = 0 if resumed_from is None else self._first[resumed_from["stage"]] + resumed_from["step"]
        self._board = _summary_writer(run_dir / "tensorboard", done + 1) if tensorboard and self._writes else None
        self.event("start", resumed_from=resumed_from)

    def step(self, stage: str, step: int, figures: Figures, rate: float, speed: dict[str, float]) -> None:
        """``speed`` as from `negfast.train.speed.Meter`."""
        measured = {"loss": figures.loss, "grad_norm": figures.grad_norm} | figures.metrics
        line = {"stage": stage, "step": step} | {name: measured.get(name) for name in ALWAYS} | measured | {"lr": rate}
        self._append("metrics.jsonl", line)
        self._append("speed.jsonl", {"stage": stage, "step": step} | speed)
        self._show(stage, stage, step, measured | {"lr": rate})
        self._show("speed", stage, step, speed)
        for name, value in [*((name, measured.get(name)) for name in ALWAYS), *((name, speed[name]) for name in SHOWN)]:
            if value is not None:
                self._shown[name] = SMOOTH * self._shown.get(name, value) + (1 - SMOOTH) * value

    def summary(self) -> str:
        """Smoothed figures for the progress line."""
        return ", ".join(SHOWN.get(name, name + " {:.4f}").format(value) for name, value in self._shown.items())

    def event(self, kind: str, **fields: object) -> None:
        self._append("events.jsonl", {"event": kind} | fields)
        if kind == "valid":
            figures = {name: value for name, value in fields.items() if isinstance(value, float)}
            self._show("valid", str(fields["stage"]), int(str(fields["step"])), figures)

    def _show(self, group: str, stage: str, step: int, figures: Mapping[str, float | None]) -> None:
        if self._board is not None:
            for name, value in figures.items():
                if value is not None:
                    self._board.add_scalar(f"{group}/{name}", value, self._first[stage] + step)
            self._board.flush()

    def _append(self, name: str, line: dict) -> None:
        if self._writes:
            with open(self._folder / name, "a") as file:
                file.write(json.dumps(line) + "\n")

    def _drop_after(self, path: Path, resumed_from: dict | None) -> None:
        """Keeps the lines up to the checkpoint."""
        limit = (-1, 0) if resumed_from is None else (self._stages.index(resumed_from["stage"]), resumed_from["step"])
        _keep(path, lambda line: (self._stages.index(line["stage"]), line["step"]) <= limit)


def _keep(path: Path, wanted: Callable[[dict], bool]) -> None:
    """Keeps the lines of a file that are ``wanted``; one cut short by a crash goes too."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if wanted(line):
            kept.append(text + "\n")
    with atomic_file(path) as temporary:
        temporary.write_text("".join(kept))


def check_tensorboard(wanted: bool) -> None:
    """InputError where it is ``wanted`` and not installed."""
    if wanted and find_spec("tensorboard") is None:
        raise InputError("train.tensorboard: found true, but tensorboard is not installed (pip install tensorboard)")


def _summary_writer(folder: Path, first_step: int) -> Any:
    """TensorBoard's writer; what it wrote of later steps before is hidden."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step)
