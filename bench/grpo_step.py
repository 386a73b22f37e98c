"""What `bench grpo` measures of negfast: whole GRPO steps on prompts of given lengths, and the floor under them.

A step builds its layout, prunes, applies the prior, samples, rewards, asks the reference and updates. Codes are bushy:
no token of a completion is forced, so no forward is spared that a general library would need.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from negfast.config import Config, Model
from negfast.data.log import DAY, DISLIKE, LIKE, EventLog
from negfast.kernels.trie_grpo import GRPOObjective
from negfast.model.choice import TrieChooser
from negfast.model.fused_layers import fuse_layers
from negfast.model.histories import Histories
from negfast.model.layout import GroupLayout
from negfast.model.load import build_policy, small_qwen3
from negfast.model.policy import Policy
from negfast.prepare.build import SemanticIdSettings
from negfast.prepare.samples import prepare_movietweetings
from negfast.runtime.engine import build_engine
from negfast.sid.prior import DevicePrior, RequestPrior
from negfast.sid.tokens import CodeVocabulary
from negfast.sid.trie import SeenNodes, Trie, build_trie
from negfast.train.grpo.loss import GroupLoss, GroupStep
from negfast.train.grpo.stage import freeze
from negfast.train.order import epoch_rows
from negfast.train.speed import Meter

SHAPE = Model(hidden=256, intermediate=1024, layers=4, heads=4, kv_heads=2, head_dim=64)
CODEBOOK, TEXT_TOKENS = 256, 8
VOCABULARY = 1024  # of the peer's model: 4 x 256, so that both have 4.2 M parameters
SEEN = 100  # items that each request has met


@dataclass(frozen=True)
class Case:
    """Prompts of ``lengths`` tokens, the marker among them, and ``group`` completions of ``levels`` tokens to each.

    ``shared``: the prompts are prefixes of one history, which is read once.
    """

    lengths: tuple[int, ...]
    group: int
    levels: int = 4
    objective: str = "trie"
    shared: bool = False

    @property
    def completions(self) -> int:
        return len(self.lengths) * self.group

    def describe(self) -> dict[str, Any]:
        """As results have it; "prompt" is the mean length."""
        return {
            "prompt": round(statistics.mean(self.lengths)),
            "longest": max(self.lengths),
            "prompts": len(self.lengths),
            "group": self.group,
            "levels": self.levels,
            "objective": self.objective,
            "shared": self.shared,
        }


class Ours:
    """negfast's step on a case: loss dr_grpo, beta 0.04, AdamW; float32, on a GPU the decoder in bf16 as in `train`."""

    def __init__(self, case: Case, shape: Model = SHAPE, device: torch.device | str = "cpu") -> None:
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        self.case, self.full, self.device = case, case.objective == "full", torch.device(device)
        self.trie = bushy_trie(case.levels)
        vocabulary = CodeVocabulary(TEXT_TOKENS, case.levels, CODEBOOK)
        self.policy = Policy(small_qwen3(shape, TEXT_TOKENS), vocabulary).train()
        torch.nn.init.normal_(self.policy.block.head.weight, std=shape.hidden**-0.5)
        fuse_layers(self.policy.to(device), self.device)
        self.policy.in_bfloat16 = self.device.type == "cuda"
        self.reference = freeze(self.policy)
        self.chooser = TrieChooser(self.trie.to(device), 0.0 if self.full else 1.0)
        self.objective = GRPOObjective(loss="dr_grpo", beta=0.04, kl="k3" if self.full else "exact")
        on_gpu = self.device.type == "cuda"
        self.group_loss = GroupLoss(
            self.policy, self.reference, self.chooser, self.objective, case.group, 0, self.full, on_gpu
        )
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6, fused=True)
        n_items = len(self.trie.leaf_item)
        weight = rng.gamma(0.3, size=n_items)
        items = rng.choice(n_items, 4 * n_items, p=weight / weight.sum())
        judged = rng.integers(LIKE, DISLIKE + 1, len(items)).astype(np.uint8)
        log = EventLog(np.array([0, len(items)]), items.astype(np.int32), judged, 0 * items, None, n_items)
        self.prior = DevicePrior.build(self.trie, log, 4.0, 0.01, device)
        self.prefix = np.array(case.lengths) - 1
        histories = [max(self.prefix)] if case.shared else self.prefix
        self.cu_seqlens = np.cumsum([0, *histories])
        tokens = rng.integers(vocabulary.code_base(1), TEXT_TOKENS + vocabulary.size, self.cu_seqlens[-1])
        self.tokens = torch.from_numpy(tokens).to(device)
        self.gap = torch.full((len(case.lengths),), vocabulary.marker("none"), device=device)  # prompts end in a marker
        self.seen = [np.sort(rng.choice(n_items, SEEN, replace=False)) for _ in case.lengths]
        self.steps, self.processed = 0, 0

    def batch(self) -> Histories:
        layout, every = GroupLayout.build(self.cu_seqlens, self.device), np.arange(len(self.case.lengths))
        history, days = every * (not self.case.shared), np.zeros_like(every)
        seen = packed_seen(self.trie, self.seen)

        def prior() -> RequestPrior:
            return self.prior.for_requests(days, SeenNodes.from_packed(seen, self.trie, self.device))

        return Histories(self.tokens, layout, history, self.prefix, self.gap, prior)

    def loss(self) -> GroupStep:
        """All of a step before its backward."""
        ids = torch.arange(len(self.case.lengths), device=self.device)
        return self.group_loss.sample(self.batch(), ids, lambda items: dummy_reward(items).unsqueeze(-1), self.steps)

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        with self.policy.weights_cast_once():
            sampled, _, result, _ = self.loss()
            result.loss.backward()
        self.update()
        self.steps += 1
        self.processed = len(self.tokens) + len(self.prefix) + sum(len(rows) for rows in sampled.rows[1:])


