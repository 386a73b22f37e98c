"""The whole GRPO step, rollout + reference + update: negfast beside a general RL library, on the same small Qwen3.

Both train a decoder of the same 4.2 M weights in float32 on the same number of prompts, completions and tokens, with
the same loss (dr_grpo, beta 0.04, one update a rollout, AdamW). Steps alternate within one process. "full" is negfast
with the peer's objective, log-probabilities over the whole vocabulary; "trie" the one it trains with.

The case "user" is 8 requests of one user of 512 events, ten events apart. negfast reads the history once for all of
them ("shared"), and once a request for comparison.
"""

import multiprocessing
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.grpo_phases import breakdown
from bench.grpo_step import (
    SHAPE,
    Case,
    Ours,
    floor_seconds,
    operations,
    peer_operations,
    quickstart_lengths,
    seconds_of,
)
from bench.machine import device_name, resident_mib, versions, write_result

PACKAGES = "negfast", "torch", "transformers", "trl", "accelerate"
CASES = "G16", "G64", "quickstart", "user"
MICRO_BATCHES = 32, 64


def run(
    out: Path | None = None, prompts: int = 4, repeats: int = 5, peer: str = "trl", threads: int = 2, only: str = ""
) -> dict[str, Any]:
    """Measures the cases and writes the JSON result to ``out`` after each.

    ``prompts`` of 512 tokens in the cases G16 and G64, twice as many of a quickstart step's in the case quickstart;
    ``only`` names one of them; ``peer`` is "trl" or "none".
    """
    if only not in ("", *CASES):
        raise SystemExit(f"bench grpo: --only: found {only!r}, expected one of {', '.join(CASES)}")
    torch.set_num_threads(threads)
    result: dict[str, Any] = {
        "bench": "grpo",
        "device": device_name(),
        "threads": threads,
        "versions": versions(*PACKAGES),
        "model": asdict(SHAPE),
        "rows": [],
        "ratios": [],
        "floor": {},
    }
    if peer == "trl":
        from bench.trl_agreement import check_against_trl

        result["relative_error_of_the_full_objective"] = check_against_trl()
        print(f"full objective against TRL: {result['relative_error_of_the_full_objective']}", flush=True)
    for name in CASES:
        if only and only != name:
            continue
        measure(name, make_case(name, prompts), repeats, peer, result)
        if out is not None:
            write_result(out, result)
    return result


def make_case(name: str, prompts: int) -> Case:
    if name == "quickstart":
        return Case(quickstart_lengths(2 * prompts), group=16, levels=3)
    if name == "user":
        return Case(tuple(range(443, 514, 10)), group=16, shared=True)
    return Case((512,) * prompts, group=int(name.removeprefix("G")))


def variants(case: Case) -> list[Case]:
    """What of a case is measured of negfast: a shared history and one a request, else both objectives."""
    if case.shared:
        return [case, replace(case, shared=False)]
    return [replace(case, objective=objective) for objective in ("trie", "full")]


def measure(name: str, case: Case, repeats: int, peer: str, result: dict[str, Any]) -> None:
    """Adds a case's rows, ratios and floor to ``result``: its variants and the peer, in turns."""
    systems = [Ours(variant) for variant in variants(case)]
    for ours in systems:
        ours.step()  # warm
    seconds: list[list[float]] = [[], []]

    def between() -> None:
        for ours, times in zip(systems, seconds, strict=True):
            times.append(seconds_of(ours.step))

    rows = []
    if peer == "trl":
        from bench.trl_peer import peer_steps, sweep

        swept = sweep(case, sorted({min(size, case.completions) for size in MICRO_BATCHES}))
        best = min(swept, key=lambda size: swept[size])
        timer = peer_steps(case, best, repeats, between)
        row = describe("trl", name, replace(case, objective="full", shared=False), timer.wall)
        row |= {"cpu_s": statistics.median(timer.cpu), "peak_mib": swept[best][1], "micro_batch": best}
        row["sweep_s"] = {str(size): wall for size, (wall, _) in swept.items()}
        row["tokens"] = (max(case.lengths) + case.levels) * case.completions
        row["flops"] = peer_operations(systems[0])
        rows.append(row)
    else:
        for _ in range(repeats):
            between()
    for ours, times in zip(systems, seconds, strict=True):
        row = describe("negfast", name, ours.case, times)
        row |= {"peak_mib": peak_mib(ours.case), "tokens": ours.processed, "breakdown_s": breakdown(ours)}
        row["flops"] = operations(ours)
        rows.append(row)
        if peer == "trl":
            result["ratios"].append(ratio_of(row, rows[0], "trl"))
    if case.shared:
        result["ratios"].append(ratio_of(rows[-2], rows[-1], "negfast, a history a request"))
    for ratio in (ratio for ratio in result["ratios"] if ratio["case"]["name"] == name):
        about = f"{name} {ratio['case']['objective']}{', shared' * ratio['case']['shared']}"
        print(f"{about}: {ratio['peer']} {ratio['ratio']:.1f}x, predicted {ratio['predicted']:.1f}x", flush=True)
    for row in rows:
        print({key: value for key, value in row.items() if key != "case"}, flush=True)
    result["rows"] += rows
    result["floor"][name] = {"prompts_alone_s": floor_seconds(case)}


def ratio_of(mine: dict[str, Any], other: dict[str, Any], peer: str) -> dict[str, Any]:
    """What the other side takes for what mine takes: time, and the decoders' operations, of which it was predicted."""
    ratio, predicted = (other[key] / mine[key] for key in ("median_s", "flops"))
    return {"case": mine["case"], "peer": peer, "figure": "median_s", "ratio": ratio, "predicted": predicted}


def describe(system: str, name: str, case: Case, seconds: list[float]) -> dict[str, Any]:
    figures = {"median_s": statistics.median(seconds), "seconds": seconds}
    return {"system": system, "case": {"name": name, **case.describe()}, "status": "ok", **figures}


def peak_mib(case: Case) -> float:
    """Peak resident MiB of a fresh process that makes two steps of ours."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (case, torch.get_num_threads()))


def _peak(case: Case, threads: int) -> float:
    torch.set_num_threads(threads)
    ours = Ours(case)
    ours.step()
    ours.step()
    return resident_mib(peak=True)
