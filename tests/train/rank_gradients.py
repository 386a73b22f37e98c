"""Run by each rank of test_distributed.py: the gradients of one step of every stage, written by rank 0.

python rank_gradients.py RUN OUT ACCUMULATE
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from negfast.data.dataset import Dataset
from negfast.model.policy import Policy
from negfast.run_folder import RunFolder
from negfast.train import distributed
from negfast.train.checkpoint import load_weights
from negfast.train.engine import build_engine
from negfast.train.loop import gradients, my_shares
from negfast.train.reader import read_step
from negfast.train.run import STAGES

STEP = 3


def stage_gradients(run: RunFolder, accumulate: int, budget: int = 0) -> dict[str, torch.Tensor]:
    """Gradients, figures and, for GRPO, the items sampled by this rank, of step ``STEP`` of every stage."""
    torch.manual_seed(0)
    found = {}
    for policy, stage in opened_stages(run):
        name = stage.name
        torch.nn.init.normal_(policy.block.head.weight, std=0.1)
        distributed.share_weights(policy)
        items: list[torch.Tensor] = []
        if name == "grpo":
            keep_items(stage, items)
        figures, norm = gradients(stage, policy, read_step(stage, STEP, my_shares(accumulate), budget))
        found |= {f"{name}/{n}": p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
        found[f"{name} figures"] = torch.tensor([figures.loss, norm.item(), *map(float, figures.metrics.values())])
        if items:
            found["items"] = torch.cat(items)
        policy.zero_grad()
    return found


def opened_stages(run: RunFolder) -> Iterator[tuple[Policy, Any]]:
    """The stages one after the other, of one policy with the run's first weights."""
    dataset = Dataset.open(run.data)
    policy, tokenizer = run.load_policy(dataset)
    engine = build_engine(run.config, dataset, policy, tokenizer, torch.device("cpu"))
    load_weights(run.checkpoints / "initial", policy)
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
    torch.set_num_threads(1)
    with distributed.group(torch.device("cpu")):
        found = stage_gradients(run, accumulate)
        save_file({k: v.contiguous() for k, v in found.items()}, out / f"rank{distributed.rank()}.safetensors")


if __name__ == "__main__":
    main()
