"""Whole steps with liger's norms, rotary embedding and SwiGLU against the stock decoder: loss and every gradient."""

import copy

import pytest
import torch
import triton.language as tl
from transformers import LlamaConfig, LlamaForCausalLM

from negfast.kernels import dispatch
from negfast.kernels.trie_grpo import GRPOObjective
from negfast.model.fused_layers import FusedAddNorm, FusedMlp, FusedNorm, fuse_layers, fused_rotation, stock_because
from negfast.model.policy import Policy
from negfast.train.grpo.loss import GroupLoss
from negfast.train.grpo.stage import freeze
from tests.kernels.cases import relative_error
from tests.kernels.steps import GROUP, REQUESTS, SHAPE, check, gradients, make_job, thirds


class Scalar(float):
    """A number of the host as compiled kernels see it; the interpreter hands them Python's, which have no ``to``."""

    def to(self, _: object) -> "Scalar":
        return self


@pytest.fixture(autouse=True)
def scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    if not dispatch.INTERPRETED:
        return
    from liger_kernel.ops import rms_norm, swiglu

    there, back = rms_norm.rms_norm_forward, rms_norm.rms_norm_backward

    def forward(x, weight, eps, offset, *rest, **named):
        return there(x, weight, Scalar(eps), Scalar(offset), *rest, **named)

    def backward(gradient, x, weight, rstd, offset, *rest, **named):
        return back(gradient, x, weight, rstd, Scalar(offset), *rest, **named)

    monkeypatch.setattr(rms_norm, "rms_norm_forward", forward)
    monkeypatch.setattr(rms_norm, "rms_norm_backward", backward)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: 1 / tl.sqrt(x))  # CUDA's own is not interpreted
    monkeypatch.setattr(swiglu, "float", Scalar, raising=False)


@pytest.mark.parametrize("decoder", ["qwen3", "llama"])
def test_a_step_by_one_pass_and_by_two(decoder: str, device: torch.device, seed: int):
    """The prompts' keys serve every level, so nothing that liger overwrites may be read again."""
    job = make_job(seed, device)
    if decoder == "llama":
        job.policy = Policy(LlamaForCausalLM(LlamaConfig(**SHAPE)), job.policy.vocabulary).to(device)
        torch.nn.init.normal_(job.policy.block.head.weight, std=0.3)
        job.reference = freeze(job.policy)
    for norm in (module for name, module in job.policy.named_modules() if name.endswith("norm")):
        torch.nn.init.normal_(norm.weight, mean=1.0, std=0.2)
    stock = copy.copy(job)
    stock.policy, stock.reference = copy.deepcopy(job.policy), copy.deepcopy(job.reference)
    names = [name for name, _ in job.policy.named_parameters()]
    for policy in (job.policy, job.reference):
        assert stock_because(policy, device) is None
        fuse_layers(policy, device)
    assert [name for name, _ in job.policy.named_parameters()] == names
    kinds = [type(module) for module in job.policy.decoder.modules()]
    assert kinds.count(FusedMlp) == 2 and kinds.count(FusedAddNorm) == 5
    assert kinds.count(FusedNorm) == (4 if decoder == "qwen3" else 0)
    rotations = [layer.self_attn.forward.__func__.__globals__ for layer in job.policy.decoder.layers]
    assert all(names["apply_rotary_pos_emb"] is fused_rotation for names in rotations)

    def both(job) -> list:
        batch, ids = job.histories(), torch.arange(REQUESTS, device=device)
        loss = GroupLoss(job.policy, job.reference, job.chooser, GRPOObjective(beta=0.1), GROUP, 1)
        taken = loss.sample(batch, ids, thirds, seed)
        first = taken.terms.loss, gradients(job, taken.terms.loss)
        again = loss.reuse(batch.fresh(), taken).loss
        return [first, (again, gradients(job, again))]

    for found, expected in zip(both(job), both(stock), strict=True):
        check(found, expected)
    frozen = freeze(job.policy)
    assert frozen.decoder.layers[0].self_attn.forward.__self__ is frozen.decoder.layers[0].self_attn


def test_in_bfloat16(device: torch.device, seed: int):
    """No further from float32 than the stock layers under the same autocast."""
    job = make_job(seed, device)
    fused = copy.copy(job)
    fused.policy = copy.deepcopy(job.policy)
    fuse_layers(fused.policy, device)

    def hidden(job, in_bfloat16: bool) -> tuple[torch.Tensor, torch.Tensor]:
        job.policy.in_bfloat16 = in_bfloat16
        out = job.policy.hidden(job.histories().layout, job.tokens, None)
        weight = torch.linspace(-1, 1, out.numel(), device=device).view_as(out)
        return out.detach(), torch.cat([g.flatten() for g in gradients(job, (out * weight).sum()).values()])

    for found, rounded, exact in zip(hidden(fused, True), hidden(job, True), hidden(job, False), strict=True):
        assert relative_error(found, exact) <= 1.5 * relative_error(rounded, exact) + 1e-3


def test_what_liger_does_not_know_stays_and_says_why(device: torch.device, seed: int):
    policy = make_job(seed, device).policy
    before = [type(module) for module in policy.modules()]
    with dispatch.eager():
        fuse_layers(policy, device)
        assert stock_because(policy, device) == "no CUDA"
    policy.decoder.config.hidden_act = "gelu"
    fuse_layers(policy, device)
    assert stock_because(policy, device) == "liger-kernel is not used for qwen3 with gelu"
    assert [type(module) for module in policy.modules()] == before
