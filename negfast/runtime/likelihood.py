"""Cross entropy of given items as targets on the trie: what every SFT task shares."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from negfast.kernels.dispatch import runs_triton
from negfast.kernels.sid_cross_entropy import sid_cross_entropy
from negfast.model.compact import compact_rows, compact_tables
from negfast.model.histories import Histories
from negfast.runtime.engine import Engine
from negfast.sid.prior import RequestPrior
from negfast.spans import span
from negfast.staging import put

Visited = tuple[Tensor, list[Tensor], list[Tensor]]  # states, and by level the nodes and the codes that follow


@dataclass(frozen=True)
class Targets:
    """A items, each after a marker that continues a branch of the histories."""

    histories: Histories
    requests: np.ndarray  # int64 [A], ascending: which of the histories' requests each is a target of
    markers: Tensor  # int64 [A], <|next-dislike|>, <|next-like|> or <|item|>
    items: Tensor  # int64 [A]


def target_log_probs(engine: Engine, targets: Targets, prior: RequestPrior | None, branch: int | Tensor) -> Tensor:
    """log p(item | what its branch sees, marker) of targets, [A]: exact on the trie, with gradients."""
    return _log_probs(engine, targets, _at_true_nodes(engine, targets), prior, branch)


def log_probs_by_scale(
    engine: Engine, targets: Targets, prior: RequestPrior | None, branch: int, scales: Sequence[float]
) -> Tensor:
    """The same under each scale of the code logits, [scales, A], from one pass; leaves the last scale set."""
    visited, parts = _at_true_nodes(engine, targets), []
    for scale in scales:
        engine.policy.block.scale.fill_(scale)
        parts.append(_log_probs(engine, targets, visited, prior, branch))
    return torch.stack(parts)


def _log_probs(
    engine: Engine, targets: Targets, visited: Visited, prior: RequestPrior | None, branch: int | Tensor
) -> Tensor:
    policy, levels = engine.policy, engine.chooser.trie.levels
    states, nodes, chosen = visited
    requests = put(targets.requests, engine.device)
    with span("loss"):
        if runs_triton(states.device, "sid_cross_entropy"):
            logits = torch.cat([policy.code_logits(states[:, level], level + 1) for level in range(levels)])
            tables = compact_tables(engine.chooser, prior)
            rows = compact_rows(engine.chooser, tables, prior, branch, nodes, [requests] * levels)
            return -sid_cross_entropy(logits, tables, rows, torch.cat(chosen).int()).view(levels, -1).sum(0)
        total = torch.zeros(len(states), dtype=states.dtype, device=states.device)
        for level, (node, code) in enumerate(zip(nodes, chosen, strict=True)):
            choice = engine.chooser.choose(policy, states[:, level], level, node, requests, prior, branch)
            total = total + choice.log_probs().gather(1, code.unsqueeze(1))[:, 0]
        return total


def code_ranks(engine: Engine, targets: Targets) -> Tensor:
    """How many codes the policy puts before an item's own at each of its nodes, int64 [A, L], without prior and
    pruning, the lower code first where two are equal; a row is 0 throughout where a greedy descent ends at the item."""
    states, nodes, chosen = _at_true_nodes(engine, targets)
    requests, ranks = put(targets.requests, engine.device), []
    for level, (node, code) in enumerate(zip(nodes, chosen, strict=True)):
        choice = engine.chooser.choose(engine.policy, states[:, level], level, node, requests, None, 0)
        log_p, own = choice.log_probs(), code.unsqueeze(1)
        at_own = log_p.gather(1, own)
        lower = torch.arange(log_p.shape[1], device=log_p.device) < own
        ranks.append(((log_p > at_own) | ((log_p == at_own) & lower)).sum(1))
    return torch.stack(ranks, dim=1)


def _at_true_nodes(engine: Engine, targets: Targets) -> Visited:
    """Hidden states [A, L, d] before each code of the targets, and of each level their nodes [A] and the codes [A] that
    follow."""
    trie, policy, items = engine.chooser.trie, engine.policy, targets.items
    gap = targets.histories.gap[put(targets.requests, engine.device)]
    tokens = engine.histories.target_tokens(targets.markers, gap, items)
    states = targets.histories.states(policy, targets.requests, tokens)
    codes = engine.histories.item_token_ids[items]
    nodes = [torch.zeros_like(items), *(trie.item_nodes[items, level].long() for level in range(trie.levels - 1))]
    chosen = [codes[:, level] - policy.vocabulary.code_base(level + 1) for level in range(trie.levels)]
    return states, nodes, chosen
