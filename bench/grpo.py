"""The whole GRPO step, rollout + reference + update: negfast beside a general RL library, on the same small Qwen3.

Both train the same decoder in float32 on the same number of prompts, answers and tokens, with the same loss
(dr_grpo, beta 0.04, one update a rollout, AdamW). Steps of the two alternate within one process. The peer gets
what makes it fastest: no activation checkpointing, and the best micro-batch of a sweep. negfast prunes, applies the
prior and builds its layout within the timed step. Codes are bushy: no token of an answer is forced.
"""

import json
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from negfast.kernels.trie_grpo import GRPOObjective
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.machine import device_name, resident_mib, versions
from negfast.model.choice import TrieChooser
from negfast.model.layout import GroupLayout
from negfast.model.policy import Policy
from negfast.model.prompts import PromptBatch
from negfast.sid.prior import DevicePrior
from negfast.sid.tokens import CodeVocabulary
from negfast.sid.trie import SeenNodes, Trie, build_trie
from negfast.train import grpo
from negfast.train.grpo import freeze, group_loss

PACKAGES = "negfast", "torch", "transformers", "trl", "accelerate"
CODEBOOK, TEXT_TOKENS = 256, 8
SEEN = 100  # items that each request has met
MICRO_BATCHES = 8, 16, 32


@dataclass(frozen=True)
class Case:
    """``prompt`` tokens a prompt, or with ``ragged`` their mean."""

    prompt: int = 512
    group: int = 16
    levels: int = 4
    prompts: int = 4
    objective: str = "trie"
    ragged: bool = False
    hidden: int = 256
    intermediate: int = 1024
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64

    @property
    def answers(self) -> int:
        return self.prompts * self.group

    def decoder(self, vocabulary: int) -> Qwen3Config:
        return Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            use_sliding_window=False,
            pad_token_id=None,
        )


