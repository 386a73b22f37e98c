"""Cross entropy of given items as answers on the trie: what every SFT task shares."""

import torch
from torch import Tensor

from negfast.model.layout import GroupLayout
from negfast.sid.prior import RequestPrior
from negfast.train.engine import Engine


def answer_log_probs(
    engine: Engine,
    layout: GroupLayout,
    prompt_tokens: Tensor,
    markers: Tensor,
    items: Tensor,
    prior: RequestPrior | None,
    branch: int | Tensor,
    has_text: bool = False,
) -> Tensor:
    """log p(item | prompt, marker) of A answers, [A]: the exact log-probability on the trie, with gradients.

    ``markers`` int64 [A] are fed before an answer's codes (a branch, or <|item|>), ``items`` int64 [A]. Prompts and
    answers go through the policy in one call.
    """
    trie, policy = engine.chooser.trie, engine.policy
    codes = engine.prompts.item_token_ids[items]
    fed = torch.cat([markers.unsqueeze(1), codes[:, :-1]], dim=1)
    hidden = policy.hidden(layout, prompt_tokens, fed, has_text, prompt_rows="none")
    states = hidden.view(*fed.shape, -1)
    requests = layout.answer_prompt
    nodes = torch.zeros_like(items)
    total = torch.zeros(len(items), dtype=states.dtype, device=items.device)
    for level in range(trie.levels):
        choice = engine.chooser.choose(policy, states[:, level], level, nodes, requests, prior, branch)
        code = codes[:, level] - policy.vocabulary.code_base(level + 1)
        total = total + choice.log_probs().gather(1, code.unsqueeze(1))[:, 0]
        nodes = trie.item_nodes[items, level].long()
    return total
