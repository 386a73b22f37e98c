"""The benchmark's bookkeeping without a GPU: floors are predicted, nothing is said to be timed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from bench import gpu, kernels, sft
from bench.gpu_steps import PARTS, Job, Sizes, fastest_peer, measured, ratios_of
from bench.grpo_step import Case as GrpoCase
from bench.kernel_cases.case import Case
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


def test_what_inductor_compiles_is_timed_last(monkeypatch):
    """Seconds a case, which must not cost other cases their rows."""
    names = ["negfast", "eager", "torch.compile of eager"]
    cases = [Case(kernel, {}, 1, 1, lambda _: {name: lambda: torch.ones(1) for name in names}) for kernel in "ab"]
    monkeypatch.setattr(kernels, "all_cases", lambda: cases)
    monkeypatch.setattr(kernels, "measure_floor", lambda _: {"copy_bytes_s": 1.0, "matrix_flop_s": 1.0})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "none")
    monkeypatch.setattr("triton.testing.do_bench", lambda *_, **__: (1.0, 1.0, 1.0))
    rows = kernels.run()["rows"]
    found = [(row["case"]["kernel"], row["system"]) for row in rows]
    assert found == [(case, name) for part in (names[:2], names[2:]) for case in "ab" for name in part]
    assert {row["status"] for row in rows} == {"ok"}


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


def test_the_predicted_sft_step_is_that_of_the_docs():
    """docs/kernels.md: 480 ms, 120 of them elementwise, 46 % MFU on an H100; 50 % with the memory of an H200."""
    found = sft.predict()
    assert round(found["seconds"]["elementwise"], 3) == 0.120 and round(sum(found["seconds"].values()), 2) == 0.48
    assert round(found["mfu"], 2) == 0.46
    assert round(sft.predict(gpu=sft.Gpu(bytes_per_s=4.8e12))["mfu"], 2) == 0.50


def test_the_gpu_bench_refuses_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA GPU found"):
        gpu.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_visit_needs_the_dependencies_pytest_and_hypothesis():
    """A GPU machine without network has little more: no module of other extras is imported (`make visit`)."""
    extras = ["zstandard", "polars", "ray", "peft", "tensorboard", "fastapi", "uvicorn", "prometheus_client", "httpx"]
    script = f"""
import sys
sys.modules |= dict.fromkeys({extras})
import bench.gpu, bench.gpu_steps, bench.kernels, pytest
sys.exit(pytest.main([bench.gpu.TESTS, "--collect-only", "-q", "-p", "no:cacheprovider"]))
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=gpu.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


TINY = Model(hidden=32, intermediate=48, layers=2, heads=2, kv_heads=1, head_dim=32)
SMALL = Sizes(
    grpo=(GrpoCase((9, 4), 2, levels=2),),
    grpo_micro_batches=(4, 3, 2),
    grpo_shape=TINY,
    sft=SftCase(2, 6, 2, layers=2, hidden=32, heads=2, kv_heads=1, head_dim=32),
    sft_micro_batch=2,
    beam=GrpoCase((7, 3), 1, levels=2),
    beam_width=4,
    beam_shape=TINY,
    repeats=2,
)
CPU = torch.device("cpu")


def test_whole_steps_are_timed_beside_their_peers():
    """What runs on a GPU, at small sizes on the CPU."""
    rows = [measured(job, CPU) for jobs in PARTS.values() for job in jobs(CPU, SMALL)]
    assert all(row["status"] == "ok" and row["median_s"] > 0 for row in rows), rows
    systems = {(row["case"]["bench"], row["system"]) for row in rows}
    assert systems >= {
        (name, system) for name in ("grpo", "rollout", "sft") for system in ("negfast", "negfast, eager")
    }
    assert ("sft", "transformers Trainer") in systems
    assert (("grpo", "trl") in systems) == (find_spec("trl") is not None)  # a peer that only `bench` installs
    assert len(ratios_of(rows)) == len(rows) - 3


@pytest.mark.parametrize(
    ("seconds", "fastest", "asked"),
    [
        ({8: 1.0, 4: 2.0, 2: 0.5}, 8, [8, 4]),
        ({8: 3.0, 4: 2.0, 2: 1.0}, 2, [8, 4, 2]),
        ({4: 2.0, 2: 3.0}, 4, [8, 4, 2]),
    ],
)
def test_the_peer_gets_its_fastest_micro_batch(seconds, fastest, asked, monkeypatch):
    """The sweep ends where a smaller one is slower; one that does not fit is passed over."""
    tried = []

    def peer_steps(case: GrpoCase, size: int, *_: object, **__: object) -> SimpleNamespace:
        tried.append(size)
        if size not in seconds:
            raise RuntimeError("CUDA out of memory")
        return SimpleNamespace(wall=[9.0, seconds[size], seconds[size]])

    monkeypatch.setitem(sys.modules, "bench.trl_peer", SimpleNamespace(peer_steps=peer_steps))
    sizes = replace(SMALL, grpo_micro_batches=(8, 4, 2))
    found = fastest_peer(GrpoCase((9, 4), 4, levels=2), sizes, CPU)
    assert (found["micro_batch"], tried) == (fastest, asked)


