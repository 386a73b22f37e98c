"""Run by each rank of test_distributed.py and test_sharding.py: the gradients of one step of every stage.

python rank_gradients.py RUN OUT ACCUMULATE [fsdp]

With sharded weights a checkpoint of the policy and of the optimiser after one more step goes beside.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from negfast.data.dataset import Dataset
from negfast.model.policy import Policy
from negfast.runtime import distributed, sharding
from negfast.runtime.checkpoint import OPTIMIZER, WEIGHTS, load_weights, optimizer_tensors, unique_tensors, write_parts
from negfast.runtime.engine import build_engine
from negfast.runtime.run_folder import RunFolder
from negfast.runtime.sharding import whole
from negfast.train.loop import gradients, my_micro_batches, update
from negfast.train.optimizer import make_optimizer
from negfast.train.reader import read_step
from negfast.train.run import STAGES

STEP, RATE = 3, 1e-4


def stage_gradients(
    run: RunFolder, accumulate: int, budget: int = 0, shard: str = "none", out: Path | None = None
) -> dict[str, torch.Tensor]:
    """Gradients, figures and, for GRPO, the items sampled by this rank, of step ``STEP`` of every stage; a checkpoint
    after one more step in ``out``."""
    torch.manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    for policy, stage in opened_stages(run, shard):
        name = stage.name
        torch.nn.init.normal_(policy.block.head.weight, std=0.1)
        distributed.share_weights(policy)
        items: list[torch.Tensor] = []
        if name == "grpo":
            keep_items(stage, items)
        measured, norm = gradients(stage, policy, read_step(stage, STEP, my_micro_batches(accumulate), budget))
        figures = measured.figures()
        found |= {f"{name}/{n}": whole(p.grad).clone() for n, p in policy.named_parameters() if p.grad is not None}
        metrics: dict[str, Any] = figures.metrics
        found[f"{name} figures"] = torch.tensor([figures.loss, norm.item(), *map(float, metrics.values())])
        if items:
            found["items"] = torch.cat(items)
        policy.zero_grad()
    if out is not None:
        optimizer = make_optimizer(policy, stage.config, run.config.train)
        update(
            stage,
            policy,
            optimizer,
            RATE,
            run.config.train.clip_norm,
            read_step(stage, STEP, my_micro_batches(accumulate), budget),
        )
        parts = {WEIGHTS: unique_tensors(policy), OPTIMIZER: optimizer_tensors(policy, optimizer)}
        distributed.first_does(lambda: write_parts(out, parts, {}))
    return found


def opened_stages(run: RunFolder, shard: str = "none") -> Iterator[tuple[Policy, Any]]:
    """The stages one after the other, of one policy with the run's first weights."""
    dataset = Dataset.open(run.data)
    policy, tokenizer = run.load_policy(dataset)
    engine = build_engine(run.config, dataset, policy, tokenizer, torch.device("cpu"))
    load_weights(run.checkpoints / "initial", policy)
    sharding.shard(policy, replace(run.config, train=replace(run.config.train, shard=shard)), torch.device("cpu"))
    for make in STAGES.values():
        yield policy, make(engine)


def keep_items(stage, items: list[torch.Tensor]) -> None:
    sample = stage.sample

    def noted(*arguments):
        taken = sample(*arguments)
        items.append(taken.rollout.items)
        return taken

    stage.sample = noted


def main() -> None:
    run, out, accumulate = RunFolder(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])
    sharded = sys.argv[4:] == ["fsdp"]
    torch.set_num_threads(1)
    with distributed.group(torch.device("cpu")):
        found = stage_gradients(run, accumulate, 0, *(("fsdp", out / "checkpoint") if sharded else ()))
        save_file({k: v.contiguous() for k, v in found.items()}, out / f"rank{distributed.rank()}.safetensors")


if __name__ == "__main__":
    main()
    distributed.leave(0)
