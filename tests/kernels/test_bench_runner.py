"""The benchmark's bookkeeping without a GPU: floors are predicted, nothing is said to be timed."""

import json
import time
from importlib.util import find_spec

import pytest
import torch

from bench import gpu, kernels
from bench.gpu_steps import Sizes
from bench.grpo_step import Case
from bench.sft import Case as SftCase
from negfast.config import Model


def test_without_a_gpu_floors_are_predicted(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = kernels.run(out=tmp_path / "kernels.json")
    assert json.loads((tmp_path / "kernels.json").read_text()) == result
    assert {row["case"]["kernel"] for row in result["rows"]} == {
        "trie_grpo",
        "sid_cross_entropy",
        "prompt_attention",
        "completion_attention",
        "vocabulary_cross_entropy",
    }
    for row in result["rows"]:
        assert row["status"] == "predicted" and "p50_s" not in row
        bound = max(row["bytes"] / kernels.H100_COPY, row["flops"] / kernels.H100_MATRIX)
        assert row["floor_s"] == bound > 0
    assert result["ratios"] == []


def test_bytes_are_those_of_the_tensors():
    """The prompt's keys and values once a group: 4 prompts of 1,024, 16 completions, bf16, 8 kv heads of 128."""
    case = kernels.completion_attention_case(4, 16, 1024, 1, 16, 8, 128, False)
    keys = 2 * 4 * 1024 * 8 * 128 * 2
    own = 2 * 4 * 16 * 8 * 128 * 2
    queries_and_output = 2 * 4 * 16 * 16 * 128 * 2
    assert case.bytes == keys + own + queries_and_output
    products = 2 * 2 * 4 * 16 * 128  # of all prompts and heads, a key
    assert case.flops == products * 16 * 1024
    spread = kernels.completion_attention_case(4, 16, 1024, 1, 16, 8, 128, False, "spread")
    assert spread.flops == products * sum(range(64, 1025, 64)) and spread.bytes == case.bytes
    grpo = kernels.trie_grpo_case(4096, 512, torch.bfloat16)
    assert 6 * 4096 * 512 < grpo.bytes < 8 * 4096 * 512


def test_the_gpu_bench_refuses_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA GPU found"):
        gpu.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


TINY = Model(hidden=32, intermediate=48, layers=2, heads=2, kv_heads=1, head_dim=32)
SMALL = Sizes(
    grpo=((Case((9, 4), 2, levels=2), 2),),
    grpo_shape=TINY,
    sft=SftCase(2, 6, 2, layers=2, hidden=32, heads=2, kv_heads=1, head_dim=32),
    sft_micro_batch=2,
    beam=Case((7, 3), 1, levels=2),
    beam_width=4,
    beam_shape=TINY,
    repeats=2,
)


def test_whole_steps_are_timed_beside_their_peers(tmp_path):
    """What runs on a GPU, at small sizes on the CPU."""
    rows = gpu.whole_steps(tmp_path, torch.device("cpu"), SMALL, time.monotonic() + 600)
    assert all(row["status"] == "ok" and row["median_s"] > 0 for row in rows), rows
    systems = {(row["case"]["bench"], row["system"]) for row in rows}
    assert systems >= {
        (name, system) for name in ("grpo", "rollout", "sft") for system in ("negfast", "negfast, eager")
    }
    assert ("sft", "transformers Trainer") in systems
    assert (("grpo", "trl") in systems) == (find_spec("trl") is not None)  # a peer that only `bench` installs
    for name in ("grpo", "rollout", "sft"):
        written = json.loads((tmp_path / f"gpu-{name}.json").read_text())
        assert written["rows"] and written["ratios"]


def test_a_part_that_fails_or_comes_too_late_costs_no_other(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(gpu.gpu_steps, "grpo_rows", broken)
    monkeypatch.setattr(gpu.gpu_steps, "sft_rows", lambda *_: [{"system": "negfast", "case": {}, "status": "ok"}])
    monkeypatch.setattr(gpu.gpu_steps, "Ours", broken)
    rows = gpu.whole_steps(tmp_path, torch.device("cpu"), SMALL, time.monotonic() + 600)
    assert [row["status"] for row in rows] == ["failed: RuntimeError: out of memory"] * 3 + ["ok"]  # both beam searches
    rows = gpu.whole_steps(tmp_path, torch.device("cpu"), SMALL, time.monotonic())
    assert [row["status"] for row in rows] == ["not reached"] * 3


def test_kernel_tests_that_fail_are_reported(monkeypatch):
    """Without a GPU and uninterpreted, the folder holds nothing to run: that is no success."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    row = gpu.check_kernels(seconds=100)
    assert row["status"] != "ok" and row["passed"] == 0
