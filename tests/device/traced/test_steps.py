"""Every stage's step in its variants, lists and verdicts: every tensor on the device, no wait but those of `WAITS`."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, unset_fake_temporarily

from negfast.model.choice import TrieChooser
from negfast.model.layout import GroupLayout
from negfast.runtime.generation import generate
from negfast.runtime.verdict import candidate_logits, first_feedback_candidates
from negfast.train.grpo import rollout
from negfast.train.loop import my_micro_batches, update
from negfast.train.optimizer import make_optimizer
from negfast.train.reader import read_step
from negfast.train.run import STAGES
from negfast.train.sft import NextItems
from negfast.train.stage_checkpoints import StageCheckpoints
from tests.device.fake_cuda import CUDA

FIGURES = "negfast/train/step.py", "figures"
WAITS = {  # within a step: (file, function) and why
    FIGURES: "the journal's figures and whether they are finite, by one copy when all of the step is on its way",
    ("liger_kernel/ops/cross_entropy.py", "cross_entropy_forward"): "liger counts the targets that are not ignored",
    ("liger_kernel/ops/cross_entropy.py", "cross_entropy_backward"): "liger asks whether the gradient is 1",
}
FULL = {"grpo__objective": "full", "grpo__kl": "k3", "prior__weight": 0.0}


def trace_steps(job, name: str, count: int) -> None:
    """Steps of a stage, what each reads included, after a first one, which makes the tables that later ones share."""
    engine, train = job.engine, job.engine.config.train
    stage = STAGES[name](engine)
    optimizer = make_optimizer(engine.policy, stage.config, train)
    for step in range(1 + count):
        batches = read_step(stage, step, my_micro_batches(train.accumulate), 0)
        update(stage, engine.policy, optimizer, 1e-3, train.clip_norm, batches)
        if step == 0:
            job.trace.reset()
    assert all(p.device == CUDA and p.grad is None for p in engine.policy.parameters())


def check_trace(job, steps: int) -> None:
    assert set(job.trace.waits) <= set(WAITS)
    assert job.trace.waits[FIGURES] == steps
    assert not job.trace.unordered


@pytest.mark.parametrize("stage", STAGES)
def test_stages(stage, open_job):
    job = open_job()
    trace_steps(job, stage, 1)
    check_trace(job, 1)


@pytest.mark.parametrize(
    ("stage", "variant"),
    [
        ("sft", {"train__accumulate": 2}),
        ("grpo", {"model__lora_rank": 2}),
        ("grpo", {"train__dtype": "float32"}),
        ("grpo", {"train__stream": "bfloat16"}),
    ],
    ids=str,
)
def test_execution(stage, variant, open_job):
    job = open_job(**variant)
    trace_steps(job, stage, 1)
    check_trace(job, 1)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_execution_of_heads_that_the_kernels_do_not_take(stage, open_job, monkeypatch):
    for module in ("kernels.dispatch", "train.grpo.graphs"):
        monkeypatch.setattr(f"negfast.{module}.HEAD_DIMS", (64, 128))
    job = open_job()
    trace_steps(job, stage, 1)
    assert not any("attention" in name for name in job.trace.launches)
    assert dict(job.trace.waits) == {FIGURES: 1}
    # of index_select: rows that are distinct, but for those of padding, which are zeros
    assert {name for *_, name in job.trace.unordered} == {"index_add"}


@pytest.mark.parametrize("stage", STAGES)
def test_stages_without_liger(stage, open_job):
    with mock.patch("negfast.kernels.dispatch.find_spec", lambda _: None):
        job = open_job()
        trace_steps(job, stage, 1)
    assert dict(job.trace.waits) == {FIGURES: 1}


@pytest.mark.parametrize(
    "variant",
    [
        {"grpo__epochs": 2},
        {"grpo__epochs": 2, "grpo__loss": "dapo", "grpo__set_size": 0, "grpo__scale_rewards": True},
        {"grpo__loss": "grpo", "grpo__set_size": 1, "grpo__kl": "k3", "grpo__temperature": 0.7},
        {"grpo__beta": 0.0, "grpo__sft_weight": 0.5, "grpo__schedule": "static"},
        {"reward__target": "next", "prior__weight": 0.0},
        FULL,
        FULL | {"grpo__beta": 0.0, "grpo__kl": "exact", "grpo__set_size": 0},
    ],
    ids=str,
)
def test_objectives(variant, open_job):
    job = open_job(**variant)
    trace_steps(job, "grpo", 2)
    check_trace(job, 2)


def test_full_objective_without_liger(open_job):
    with mock.patch("negfast.kernels.dispatch.find_spec", lambda _: None):
        job = open_job(**FULL)
        trace_steps(job, "grpo", 1)
    check_trace(job, 1)


def test_resumed(checkpoint, open_job, monkeypatch):
    monkeypatch.setattr("negfast.runtime.checkpoint.load_file", unset_fake_temporarily()(load_file))
    # weights are told apart by where they lie
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda tensor: tensor.untyped_storage()._cdata, raising=False)
    job = open_job()
    stage = STAGES["sft"](job.engine)
    optimizer = make_optimizer(job.engine.policy, stage.config, job.engine.config.train)
    saved = StageCheckpoints(checkpoint.parent, 1, "sft", job.engine.policy, optimizer, mock.Mock(), background=False)
    step = saved.resume(checkpoint)
    assert {value.device for state in optimizer.state.values() for value in state.values()} == {CUDA}
    job.trace.reset()
    update(stage, job.engine.policy, optimizer, 1e-3, 1.0, read_step(stage, step, my_micro_batches(1), 0))


@pytest.mark.parametrize("with_policy", [True, False], ids=["policy", "prior"])
def test_lists(with_policy, open_job):
    job, requests = open_job(), 2 * 64  # two batches
    job.trace.reset()
    found = generate(job.engine, job.engine.split.train.take(np.arange(requests)), 10, with_policy)
    assert found[0].shape == (requests, 10)
    assert dict(job.trace.waits) == {("negfast/runtime/generation.py", "generate"): 2 * 2}  # items, log p


def test_verdicts(open_job):
    job = open_job()
    log = job.engine.log
    candidates, _ = first_feedback_candidates(log, "day", int(log.day.max()) - 5, int(log.day.max()))
    job.trace.reset()
    candidate_logits(job.engine, candidates)
    assert dict(job.trace.waits) == {("negfast/runtime/verdict.py", "verdict_logits"): 1}


def also(before: Callable[..., object]) -> Callable[[Callable], Callable]:
    """A change of a function: ``before`` is called with its arguments first."""

    def change(stock: Callable) -> Callable:
        def changed(*args: object, **kwargs: object) -> object:
            before(*args, **kwargs)
            return stock(*args, **kwargs)

        return changed

    return change


def then(after: Callable[[Any], object]) -> Callable[[Callable], Callable]:
    """A change of a function: its result goes through ``after``."""

    def change(stock: Callable) -> Callable:
        return lambda *args, **kwargs: after(stock(*args, **kwargs))

    return change


MISTAKES = {
    "an index on the CPU": (GroupLayout, "completion_positions", then(lambda x: x[torch.arange(len(x))])),
    "a part on the CPU": (GroupLayout, "completion_positions", then(lambda x: torch.arange(len(x)))),
    "a constant on the CPU in the loss": (
        NextItems,
        "loss",
        then(lambda found: ((found[0] * torch.ones(1)).sum(), found[1])),
    ),
    "item()": (NextItems, "read", then(lambda batch: (batch.targets.items.sum().item(), batch)[1])),
    "a branch on a tensor": (NextItems, "loss", then(lambda found: found if found[0] > 0 else (-found[0], found[1]))),
    "a number made a tensor": (
        TrieChooser,
        "choose",
        also(lambda _, policy, hidden, level, nodes, *rest: torch.as_tensor(level, device=nodes.device)),
    ),
    "a mask's rows": (rollout, "keyed_rows", also(lambda _, step, ids, *rest: (ids > 0).nonzero())),
    "an unordered sum": (
        TrieChooser,
        "choose",
        also(lambda _, policy, hidden, *rest: torch.zeros_like(hidden).index_add_(0, rest[2], hidden)),
    ),
    "a copy that blocks": (NextItems, "read", also(lambda *_: torch.from_numpy(np.arange(3)).to(CUDA))),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught(mistake, open_job, monkeypatch):
    owner, name, change = MISTAKES[mistake]
    monkeypatch.setattr(owner, name, change(getattr(owner, name)))
    job = open_job(grpo__sft_weight=0.5)
    try:
        trace_steps(job, "grpo", 1)
    except DynamicOutputShapeException:
        assert mistake == "a mask's rows"
    except (AssertionError, RuntimeError) as error:
        assert "cpu" in str(error).lower()
    else:
        assert job.trace.unordered if mistake == "an unordered sum" else set(job.trace.waits) - set(WAITS)
