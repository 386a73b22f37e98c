"""Several updates from one rollout: ratios against the policy that sampled, clipped."""

import json
import os
import signal
from typing import Any

import pytest
import torch

from negfast.config import load_config
from negfast.errors import InputError
from negfast.kernels.trie_grpo import GRPOObjective
from negfast.train.combinations import check_combinations
from negfast.train.grpo import graphs
from negfast.train.grpo.loss import GroupLoss
from negfast.train.grpo.stage import GrpoStage, freeze
from tests.tiny import run_cli, train_arguments
from tests.train.small import make_small


def sample(small, objective, rewards):
    reference = freeze(small.policy) if objective.beta else None
    loss, histories = GroupLoss(small.policy, reference, small.chooser, objective, 6, 0), small.histories()
    taken = loss.sample(histories, torch.arange(3), lambda _: rewards[..., None], 0)
    return taken, lambda: loss.reuse(histories.fresh(), taken)


def test_the_first_reuse_is_the_on_policy_loss():
    small = make_small(1)
    objective = GRPOObjective(beta=0.1)
    taken, reuse = sample(small, objective, torch.randn(3, 6, dtype=torch.float64))
    again = reuse()
    parameters = list(small.policy.block.parameters())
    wanted = torch.autograd.grad(taken.terms.loss, parameters)
    found = torch.autograd.grad(again.loss, parameters)
    assert abs(again.loss - taken.terms.loss) < 1e-12
    assert all((a - b).abs().max() < 1e-9 * b.abs().max() for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_static_shapes_give_the_same_step(beta):
    """As on a GPU: all completions are carried along, and one pass without sampling computes the loss."""
    small, rewards = make_small(4), torch.randn(3, 6, dtype=torch.float64)
    reference = freeze(small.policy) if beta else None
    if reference is not None:
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    parameters, steps = list(small.policy.decoder.parameters()) + list(small.policy.block.parameters()), []
    for static in (False, True):
        loss = GroupLoss(small.policy, reference, small.chooser, GRPOObjective(beta=beta), 6, 0, static=static)
        taken = loss.sample(small.histories(), torch.arange(3), lambda _: rewards[..., None], 0)
        gradients = torch.autograd.grad(taken.terms.loss, parameters, allow_unused=True)
        steps.append((taken.rollout.items, taken.terms.loss, gradients))
        assert (len(taken.rollout.rows[1]) == 18) == static  # the other shares rows
    (items, value, wanted), (other_items, other_value, found) = steps
    assert torch.equal(items, other_items) and abs(value - other_value) <= 1e-12
    for want, got in zip(wanted, found, strict=True):
        assert (want is None) == (got is None)
        assert want is None or (got - want).abs().max() <= 1e-10 * want.abs().max().clamp_min(1e-12)


def test_a_graph_that_cannot_be_captured_costs_a_line(monkeypatch, capsys):
    def fails(_parts):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graphs, "replayed", fails)
    monkeypatch.setattr(graphs.RolloutGraphs, "_possible", lambda *_: True)
    small, rewards = make_small(4), torch.randn(3, 6, dtype=torch.float64)
    loss = GroupLoss(small.policy, None, small.chooser, GRPOObjective(beta=0.0), 6, 0, static=True)
    for step in range(2):
        taken = loss.sample(small.histories(), torch.arange(3), lambda _: rewards[..., None], step)
        assert taken.terms.loss.isfinite()
    assert capsys.readouterr().err.splitlines() == [
        "GRPO rolls out without CUDA graphs: operation not permitted when stream is capturing"
    ]


def test_sizes_are_rounded_up_by_an_eighth_at_most():
    for size in range(1, 5000):
        assert size <= graphs.eighths(size) <= size * 9 / 8
    assert len({graphs.eighths(size) for size in range(1024, 2049)}) == 9


