"""Exact log-probabilities of all items under a context: for analysis and tests on small catalogues."""

import torch
from torch import Tensor

from negfast.model.choice import TrieChooser
from negfast.model.layout import GroupLayout
from negfast.model.policy import Policy
from negfast.sid.prior import RequestPrior


def all_item_log_probs(
    policy: Policy,
    chooser: TrieChooser,
    layout: GroupLayout,
    prompt_tokens: Tensor,
    prior: RequestPrior,
    branch: int,
) -> Tensor:
    """log p(item | context) of every item for B prompts that end with the branch's marker, [B, I]; -inf where seen.

    Every node of the trie above the leaves is visited once a prompt, so the cost is that of as many completion tokens
    as the trie has inner nodes, times B. The probabilities of a prompt sum to 1. Gradients flow where they are on.
    """
    trie, prompts, device = chooser.trie, layout.prompts, prompt_tokens.device
    hidden = policy.hidden(layout, prompt_tokens, None, prompt_rows="last")
    log_prob = torch.zeros(prompts, 1, dtype=hidden.dtype, device=device)
    for level in range(trie.levels):
        size, below = trie.node_counts[level], trie.node_counts[level + 1]
        request = torch.arange(prompts, device=device).repeat_interleave(size)
        node = torch.arange(size, device=device).repeat(prompts)
        choice = chooser.choose(policy, hidden, level, node, request, prior, branch)
        joint = log_prob.reshape(-1, 1) + choice.log_probs().masked_fill(~choice.valid, -torch.inf)
        children = trie.first_child[level].long().diff()
        parent = torch.arange(size, device=device).repeat_interleave(children)
        code = trie.node_code[level].long()
        log_prob = joint.unflatten(0, (prompts, size))[:, parent, code]
        if level == trie.levels - 1:
            break
        slots = torch.arange(prompts * below, device=device)
        if level == 0:
            layout.set_completions(slots, below)
        else:
            parents = (torch.arange(prompts, device=device)[:, None] * size + parent).flatten()
            layout.branch(parents, slots, below)
        tokens = (policy.vocabulary.code_base(level + 1) + code).repeat(prompts)
        hidden = policy.hidden(layout, None, tokens.unsqueeze(1))
    return torch.empty_like(log_prob).index_copy(1, trie.leaf_item.long(), log_prob)
