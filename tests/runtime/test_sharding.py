"""Two ranks that share the weights against one that has them all: gradients, items, checkpoints."""

import pytest
import torch

from negfast.config import load_config
from negfast.data.dataset import Dataset
from negfast.errors import InputError
from negfast.runtime import distributed, sharding
from negfast.runtime.checkpoint import load_optimizer, load_weights, unique_tensors
from negfast.runtime.run_folder import RunFolder
from negfast.train.optimizer import make_optimizer
from tests.runtime.test_distributed import assert_same, of_two_ranks
from tests.train.rank_gradients import RATE, stage_gradients


def test_two_ranks_that_share_the_weights_agree_with_one(tiny_run, tmp_path):
    run = RunFolder(tiny_run)
    alone = stage_gradients(run, 1, out=tmp_path / "alone")
    ranks = of_two_ranks(tiny_run, tmp_path, "fsdp")
    assert torch.equal(torch.cat([found.pop("items") for found in ranks]), alone.pop("items"))
    for found in ranks:
        assert_same(found, alone)
    sharded, whole = (opened(run, tmp_path / name) for name in ("checkpoint", "alone"))
    for name, tensor in whole[0].items():  # moments of tiny gradients decide on their sign alone
        torch.testing.assert_close(sharded[0][name], tensor, rtol=0, atol=2.1 * RATE)
    assert sharded[1].keys() == whole[1].keys() and len(whole[1]) > 20
    for name, entry in whole[1].items():
        assert float(sharded[1][name]["step"]) == 1
        torch.testing.assert_close(sharded[1][name]["exp_avg"], entry["exp_avg"], rtol=1e-3, atol=1e-6)


def opened(run: RunFolder, checkpoint) -> tuple[dict, dict]:
    """Weights and the optimiser's state of a checkpoint, read by one process as a run would go on from it."""
    policy, _ = run.load_policy(Dataset.open(run.data))
    optimizer = make_optimizer(policy, run.config.grpo, run.config.train)
    load_weights(checkpoint, policy)
    load_optimizer(checkpoint, policy, optimizer)
    return unique_tensors(policy), {n: optimizer.state[p] for n, p in policy.named_parameters() if p in optimizer.state}


def test_auto_shards_where_a_gpu_would_be_full(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 8)
    gpu, small, large = 80 * 2**30, int(0.6e9) * sharding.TRAINED_BYTES, int(4e9) * sharding.TRAINED_BYTES
    assert not sharding.wanted("auto", small, gpu) and sharding.wanted("auto", large, gpu)
    assert not sharding.wanted("auto", int(4e9) * sharding.FROZEN_BYTES, gpu)  # with adapters
    assert not sharding.wanted("auto", large, None) and sharding.wanted("fsdp", 10, None)
    assert not sharding.wanted("none", large, gpu)
    monkeypatch.setattr(distributed, "size", lambda: 1)
    assert not sharding.wanted("fsdp", large, gpu)


def test_parts_that_ranks_count_for_themselves_are_refused_beside_a_sharded_reference(monkeypatch, tiny_run):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    run = RunFolder(tiny_run)
    policy, _ = run.load_policy(Dataset.open(run.data))
    config = load_config(None, "smoke", ["train.shard=fsdp", "train.token_budget=4096"])
    with pytest.raises(InputError, match="found 4096 with sharded weights"):
        sharding.shard(policy, config, torch.device("cpu"))