def operations(ours: Ours) -> float:
    """Of the decoders in a step of ours by `Meter`: rollout, backward and reference."""
    with Meter(ours.policy) as trained, Meter(ours.reference) as frozen:
        ours.step()
    return trained.operations + frozen.operations


def peer_operations(ours: Ours) -> float:
    """The same of a library that reads each completion with its padded prompt: generation, training, reference."""
    meter, tokens = Meter(ours.policy), max(ours.case.lengths) + ours.case.levels
    forward = meter.layers * (2.0 * meter.weights * tokens + meter.pair * tokens * (tokens + 1) / 2)
    return 5 * forward * ours.case.completions


def dummy_reward(items: Tensor) -> Tensor:
    return (items % 7).float() / 7


def bushy_trie(levels: int) -> Trie:
    """Items whose every prefix has several ways on: 256 codes at level 1, then 16, 8, 4, ..."""
    fans = [CODEBOOK, *(max(16 >> k, 2) for k in range(levels - 1))]
    grids = np.meshgrid(*(np.arange(fan) * (CODEBOOK // fan) for fan in fans), indexing="ij")
    return build_trie(np.stack([grid.ravel() for grid in grids], 1), CODEBOOK)


@dataclass(frozen=True)
class PackedSeen:
    """What `SeenNodes.from_packed` reads; the packer's own work is part of `bench shards`."""

    seen_item: np.ndarray
    seen_cu: np.ndarray
    seen_node: list[np.ndarray]
    seen_request: list[np.ndarray]
    seen_count: list[np.ndarray]
    seen_slot: list[np.ndarray]


def packed_seen(trie: Trie, seen: list[np.ndarray]) -> PackedSeen:
    request = np.repeat(np.arange(len(seen)), [len(items) for items in seen])
    items = np.concatenate(seen)
    node, owner, count, slot = [], [], [], []
    for level, n_nodes in enumerate(trie.node_counts[1:]):
        key = request * n_nodes + trie.item_nodes[items, level]
        unique, inverse, counts = np.unique(key, return_inverse=True, return_counts=True)
        node.append(unique % n_nodes)
        owner.append(unique // n_nodes)
        count.append(counts)
        slot.append(inverse)
    return PackedSeen(items, np.cumsum([0, *(len(s) for s in seen)]), node, owner, count, slot)


def quickstart_lengths(requests: int) -> tuple[int, ...]:
    """Positions of ``requests`` of those that the quickstart's GRPO trains on, drawn at random, with their marker."""
    config = Config()
    with tempfile.TemporaryDirectory() as folder:
        settings = SemanticIdSettings(encoder="tfidf")  # codes differ from the quickstart's, lengths do not
        data = prepare_movietweetings(Path(folder) / "data", semantic_ids=settings, report=lambda *_: None)
        shape = data.codes.shape[1], int(data.manifest["semantic_ids"]["codebook"])
        policy, tokenizer = build_policy(config.model, None, ["text"], *shape, 4)
        engine = build_engine(config, data, policy, tokenizer, torch.device("cpu"))
        train = engine.split.train.take(engine.split.train.has_dislikes)
        rows = np.sort(epoch_rows(config.train.seed, "grpo", 0, len(train), requests))
        batch = engine.histories.build(train.user[rows], (train.day[rows].astype(np.int64) + 1) * DAY)
    return tuple((batch.prefix + 1).tolist())


def floor_seconds(case: Case, repeats: int = 3) -> float:
    """A stock decoder over the padded prompts alone: a forward without gradients, and one with its backward.

    No implementation of the step that reads each prompt once, with this decoder, can do with less.
    """
    model = small_qwen3(SHAPE, VOCABULARY).get_decoder()
    model.set_attn_implementation("sdpa")
    tokens = torch.zeros(len(case.lengths), max(case.lengths), dtype=torch.int64)
    mask = torch.arange(tokens.shape[1]) < torch.tensor(case.lengths)[:, None]
    whole = None if bool(mask.all()) else mask.long()

    def step() -> None:
        with torch.no_grad():
            model(input_ids=tokens, attention_mask=whole, use_cache=False)
        model(input_ids=tokens, attention_mask=whole, use_cache=False).last_hidden_state.sum().backward()
        model.zero_grad()

    return statistics.median(seconds_of(step) for _ in range(repeats))


def seconds_of(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