class Ours:
    """negfast's step on a case; ``seconds`` gathers the time of each phase while ``stopwatch`` is on."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        self.case = case
        self.full = case.objective == "full"
        self.trie = bushy_trie(case.levels)
        vocabulary = CodeVocabulary(TEXT_TOKENS, case.levels, CODEBOOK)
        self.policy = Policy(Qwen3ForCausalLM(case.decoder(TEXT_TOKENS)), vocabulary).train()
        torch.nn.init.normal_(self.policy.block.head.weight, std=case.hidden**-0.5)
        self.reference = freeze(self.policy)
        self.chooser = TrieChooser(self.trie.to("cpu"), 0.0 if self.full else 1.0)
        self.objective = GRPOObjective(loss="dr_grpo", beta=0.04, kl="k3" if self.full else "exact")
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6, fused=True)
        n_items = len(self.trie.leaf_item)
        mass = rng.gamma(0.3, size=(2, 1, n_items))
        self.prior = DevicePrior.build(self.trie, mass[0], mass[1], 0, 0.01, "cpu")
        lengths = prompt_lengths(case, rng)
        self.cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
        self.tokens = torch.from_numpy(rng.integers(TEXT_TOKENS, TEXT_TOKENS + vocabulary.size, self.cu_seqlens[-1]))
        self.seen = [np.sort(rng.choice(n_items, SEEN, replace=False)) for _ in range(case.prompts)]
        self.steps, self.processed = 0, 0
        self.seconds: dict[str, float] = defaultdict(float)

    def batch(self) -> PromptBatch:
        layout = GroupLayout.build(self.cu_seqlens, self.case.group, torch.device("cpu"))
        days = np.zeros(self.case.prompts, dtype=np.int64)
        seen = packed_seen(self.trie, self.seen)
        return PromptBatch(
            self.tokens, layout, lambda: self.prior.for_requests(days, SeenNodes.from_packed(seen, self.trie, "cpu"))
        )

    def step(self) -> float:
        batch = self.batch()
        sampled, _, result, _ = group_loss(
            self.policy,
            self.reference,
            self.chooser,
            batch,
            torch.arange(self.case.prompts),
            lambda items: dummy_reward(items).unsqueeze(-1),
            self.objective,
            self.case.group,
            0,
            self.steps,
            self.full,
        )
        began = time.perf_counter()
        result.loss.backward()
        self.seconds["backward"] += time.perf_counter() - began
        began = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds["optimiser"] += time.perf_counter() - began
        self.steps += 1
        self.processed = len(self.tokens) + sum(len(rows) for rows in sampled.rows[1:])
        return result.loss.item()


def bushy_trie(levels: int) -> Trie:
    """Items whose every prefix has several ways on: 256 codes at level 1, then 16, 8, 4, ..."""
    fans = [CODEBOOK, *(max(16 >> k, 2) for k in range(levels - 1))]
    grids = np.meshgrid(*(np.arange(fan) * (CODEBOOK // fan) for fan in fans), indexing="ij")
    return build_trie(np.stack([grid.ravel() for grid in grids], 1), CODEBOOK)


def prompt_lengths(case: Case, rng: np.random.Generator) -> np.ndarray:
    if not case.ragged:
        return np.full(case.prompts, case.prompt)
    spread = np.clip(rng.lognormal(0, 0.8, case.prompts), 0.1, 5)
    return np.maximum((spread / spread.mean() * case.prompt).round().astype(np.int64), 1)


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


def dummy_reward(items: Tensor) -> Tensor:
    return (items % 7).float() / 7


@contextmanager
def stopwatch(ours: Ours) -> Iterator[None]:
    """Attributes the time of a step to its phases by timing the calls between them."""
    seconds = ours.seconds
    policy_hidden, loss = Policy.hidden, grpo.trie_grpo_reference

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                seconds[name] += time.perf_counter() - began

        return wrapper

    def hidden(policy: Policy, layout: GroupLayout, prompt: Tensor | None, *rest: Any, **options: Any) -> Tensor:
        phase = "reference" if policy is ours.reference else "levels" if prompt is None else "prompt"
        return timed(phase, policy_hidden)(policy, layout, prompt, *rest, **options)

    Policy.hidden, grpo.trie_grpo_reference = hidden, timed("loss", loss)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Policy.hidden, grpo.trie_grpo_reference = policy_hidden, loss  # type: ignore[method-assign]


def breakdown(ours: Ours, steps: int) -> dict[str, float]:
    """Seconds a step by phase, means over ``steps``; "head and host" is what the others leave: choosing, sampling,
    pruning and the prior, rewards, layout."""
    ours.seconds.clear()
    with stopwatch(ours):
        began = time.perf_counter()
        for _ in range(steps):
            ours.step()
        total = time.perf_counter() - began
    phases = {name: ours.seconds[name] / steps for name in ("prompt", "levels", "reference", "loss", "backward")}
    phases["optimiser"] = ours.seconds["optimiser"] / steps
    return {**phases, "head and host": total / steps - sum(phases.values()), "total": total / steps}


def run(
    out: Path | None = None,
    prompts: int = 4,
    repeats: int = 5,
    peer: str = "trl",
    threads: int = 2,
    only: str = "",
    micro_batch: int = 0,
) -> dict[str, Any]:
    """Measures the cases, prints a table and writes the JSON result to ``out`` after each.

    ``peer`` is "trl" or "none"; ``only`` one of the cases G16, G64, ragged; ``micro_batch`` the peer's, 0 to sweep.
    """
    torch.set_num_threads(threads)
    cases = {
        "G16": Case(group=16, prompts=prompts),
        "G64": Case(group=64, prompts=prompts),
        "ragged": Case(prompt=40, group=16, prompts=4 * prompts, ragged=True),
    }
    if only and only not in cases:
        raise SystemExit(f"bench grpo: --only: found {only!r}, expected one of {', '.join(cases)}")
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    agreement = None
    if peer == "trl":
        agreement = check_against_peer()
        print(f"full objective against TRL on the same tensors: {agreement}", flush=True)
    swept: dict[int, float] = {micro_batch: 0.0}
    if peer == "trl" and not micro_batch:
        swept = sweep(cases["G16"], MICRO_BATCHES)
    for name, case in cases.items():
        if only and only != name:
            continue
        measure_case(case, repeats, peer, swept, rows, ratios)
        if out is not None:
            result = {
                "bench": "grpo",
                "device": device_name(),
                "threads": threads,
                "versions": versions(*PACKAGES),
                "agreement": agreement,
                "rows": rows,
                "ratios": ratios,
                "floor": {},
            }
            out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return result if out is not None else {"bench": "grpo", "rows": rows, "ratios": ratios}


def measure_case(
    case: Case, steps: int, peer: str, swept: dict[int, float], rows: list[dict[str, Any]], ratios: list[dict[str, Any]]
) -> None:
    """Adds the rows of one case: ours in both objectives and, if it is there, the peer's, in turns."""
    full = Ours(replace(case, objective="full"))
    full.step()
    if peer == "trl":
        best = min(swept, key=lambda size: swept[size])
        ours, mine, whole, theirs, theirs_cpu = measure_pair(case, full, best, steps)
        print(f"P={case.prompt} G={case.group}: ours {mine}, full {whole}, peer {theirs} s", flush=True)
    else:
        ours = Ours(case)
        ours.step()
        mine, whole = ([seconds_of(system.step) for _ in range(steps)] for system in (ours, full))
    for system, seconds in ((ours, mine), (full, whole)):
        row = {"system": "negfast", "case": asdict(system.case), "status": "ok", **figures(seconds)}
        row |= {"peak_mib": measure_peak("negfast", system.case, 0), "tokens": system.processed}
        rows.append(row | {"breakdown_s": breakdown(system, 3)})
    if peer == "trl":
        tokens = int((np.diff(ours.cu_seqlens) + case.levels).sum()) * case.group
        row = {"system": "trl", "case": asdict(replace(case, objective="full")), "status": "ok", **figures(theirs)}
        row |= {"cpu_s": statistics.median(theirs_cpu), "peak_mib": measure_peak("trl", case, best), "tokens": tokens}
        rows.append(row | {"micro_batch": best, "sweep_s": swept})
        for system, seconds in ((ours, mine), (full, whole)):
            ratio = statistics.median(theirs) / statistics.median(seconds)
            ratios.append({"case": asdict(system.case), "peer": "trl", "figure": "median_s", "ratio": ratio})
            print(f"P={case.prompt} G={case.group} {system.case.objective}: {ratio:.1f}x", flush=True)
    for row in rows[-3:] if peer == "trl" else rows[-2:]:
        print({key: value for key, value in row.items() if key != "case"}, flush=True)


