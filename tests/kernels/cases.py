"""Random inputs of the kernels, and how far an output is from the truth; shared by tests and benchmarks."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from negfast.kernels.attention_inputs import Segments
from negfast.kernels.trie_grpo import GRPOObjective, trie_grpo
from negfast.kernels.trie_rows import RowTokens, TrieRows, TrieTables


def relative_error(found: Tensor, truth: Tensor, scale: float = 0.0) -> float:
    """||found - truth|| / max(||truth||, scale) in float64; infinite where anything found is not finite.

    ``scale``: what the truth's terms measure where they may cancel.
    """
    found, truth = found.detach().cpu().double(), truth.detach().cpu().double()
    if not torch.isfinite(found).all():
        return float("inf")
    return float((found - truth).norm() / truth.norm().clamp_min(max(scale, 1e-30)))


@dataclass(frozen=True)
class PlainTrie:
    """A trie built slowly from Python sets: per level the sorted prefixes, and the tables made from them."""

    codes: np.ndarray  # [I, L], distinct rows
    codebook: int
    prefixes: list[list[tuple[int, ...]]]  # level 0..L
    index: dict[tuple[int, ...], int]  # prefix -> global node id

    @classmethod
    def random(cls, random: np.random.Generator, items: int, levels: int, codebook: int) -> "PlainTrie":
        codes = np.unique(random.integers(0, codebook, (items, levels)), axis=0)
        prefixes = [sorted({tuple(int(c) for c in row[:level]) for row in codes}) for level in range(levels + 1)]
        index = {prefix: n for n, prefix in enumerate(prefix for level in prefixes for prefix in level)}
        return cls(codes, codebook, prefixes, index)

    def tables(self, weight: float, device: torch.device) -> TrieTables:
        words = -(-self.codebook // 32)
        first_child, child_bits, leaf_count = [], [], []
        for level, level_prefixes in enumerate(self.prefixes):
            local = {prefix: n for n, prefix in enumerate(level_prefixes)}
            if level:
                owner = np.array([local[tuple(int(c) for c in row[:level])] for row in self.codes])
                leaf_count.append(np.bincount(owner, minlength=len(local)).astype(np.int32))
            if level < len(self.prefixes) - 1:
                bits = np.zeros((len(local), words), dtype=np.uint32)
                counts = np.zeros(len(local), dtype=np.int64)
                for prefix in self.prefixes[level + 1]:
                    bits[local[prefix[:-1]], prefix[-1] // 32] |= np.uint32(1 << (prefix[-1] % 32))
                    counts[local[prefix[:-1]]] += 1
                first_child.append(np.append(0, np.cumsum(counts)).astype(np.int32))
                child_bits.append(bits.view(np.int32))

        def put(arrays: list[np.ndarray]) -> list[Tensor]:
            return [torch.from_numpy(array).to(device) for array in arrays]

        return TrieTables.from_levels(
            put(first_child),
            put(child_bits),
            put(leaf_count),
            self.codebook,
            weight,
            epsilon=0.05,
        )

    def log_mass(self, mass: np.ndarray, tables: TrieTables) -> Tensor:
        """Log mass of every node on every day, day by day, from ``mass`` float64 [D, I] of items."""
        of_node = np.stack([[day[self.below[node]].sum() for node in range(len(self.index))] for day in mass])
        device = tables.leaf_count.device
        return (torch.from_numpy(of_node).float().to(device) + tables.epsilon * tables.leaf_count).log().flatten()

    @cached_property
    def below(self) -> dict[int, list[int]]:
        """Items below each node, by global id."""
        items: dict[int, list[int]] = {}
        for item, row in enumerate(self.codes):
            for level in range(len(row) + 1):
                items.setdefault(self.index[tuple(int(c) for c in row[:level])], []).append(item)
        return items

    def choices(self, prefix: tuple[int, ...], seen: set[int]) -> dict[int, list[int]]:
        """code -> unseen items below it, of the children of a prefix that have any."""
        below: dict[int, list[int]] = {}
        for item, row in enumerate(self.codes):
            if item not in seen and tuple(int(c) for c in row[: len(prefix)]) == prefix:
                below.setdefault(int(row[len(prefix)]), []).append(item)
        return below


@dataclass(frozen=True)
class TrieCase:
    """Inputs of ``trie_grpo``; ``request_seen`` and ``row_prefix`` let a test enumerate what the tables say."""

    logits: Tensor
    tables: TrieTables
    rows: TrieRows
    tokens: RowTokens
    rewards: Tensor
    reference: Tensor
    trie: PlainTrie
    mass: np.ndarray | None
    request_seen: list[set[int]]
    row_prefix: list[tuple[int, tuple[int, ...]]]  # (request, prefix) of each row that is no padding

    def to(self, dtype: torch.dtype) -> "TrieCase":
        """Logits in a dtype; in float64 all that computes with them."""
        if dtype != torch.float64:
            return replace(self, logits=self.logits.to(dtype), reference=self.reference.to(dtype))
        names = ("logits", "reference", "rewards")
        return replace(self, **{name: getattr(self, name).double() for name in names})


def trie_case(
    seed: int,
    device: torch.device,
    *,
    prompts: int = 3,
    group: int = 4,
    levels: int = 3,
    codebook: int = 16,
    items: int = 60,
    rows: int | None = None,
    merge: bool = True,
    with_prior: bool = True,
    seen_items: int = 12,
    equal_rewards: bool = False,
    dtype: torch.dtype = torch.float32,
) -> TrieCase:
    """Completions drawn uniformly from unseen items. ``rows``: padded up to this many; ``merge``: those that share a
    node share its row. Each request has seen all items under some node, so that inner nodes are pruned too."""
    random = np.random.default_rng(seed)
    trie = PlainTrie.random(random, items, levels, codebook)
    count = len(trie.codes)
    mass = random.exponential(1.0, (2, count)) * (random.random((2, count)) < 0.7) if with_prior else None
    tables = trie.tables(weight=0.8, device=device)
    seen_sets, entries = [], []
    for _ in range(prompts):
        seen = {int(i) for i in random.choice(count, min(seen_items, count // 3), replace=False)}
        if levels > 1 and count > 3:
            first = int(random.integers(count))
            seen |= {i for i in range(count) if (trie.codes[i, : levels - 1] == trie.codes[first, : levels - 1]).all()}
        seen_sets.append(seen if len(seen) < count else set())
        per_node: dict[int, list[int]] = {}
        for item in sorted(seen_sets[-1]):
            for level in range(1, levels + 1):
                per_node.setdefault(trie.index[tuple(int(c) for c in trie.codes[item, :level])], []).append(item)
        entries.append(sorted(per_node.items()))

    unseen = [[i for i in range(count) if i not in seen] for seen in seen_sets]
    completions = np.stack([random.choice(options, group) for options in unseen])  # [B, G]
    code = torch.tensor(trie.codes[completions.reshape(-1)].T.copy(), dtype=torch.int32)  # [L, B*G]
    row_of: dict[tuple, int] = {}
    row_prefix: list[tuple[int, tuple[int, ...]]] = []
    token_row = np.empty((levels, prompts * group), dtype=np.int64)
    counted = np.empty((levels, prompts * group), dtype=bool)
    open_choice: dict[tuple, bool] = {}
    for level in range(levels):
        for completion, item in enumerate(completions.reshape(-1)):
            request, prefix = completion // group, tuple(int(c) for c in trie.codes[item, :level])
            key = (request, prefix) if merge or level == 0 else (request, prefix, completion)
            if key not in row_of:
                row_of[key] = len(row_prefix)
                row_prefix.append((request, prefix))
            if (request, prefix) not in open_choice:
                open_choice[request, prefix] = len(trie.choices(prefix, seen_sets[request])) > 1
            token_row[level, completion] = row_of[key]
            counted[level, completion] = open_choice[request, prefix]
    total = max(rows or 0, len(row_prefix))

    flat = [(node, len(seen), request) for request, per in enumerate(entries) for node, seen in per]
    begin = np.searchsorted([request for _, _, request in flat], np.arange(prompts + 1))
    day = random.integers(0, 2, prompts)
    unseen_mass = [
        sum(mass[day[request], item] for item in trie.below[node] if item not in seen) if mass is not None else 0
        for request, per in enumerate(entries)
        for node, seen in per
    ]

    def put(values, dtype: torch.dtype, fill: float = 0) -> Tensor:
        tensor = torch.as_tensor(np.asarray(values), dtype=dtype)
        missing = total - len(tensor)
        return torch.cat([tensor, torch.full((missing,), fill, dtype=dtype)]).to(device)

    requests = np.array([request for request, _ in row_prefix])
    seen_node, seen_count, _ = np.array(flat, dtype=np.int64).reshape(-1, 3).T
    seen_log = tables.seen_log_mass(
        torch.from_numpy(seen_node).to(device),
        torch.from_numpy(seen_count).to(device),
        torch.tensor(unseen_mass, dtype=torch.float32, device=device) if with_prior else None,
    )
    trie_rows = TrieRows(
        node=put([trie.index[prefix] for _, prefix in row_prefix], torch.int32, -1),
        seen_begin=put(begin[requests], torch.int32),
        seen_end=put(begin[requests + 1], torch.int32),
        seen_node=torch.from_numpy(seen_node).int().to(device),
        seen_log=seen_log,
        log_mass=trie.log_mass(mass, tables) if mass is not None else None,
        mass_start=put(day[requests] * len(trie.index), torch.int32) if with_prior else None,
    )
    counts = torch.from_numpy(counted).to(device)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    rewards = torch.full((prompts, group), 0.25) if equal_rewards else torch.rand(prompts, group, generator=generator)
    rewards = (rewards * 4).round() / 4  # ties within groups
    return TrieCase(
        logits=(2 * normal(total, codebook)).to(dtype),
        tables=tables,
        rows=trie_rows,
        tokens=RowTokens.build(torch.from_numpy(token_row).to(device), code.to(device), counts, total),
        rewards=rewards.to(device),
        reference=(2 * normal(total, codebook)).to(dtype),
        trie=trie,
        mass=mass,
        request_seen=seen_sets,
        row_prefix=row_prefix,
    )


class LossAndGradient(NamedTuple):
    loss: Tensor
    log_prob: Tensor
    kl: Tensor
    entropy: Tensor
    clipped: Tensor
    dlogits: Tensor


def loss_and_gradient(
    case: TrieCase, objective: GRPOObjective, *, old_log_prob: Tensor | None = None
) -> LossAndGradient:
    """``trie_grpo`` of a case, under its reference where the objective has one, and the gradient of its logits."""
    logits = case.logits.detach().requires_grad_()
    terms = trie_grpo(
        logits,
        case.tables,
        case.rows,
        case.tokens,
        case.rewards,
        objective,
        reference=case.reference if objective.beta else None,
        old_log_prob=old_log_prob,
    )
    (dlogits,) = torch.autograd.grad(terms.loss, logits)
    return LossAndGradient(terms.loss.detach(), *terms.per_token, dlogits)


@dataclass(frozen=True)
class AttentionCase:
    """Tensors of one half of group attention, a gradient of its output, and what says which rows belong together."""

    tensors: tuple[Any, ...]  # Tensor; Any, as both are passed on by `*`
    grad: Tensor
    layout: tuple[Any, ...]  # Segments of prompts; of completions too, and their prefix


@dataclass(frozen=True)
class GroupCase:
    """Random packed prompts, and completions of ``seen`` tokens of which the last ``new`` ask; each sees a prefix."""

    prompt: tuple[Tensor, Tensor, Tensor]
    own: tuple[Tensor, Tensor, Tensor]
    grads: tuple[Tensor, Tensor]
    lengths: tuple[int, ...]
    groups: tuple[int, ...]
    prefix: Tensor

    @property
    def device(self) -> torch.device:
        return self.grads[0].device

    def prompts(self) -> AttentionCase:
        return AttentionCase(self.prompt, self.grads[0], (segments_of(self.lengths, self.device),))

    def completions(self) -> AttentionCase:
        query, key, value = self.own
        layout = segments_of(self.lengths, self.device), segments_of(self.groups, self.device), self.prefix
        return AttentionCase((query, *self.prompt[1:], key, value), self.grads[1], layout)


def segments_of(counts: tuple[int, ...], device: torch.device) -> Segments:
    return Segments(torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32, device=device), max(counts))


def prefixes(kind: str, length: int, count: int, random: np.random.Generator) -> np.ndarray:
    """``count`` prefixes of a prompt, int32: "full", "zero", "equal", "spread" evenly, "random" or "unsorted"."""
    if kind == "spread":
        return ((np.arange(count) + 1) * length // count).astype(np.int32)
    if kind in ("full", "zero", "equal"):
        value = {"full": length, "zero": 0, "equal": random.integers(length + 1)}[kind]
        return np.full(count, value, dtype=np.int32)
    drawn = random.integers(0, length + 1, count, dtype=np.int32)
    drawn[-1:] = np.maximum(drawn[-1:], 1)  # with one own token alone, all gradients of scores are zero
    return drawn if kind == "unsorted" else np.sort(drawn)


def attention_case(
    seed: int,
    device: torch.device,
    lengths: tuple[int, ...],
    heads: int,
    kv_heads: int,
    dim: int,
    *,
    group: int | tuple[int, ...] = 1,
    new: int = 1,
    seen: int = 1,
    prefix: str = "random",
    dtype: torch.dtype = torch.float32,
) -> GroupCase:
    """``group``: completions of every prompt, or of each; ``prefix``: a kind of ``prefixes``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    groups = group if isinstance(group, tuple) else (group,) * len(lengths)
    total, completions = sum(lengths), sum(groups)
    random = np.random.default_rng(seed)
    shown = [prefixes(prefix, length, count, random) for length, count in zip(lengths, groups, strict=True)]
    return GroupCase(
        prompt=(normal(total, heads, dim), normal(total, kv_heads, dim), normal(total, kv_heads, dim)),
        own=(
            normal(completions, new, heads, dim),
            normal(completions, seen, kv_heads, dim),
            normal(completions, seen, kv_heads, dim),
        ),
        grads=(normal(total, heads, dim), normal(completions, new, heads, dim)),
        lengths=lengths,
        groups=groups,
        prefix=torch.from_numpy(np.concatenate(shown)).to(device),
    )


