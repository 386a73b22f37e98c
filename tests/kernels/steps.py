"""A small policy with histories and masses: what whole training steps are compared on."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from negfast.config import History
from negfast.model.choice import TrieChooser
from negfast.model.histories import Histories, HistoryBuilder
from negfast.model.layout import GroupLayout
from negfast.model.policy import Policy
from negfast.sid.prior import DevicePrior, RequestPrior
from negfast.sid.tokens import CodeVocabulary
from negfast.sid.trie import SeenNodes, build_trie
from negfast.train.grpo.stage import freeze
from tests.sid.reference import random_codes, random_log, seen_nodes_reference

TEXT, LEVELS, CODEBOOK, ITEMS, REQUESTS, GROUP = 7, 3, 20, 60, 3, 5
DAYS = 4
SHAPE: dict[str, Any] = {  # of the decoder, whichever it is
    **{"vocab_size": TEXT, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "pad_token_id": None},
}


@dataclass
class Job:
    policy: Policy
    reference: Policy
    chooser: TrieChooser
    tokens: torch.Tensor
    cu_seqlens: np.ndarray
    prior: RequestPrior
    builder: HistoryBuilder

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @property
    def engine(self) -> Any:
        """What asks of an engine no more than its policy and trie."""
        return SimpleNamespace(chooser=self.chooser, policy=self.policy, histories=self.builder, device=self.device)

    def histories(self, with_prior: bool = True) -> Histories:
        """Two requests of the first history, of which the earlier sees less, and one of each other."""
        layout = GroupLayout.build(self.cu_seqlens, self.device)
        history = np.maximum(np.arange(REQUESTS) - 1, 0)
        prefix = np.diff(self.cu_seqlens)[history]
        prefix[0] = prefix[1] // 2
        gap = torch.arange(REQUESTS, device=self.device) + self.policy.vocabulary.marker("gap-0")
        prior = (lambda: self.prior) if with_prior else None
        return Histories(self.tokens, layout, history, prefix, gap, prior)


def make_job(seed: int, device: torch.device, prior_weight: float = 0.7) -> Job:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    trie = build_trie(random_codes(rng, ITEMS, LEVELS, CODEBOOK), CODEBOOK)
    vocabulary = CodeVocabulary(TEXT, LEVELS, CODEBOOK)
    policy = Policy(Qwen3ForCausalLM(Qwen3Config(**SHAPE)), vocabulary)
    torch.nn.init.normal_(policy.block.head.weight, std=0.3)
    torch.nn.init.normal_(policy.block.rows, std=0.5)
    policy.to(device)
    reference = freeze(policy)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    seen = [
        sorted(rng.choice(ITEMS, int(rng.integers(0, ITEMS // 2)), replace=False).tolist()) for _ in range(REQUESTS)
    ]
    prior = DevicePrior.build(trie, random_log(rng, ITEMS, 4 * ITEMS, 100, DAYS), 2.0, 0.05, device)
    packed = SeenNodes.from_packed(seen_nodes_reference(trie, seen), trie, device)
    cu_seqlens = np.cumsum([0, *rng.integers(1, 20, REQUESTS - 1)])
    tokens = torch.from_numpy(rng.integers(TEXT, TEXT + vocabulary.size, cu_seqlens[-1])).to(device)
    return Job(
        policy,
        reference,
        TrieChooser(trie.to(device), prior_weight),
        tokens,
        cu_seqlens,
        prior.for_requests(rng.integers(100, 100 + DAYS, REQUESTS), packed),
        HistoryBuilder(None, None, trie, vocabulary, prior, History(), device, 1),  # type: ignore[arg-type]
    )


def gradients(job: Job, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every parameter that the loss reaches."""
    named = {name: parameter for name, parameter in job.policy.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}


def check(kernel: tuple[torch.Tensor, dict], eager: tuple[torch.Tensor, dict]) -> None:
    torch.testing.assert_close(kernel[0], eager[0], rtol=2e-5, atol=2e-6)
    assert kernel[1].keys() == eager[1].keys() and len(eager[1]) > 20
    for name, right in eager[1].items():
        assert torch.isfinite(kernel[1][name]).all(), name
        assert (kernel[1][name] - right).norm() <= 2e-4 * right.norm() + 1e-7, name


def thirds(items: torch.Tensor) -> torch.Tensor:
    """A reward of one term, [B, G, 1]."""
    return (items % 3 / 2).unsqueeze(-1)
