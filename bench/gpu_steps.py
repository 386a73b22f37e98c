"""Whole GRPO and SFT steps and rollouts on one device: by the kernels, in eager code, and the peers where installed.

Sizes are those of the targets: GRPO at the Qwen3-0.6B shape (4 prompts of 1,024 tokens with 16 completions, and of
2,048 with 64; 4 codes each), SFT at the same shape (prompts of 2,048 tokens on average), beams of 256 at the Qwen3-1.7B
shape (8 contexts of 1,000 tokens, 3 levels). Weights are random; the vocabulary is the benchmark's small one on all
sides, which spares the peers most of what the real one of 151,936 costs them. Every step is measured from its batch's
layout to the updated weights, and until the device is done.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch

from bench import sft
from bench.grpo_step import Case, Ours
from bench.sft import Case as SftCase
from negfast.config import Model
from negfast.kernels import dispatch
from negfast.model.beam import beam_search
from negfast.sid.prior import NEXT_DISLIKE

QWEN3_06B = Model(hidden=1024, intermediate=3072, layers=28, heads=16, kv_heads=8, head_dim=128)
QWEN3_17B = Model(hidden=2048, intermediate=6144, layers=28, heads=16, kv_heads=8, head_dim=128)


@dataclass(frozen=True)
class Sizes:
    """What is measured: GRPO cases with the peer's micro-batch, an SFT case, and one beam search."""

    grpo: tuple[tuple[Case, int], ...]
    grpo_shape: Model
    sft: SftCase
    sft_micro_batch: int
    beam: Case
    beam_width: int
    beam_shape: Model
    repeats: int


TARGETS = Sizes(
    grpo=((Case((1024,) * 4, 16), 16), (Case((2048,) * 4, 64), 16)),
    grpo_shape=QWEN3_06B,
    sft=SftCase(4, 2048, 8, layers=28, hidden=1024, heads=16, kv_heads=8, head_dim=128),
    sft_micro_batch=8,
    beam=Case((1000,) * 8, group=1, levels=3),
    beam_width=256,
    beam_shape=QWEN3_17B,
    repeats=5,
)


def grpo_rows(device: torch.device, sizes: Sizes, seconds: float) -> list[dict[str, Any]]:
    """Rows of every case and system; a system is not begun once ``seconds`` have gone by."""
    rows, began = [], time.monotonic()
    for case, micro_batch in sizes.grpo:

        def peer(case: Case = case, micro_batch: int = micro_batch) -> list[float]:
            from bench.trl_peer import peer_steps

            on_gpu = device.type == "cuda"
            return peer_steps(case, micro_batch, 3, shape=sizes.grpo_shape, on_gpu=on_gpu).wall[1:]

        def ours(case: Case = case) -> list[float]:
            return timed(Ours(case, sizes.grpo_shape, device).step, device, sizes.repeats)

        systems: dict[str, Callable[[], list[float]]] = {"negfast": ours, "negfast, eager": eagerly(ours)}
        if find_spec("trl"):
            systems["trl"] = peer
        about = {"bench": "grpo", **case.describe(), **asdict(sizes.grpo_shape)}
        rows += measure(systems, about, device, began + seconds)
    return rows


def sft_rows(device: torch.device, sizes: Sizes, seconds: float) -> list[dict[str, Any]]:
    """Packed SFT steps, with their model FLOP/s as a share of the device's peak."""
    case, deadline = sizes.sft, time.monotonic() + seconds

    def ours() -> list[float]:
        return timed(sft.Ours(case, device).step, device, sizes.repeats)

    def peer() -> list[float]:
        made, turns = sft.trainer(sft.Ours(case, device), sizes.sft_micro_batch, 4, lambda: None)
        made.train()
        return turns.seconds[1:]

    systems: dict[str, Callable[[], list[float]]] = {"negfast": ours, "negfast, eager": eagerly(ours)}
    if device.type == "cpu" or find_spec("liger_kernel"):
        systems["transformers Trainer"] = peer
    rows = measure(systems, {"bench": "sft", **asdict(case)}, device, deadline)
    counted = sft.Ours(case, device)
    with counted.meter, counted.meter.step():
        counted.step()
    for row in rows:
        if "median_s" in row and row["system"].startswith("negfast"):
            row["mfu"] = counted.meter.operations / row["median_s"] / counted.meter.peak
    return rows


def beam_rows(device: torch.device, sizes: Sizes, seconds: float) -> list[dict[str, Any]]:
    """The constrained beam search, weights in bf16 on a GPU."""

    def times() -> list[float]:
        ours = Ours(sizes.beam, sizes.beam_shape, device)  # here, where eager code may be asked for
        del ours.optimizer, ours.reference  # their memory
        policy = ours.policy.eval()
        if device.type == "cuda":
            policy.to(torch.bfloat16)
            policy.in_bfloat16 = False  # nothing is left to cast

        def search() -> torch.Tensor:
            batch = ours.batch()
            width = sizes.beam_width
            return beam_search(policy, ours.chooser, batch, batch.prior, NEXT_DISLIKE, width, top=width)[0]

        return timed(search, device, 2 * sizes.repeats)

    about = {"bench": "rollout", **sizes.beam.describe(), "beams": sizes.beam_width, **asdict(sizes.beam_shape)}
    systems = {"negfast": times, "negfast, eager": eagerly(times)}
    return measure(systems, about, device, time.monotonic() + seconds)


def measure(
    systems: dict[str, Callable[[], list[float]]], case: dict[str, Any], device: torch.device, deadline: float
) -> list[dict[str, Any]]:
    """A row for each system; one that fails says why, and its row is kept."""
    rows = []
    for name, call in systems.items():
        row: dict[str, Any] = {"system": name, "case": case, "status": "ok"}
        if time.monotonic() > deadline:
            row["status"] = "not reached"
        else:
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            try:
                seconds = call()
                row |= {"median_s": statistics.median(seconds), "seconds": seconds}
                if device.type == "cuda":
                    row["peak_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
            except Exception as error:  # an out of memory of one system must not cost the rows of the others
                row["status"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        print(f"{case['bench']} {name}: {row.get('median_s', row['status'])}", flush=True)
        rows.append(row)
    return rows


def timed(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of ``repeats`` calls after two that warm up, each until the device is done."""
    seconds = []
    for _ in range(repeats + 2):
        synchronise(device)
        began = time.perf_counter()
        call()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return seconds[2:]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def eagerly(call: Callable[[], list[float]]) -> Callable[[], list[float]]:
    def run() -> list[float]:
        with dispatch.eager():
            return call()

    return run


def ratios_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every other system's median over negfast's, case by case."""
    timed_rows = [row for row in rows if "median_s" in row]
    mine = {str(row["case"]): row["median_s"] for row in timed_rows if row["system"] == "negfast"}
    return [
        {"case": r["case"], "peer": r["system"], "figure": "median_s", "ratio": r["median_s"] / mine[str(r["case"])]}
        for r in timed_rows
        if r["system"] != "negfast" and str(r["case"]) in mine
    ]