@dataclass(frozen=True)
class WideCase:
    """Many rows made without Python loops, one token each, as a benchmark wants them; fields as ``TrieCase``."""

    logits: Tensor
    tables: TrieTables
    rows: TrieRows
    tokens: RowTokens
    rewards: Tensor
    reference: Tensor


def wide_trie_case(
    seed: int, device: torch.device, rows: int, codebook: int, group: int, dtype: torch.dtype, density: float = 0.3
) -> WideCase:
    """Nodes with a share ``density`` of all codes (at least 4) as children; every second row has seen two of them,
    one of which is pruned. ``rows`` is a multiple of ``group``."""
    generator = torch.Generator(device).manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    inner = min(rows, 2048)
    exists = uniform(inner, codebook) < density
    exists[:, torch.randperm(codebook, generator=generator, device=device)[:4]] = True
    words = -(-codebook // 32)
    padded = torch.nn.functional.pad(exists, (0, 32 * words - codebook)).view(inner, words, 32)
    powers = torch.tensor([1 << bit for bit in range(31)] + [-(1 << 31)], dtype=torch.int64, device=device)
    counts = exists.sum(-1)
    first_child = inner + torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    nodes = int(first_child[-1])
    tables = TrieTables(
        first_child=first_child.int(),
        child_bits=(padded * powers).sum(-1).int(),
        leaf_count=torch.ones(nodes, dtype=torch.int32, device=device),
        level_base=(0, inner),
        codebook=codebook,
    )
    node = torch.randint(inner, (rows,), generator=generator, device=device)
    seen_node = first_child[:-1, None] + torch.arange(2, device=device)
    seen_log = torch.stack([uniform(inner), torch.full((inner,), -torch.inf, device=device)], 1)
    has_seen = torch.arange(rows, device=device) % 2
    trie_rows = TrieRows(
        node=node.int(),
        seen_begin=(2 * node).int(),
        seen_end=(2 * node + 2 * has_seen).int(),
        seen_node=seen_node.flatten().int(),
        seen_log=seen_log.flatten(),
        log_mass=2 * uniform(4 * nodes) - 1,
        mass_start=nodes * torch.randint(4, (rows,), generator=generator, device=device).int(),
    )
    unseen = exists & (exists.cumsum(-1) > 2)
    code = torch.where(unseen[node], uniform(rows, codebook), -1.0).argmax(-1).int()[None]
    counted = torch.ones(1, rows, dtype=torch.bool, device=device)
    logits, reference = (2 * torch.randn(rows, codebook, generator=generator, device=device) for _ in range(2))
    return WideCase(
        logits.to(dtype),
        tables,
        trie_rows,
        RowTokens.build(torch.arange(rows, device=device)[None], code, counted, rows),
        uniform(rows // group, group),
        reference.to(dtype),
    )
