"""Whole GRPO and SFT steps and rollouts on one device: by the kernels, in eager code, and the peers where installed.

Sizes are those of the targets: GRPO at the Qwen3-0.6B shape (4 prompts of 1,024 tokens with 16 completions, and of
2,048 with 64; 4 codes each), SFT at the same shape (prompts of 2,048 tokens on average), beams of 256 at the Qwen3-1.7B
shape (8 contexts of 1,000 tokens, 3 levels). Weights are random; the vocabulary is the benchmark's small one on all
sides, which spares the peers most of what the real one of 151,936 costs them. Every step is measured from its batch's
layout to the updated weights, and until the device is done.

    python -m bench.gpu_steps PART --begin 0 --seconds 100 [--eager KERNEL ...]

prints the rows of a part, "grpo", "rollout" or "sft", one a line: what `bench gpu` runs in a process of its own, since
an error of the device ends all that a process could still do. Eager code takes the place of the kernels named.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
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
    """What is measured: GRPO cases with the peer's micro-batches, an SFT case, and one beam search."""

    grpo: tuple[Case, ...]
    grpo_micro_batches: tuple[int, ...]
    grpo_shape: Model
    sft: SftCase
    sft_micro_batch: int
    beam: Case
    beam_width: int
    beam_shape: Model
    repeats: int


TARGETS = Sizes(
    grpo=(Case((1024,) * 4, 16), Case((2048,) * 4, 64)),
    grpo_micro_batches=(64, 32, 16, 8),
    grpo_shape=QWEN3_06B,
    sft=SftCase(4, 2048, 8, layers=28, hidden=1024, intermediate=3072, heads=16, kv_heads=8, head_dim=128),
    sft_micro_batch=8,
    beam=Case((1000,) * 8, group=1, levels=3),
    beam_width=256,
    beam_shape=QWEN3_17B,
    repeats=5,
)

Figures = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A system's measurement of a case; the call gives "seconds" of each repeat, and what else the row should have."""

    system: str
    case: dict[str, Any]
    call: Callable[[], Figures]


def grpo_jobs(device: torch.device, sizes: Sizes) -> Iterator[Job]:
    """All of ours come first: a peer that takes too long must not cost them their rows."""

    def ours(case: Case) -> Figures:
        return {"seconds": timed(Ours(case, sizes.grpo_shape, device).step, device, sizes.repeats)}

    cases = [(case, {"bench": "grpo", **case.describe(), **asdict(sizes.grpo_shape)}) for case in sizes.grpo]
    for case, about in cases:
        yield Job("negfast", about, partial(ours, case))
    if find_spec("trl"):
        for case, about in cases:
            system = "trl with vllm" if find_spec("vllm") else "trl"
            yield Job(system, about, partial(fastest_peer, case, sizes, device))
    for case, about in cases:
        yield Job("negfast, eager", about, eagerly(partial(ours, case)))


def fastest_peer(case: Case, sizes: Sizes, device: torch.device) -> Figures:
    """TRL's steps at the fastest micro-batch that fits, the largest first, until a smaller one is slower."""
    from bench.trl_peer import peer_steps

    found: dict[int, list[float]] = {}
    failed = ""
    for size in sizes.grpo_micro_batches:
        if case.completions % size:
            continue
        try:
            on_gpu = device.type == "cuda"
            found[size] = peer_steps(case, size, 3, shape=sizes.grpo_shape, on_gpu=on_gpu).wall[1:]
        except RuntimeError as error:  # out of memory
            failed = str(error).splitlines()[0]
            continue
        *earlier, last = map(statistics.median, found.values())
        if earlier and last > earlier[-1]:
            break
    if not found:
        raise RuntimeError(failed or f"no micro-batch divides {case.completions} completions")
    best = min(found, key=lambda size: statistics.median(found[size]))
    sweep = {str(size): statistics.median(seconds) for size, seconds in found.items()}
    return {"seconds": found[best], "micro_batch": best, "sweep_s": sweep}


