"""The Triton kernels beside eager code, torch.compile and the libraries that come closest, against the card's floors.

Inputs and eager baselines are those of the tests (tests/kernels/cases.py). Every system of a case does the same work;
what a peer leaves out is in its name. Bytes and FLOPs are the least that the case needs, the floor is the larger of
bytes over the measured copy bandwidth and FLOPs over the measured rate of a large bf16 product. Without a GPU nothing
is timed, since Triton's interpreter says nothing of speed: rows then hold the predicted floor of an H100.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.kernel_cases.case import Case
from bench.kernel_cases.completion_attention import completion_attention_case
from bench.kernel_cases.prompt_attention import prompt_attention_case
from bench.kernel_cases.sid_cross_entropy import sid_cross_entropy_case
from bench.kernel_cases.trie_grpo import trie_grpo_case
from bench.kernel_cases.vocabulary_cross_entropy import vocabulary_cross_entropy_case
from bench.machine import versions, write_result
from tests.kernels import cases as inputs

H100_COPY = 3.0e12  # bytes/s, read plus written; about 90 % of the datasheet's 3.35e12. Predictions only
H100_MATRIX = 989e12  # dense bf16 FLOP/s of the datasheet. Predictions only
INDUCTOR = "torch.compile of eager", "flex attention"  # systems that compile for seconds: timed after all others
PACKAGES = "negfast", "torch", "triton", "liger-kernel", "flash-attn"


def all_cases() -> list[Case]:
    """From launch-bound to bandwidth-bound, the shapes of Qwen3-0.6B's attention, and many requests of a history."""
    bf16 = torch.bfloat16
    sizes = [(64, 256, bf16), (1088, 256, bf16), (16_384, 256, bf16), (131_072, 256, bf16)]
    sizes += [(131_072, 256, torch.float32), (1024, 8192, bf16), (8192, 8192, bf16)]
    made = [trie_grpo_case(*size) for size in sizes]
    made += [sid_cross_entropy_case(*sizes[n]) for n in (1, 3, 6)]
    made += [vocabulary_cross_entropy_case(rows, 151_936) for rows in (256, 1024)]
    for backward in (False, True):
        for prompts, length in ((4, 512), (4, 1024), (4, 2048), (2, 8192)):
            made.append(prompt_attention_case(prompts, length, 16, 8, 128, backward))
        made.append(prompt_attention_case(4, 2048, 16, 8, 64, backward))
        for group, length, new in ((16, 1024, 1), (16, 1024, 3), (64, 2048, 1), (64, 2048, 3)):
            made.append(completion_attention_case(4, group, length, new, 16, 8, 128, backward))
        made.append(completion_attention_case(2, 700, 1024, 1, 16, 8, 128, backward, "spread"))
    return made


def run(out: Path | None = None, seconds: float = 240.0) -> dict[str, Any]:
    """The bench's JSON object, written to ``out`` if given. On a GPU it times for about ``seconds`` at most (cases
    beyond have status "not reached"); without one it predicts an H100's floor."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    floor = measure_floor(device) if on_gpu else {"copy_bytes_s": H100_COPY, "matrix_flop_s": H100_MATRIX}
    if not on_gpu:
        print("No GPU: Triton is not timed in its interpreter. The least an H100 would take:", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "bench": "kernels",
        "device": torch.cuda.get_device_name() if on_gpu else "none; floors predicted for an H100",
        "versions": versions(*PACKAGES),
    }
    began = time.monotonic()
    cases = all_cases()
    for case, by_inductor in [(case, last) for last in (False, True) for case in cases]:
        if not on_gpu:
            found = [] if by_inductor else [_row(case, "negfast", floor) | {"status": "predicted"}]
        elif time.monotonic() - began > seconds:
            found = [_row(case, "by inductor" if by_inductor else "negfast", floor) | {"status": "not reached"}]
        else:
            found = time_case(case, device, floor, by_inductor)
        for row in found:
            print(_line(row), file=sys.stderr, flush=True)
        rows += found
        result |= {"rows": rows, "ratios": _ratios(rows), "floor": floor}
        if out is not None:
            write_result(out, result)
    return result


def measure_floor(device: torch.device) -> dict[str, float]:
    """Bytes/s (read plus written) of a large copy and FLOP/s of a large bf16 product."""
    from triton.testing import do_bench

    source = torch.randn(1 << 28, device=device)
    target = torch.empty_like(source)
    copy = do_bench(lambda: target.copy_(source), quantiles=[0.5])
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = do_bench(lambda: a @ b, quantiles=[0.5])
    return {"copy_bytes_s": 2e3 * source.nbytes / copy, "matrix_flop_s": 2e3 * 8192**3 / product}


def time_case(case: Case, device: torch.device, floor: dict[str, float], by_inductor: bool) -> list[dict[str, Any]]:
    """p20, p50, p80 of each system, of `INDUCTOR` or of the others, each first compared with negfast's result; one that
    fails says why."""
    from triton.testing import do_bench

    rows = []
    try:
        systems = case.build(device)
        expected = systems["negfast"]()
    except Exception as error:  # the other cases' rows are worth having
        return [_row(case, "negfast", floor) | {"status": _failed(error)}]
    for name, call in systems.items():
        if (name in INDUCTOR) != by_inductor:
            continue
        row = _row(case, name, floor)
        try:
            if "(no trie" not in name:
                row["difference"] = inputs.relative_error(call(), expected)
            p20, p50, p80 = do_bench(call, warmup=25, rep=150, quantiles=[0.2, 0.5, 0.8])
            row |= {"p20_s": p20 / 1e3, "p50_s": p50 / 1e3, "p80_s": p80 / 1e3}
            row |= {"bytes_s": case.bytes / row["p50_s"], "of_floor": row["floor_s"] / row["p50_s"]}
        except Exception as error:
            row["status"] = _failed(error)
        rows.append(row)
    return rows


def _failed(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"


def _row(case: Case, system: str, floor: dict[str, float]) -> dict[str, Any]:
    least = max(case.bytes / floor["copy_bytes_s"], case.flops / floor["matrix_flop_s"])
    work = {"bytes": case.bytes, "flops": case.flops, "floor_s": least}
    return {"system": system, "case": {"kernel": case.kernel, **case.shape}, "status": "ok", **work}


def _ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The peer's median time over negfast's, case by case."""
    timed = [row for row in rows if "p50_s" in row]
    ours = {json.dumps(row["case"]): row["p50_s"] for row in timed if row["system"] == "negfast"}
    return [
        {"case": r["case"], "peer": r["system"], "figure": "p50_s", "ratio": r["p50_s"] / ours[json.dumps(r["case"])]}
        for r in timed
        if r["system"] != "negfast"
    ]


def _line(row: dict[str, Any]) -> str:
    shape = " ".join(f"{name} {value}" for name, value in row["case"].items() if name != "kernel")
    work = f"{row['bytes'] / 2**20:9.1f} MiB {row['flops'] / 1e9:9.2f} GFLOP, floor {1e6 * row['floor_s']:8.1f} us"
    time_ = f", {1e6 * row['p50_s']:8.1f} us" if "p50_s" in row else f", {row['status']}"
    return f"{row['case']['kernel']:18} {row['system'][:34]:34} {shape}: {work}{time_}"
