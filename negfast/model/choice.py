"""The policy's choice among the codes of a visited node: level-slice logits, community prior, pruned trie."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from negfast.kernels.trie_rows_reference import log_policy
from negfast.model.policy import Policy
from negfast.sid.prior import RequestPrior, child_log_prior, slot_log_prior
from negfast.sid.trie import DeviceTrie


@dataclass(frozen=True)
class Choice:
    """R choices among K codes: what `log_policy` turns into probabilities."""

    logits: Tensor  # [R, K]
    valid: Tensor  # bool [R, K]
    log_prior: Tensor | None  # [R, K], already weighted
    children: Tensor  # int64 [R, K], node ids of the next level, -1 where none

    def log_probs(self, temperature: float = 1.0) -> Tensor:
        return log_policy(self.logits, self.valid, self.log_prior, temperature)


@dataclass(frozen=True)
class TrieChooser:
    """How a policy chooses on the trie. ``prior_weight`` 0 switches the community prior off."""

    trie: DeviceTrie
    prior_weight: float
    compact: dict = field(default_factory=dict, compare=False, repr=False)  # `compact_tables` keeps its own here

    def choose(
        self,
        policy: Policy | None,
        hidden: Tensor | None,
        level: int,
        nodes: Tensor,
        request_rows: Tensor,
        prior: RequestPrior | None,
        branch: int | Tensor,
    ) -> Choice:
        """The choice at ``nodes`` [R] of a level in 0..L-1 after ``hidden`` [R, d], for requests ``request_rows`` [R].

        Without a policy its logits are zero and the prior alone chooses; without ``prior`` (item-level tasks) every
        child counts, unpruned and without mass.
        """
        if prior is None:
            children = self.trie.children(level, nodes)
            valid, log_prior = children >= 0, None
        else:
            log_mass, valid, children = child_log_prior(self.trie, prior, branch, level, nodes, request_rows)
            log_prior = log_mass * self.prior_weight if self.prior_weight else None
        if policy is None or hidden is None:
            logits = torch.zeros(children.shape, device=children.device)
        else:
            logits = policy.code_logits(hidden, level + 1)
        return Choice(logits, valid, log_prior, children)

    def choose_slots(
        self,
        policy: Policy | None,
        hidden: Tensor | None,
        level: int,
        nodes: Tensor,
        request_rows: Tensor,
        prior: RequestPrior | None,
        branch: int,
    ) -> tuple[Choice, Tensor]:
        """The same among the children alone, in the slots [R, F] of `DeviceTrie.child_slots`, and the code of each:
        deep levels have F far below K."""
        children, code = self.trie.child_slots(level, nodes)
        valid, log_prior = children >= 0, None
        if prior is not None:
            log_mass, valid = slot_log_prior(self.trie, prior, branch, level, children, request_rows)
            log_prior = log_mass * self.prior_weight if self.prior_weight else None
        if policy is None or hidden is None:
            logits = torch.zeros(children.shape, device=children.device)
        else:
            logits = policy.code_logits(hidden, level + 1).gather(1, code.clamp_max(self.trie.codebook - 1))
        return Choice(logits, valid, log_prior, children), code

    def unseen_leaves(self, level: int, nodes: Tensor, request_rows: Tensor, prior: RequestPrior) -> Tensor:
        """Unseen leaves under each of ``nodes`` [R] of a level in 1..L, int [R]."""
        _, seen = prior.seen.find(level, request_rows, nodes.unsqueeze(1), self.trie.node_counts[level])
        return self.trie.leaf_count[level - 1][nodes] - seen[:, 0]
