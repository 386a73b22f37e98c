"""train.dtype=bfloat16: the decoder computes in bfloat16, everything else stays float32."""

from dataclasses import replace
from typing import Any

import torch

from negfast.data.dataset import Dataset
from negfast.runtime.checkpoint import load_weights
from negfast.runtime.engine import build_engine
from negfast.runtime.run_folder import RunFolder
from negfast.train.loop import gradients, my_micro_batches
from negfast.train.reader import read_step
from negfast.train.sft import SftStage
from tests.train.rank_gradients import STEP


def sft_gradient(run: RunFolder, dtype: str, stream: str = "float32") -> tuple[float, torch.Tensor]:
    config, dataset = run.config, Dataset.open(run.data)
    policy, tokenizer = run.load_policy(dataset)
    config = replace(config, train=replace(config.train, dtype=dtype, stream=stream))
    engine = build_engine(config, dataset, policy, tokenizer, torch.device("cpu"))
    load_weights(run.checkpoints / "initial", policy)
    stage = SftStage(engine)
    torch.manual_seed(1)
    torch.nn.init.normal_(policy.block.head.weight, std=0.1)
    measured, _ = gradients(stage, policy, read_step(stage, STEP, my_micro_batches(1), 0))
    of_layers: list[Any] = [p.grad for n, p in policy.named_parameters() if n.startswith("decoder.layers")]
    flat = torch.cat([gradient.flatten() for gradient in of_layers])
    assert {p.grad.dtype for p in policy.parameters() if p.grad is not None} == {torch.float32}
    return measured.figures().loss, flat


def test_bfloat16_gives_float32_gradients_that_point_the_same_way(tiny_run):
    run = RunFolder(tiny_run)
    exact, wanted = sft_gradient(run, "float32")
    loss, found = sft_gradient(run, "bfloat16")
    assert not torch.equal(found, wanted) and abs(loss - exact) < 0.01 * exact
    assert torch.nn.functional.cosine_similarity(found, wanted, dim=0) > 0.99
    assert sft_gradient(run, "auto")[0] == exact  # on a CPU
    narrow, found = sft_gradient(run, "bfloat16", "bfloat16")
    assert narrow != loss and abs(narrow - exact) < 0.01 * exact
    assert torch.nn.functional.cosine_similarity(found, wanted, dim=0) > 0.98
    assert sft_gradient(run, "float32", "bfloat16")[0] == exact  # a stream is no narrower than the products
