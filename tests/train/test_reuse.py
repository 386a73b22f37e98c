"""Several updates from one rollout: ratios against the policy that sampled, clipped."""

import pytest
import torch
from negfast.kernels.trie_grpo import GRPOObjective

from negfast.config import load_config
from negfast.errors import InputError
from negfast.train.grpo import check_combinations, freeze, group_loss, reuse_loss
from tests.tiny import run_cli, train_arguments
from tests.train.small import make_small


def sample(small, objective, rewards):
    batch = small.batch(6)
    taken = group_loss(
        small.policy,
        freeze(small.policy),
        small.chooser,
        batch,
        torch.arange(3),
        lambda _: rewards[..., None],
        objective,
        6,
        0,
        0,
    )
    return batch, taken


def test_the_first_reuse_is_the_on_policy_loss():
    small = make_small(1)
    objective = GRPOObjective(beta=0.1)
    batch, taken = sample(small, objective, torch.randn(3, 6, dtype=torch.float64))
    again = reuse_loss(small.policy, batch, taken, objective, 3)
    parameters = list(small.policy.block.parameters())
    wanted = torch.autograd.grad(taken.result.loss, parameters)
    found = torch.autograd.grad(again.loss, parameters)
    assert abs(again.loss - taken.result.loss) < 1e-12
    assert all((a - b).abs().max() < 1e-9 * b.abs().max() for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("move", [0.01, 0.3])
def test_a_moved_policy_is_weighed_by_clipped_ratios(move):
    small = make_small(2)
    objective = GRPOObjective(beta=0.0, clip_low=0.1, clip_high=0.3)
    rewards = torch.randn(3, 6, dtype=torch.float64)
    before = small.leaf_log_probs(0)
    batch, taken = sample(small, objective, rewards)
    with torch.no_grad():
        for parameter in small.policy.block.parameters():
            parameter.add_(move * torch.randn_like(parameter))
    found = reuse_loss(small.policy, batch, taken, objective, 3)

    # answer by answer and level by level, from the leaves' probabilities by separate forwards
    after = small.leaf_log_probs(0)
    advantage = rewards - rewards.mean(1, keepdim=True)
    total, clipped = 0.0, 0
    for b, items in enumerate(taken.rollout.items.tolist()):
        for g, item in enumerate(items):
            for level in range(3):
                step = [conditional(small.trie.codes, logs[b], item, level) for logs in (before, after)]
                ratio = torch.tensor(step[1] - step[0]).exp()
                bounded = ratio.clamp(0.9, 1.3)
                clipped += int(bounded * advantage[b, g] < ratio * advantage[b, g])
                total -= min(ratio * advantage[b, g], bounded * advantage[b, g])
    # forced tokens do not count; their ratio is 1, and a group's advantages sum to 0 only where all of them are forced
    forced = ~taken.rollout.tokens.counted
    total += (advantage.flatten()[taken.rollout.tokens.answer] * forced).sum()
    assert abs(found.loss - total / (3 * 18)) < 1e-9
    assert found.clipped.sum() == clipped


def conditional(codes, log_prob, item, level):
    """log p of an item's code at a level given those before it, from the log-probabilities of all items."""
    weights = torch.from_numpy(log_prob).exp()
    above = torch.from_numpy((codes[:, :level] == codes[item, :level]).all(1))
    below = torch.from_numpy((codes[:, : level + 1] == codes[item, : level + 1]).all(1))
    return float(weights[below].sum().log() - weights[above].sum().log())


def test_the_job_runs_with_reuse_and_refuses_what_does_not_fit(tiny_data, tmp_path):
    command = train_arguments(tiny_data, tmp_path / "run", grpo__epochs=2, align__steps=1, sft__steps=1, sft__warmup=0)
    run_cli(*command)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum('"grpo"' in line for line in lines) == 4
    odd = train_arguments(tiny_data, tmp_path / "odd", grpo__epochs=3, align__steps=0, sft__steps=0)
    assert "train.checkpoint_every" in run_cli(*odd, code=2)
    for other in ("grpo.objective=full", "grpo.sampling=without_replacement"):
        config = load_config(overrides=("grpo.epochs=2", "grpo.kl=k3", "prior.weight=0", other))
        with pytest.raises(InputError, match=r"grpo[.]epochs"):
            check_combinations(config)
