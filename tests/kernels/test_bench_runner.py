"""The benchmark's bookkeeping without a GPU: floors are predicted, nothing is said to be timed."""

import json

import pytest
import torch

from bench import gpu, kernels


def test_without_a_gpu_floors_are_predicted(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = kernels.run(out=tmp_path / "kernels.json")
    assert json.loads((tmp_path / "kernels.json").read_text()) == result
    assert {row["case"]["kernel"] for row in result["rows"]} == {
        "trie_grpo",
        "sid_cross_entropy",
        "prompt_attention",
        "answer_attention",
    }
    for row in result["rows"]:
        assert row["status"] == "predicted" and "p50_s" not in row
        bound = max(row["bytes"] / kernels.H100_COPY, row["flops"] / kernels.H100_MATRIX)
        assert row["floor_s"] == bound > 0
    assert result["ratios"] == []


def test_bytes_are_those_of_the_tensors():
    """The prompt's keys and values once a group: 4 prompts of 1,024, 16 answers, bf16, 8 kv heads of 128."""
    case = kernels.answer_case(4, 16, 1024, 1, 16, 8, 128, False)
    keys = 2 * 4 * 1024 * 8 * 128 * 2
    own = 2 * 4 * 16 * 8 * 128 * 2
    queries_and_output = 2 * 4 * 16 * 16 * 128 * 2
    assert case.bytes == keys + own + queries_and_output
    grpo = kernels.trie_grpo_case(4096, 512, torch.bfloat16)
    assert 6 * 4096 * 512 < grpo.bytes < 8 * 4096 * 512


def test_the_gpu_bench_refuses_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA GPU found"):
        gpu.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_kernel_tests_that_fail_are_reported(monkeypatch):
    """Without a GPU and uninterpreted, the folder holds nothing to run: that is no success."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    row = gpu.check_kernels(seconds=100)
    assert row["status"] != "ok" and row["passed"] == 0
