"""The side "before" of `bench histories`: the SFT step of an older checkout, run by that checkout's own Python.

It needs the names that negfast had before histories were shared, when every user-day was a prompt, and speaks as
`bench.history_sides` does. Settings are that checkout's defaults.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from negfast.config import load_config
from negfast.data.dataset import Dataset
from negfast.model.load import build_policy
from negfast.runtime.engine import build_engine, history_features
from negfast.train.loop import update
from negfast.train.optimizer import make_optimizer
from negfast.train.sft import SftStage
from negfast.train.speed import Meter, attention_pairs


class Counter(Meter):
    pairs = 0.0

    def _count(self, module: Any, arguments: tuple, inputs: dict) -> None:
        super()._count(module, arguments, inputs)
        self.pairs += sum(attention_pairs(inputs["layout"]))


def main(task: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand among the answers
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    config, dataset = load_config(None, "quickstart", ["sft.verdict_weight=0"]), Dataset.open(Path(task["data"]))
    shape = dataset.codes.shape[1], int(dataset.manifest["semantic_ids"]["codebook"])
    features: Any = history_features  # which asked for less
    width = features(dataset, dataset.valid_day).width
    texts = [text for text in dataset.items.text if text.strip()] or ["text"]
    policy, tokenizer = build_policy(config.model, None, texts, *shape, width)
    stage = SftStage(build_engine(config, dataset, policy, tokenizer, torch.device("cpu")))
    optimizer, counter = make_optimizer(policy, config.sft, config.train), Counter(policy)
    print(json.dumps({"start_mib": resident_mib()}), file=answers, flush=True)
    for step in range(task["steps"]):
        if not sys.stdin.readline():
            return
        counter.operations = counter.pairs = 0.0
        began = time.perf_counter()
        batch: Any = stage.read(step)
        targets = len(batch.items.items)
        with counter:
            figures = update(stage, policy, optimizer, 1e-5, config.train.clip_norm, [batch])
        found = {
            "seconds": time.perf_counter() - began,
            "targets": targets,
            "positions": batch.tokens,
            "pairs": counter.pairs,
            "flops": counter.operations,
            "loss": figures.loss,
            "peak_mib": resident_mib("VmHWM:"),
        }
        print(json.dumps(found), file=answers, flush=True)


def resident_mib(name: str = "VmRSS:") -> float:
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
