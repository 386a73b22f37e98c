"""Exact log-probabilities of all items under a context: for analysis and tests on small catalogues."""

import torch
from torch import Tensor

from negfast.model.choice import TrieChooser
from negfast.model.histories import Histories
from negfast.model.policy import Policy
from negfast.sid.prior import MARKERS


def all_item_log_probs(policy: Policy, chooser: TrieChooser, histories: Histories, branch: int) -> Tensor:
    """log p(item | context) of every item for the R requests of ``histories``, [R, I]; -inf where seen.

    Every node of the trie above the leaves is visited once a request, so the cost is that of as many completion tokens
    as the trie has inner nodes, times R. The probabilities of a request sum to 1. Gradients flow where they are on.
    """
    trie, size, prior = chooser.trie, len(histories), histories.prior
    hidden = histories.start(policy, MARKERS[branch])
    requests = torch.arange(size, device=hidden.device)
    log_prob = torch.zeros(size, 1, dtype=hidden.dtype, device=hidden.device)
    for level in range(trie.levels):
        nodes = torch.arange(trie.node_counts[level], device=hidden.device)
        request, node = requests.repeat_interleave(len(nodes)), nodes.repeat(size)
        choice = chooser.choose(policy, hidden, level, node, request, prior, branch)
        joint = log_prob.reshape(-1, 1) + choice.log_probs().masked_fill(~choice.valid, -torch.inf)
        parent = nodes.repeat_interleave(trie.first_child[level].long().diff())
        code = trie.node_code[level].long()
        log_prob = joint.unflatten(0, (size, len(nodes)))[:, parent, code]
        if level == trie.levels - 1:
            break
        histories.layout.branch((requests[:, None] * len(nodes) + parent).flatten(), len(parent))
        tokens = (policy.vocabulary.code_base(level + 1) + code).repeat(size)
        hidden = policy.hidden(histories.layout, None, tokens.unsqueeze(1))
    return torch.empty_like(log_prob).index_copy(1, trie.leaf_item.long(), log_prob)
