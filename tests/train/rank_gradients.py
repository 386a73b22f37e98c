"""Run by each rank of test_distributed.py: the gradients of one step of every stage, written by rank 0.

python rank_gradients.py RUN OUT ACCUMULATE
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from negfast.data.dataset import Dataset
from negfast.run_folder import RunFolder
from negfast.train import distributed
from negfast.train.checkpoint import load_weights
from negfast.train.engine import build_engine
from negfast.train.loop import gradients, my_shares
from negfast.train.run import STAGES

STEP = 3


def stage_gradients(run: RunFolder, accumulate: int) -> dict[str, torch.Tensor]:
    """Gradients, figures and, for GRPO, the items sampled by this rank, of step ``STEP`` of every stage."""
    dataset = Dataset.open(run.data)
    policy, tokenizer = run.load_policy(dataset)
    engine = build_engine(run.config, dataset, policy, tokenizer, torch.device("cpu"))
    load_weights(run.checkpoints / "initial", policy)
    torch.manual_seed(0)
    found = {}
    for name, make in STAGES.items():
        stage = make(engine)
        torch.nn.init.normal_(policy.block.head.weight, std=0.1)
        distributed.share_weights(policy)
        items: list[torch.Tensor] = []
        if name == "grpo":
            keep_items(stage, items)
        figures, norm = gradients(stage, STEP, policy, my_shares(accumulate))
        found |= {f"{name}/{n}": p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
        found[f"{name} figures"] = torch.tensor([figures.loss, norm.item(), *map(float, figures.metrics.values())])
        if items:
            found["items"] = torch.cat(items)
        policy.zero_grad()
    return found


def keep_items(stage, items: list[torch.Tensor]) -> None:
    sample = stage.sample

    def noted(*arguments):
        taken = sample(*arguments)
        items.append(taken[1].rollout.items)
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
