"""The policy at trie rows in eager code: the reference of what kernels rebuild on chip."""

import torch
from torch import Tensor

from negfast.kernels.trie_rows import TrieRows, TrieTables


def dense_policy(
    tables: TrieTables, rows: TrieRows, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """The dense form of rows: valid bool [R, K] and log prior [R, K] (0 where not valid; None without a prior)."""
    device = rows.node.device
    codes = torch.arange(tables.codebook, device=device)
    inside = rows.node >= 0
    node = rows.node.clamp(min=0).long()
    words = tables.child_bits[node]
    exists = ((words[:, codes // 32] >> (codes % 32)) & 1).bool() & inside[:, None]
    rank = exists.long().cumsum(-1) - exists.long()
    child = torch.where(exists, tables.first_child[node].long()[:, None] + rank, 0)

    log_mass = torch.zeros_like(child, dtype=torch.float32)
    if rows.log_mass is not None:
        if rows.mass_start is None:
            raise ValueError("log_mass and mass_start: found one of them, expected both or none")
        place = rows.mass_start.long()[:, None] + child
        log_mass = rows.log_mass[torch.where(exists, place, 0)]
    # every (row, entry) pair whose entry is a child of the row's node, put at the child's code
    sizes = (rows.seen_end - rows.seen_begin).long()
    pair_row = torch.repeat_interleave(torch.arange(len(node), device=device), sizes)
    first_pair = sizes.cumsum(0) - sizes
    entry = torch.arange(len(pair_row), device=device) - first_pair[pair_row] + rows.seen_begin[pair_row].long()
    seen_rank = rows.seen_node[entry].long() - tables.first_child[node[pair_row]].long()
    among = (seen_rank >= 0) & (seen_rank < exists.sum(-1)[pair_row])
    by_rank = torch.full_like(log_mass, torch.nan)  # [R, K], columns are ranks
    by_rank[pair_row[among], seen_rank[among]] = rows.seen_log[entry[among]]
    seen_log = by_rank.gather(1, rank.clamp(max=tables.codebook - 1))
    log_mass = torch.where(seen_log.isnan(), log_mass, seen_log)
    valid = exists & (log_mass > -torch.inf)
    if rows.log_mass is None:
        return valid, None
    return valid, torch.where(valid, tables.weight * log_mass.to(dtype), 0.0)


def log_policy(logits: Tensor, valid: Tensor, log_prior: Tensor | None, temperature: float) -> Tensor:
    """Log-probabilities [R, K] of the policy renormalised over the valid codes, in float32 or float64; -inf elsewhere.

    A row without a valid code (padding) gets zeros, so that it can be carried along without NaN.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = scores if log_prior is None else scores + log_prior
    scores = (scores / temperature).masked_fill(~valid, -torch.inf)
    scores = torch.where(valid.any(-1, keepdim=True), scores, 0.0)
    return torch.log_softmax(scores, dim=-1)
