"""What `bench gpu` times on the first visit of a GPU, our side of it: every job ends, with no tensor off the device."""

import pytest
import torch

from bench.gpu_steps import PARTS, Sizes, measured
from bench.grpo_step import Case
from bench.sft import Case as SftCase
from negfast.config import Model
from tests.device.fake_cuda import CUDA

SHAPE = Model(hidden=64, intermediate=48, layers=2, heads=2, kv_heads=1, head_dim=32)
SMALL = Sizes(
    grpo=(Case((9, 4), 2, levels=2),),
    grpo_micro_batches=(4,),
    grpo_shape=SHAPE,
    sft=SftCase(2, 6, 2, layers=2, hidden=64, heads=2, kv_heads=1, head_dim=32),
    sft_micro_batch=2,
    beam=Case((7, 3), 1, levels=2),
    beam_width=4,
    beam_shape=SHAPE,
    repeats=1,
)


@pytest.mark.parametrize("part", PARTS)
def test_the_jobs_of_a_visit_end(part, trace, monkeypatch):
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 0)
    rows = [measured(job, CUDA) for job in PARTS[part](CUDA, SMALL) if job.system.startswith("negfast")]
    assert [(row["system"], row["status"]) for row in rows] == [("negfast", "ok"), ("negfast, eager", "ok")]
    assert trace.launches
