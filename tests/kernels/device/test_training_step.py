"""Whole training steps through the kernels against the same steps in eager code: loss and every gradient.

Rollout or teacher forcing, pruning, prior, reference, loss and backward of a small Qwen3 in float32, on the GPU where
there is one, else in Triton's interpreter.
"""

import numpy as np
import pytest
import torch

from negfast.kernels import dispatch, sid_cross_entropy, trie_grpo, vocabulary_cross_entropy
from negfast.kernels.trie_grpo import GRPOObjective, GRPOTerms
from negfast.model import packed_attention
from negfast.model.beam import beam_search
from negfast.runtime.likelihood import Targets, target_log_probs
from negfast.sid.prior import NEXT_DISLIKE
from negfast.sid.trie import SeenNodes
from negfast.train.grpo import graphs
from negfast.train.grpo.graphs import RolloutGraphs
from negfast.train.grpo.loss import GroupLoss
from tests.kernels.cases import relative_error
from tests.kernels.steps import GROUP, ITEMS, REQUESTS, Job, check, gradients, make_job, thirds


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each part is computed by its kernel."""
    counted = dict.fromkeys(("grpo", "cross entropy", "vocabulary", "prompt", "completion"), 0)

    def count(module, function: str, part: str) -> None:
        original = getattr(module, function)

        def counting(*arguments):
            counted[part] += 1
            return original(*arguments)

        monkeypatch.setattr(module, function, counting)

    count(trie_grpo, "_operator", "grpo")
    count(sid_cross_entropy, "_forward", "cross entropy")
    count(vocabulary_cross_entropy, "liger_cross_entropy", "vocabulary")
    for part in ("prompt", "completion"):
        count(packed_attention, f"{part}_attention", part)
    return counted


OBJECTIVES = {
    "default": GRPOObjective(beta=0.1),
    "off-policy k3 grpo": GRPOObjective(beta=0.1, kl="k3", loss="grpo", scale_rewards=True, temperature=0.8),
    "max@2": GRPOObjective(beta=0.1, set_size=2, loss="dapo"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_grpo(name: str, device: torch.device, seed: int, calls: dict[str, int]):
    """Rollout, reference, loss and backward; then another update from the same rollout by a second pass."""
    job = make_job(seed, device)
    loss = GroupLoss(job.policy, job.reference, job.chooser, OBJECTIVES[name], GROUP, 1)

    def step() -> tuple:
        histories = job.histories()
        return histories, loss.sample(histories, torch.arange(REQUESTS, device=device), thirds, seed)

    histories, taken = step()
    used = dict(calls)
    assert used["grpo"] == 1 and min(used["prompt"], used["completion"]) >= 1
    found = taken.terms.loss, gradients(job, taken.terms.loss)
    with dispatch.eager():
        _, expected = step()
        check(found, (expected.terms.loss, gradients(job, expected.terms.loss)))
    assert calls == used, "the reference used a kernel"
    assert torch.equal(taken.rollout.items, expected.rollout.items)
    for kernel, eager in zip(taken.terms.per_token, expected.terms.per_token, strict=True):
        torch.testing.assert_close(kernel, eager, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for parameter in job.policy.block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    again = loss.reuse(histories.fresh(), taken).loss
    found = again, gradients(job, again)
    with dispatch.eager():
        again = loss.reuse(histories.fresh(), expected).loss
        check(found, (again, gradients(job, again)))


def test_grpo_by_graphs(device: torch.device, seed: int, monkeypatch: pytest.MonkeyPatch):
    """As on a GPU: padded, with static shapes, replayed, then one pass that trains. Two batches of one size, of which
    the second finds what the first one left, earn the loss and gradients of a step with changing shapes."""
    if device.type == "cpu":  # a replay runs its part again
        monkeypatch.setattr(graphs, "replayed", lambda parts: ([part() for part in parts], parts)[1])
        monkeypatch.setattr(RolloutGraphs, "_possible", lambda *_: True)
    job, objective = make_job(seed, device), GRPOObjective(beta=0.1)
    loss = GroupLoss(job.policy, job.reference, job.chooser, objective, GROUP, 1, static=True)
    short = job.histories()
    short.prefix[:] = np.maximum(short.prefix // 2, 1)
    for step, histories in enumerate((job.histories(), short)):
        ids = torch.arange(REQUESTS, device=device)
        taken = loss.sample(histories.fresh(), ids, thirds, step)
        found = taken.terms.loss, gradients(job, taken.terms.loss)
        with dispatch.eager():
            other = GroupLoss(job.policy, job.reference, job.chooser, objective, GROUP, 1)
            expected = other.sample(histories.fresh(), ids, thirds, step)
            check(found, (expected.terms.loss, gradients(job, expected.terms.loss)))
        assert torch.equal(taken.rollout.items, expected.rollout.items)
    assert len(loss.graphs.kept) == 1 and not loss.graphs.failed


@pytest.mark.parametrize(
    "objective",
    [GRPOObjective(beta=0.1, kl="k3", temperature=0.7), GRPOObjective(beta=0.0, loss="grpo", scale_rewards=True)],
    ids=["k3", "no-kl"],
)
def test_grpo_over_the_whole_vocabulary(
    objective: GRPOObjective, device: torch.device, seed: int, calls: dict[str, int]
):
    """By liger-kernel; what is told of each token is the same too."""
    job = make_job(seed, device, prior_weight=0.0)
    reference = job.reference if objective.beta else None
    ids = torch.arange(REQUESTS, device=device)

    def step() -> GRPOTerms:
        loss = GroupLoss(job.policy, reference, job.chooser, objective, GROUP, 1, full=True)
        return loss.sample(job.histories(), ids, thirds, seed).terms

    found = step()
    assert calls["vocabulary"] == 1 and calls["grpo"] == 0
    kernel = found.loss, gradients(job, found.loss)
    with dispatch.eager():
        expected = step()
        check(kernel, (expected.loss, gradients(job, expected.loss)))
    assert calls["vocabulary"] == 1, "the reference used a kernel"
    for ours, right in zip(found.per_token, expected.per_token, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_prior", [True, False], ids=["sft", "align"])
def test_sft(with_prior: bool, device: torch.device, seed: int, calls: dict[str, int]):
    """Different numbers of targets a request, of both branches; align has neither prior nor pruning."""
    job = make_job(seed, device)
    rng = np.random.default_rng(seed)
    counts = np.array([4, 0, 3])
    seen = job.prior.seen
    unseen = [np.setdiff1d(np.arange(ITEMS), leaves_of(job, seen, request)) for request in range(REQUESTS)]
    drawn = np.concatenate([rng.choice(unseen[request], count) for request, count in enumerate(counts)])
    items = torch.from_numpy(drawn).to(device)
    branch = torch.from_numpy(rng.integers(0, 2, len(items))).to(device) if with_prior else 0
    markers = torch.full_like(items, job.policy.vocabulary.marker("next-dislike"))
    weight = torch.rand(len(items), device=device)

    def loss() -> tuple[torch.Tensor, dict]:
        histories = job.histories(with_prior)
        targets = Targets(histories, np.repeat(np.arange(REQUESTS), counts), markers, items)
        log_p = target_log_probs(job.engine, targets, histories.prior, branch)
        return log_p.detach(), gradients(job, -(weight * log_p).sum())

    found = loss()
    assert calls["cross entropy"] == 1 and calls["prompt"] >= 1 and calls["completion"] == 2
    with dispatch.eager():
        check(found, loss())


def test_sft_in_bfloat16(device: torch.device, seed: int):
    """Under autocast: no further from float32 than eager code under autocast is."""
    job = make_job(seed, device)
    items = torch.from_numpy(np.random.default_rng(seed).integers(0, ITEMS, 6)).to(device)
    markers = torch.full_like(items, job.policy.vocabulary.marker("next-dislike"))

    def log_probs(autocast: bool) -> tuple[torch.Tensor, torch.Tensor]:
        targets = Targets(job.histories(False), np.repeat(np.arange(REQUESTS), 2), markers, items)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            log_p = target_log_probs(job.engine, targets, None, 0)
        gradient = torch.cat([g.flatten() for g in gradients(job, -log_p.float().sum()).values()])
        return log_p.detach(), gradient

    found = log_probs(True)
    with dispatch.eager():
        rounded, exact = log_probs(True), log_probs(False)
    for kernel, eager, right in zip(found, rounded, exact, strict=True):
        assert relative_error(kernel, right) <= 1.5 * relative_error(eager, right) + 1e-3
        assert relative_error(kernel, right) < 0.05


def leaves_of(job: Job, seen: SeenNodes, request: int) -> np.ndarray:
    return job.chooser.trie.leaf_item[seen.leaf[seen.request == request]].cpu().numpy()


def test_beam_search(device: torch.device, seed: int, calls: dict[str, int]):
    job = make_job(seed, device)

    def search() -> tuple[torch.Tensor, torch.Tensor]:
        histories = job.histories()
        return beam_search(job.policy, job.chooser, histories, histories.prior, NEXT_DISLIKE, width=6, top=6)

    items, scores = search()
    assert calls["prompt"] and calls["completion"]
    with dispatch.eager():
        wanted, wanted_scores = search()
    torch.testing.assert_close(scores, wanted_scores, rtol=1e-4, atol=1e-4)
    clear = wanted_scores.diff(dim=1, prepend=wanted_scores[:, :1] + 1).abs() > 1e-3  # of both neighbours
    clear &= wanted_scores.diff(dim=1, append=wanted_scores[:, -1:] - 1).abs() > 1e-3
    assert torch.equal(items[clear], wanted[clear])
