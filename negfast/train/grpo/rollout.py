"""Rollout: the histories once, then level by level choose and sample.

Where shapes may change, on-policy, the forward that samples *is* the forward that trains. Level 1 is chosen
once per request for all of its completions. Completions that agree so far share a row, and one whose remaining choices
are all forced (one unseen leaf below it) is carried no further. With static shapes, for a GPU, all are carried, without
gradients, and another pass trains.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from negfast.kernels.trie_grpo_reference import SampledTokens
from negfast.model.choice import Choice, TrieChooser
from negfast.model.histories import Histories, marked_codes
from negfast.model.noise import keyed_gumbel, keyed_rows
from negfast.model.policy import Policy
from negfast.sid.prior import MARKERS, NEXT_DISLIKE, RequestPrior
from negfast.train.grpo.graphs import StaticForwards


@dataclass(frozen=True)
class Rollout:
    """G completions of each of B requests, and the policy's choices at every node they visited.

    items int64 [B, G]; ``choice`` holds R rows in the order of levels; ``tokens`` are the L*B*G sampled tokens of
    `negfast.kernels.trie_grpo_reference`; ``codes`` int64 [B*G, L]. ``choice.logits`` carries the gradient.
    """

    items: Tensor
    codes: Tensor
    choice: Choice
    tokens: SampledTokens
    hidden: Tensor  # [R, d], what each choice was made after, with a gradient
    # per level, int64 [R_l]: the request of each row of level 1; on lower levels a completion that has its codes
    rows: list[Tensor]
    parents: list[Tensor]  # the same: which row of the level above each continues
    static: bool  # whether every completion has a row at every level below the first, in their order


def rollout(
    policy: Policy,
    chooser: TrieChooser,
    histories: Histories,
    request_ids: Tensor,
    branch: int,
    group: int,
    seed: int,
    step: int,
    temperature: float = 1.0,
    keep_forced: bool = False,
    static: bool = False,
    graphs: StaticForwards | None = None,
) -> Rollout:
    """Samples ``group`` items for every request of ``histories``, with replacement.

    ``request_ids`` int64 [B] key the noise, so the same request draws the same numbers in any batch. ``keep_forced``
    carries every completion to its end, for objectives in which forced tokens count. So does ``static``, without
    gradients, with shapes that depend on the numbers of requests and completions alone; ``graphs`` of the same
    histories then compute the hidden states, where given.
    """
    layout, trie, prior = histories.layout, chooser.trie, histories.prior
    assert prior is not None
    size, device = len(histories), histories.tokens.device
    completion = torch.arange(size * group, device=device)
    owner, number = completion // group, completion % group

    key = keyed_rows(seed, step, request_ids[owner], number)

    with torch.set_grad_enabled(torch.is_grad_enabled() and not static):
        hidden = histories.start(policy, MARKERS[branch]) if graphs is None else graphs.start()
        roots = torch.zeros(size, dtype=torch.int64, device=device)
        choices = [chooser.choose(policy, hidden, 0, roots, owner[::group], prior, branch)]
        rows, parents, states = [owner[::group]], [owner[::group]], [hidden]
        carried, row = completion, owner  # of each completion the row that chooses for it
        node, codes, token_rows, counted, offset = torch.zeros_like(completion), [], [], [], 0
        for level in range(trie.levels):
            choice = choices[-1]
            noise = keyed_gumbel(key[carried], level, trie.codebook)
            sampled = (choice.log_probs(temperature).detach()[row[carried]] + noise).argmax(-1)
            code, next_node = _forced(chooser, level, node, owner, carried, prior, branch)
            code[carried] = sampled
            next_node[carried] = choice.children[row[carried], sampled]
            open_choice = choice.valid.sum(-1) > 1
            codes.append(code)
            token_rows.append(torch.zeros_like(completion).index_copy(0, carried, row[carried] + offset))
            counted.append(
                torch.zeros_like(completion, dtype=torch.bool).index_copy(0, carried, open_choice[row[carried]])
            )
            node, offset = next_node, offset + len(choice.logits)
            if level == trie.levels - 1:
                break
            if not keep_forced and not static:
                carried = carried[chooser.unseen_leaves(level + 1, node[carried], owner[carried], prior) > 1]
            chosen, next_row = carried, torch.arange(len(carried), device=device)
            if not static:
                chosen, next_row = _distinct(owner[carried] * trie.node_counts[level + 1] + node[carried], carried)
            parents.append(row[chosen])
            tokens = policy.vocabulary.code_base(level + 1) + code[chosen]
            if graphs is not None:
                hidden = graphs.level(level + 2, tokens)
            elif len(chosen):
                if level == 0 or not static:  # else each continues its own row
                    layout.branch(parents[-1], group, chosen)
                hidden = policy.hidden(layout, None, tokens.unsqueeze(-1))
            else:
                hidden = hidden[:0]
            row = row.index_copy(0, carried, next_row)
            choices.append(chooser.choose(policy, hidden, level + 1, node[chosen], owner[chosen], prior, branch))
            rows.append(chosen)
            states.append(hidden)

    merged = Choice(
        torch.cat([c.logits for c in choices]),
        torch.cat([c.valid for c in choices]),
        torch.cat([c.log_prior for c in choices if c.log_prior is not None]) if chooser.prior_weight else None,
        torch.cat([c.children for c in choices]),
    )
    sampled_tokens = SampledTokens(
        torch.cat(token_rows), torch.cat(codes), completion.repeat(trie.levels), torch.cat(counted)
    )
    items = trie.leaf_item[node].long().view(size, group)
    return Rollout(items, torch.stack(codes, 1), merged, sampled_tokens, torch.cat(states), rows, parents, static)


def _distinct(key: Tensor, completion: Tensor) -> tuple[Tensor, Tensor]:
    """Of completions int64 [C] one for each key, in the order of keys, and the place of each key [C] among these."""
    keys, place = key.unique(return_inverse=True)
    first = torch.full_like(keys, torch.iinfo(torch.int64).max)
    return first.scatter_reduce(0, place, completion, "amin"), place


def _forced(
    chooser: TrieChooser,
    level: int,
    node: Tensor,
    owner: Tensor,
    carried: Tensor,
    prior: RequestPrior,
    branch: int,
) -> tuple[Tensor, Tensor]:
    """The code and child of every completion that is carried no further: the only unseen way on. Zeros for the rest."""
    code, child = torch.zeros_like(node), torch.zeros_like(node)
    if len(carried) < len(node):
        rest = torch.ones_like(node, dtype=torch.bool).index_fill(0, carried, False).nonzero()[:, 0]
        only = chooser.choose(None, None, level, node[rest], owner[rest], prior, branch)
        code[rest] = only.valid.int().argmax(-1)
        child[rest] = only.children.gather(1, code[rest].unsqueeze(1))[:, 0]
    return code, child


def replay_hidden(policy: Policy, histories: Histories, sampled: Rollout) -> Tensor:
    """Hidden states [R, d] of ``policy`` at the nodes of a rollout, row for row those of ``sampled.hidden``: of the
    reference policy, or of the policy itself in two-pass mode. With static shapes by one call."""
    group, levels = sampled.items.shape[1], sampled.codes.shape[1]
    if sampled.static:
        requests, gap = np.repeat(np.arange(len(histories)), group), histories.gap.repeat_interleave(group)
        markers = torch.full_like(gap, policy.vocabulary.marker(MARKERS[NEXT_DISLIKE]))
        codes = (sampled.codes + policy.vocabulary.code_bases(gap.device))[:, : levels - 1]
        by_level = histories.states(policy, requests, marked_codes(policy.vocabulary, markers, gap, codes))
        return rows_of_levels(by_level, group)
    states = [histories.start(policy, MARKERS[NEXT_DISLIKE])]
    for level, (rows, parents) in enumerate(zip(sampled.rows[1:], sampled.parents[1:], strict=True), 1):
        histories.layout.branch(parents, group, rows)
        tokens = policy.vocabulary.code_base(level) + sampled.codes[rows, level - 1 : level]
        states.append(policy.hidden(histories.layout, None, tokens) if len(rows) else states[-1][:0])
    return torch.cat(states)


def rows_of_levels(states: Tensor, group: int) -> Tensor:
    """States [R * G, L, ...] of completions as rows of a rollout with static shapes, of which level 1 has one a
    request."""
    return torch.cat([states[::group, 0], *states[:, 1:].unbind(1)])


def logits_of(policy: Policy, hidden: Tensor, sampled: Rollout) -> Tensor:
    """Logits [R, K] after hidden states [R, d] at the nodes of a rollout, row for row those of ``sampled.choice``."""
    by_level = hidden.split([len(rows) for rows in sampled.rows])
    return torch.cat([policy.code_logits(rows, level) for level, rows in enumerate(by_level, 1)])


def replay_logits(policy: Policy, histories: Histories, sampled: Rollout) -> Tensor:
    """The same of ``policy`` by another pass."""
    return logits_of(policy, replay_hidden(policy, histories, sampled), sampled)