def sft_jobs(device: torch.device, sizes: Sizes) -> Iterator[Job]:
    """Packed SFT steps, with their model FLOP/s as a share of the device's peak."""
    case = sizes.sft

    def ours() -> Figures:
        made = sft.Ours(case, device)
        seconds = timed(made.step, device, sizes.repeats)
        with made.meter, made.meter.step():
            made.step()
        return {"seconds": seconds, "mfu": made.meter.operations / statistics.median(seconds) / made.meter.peak}

    def peer() -> Figures:
        made, turns = sft.trainer(sft.Ours(case, device), sizes.sft_micro_batch, 4, lambda: None)
        made.train()
        return {"seconds": turns.seconds[1:]}

    about = {"bench": "sft", **asdict(case)}
    yield Job("negfast", about, ours)
    if device.type == "cpu" or find_spec("liger_kernel"):
        yield Job("transformers Trainer", about, peer)
    yield Job("negfast, eager", about, eagerly(ours))


def beam_jobs(device: torch.device, sizes: Sizes) -> Iterator[Job]:
    """The constrained beam search, weights in bf16 on a GPU."""

    def ours() -> Figures:
        made = Ours(sizes.beam, sizes.beam_shape, device)  # here, where eager code may be asked for
        del made.optimizer, made.reference, made.group_loss  # their memory
        policy = made.policy.eval()
        if device.type == "cuda":
            for parameter in policy.parameters():  # and no buffer: rotary frequencies stay in float32
                parameter.data = parameter.data.to(torch.bfloat16)
            policy.in_bfloat16 = False  # nothing is left to cast

        def search() -> torch.Tensor:
            batch = made.batch()
            width = sizes.beam_width
            return beam_search(policy, made.chooser, batch, batch.prior, NEXT_DISLIKE, width, top=width)[0]

        return {"seconds": timed(search, device, 2 * sizes.repeats)}

    about = {"bench": "rollout", **sizes.beam.describe(), "beams": sizes.beam_width, **asdict(sizes.beam_shape)}
    yield Job("negfast", about, ours)
    yield Job("negfast, eager", about, eagerly(ours))


PARTS: dict[str, Callable[[torch.device, Sizes], Iterator[Job]]] = {
    "grpo": grpo_jobs,
    "sft": sft_jobs,
    "rollout": beam_jobs,
}


def measured(job: Job, device: torch.device, instead: tuple[str, ...] = ()) -> dict[str, Any]:
    """The row of a job; one that fails says why. Eager code runs in place of the kernels ``instead``."""
    row: dict[str, Any] = {"system": job.system, "case": job.case, "status": "ok"}
    if instead and job.system == "negfast":
        row["eager"] = list(instead)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with dispatch.eager(*instead) if instead else nullcontext():
            figures = job.call()
        row |= {"median_s": statistics.median(figures["seconds"]), **figures}
        if device.type == "cuda":
            row["peak_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    except Exception as error:  # an out of memory of one system must not cost the rows of the others
        row["status"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return row


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


def ratios_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every other system's median over negfast's, case by case."""
    timed_rows = [row for row in rows if "median_s" in row]
    mine = {str(row["case"]): row["median_s"] for row in timed_rows if row["system"] == "negfast"}
    return [
        {"case": r["case"], "peer": r["system"], "figure": "median_s", "ratio": r["median_s"] / mine[str(r["case"])]}
        for r in timed_rows
        if r["system"] != "negfast" and str(r["case"]) in mine
    ]


def eagerly(call: Callable[[], Figures]) -> Callable[[], Figures]:
    def run() -> Figures:
        with dispatch.eager():
            return call()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="Rows of whole steps, one a line.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--begin", type=int, default=0, help="jobs to leave out, which have their rows")
    parser.add_argument("--seconds", type=float, default=600.0, help="after which no job is begun")
    parser.add_argument("--eager", nargs="*", default=[], choices=dispatch.KERNELS)
    options = parser.parse_args()
    device, began = torch.device("cuda" if torch.cuda.is_available() else "cpu"), time.monotonic()
    for job in list(PARTS[options.part](device, TARGETS))[options.begin :]:
        if time.monotonic() - began > options.seconds:
            row = {"system": job.system, "case": job.case, "status": "late: not begun"}
        else:
            row = measured(job, device, tuple(options.eager))
        print(json.dumps(row), flush=True)
        if "CUDA" in row["status"] or "device-side" in row["status"]:
            raise SystemExit("the device is lost to this process")


if __name__ == "__main__":
    main()
