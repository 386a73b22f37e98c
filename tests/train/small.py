"""A small policy on a random trie with random histories and masses: what rollout and beam are tested on."""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from negfast.model.choice import TrieChooser
from negfast.model.histories import Histories
from negfast.model.layout import GroupLayout
from negfast.model.policy import Policy
from negfast.sid.prior import MARKERS, DevicePrior, RequestPrior, child_log_prior
from negfast.sid.tokens import CodeVocabulary
from negfast.sid.trie import SeenNodes, Trie, build_trie
from tests.sid.reference import random_codes, random_log, seen_nodes_reference

BASE = 7


@dataclass
class Small:
    policy: Policy
    chooser: TrieChooser
    trie: Trie
    seen: list[list[int]]
    tokens: torch.Tensor
    cu_seqlens: np.ndarray
    prior: RequestPrior

    def histories(self) -> Histories:
        """A request at the end of each history."""
        layout = GroupLayout.build(self.cu_seqlens, torch.device("cpu"))
        every = np.arange(len(self.seen))
        return Histories(self.tokens, layout, every, np.diff(self.cu_seqlens), self.gap, lambda: self.prior)

    @property
    def gap(self) -> torch.Tensor:
        """int64 [B]"""
        return torch.arange(len(self.seen)) + self.policy.vocabulary.marker("gap-0")

    @torch.no_grad()
    def leaf_log_probs(self, branch: int) -> np.ndarray:
        """log p of every item for every request, float64 [B, I], by a separate forward for every prefix."""
        prompts, levels = len(self.seen), self.chooser.trie.levels
        out = np.full((prompts, len(self.trie.leaf_item)), -np.inf)
        prefix_states: dict = {}
        for b in range(prompts):
            prompt = self.tokens[self.cu_seqlens[b] : self.cu_seqlens[b + 1]]
            for item in range(out.shape[1]):
                if item in self.seen[b]:
                    continue
                total = 0.0
                for level in range(levels):
                    prefix = tuple(self.trie.codes[item, :level].tolist())
                    if (b, prefix) not in prefix_states:
                        prefix_states[b, prefix] = self._log_probs(b, prompt, level, prefix, item, branch)
                    total += float(prefix_states[b, prefix][int(self.trie.codes[item, level])])
                out[b, item] = total
        return out

    def _log_probs(self, b, prompt, level, prefix, item, branch):
        vocabulary = self.policy.vocabulary
        codes = [vocabulary.code_base(k + 1) + code for k, code in enumerate(prefix)]
        fed = torch.tensor([[vocabulary.marker(MARKERS[branch]), *codes]]).unsqueeze(-1)
        fed = torch.cat([fed, torch.full_like(fed, vocabulary.marker("none"))], -1)
        fed[0, 0, 1] = self.gap[b]
        layout = GroupLayout.build(np.array([0, len(prompt)]), torch.device("cpu"))
        layout.ask(np.zeros(1, dtype=int))
        hidden = self.policy.hidden(layout, prompt, fed)[-1:]
        node = torch.tensor([0 if level == 0 else int(self.trie.item_nodes[item, level - 1])])
        log_mass, valid, _ = child_log_prior(self.chooser.trie, self.prior, branch, level, node, torch.tensor([b]))
        logits = self.policy.code_logits(hidden, level + 1) + self.chooser.prior_weight * log_mass
        return logits.masked_fill(~valid, -torch.inf).log_softmax(-1)[0].numpy()


def make_small(seed: int, items: int = 40, levels: int = 3, codebook: int = 6, prompts: int = 3) -> Small:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    trie = build_trie(random_codes(rng, items, levels, codebook), codebook)
    vocabulary = CodeVocabulary(BASE, levels, codebook)
    config = Qwen3Config(
        vocab_size=BASE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=None,
    )
    policy = Policy(Qwen3ForCausalLM(config), vocabulary)
    take_norms_in_their_own_dtype(policy.decoder)
    policy.double().eval()
    torch.nn.init.normal_(policy.block.head.weight, std=0.3)
    torch.nn.init.normal_(policy.block.rows, std=0.5)
    seen = [sorted(rng.choice(items, int(rng.integers(0, items // 2)), replace=False).tolist()) for _ in range(prompts)]
    log = random_log(rng, items, 4 * items, 100, 5)
    prior = DevicePrior.build(trie, log, 2.0, 0.05, "cpu", torch.float64)
    packed = seen_nodes_reference(trie, seen)
    request_prior = prior.for_requests(rng.integers(100, 105, prompts), SeenNodes.from_packed(packed, trie, "cpu"))
    lengths = rng.integers(1, 12, prompts)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    tokens = torch.from_numpy(rng.integers(BASE, BASE + vocabulary.size, cu_seqlens[-1]))
    return Small(policy, TrieChooser(trie.to("cpu"), 1.0), trie, seen, tokens, cu_seqlens, request_prior)


def take_norms_in_their_own_dtype(decoder: torch.nn.Module) -> None:
    """transformers' RMSNorm rounds to float32 on its way, and where it does so hangs on the last bit of its input."""
    for name, norm in list(decoder.named_modules()):
        if isinstance(norm, Qwen3RMSNorm):
            exact = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
            decoder.set_submodule(name, exact)
