"""One step over one rank, over micro-batches of it, and over two ranks: the same items, the same gradients."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from negfast.config import load_config
from negfast.errors import InputError
from negfast.runtime import distributed
from negfast.runtime.run_folder import RunFolder
from negfast.train.combinations import check_combinations
from negfast.train.reader import read_step
from negfast.train.step import MicroBatch
from tests.tiny import run_cli, train_arguments
from tests.train.rank_gradients import opened_stages, stage_gradients

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tiny_run) -> dict[str, torch.Tensor]:
    return stage_gradients(RunFolder(tiny_run), 1)


def assert_same(found: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]) -> None:
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        largest = tensor.abs().max()
        assert (found[name] - tensor).abs().max() <= 1e-6 * max(1.0, float(largest)), name
    assert max(t.abs().max() for n, t in whole.items() if "/decoder" in n) > 1e-4  # there is something to agree on


def test_micro_batches_one_after_the_other_give_the_whole_batch(tiny_run, whole):
    assert_same(stage_gradients(RunFolder(tiny_run), 3), whole)


def test_a_token_budget_bounds_every_part_and_gives_the_whole_batch(tiny_run, whole):
    budget, run = 100, RunFolder(tiny_run)
    assert_same(stage_gradients(run, 1, budget), whole)
    for _, stage in opened_stages(run):
        batches, tokens = read_step(stage, 3, [MicroBatch()], budget), stage.read(3).tokens
        assert max(batch.tokens for batch in batches) <= budget < tokens == sum(batch.tokens for batch in batches)
        with pytest.raises(
            InputError, match=f"train.token_budget=20: {stage.name} step 4 has a micro-batch of .* tokens"
        ):
            read_step(stage, 3, [MicroBatch()], 20)


def test_two_ranks_sample_the_same_items_and_agree_in_gradients(tiny_run, whole, tmp_path):
    found = of_two_ranks(tiny_run, tmp_path)
    items = torch.cat([gradients.pop("items") for gradients in found])
    assert torch.equal(items, whole["items"])
    for gradients in found:
        assert_same(gradients, {name: tensor for name, tensor in whole.items() if name != "items"})


def of_two_ranks(run: Path, out: Path, *options: str) -> list[dict[str, torch.Tensor]]:
    """What rank_gradients.py finds on each of two ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.train.rank_gradients", str(run), str(out), "1", *options]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [subprocess.Popen(command, cwd=ROOT, env={**common, "RANK": str(n)}) for n in range(2)]
    assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    return [load_file(out / f"rank{n}.safetensors") for n in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(("shard", "ranks_then"), [("none", 2), ("fsdp", 2), ("fsdp", 1)])
def test_a_run_of_two_ranks_has_the_curves_of_one_and_survives_the_death_of_a_rank(
    tiny_run, tiny_data, tmp_path, shard, ranks_then
):
    run = tmp_path / "run"
    script = "import sys; from negfast.runtime.distributed import launch; sys.exit(launch({}, {}))"
    arguments = train_arguments(tiny_data, run, train__shard=shard)
    start = [sys.executable, "-c", script.format(arguments, 2)]
    process = subprocess.Popen(start, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and '"sft", "step": 3' in metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    second = [
        pid for pid in children(process.pid) if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    ]
    os.kill(second[0], signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1 and "rank 1 was ended by SIGKILL" in said and "Traceback" not in said
    again = [sys.executable, "-c", script.format(arguments, ranks_then)]
    subprocess.run(again, check=True, capture_output=True, timeout=300)
    restart = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines() if '"start"' in line][-1]
    assert restart["resumed_from"]["step"] >= 2
    one, two = ([json.loads(line) for line in (r / "metrics.jsonl").open()] for r in (tiny_run, run))
    assert [(line["stage"], line["step"]) for line in one] == [(line["stage"], line["step"]) for line in two]
    for left, right in zip(one, two, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-3, abs=1e-4)


def test_ranks_left_behind_by_a_dead_one_are_ended_and_it_is_named(monkeypatch, capfd):
    monkeypatch.setattr(distributed, "GRACE", 0.1)
    began = time.monotonic()
    ranks = [subprocess.Popen(["sleep", "60"]), subprocess.Popen(["sh", "-c", "kill -9 $$"])]
    assert distributed._wait(ranks) == 1 and time.monotonic() - began < 30
    assert "negfast: rank 1 was ended by SIGKILL" in capfd.readouterr().err
    ranks = [subprocess.Popen(["sh", "-c", f"exit {code}"]) for code in (0, 130)]
    assert distributed._wait(ranks) == 130


def test_a_rank_leaves_with_its_code_and_its_words_before_the_interpreter_ends():
    script = "import atexit, os; atexit.register(os.abort); from negfast.runtime import distributed; "
    script += "print('said', end=''); distributed.leave(3)"
    found = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert (found.returncode, found.stdout) == (3, "said")


def test_more_gpus_than_there_are_is_refused():
    assert "--gpus 99: found" in run_cli("train", "--gpus", "99", code=2)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_batch_of_fewer_rows_than_micro_batches_is_refused():
    parts = [MicroBatch(number, 3).of(7) for number in range(3)]
    assert [list(range(7))[part] for part in parts] == [[0, 1], [2, 3], [4, 5, 6]]
    with pytest.raises(InputError, match="found a batch of 2 rows for 3 micro-batches"):
        MicroBatch(0, 3).of(2)


def test_a_loss_over_all_counted_tokens_is_refused_in_micro_batches():
    config = load_config(None, "smoke", ["grpo.loss=dapo", "train.accumulate=2"])
    with pytest.raises(InputError, match="found dapo with 2 micro-batches"):
        check_combinations(config)
    check_combinations(load_config(None, "smoke", ["grpo.loss=dapo"]))


def test_gradients_fill_buckets_of_one_type_in_order():
    sizes = [10, 20, 30, distributed.BUCKET // 4, 5]
    tensors = [torch.zeros(size) for size in sizes] + [torch.zeros(3, dtype=torch.float64)]
    found = list(distributed._buckets(tensors))
    assert [[t.numel() for t in bucket] for bucket in found] == [[10, 20, 30], [distributed.BUCKET // 4], [5], [3]]