def figures(seconds: list[float]) -> dict[str, Any]:
    return {"median_s": statistics.median(seconds), "seconds": seconds}


def check_against_peer() -> dict[str, float]:
    """Loss and gradient of the full objective against TRL's own function on the same answers and weights, as relative
    errors (largest difference over largest value)."""
    from bench.trl_peer import VOCABULARY, StepTimer, make_trainer

    case = Case(prompt=24, group=4, levels=4, prompts=3, objective="full", ragged=True)
    ours = Ours(case)
    size = TEXT_TOKENS + ours.policy.vocabulary.size
    with torch.no_grad():  # a reference that is not the policy
        for parameter in ours.reference.decoder.parameters():
            parameter.mul_(1.05)
    dummy = [[2] * 4] * case.prompts
    trainer = make_trainer(
        case.decoder(max(size, VOCABULARY)), dummy, case.group, case.levels, case.answers, 1, dummy_reward, StepTimer()
    )
    sampled, terms, result, _ = group_loss(
        ours.policy,
        ours.reference,
        ours.chooser,
        ours.batch(),
        torch.arange(case.prompts),
        lambda items: dummy_reward(items).unsqueeze(-1),
        ours.objective,
        case.group,
        0,
        0,
        full=True,
    )
    result.loss.backward()
    model, reference = (merged_model(policy, case, size) for policy in (ours.policy, ours.reference))
    first = torch.tensor([ours.policy.vocabulary.code_base(level) for level in range(1, case.levels + 1)])
    inputs = _padded_inputs(ours, sampled.codes + first)
    rewards = terms.sum(-1)
    inputs["advantages"] = (rewards - rewards.mean(1, keepdim=True)).flatten()
    inputs["num_items_in_batch"] = torch.tensor(case.answers * case.levels)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    trainer.current_gradient_accumulation_steps = 1
    with torch.no_grad():
        reference_logits = reference(input_ids=ids, attention_mask=mask).logits[:, -case.levels - 1 : -1]
        inputs["ref_per_token_logps"] = (
            reference_logits.log_softmax(-1).gather(2, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
        )
    trainer.model.resize_token_embeddings(size)
    trainer.model.config.tie_word_embeddings = False
    trainer.model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    trainer.model.model.load_state_dict(model.model.state_dict())
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    wanted = dict(trainer.model.model.layers.named_parameters())
    errors = []
    for name, parameter in ours.policy.decoder.layers.named_parameters():
        gradient = wanted[name].grad
        assert gradient is not None and parameter.grad is not None
        errors.append(((parameter.grad - gradient).abs().max() / gradient.abs().max()).item())
    return {
        "loss_relative_error": (abs(loss - result.loss) / abs(loss)).item(),
        "gradient_relative_error": max(errors),
    }


def merged_model(policy: Policy, case: Case, size: int) -> Qwen3ForCausalLM:
    """The policy as a stock model with one vocabulary."""
    config = case.decoder(size)
    config.tie_word_embeddings = False
    model = Qwen3ForCausalLM(config)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        model.model.load_state_dict(policy.decoder.state_dict() | {"embed_tokens.weight": _input_rows(policy)})
        text = policy.text_head.weight
        model.lm_head.weight.copy_(torch.cat([text, policy.block.rows @ policy.block.head.weight]))
    return model


def _input_rows(policy: Policy) -> Tensor:
    return torch.cat([policy.decoder.get_input_embeddings().weight, policy.block.rows]).detach()


def _padded_inputs(ours: Ours, completions: Tensor) -> dict[str, Tensor]:
    """Prompts padded on the left, once for every answer, as the peer has them."""
    lengths = np.diff(ours.cu_seqlens)
    prompts = torch.zeros(ours.case.prompts, int(lengths.max()), dtype=torch.int64)
    mask = torch.zeros_like(prompts)
    for b, tokens in enumerate(ours.tokens.split(lengths.tolist())):
        prompts[b, -len(tokens) :], mask[b, -len(tokens) :] = tokens, 1
    group = ours.case.group
    return {
        "prompt_ids": prompts.repeat_interleave(group, 0),
        "prompt_mask": mask.repeat_interleave(group, 0),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
    }


def measure_pair(
    case: Case, full: Ours, micro_batch: int, steps: int
) -> tuple[Ours, list[float], list[float], list[float], list[float]]:
    """Steps of the peer, of ours and of our full objective in turns: (ours, our seconds, those of ``full``, the peer's,
    the peer's CPU seconds), each without its first step."""
    from bench.trl_peer import StepTimer, make_trainer

    ours = Ours(case)
    mine: list[float] = []
    whole: list[float] = []

    def between() -> None:
        mine.append(seconds_of(ours.step))
        whole.append(seconds_of(full.step))

    timer = StepTimer(between)
    arguments = (case.decoder(CODEBOOK * 4), peer_prompts(ours), case.group, case.levels, micro_batch)
    make_trainer(*arguments, steps + 1, dummy_reward, timer).train()
    return ours, mine[1:], whole[1:], timer.wall[1:], timer.cpu[1:]


def peer_prompts(ours: Ours) -> list[list[int]]:
    """Prompts of the same lengths in the peer's vocabulary, without its padding and end tokens."""
    lengths = np.diff(ours.cu_seqlens)
    return [np.random.default_rng(b).integers(2, CODEBOOK * 4, n).tolist() for b, n in enumerate(lengths)]


def sweep(case: Case, micro_batches: tuple[int, ...], steps: int = 2) -> dict[int, float]:
    """The peer's last of ``steps`` steps at each micro-batch, seconds."""
    from bench.trl_peer import StepTimer, make_trainer

    found = {}
    prompts = peer_prompts(Ours(case))
    for size in micro_batches:
        timer = StepTimer()
        make_trainer(
            case.decoder(CODEBOOK * 4), prompts, case.group, case.levels, size, steps, dummy_reward, timer
        ).train()
        found[size] = timer.wall[-1]
        print(f"  peer at micro-batch {size}: {found[size]:.2f} s", flush=True)
    return found


def seconds_of(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure_peak(system: str, case: Case, micro_batch: int) -> float:
    """Peak resident MiB of a fresh process that makes a step or two."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (system, case, micro_batch, torch.get_num_threads()))


def _peak(system: str, case: Case, micro_batch: int, threads: int) -> float:
    torch.set_num_threads(threads)
    if system == "negfast":
        ours = Ours(case)
        ours.step()
        ours.step()
        return resident_mib(peak=True)
    sweep(case, (micro_batch,), 1)
    return resident_mib(peak=True)