@pytest.mark.parametrize("move", [0.01, 0.3])
def test_a_moved_policy_is_weighed_by_clipped_ratios(move):
    small = make_small(2)
    objective = GRPOObjective(beta=0.0, clip_low=0.1, clip_high=0.3)
    rewards = torch.randn(3, 6, dtype=torch.float64)
    before = small.leaf_log_probs(0)
    taken, reuse = sample(small, objective, rewards)
    with torch.no_grad():
        for parameter in small.policy.block.parameters():
            parameter.add_(move * torch.randn_like(parameter))
    found = reuse()

    # completion by completion and level by level, from the leaves' probabilities by separate forwards
    after = small.leaf_log_probs(0)
    advantage = rewards - rewards.mean(1, keepdim=True)
    total, clipped = torch.zeros((), dtype=torch.float64), 0
    for b, items in enumerate(taken.rollout.items.tolist()):
        for g, item in enumerate(items):
            for level in range(3):
                step = [conditional(small.trie.codes, logs[b], item, level) for logs in (before, after)]
                ratio = torch.tensor(step[1] - step[0], dtype=torch.float64).exp()
                bounded = ratio.clamp(0.9, 1.3)
                clipped += int(bounded * advantage[b, g] < ratio * advantage[b, g])
                total -= min(ratio * advantage[b, g], bounded * advantage[b, g])
    # forced tokens do not count; their ratio is 1, and a group's advantages sum to 0 only where all of them are forced
    forced = ~taken.rollout.tokens.counted
    total += (advantage.flatten()[taken.rollout.tokens.completion] * forced).sum()
    assert abs(found.loss - total / (3 * 18)) < 1e-9
    assert found.clipped.sum() == clipped


def conditional(codes, log_prob, item, level):
    """log p of an item's code at a level given those before it, from the log-probabilities of all items."""
    weights = torch.from_numpy(log_prob).exp()
    above = torch.from_numpy((codes[:, :level] == codes[item, :level]).all(1))
    below = torch.from_numpy((codes[:, : level + 1] == codes[item, : level + 1]).all(1))
    return float(weights[below].sum().log() - weights[above].sum().log())


@pytest.fixture(scope="module")
def reusing_run(tiny_data, tmp_path_factory):
    """(arguments but for the folder, folder) of a finished run of rounds of three steps, two and a third of them."""
    settings: dict[str, Any] = dict(grpo__epochs=3, grpo__steps=7, train__checkpoint_every=99)
    settings |= dict(align__steps=1, sft__steps=1, sft__warmup=0)
    folder = tmp_path_factory.mktemp("reuse") / "run"
    run_cli(*train_arguments(tiny_data, folder, **settings))
    return settings, folder


def test_the_job_runs_with_reuse(reusing_run):
    lines = [json.loads(line) for line in (reusing_run[1] / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["stage"] == "grpo"]
    assert len(lines) == 7
    rounds = [lines[0:3], lines[3:6], lines[6:]]
    for same in rounds:
        assert len({line["reward"] for line in same}) == 1
    assert len({same[0]["reward"] for same in rounds}) == 3


def test_an_interrupt_within_a_round_waits_for_its_end(reusing_run, tiny_data, tmp_path, monkeypatch):
    settings, whole = reusing_run
    run, take_step = tmp_path / "run", GrpoStage.step

    def interrupted(stage, batch):
        if batch.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(stage, batch)

    with monkeypatch.context() as patch:
        patch.setattr(GrpoStage, "step", interrupted)
        run_cli(*train_arguments(tiny_data, run, **settings), code=130)
    assert [path.name for path in (run / "checkpoints").glob("2-*")] == ["2-grpo-000006"]
    run_cli("train", "--out", str(run))
    for name in ("metrics.jsonl", "final/policy.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"train[.]checkpoint_every: found 100, expected a multiple of grpo.epochs=3"):
        check_combinations(load_config(overrides=("grpo.epochs=3",)))
    config = load_config(overrides=("grpo.epochs=2", "grpo.kl=k3", "prior.weight=0", "grpo.objective=full"))
    with pytest.raises(InputError, match=r"grpo[.]epochs"):
        check_combinations(config)