def test_a_job_that_fails_says_why_and_rows_name_what_eager_code_computed():
    def broken() -> dict:
        raise RuntimeError("out of memory\nand more")

    assert measured(Job("trl", {}, broken), CPU)["status"] == "failed: RuntimeError: out of memory"
    job = next(PARTS["rollout"](CPU, SMALL))
    assert measured(job, CPU, ("attention",))["eager"] == ["attention"] and "eager" not in measured(job, CPU)


@pytest.fixture
def visit(tmp_path) -> gpu.Visit:
    return gpu.Visit(tmp_path, time.monotonic() + 300)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Sequence[str]]]:
    """Puts a Python script in the place of every process; gives the commands that were asked for."""
    real, asked = gpu.Process, list[Sequence[str]]()

    def instead(script: str) -> list[Sequence[str]]:
        def process(command: Sequence[str], **changes: str | None) -> gpu.Process:
            asked.append(command)
            return real([sys.executable, "-c", script, *command], **changes)

        monkeypatch.setattr(gpu, "Process", process)
        return asked

    return instead


STEPS = """
import json, os, sys, time
begin = int(sys.argv[sys.argv.index("--begin") + 1])
row = lambda n, status: print(json.dumps({"system": f"s{n}", "case": {"bench": "grpo"}, "status": status}), flush=True)
if begin == 0:
    row(0, "ok")
    print("a warning")
    row(1, "failed: RuntimeError: CUDA error: an illegal memory access was encountered")
    sys.exit(1)
if begin == 2:
    os.abort()
row(3, "ok")
time.sleep(60)
"""


def test_a_process_that_dies_or_comes_late_costs_its_own_rows(visit, runs, monkeypatch):
    jobs = [Job(f"s{n}", {"bench": "grpo"}, dict) for n in range(6)]
    monkeypatch.setitem(gpu.PARTS, "grpo", lambda *_: iter(jobs))
    asked = runs(STEPS)
    visit.time_steps("grpo", 8.0, ("attention",))
    assert [row["system"] for row in visit.rows] == [f"s{n}" for n in range(6)]
    status = [row["status"] for row in visit.rows]
    assert status[0] == status[3] == "ok"
    assert "CUDA error" in status[1] and status[2] == "failed: exit code -6"
    assert status[4].startswith("late: stopped after") and status[5] == "late: not begun"
    assert all(list(command)[-2:] == ["--eager", "attention"] for command in asked)
    written = (visit.out / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == visit.rows


TESTED = """
import os, sys, time
part = os.environ["NEGFAST_TEST_PART"]
print("tests/kernels/device/test_trie_grpo.py::test_x[1] PASSED [ 10%]")
print("tests/kernels/device/test_sid_cross_entropy.py::test_x PASSED [ 20%]", flush=True)
if part == "0/3":
    print("tests/kernels/device/test_trie_grpo.py::test_y FAILED [ 30%]")
    sys.exit(1)
if part == "1/3" and WAIT:
    time.sleep(60)
"""


@pytest.mark.parametrize("late", [False, True])
def test_late_is_not_wrong(late, visit, runs):
    runs(TESTED.replace("WAIT", str(late)))
    assert visit.check_kernels(2.0, 3) == ("trie_grpo",)
    rows = {row["case"]["module"]: row for row in visit.rows}
    assert rows["test_trie_grpo"]["status"] == "wrong: 1 tests failed" and rows["test_trie_grpo"]["passed"] == 3
    stopped = "late: 1 of 3 processes ended before"
    assert rows["test_sid_cross_entropy"]["status"] == (stopped if late else "ok")
    assert rows["test_prompt_attention"]["status"] == (stopped if late else "failed: no test ran")
    assert "test_y FAILED" in (visit.out / "kernel-tests.txt").read_text()


def test_kernel_modules_are_known():
    """No module of device tests is missing from the rows."""
    folder = gpu.ROOT / gpu.TESTS
    assert {path.stem for path in folder.glob("test_*.py")} == set(gpu.KERNEL_OF)


def test_kernel_tests_without_a_gpu(monkeypatch, visit):
    """Without a GPU and uninterpreted nothing is there to run, which is no success."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert visit.check_kernels(300.0, 1) == ()
    assert {row["status"] for row in visit.rows} == {"failed: no test ran"}


def test_a_whole_visit(tmp_path, runs, monkeypatch):
    """In its order, within its time, whatever the processes do."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    asked = runs("import sys; print(sys.argv[1:])")
    result = gpu.run(tmp_path)
    order = [next(word for word in command if word in WORDS) for command in asked]
    assert [word for n, word in enumerate(order) if word not in order[:n]] == list(WORDS)
    benches = [row["case"]["bench"] for row in result["rows"]]
    [trained] = [row["status"] for row in result["rows"] if "train" in row["case"]["bench"]]
    assert trained == "failed: no weights of the last stage"
    assert benches[0] == "kernel tests" and benches[-2:] == ["kernels", "compute-sanitizer"]
    assert len(result["rows"]) == len((tmp_path / "rows.jsonl").read_text().splitlines())
    assert json.loads((tmp_path / "gpu.json").read_text()) == result
    shares = gpu.CORRECTNESS_S + gpu.TRAINING_S + sum(gpu.STEPS_S.values()) + gpu.KERNELS_S + gpu.SANITIZER_S
    assert shares <= gpu.BUDGET_S < 540


WORDS = "train", "pytest", "grpo", "sft", "rollout", "kernels"
