"""Constrained beam search: the most probable unseen items of a context, beams as rows over shared histories."""

import torch
from torch import Tensor

from negfast.model.choice import TrieChooser
from negfast.model.histories import Histories
from negfast.model.policy import Policy
from negfast.sid.prior import MARKERS, RequestPrior


@torch.no_grad()
def beam_search(
    policy: Policy | None,
    chooser: TrieChooser,
    histories: Histories,
    prior: RequestPrior | None,
    branch: int,
    width: int,
    top: int,
) -> tuple[Tensor, Tensor]:
    """The ``top`` best items of each of the R requests of ``histories`` and their log-probabilities.

    Returns (items int64 [R, top], log_prob [R, top]), best first; -1 and -inf where fewer unseen items were found.
    ``width`` beams are kept at every level above the last. Items are distinct, exist and are unseen, since only valid
    codes are followed. Ties go to the lower node. Without a policy the prior alone is searched, without a prior all
    items are. On the CPU a beam with a single unseen leaf left is not computed further: that leaf's probability is 1.
    """
    size, levels, device = len(histories), chooser.trie.levels, histories.tokens.device
    hidden = torch.empty(size, 0) if policy is None else histories.start(policy, MARKERS[branch])
    score = torch.zeros(size, 1, device=device)
    nodes = torch.zeros(size, 1, dtype=torch.int64, device=device)
    requests = torch.arange(size, device=device)
    place = requests  # of each beam among the rows that the layout holds
    for level in range(levels):
        beams = nodes.shape[1]
        alive = torch.isfinite(score)
        choice, code = chooser.choose_slots(
            policy, hidden, level, nodes.flatten(), requests.repeat_interleave(beams), prior, branch
        )
        joint = score.unsqueeze(-1) + choice.log_probs().unflatten(0, (size, beams))
        valid = choice.valid.unflatten(0, (size, beams)) & alive.unsqueeze(-1)
        joint = joint.masked_fill(~valid, -torch.inf).flatten(1)
        keep = min(width if level < levels - 1 else top, joint.shape[1])
        score, index = stable_topk(joint, keep)
        nodes = choice.children.unflatten(0, (size, beams)).flatten(1).gather(1, index)
        nodes = nodes.clamp_min(0)  # a dead beam (score -inf) walks along on node 0
        if level == levels - 1 or policy is None:
            continue
        parents = place[(index // choice.logits.shape[1] + requests[:, None] * beams).flatten()]
        code = code.unflatten(0, (size, beams)).flatten(1).gather(1, index).clamp_max(chooser.trie.codebook - 1)
        tokens = (policy.vocabulary.code_base(level + 1) + code).reshape(-1, 1)
        if prior is None or device.type != "cpu":  # elsewhere to count them would make the host wait
            histories.layout.branch(parents, keep)
            place = torch.arange(len(parents), device=device)
            hidden = policy.hidden(histories.layout, None, tokens)
            continue
        unseen = chooser.unseen_leaves(level + 1, nodes.flatten(), requests.repeat_interleave(keep), prior)
        open_ = torch.isfinite(score).flatten() & (unseen > 1)
        rows, place = open_.nonzero()[:, 0], open_.cumsum(0) - 1
        found = hidden[:0]
        if len(rows):
            histories.layout.branch(parents[rows], keep, rows)
            found = policy.hidden(histories.layout, None, tokens[rows])
        hidden = found.new_zeros(len(open_), hidden.shape[-1]).index_copy(0, rows, found)
    items = torch.where(torch.isfinite(score), chooser.trie.leaf_item[nodes].long(), -1)
    if items.shape[1] < top:
        missing = top - items.shape[1]
        items = torch.nn.functional.pad(items, (0, missing), value=-1)
        score = torch.nn.functional.pad(score, (0, missing), value=-torch.inf)
    return items, score


def stable_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, descending; equal values in the order of their columns (topk leaves that open)."""
    kth = values.topk(k, dim=-1).values[:, -1:]
    # everything above the k-th value is in; of those equal to it the first columns fill the rest
    above = values > kth
    equal = values == kth
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= room))
    place = torch.where(chosen, chosen.cumsum(-1) - 1, k)  # the rest falls into a spare column
    columns = torch.arange(values.shape[1], device=values.device).expand_as(values)
    index = torch.empty(len(values), k + 1, dtype=torch.int64, device=values.device)
    index = index.scatter_(1, place, columns)[:, :k]
    picked = values.gather(1, index)
    order = picked.argsort(dim=-1, descending=True, stable=True)
    return picked.gather(1, order), index.gather(1, order)
