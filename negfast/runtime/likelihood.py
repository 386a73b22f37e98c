"""Cross entropy of given items as targets on the trie: what every SFT task shares."""

import torch
from torch import Tensor

from negfast.kernels.dispatch import runs_triton
from negfast.kernels.sid_cross_entropy import sid_cross_entropy
from negfast.model.compact import compact_rows, compact_tables
from negfast.model.layout import GroupLayout
from negfast.runtime.engine import Engine
from negfast.sid.prior import RequestPrior
from negfast.spans import span


def target_log_probs(
    engine: Engine,
    layout: GroupLayout,
    prompt_tokens: Tensor,
    markers: Tensor,
    items: Tensor,
    prior: RequestPrior | None,
    branch: int | Tensor,
    has_text: bool = False,
) -> Tensor:
    """log p(item | prompt, marker) of A targets, [A]: the exact log-probability on the trie, with gradients.

    ``markers`` int64 [A] are fed before a target's codes (a branch, or <|item|>), ``items`` int64 [A]. Prompts and
    targets go through the policy in one call.
    """
    policy, levels = engine.policy, engine.chooser.trie.levels
    states, nodes, chosen = _at_true_nodes(engine, layout, prompt_tokens, markers, items, has_text)
    requests = layout.completion_prompt
    with span("loss"):
        if runs_triton(states.device):
            logits = torch.cat([policy.code_logits(states[:, level], level + 1) for level in range(levels)])
            tables = compact_tables(engine.chooser, prior)
            rows = compact_rows(tables, prior, branch, nodes, [requests] * levels)
            return -sid_cross_entropy(logits, tables, rows, torch.cat(chosen).int()).view(levels, -1).sum(0)
        total = torch.zeros(len(items), dtype=states.dtype, device=items.device)
        for level, (node, code) in enumerate(zip(nodes, chosen, strict=True)):
            choice = engine.chooser.choose(policy, states[:, level], level, node, requests, prior, branch)
            total = total + choice.log_probs().gather(1, code.unsqueeze(1))[:, 0]
        return total


def code_ranks(
    engine: Engine,
    layout: GroupLayout,
    prompt_tokens: Tensor,
    markers: Tensor,
    items: Tensor,
    has_text: bool = False,
) -> Tensor:
    """How many codes the policy puts before an item's own at each of its nodes, int64 [A, L], without prior and
    pruning, the lower code first where two are equal; a row is 0 throughout where a greedy descent ends at the item."""
    states, nodes, chosen = _at_true_nodes(engine, layout, prompt_tokens, markers, items, has_text)
    ranks = []
    for level, (node, code) in enumerate(zip(nodes, chosen, strict=True)):
        choice = engine.chooser.choose(engine.policy, states[:, level], level, node, layout.completion_prompt, None, 0)
        log_p, own = choice.log_probs(), code.unsqueeze(1)
        at_own = log_p.gather(1, own)
        lower = torch.arange(log_p.shape[1], device=log_p.device) < own
        ranks.append(((log_p > at_own) | ((log_p == at_own) & lower)).sum(1))
    return torch.stack(ranks, dim=1)


def _at_true_nodes(
    engine: Engine, layout: GroupLayout, prompt_tokens: Tensor, markers: Tensor, items: Tensor, has_text: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Hidden states [A, L, d] before each code of ``items``, and of each level their nodes [A] and the codes [A] that
    follow."""
    trie, policy = engine.chooser.trie, engine.policy
    codes = engine.prompts.item_token_ids[items]
    fed = torch.cat([markers.unsqueeze(1), codes[:, :-1]], dim=1)
    hidden = policy.hidden(layout, prompt_tokens, fed, has_text, prompt_rows="none")
    nodes = [torch.zeros_like(items), *(trie.item_nodes[items, level].long() for level in range(trie.levels - 1))]
    chosen = [codes[:, level] - policy.vocabulary.code_base(level + 1) for level in range(trie.levels)]
    return hidden.view(*fed.shape, -1), nodes, chosen
