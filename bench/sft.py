"""One SFT step: negfast's packed step beside Hugging Face's Trainer, on the same small Qwen3, data and optimiser.

An example is a prompt of ragged length and a target item of L codes; loss on the codes. The Trainer gets one padded
row an example, in the fastest micro-batch of a sweep; negfast packs prompts without padding, runs a prompt once for all
of its targets and takes logits over a level's codes, pruned to the trie, instead of over the whole vocabulary. Steps of
the two alternate within one process. On CUDA the Trainer uses liger-kernel (which then must be installed) and both
bf16 autocast.

``floor`` counts operations and bytes of a step at the Qwen3-0.6B shape and says what MFU they allow on an H100.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PrinterCallback, Qwen3Config, Qwen3ForCausalLM, Trainer, TrainerCallback, TrainingArguments

from bench.machine import device_name, versions, write_result
from negfast.model.choice import TrieChooser
from negfast.model.fused_layers import fuse_layers
from negfast.model.histories import Histories, HistoryBuilder
from negfast.model.policy import Policy
from negfast.runtime.likelihood import Targets, target_log_probs
from negfast.sid.tokens import CodeVocabulary
from negfast.sid.trie import build_trie
from negfast.train.speed import Meter

PACKAGES = "negfast", "torch", "transformers", "accelerate", "liger-kernel"
MICRO_BATCHES = 4, 8, 16, 32
CODEBOOK, TEXT_TOKENS, ITEMS = 256, 1024, 20_000


@dataclass(frozen=True)
class Case:
    """``prompts`` of log-normal length, mean ``prompt`` tokens, each with ``targets`` items of ``levels`` codes."""

    targets: int
    prompt: int
    prompts: int
    layers: int
    hidden: int
    levels: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 0  # of the MLP; 0: four times ``hidden``

    @property
    def examples(self) -> int:
        return self.prompts * self.targets

    def decoder(self, vocabulary: int) -> Qwen3Config:
        return Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate or 4 * self.hidden,
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
    """negfast's step over the examples of a case."""

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        self.case, self.device = case, device
        trie = build_trie(
            rng.permutation(CODEBOOK**case.levels)[:ITEMS, None] // CODEBOOK ** np.arange(case.levels) % CODEBOOK,
            CODEBOOK,
        )
        vocabulary = CodeVocabulary(TEXT_TOKENS, case.levels, CODEBOOK)
        self.policy = Policy(Qwen3ForCausalLM(case.decoder(TEXT_TOKENS)), vocabulary).train().to(device)
        fuse_layers(self.policy, device)
        torch.nn.init.normal_(self.policy.block.head.weight, std=case.hidden**-0.5)
        codes = torch.from_numpy(vocabulary.item_tokens(trie.codes)).long()
        builder: Any = SimpleNamespace(item_token_ids=codes.to(device), vocabulary=vocabulary)
        builder.target_tokens = partial(HistoryBuilder.target_tokens, builder)
        self.engine: Any = SimpleNamespace(
            policy=self.policy, chooser=TrieChooser(trie.to(device), 0.0), histories=builder, device=device
        )
        spread = np.clip(rng.lognormal(0, 0.8, case.prompts), 0.1, 5)
        lengths = np.maximum(spread / spread.mean() * case.prompt, 1).astype(np.int64)
        tokens = rng.integers(TEXT_TOKENS, TEXT_TOKENS + vocabulary.size, lengths.sum())
        self.prompts = np.split(tokens, np.cumsum(lengths)[:-1])
        self.prompt_tokens = len(tokens)
        self.items = torch.from_numpy(rng.integers(0, len(trie.leaf_item), case.examples))
        self.marker, self.none = vocabulary.marker("next-dislike"), vocabulary.marker("none")
        self.codes = codes
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-5, fused=True)
        self.policy.in_bfloat16 = device.type == "cuda"
        self.meter = Meter(self.policy)

    def step(self) -> float:
        histories = Histories.of_prompts(self.prompts, self.none, self.device, has_text=False)
        items, requests = self.items.to(self.device), np.arange(self.case.examples) // self.case.targets
        targets = Targets(histories, requests, torch.full_like(items, self.marker), items)
        loss = -target_log_probs(self.engine, targets, None, 0).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def examples(self) -> list[dict[str, Tensor]]:
        """The same as padded rows have them: prompt, marker, codes; labels on the codes."""
        rows = []
        for target, item in enumerate(self.items.tolist()):
            prompt = torch.from_numpy(self.prompts[target // self.case.targets])
            ids = torch.cat([prompt, torch.tensor([self.marker]), self.codes[item]])
            labels = torch.full_like(ids, -100)
            labels[-self.case.levels :] = ids[-self.case.levels :]
            rows.append({"input_ids": ids, "labels": labels})
        return rows


class Turns(TrainerCallback):
    """Takes the time of the Trainer's steps, and runs ``between`` after each."""

    def __init__(self, between: Callable[[], Any]) -> None:
        self.between = between
        self.seconds: list[float] = []
        self.between_seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        began = time.perf_counter()
        self.between()
        self.between_seconds.append(time.perf_counter() - began)


def trainer(ours: Ours, micro_batch: int, steps: int, between: Callable[[], Any]) -> tuple[Trainer, Turns]:
    """Hugging Face's Trainer over a case's examples, all of them in every step."""
    size = TEXT_TOKENS + ours.policy.vocabulary.size
    model = Qwen3ForCausalLM(ours.case.decoder(size))
    rows, turns = ours.examples(), Turns(between)

    def collate(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        padded = {"input_ids": 0, "labels": -100}
        out = {
            name: torch.nn.utils.rnn.pad_sequence([row[name] for row in batch], True, fill)
            for name, fill in padded.items()
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in batch])
        return {**out, "attention_mask": (torch.arange(out["labels"].shape[1]) < lengths[:, None]).long()}

    cuda = ours.device.type == "cuda"
    return make_trainer(model, rows, collate, micro_batch, len(rows) // micro_batch, steps, turns, cuda), turns


def make_trainer(
    model: torch.nn.Module,
    rows: list[dict[str, Tensor]],
    collate: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]],
    micro_batch: int,
    accumulate: int,
    steps: int,
    turns: Turns,
    cuda: bool = False,
    order: str = "random",
) -> Trainer:
    """A Trainer of ``steps`` steps of ``accumulate`` micro-batches; ``order`` is "random" or "sequential"."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulate,
            train_sampling_strategy=order,
            max_steps=steps,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            bf16=cuda,
            use_cpu=not cuda,
            use_liger_kernel=cuda,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=cuda,
        )
        made = Trainer(model, settings, train_dataset=rows, data_collator=collate, callbacks=[turns])
    made.remove_callback(PrinterCallback)
    return made


def run(
    out: Path | None = None,
    prompt: int = 256,
    prompts: int = 16,
    repeats: int = 5,
    threads: int = 2,
    layers: int = 4,
    hidden: int = 256,
) -> dict[str, Any]:
    """Measures 1 and 4 targets a prompt, prints a table and writes the JSON result to ``out``."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    ratios = []
    for targets in (1, 4):
        case = Case(targets, prompt, prompts, layers, hidden)
        ours = Ours(case, device)
        fastest = min(
            (size for size in MICRO_BATCHES if case.examples % size == 0), key=lambda size: sweep_seconds(ours, size)
        )
        made, turns = trainer(ours, fastest, repeats + 1, ours.step)
        made.train()
        with ours.meter, ours.meter.step():
            ours.step()
        examples = sum(len(row["input_ids"]) for row in ours.examples())
        about = {**asdict(case), "micro_batch": fastest, "example_tokens": examples}
        for system, seconds in (("negfast", turns.between_seconds[1:]), ("transformers Trainer", turns.seconds[1:])):
            median = statistics.median(seconds)
            figures = {"median_s": median, "seconds": seconds, "example_tokens_per_s": examples / median}
            if system == "negfast":
                figures |= {"tokens": ours.prompt_tokens + case.examples * case.levels}
                figures |= {"mfu": ours.meter.operations / median / ours.meter.peak}
            rows.append({"system": system, "case": about, "status": "ok", **figures})
        ratio = rows[-1]["median_s"] / rows[-2]["median_s"]
        ratios.append({"case": about, "peer": "transformers Trainer", "figure": "median_s", "ratio": ratio})
        print(
            f"{targets} targets a prompt: negfast {rows[-2]['median_s']:.3f} s (MFU {rows[-2]['mfu']:.0%}), "
            f"Trainer {rows[-1]['median_s']:.3f} s at micro-batch {fastest}, {ratio:.2f}x",
            flush=True,
        )
    floor = predict()
    print(f"H100, Qwen3-0.6B shape: predicted MFU {floor['mfu']:.0%}, {floor['tokens_per_s']:,.0f} tokens/s")
    result = {
        "bench": "sft",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device_name(),
        "threads": threads,
        "versions": versions(*PACKAGES),
        "rows": rows,
        "ratios": ratios,
        "floor": floor,
    }
    if out is not None:
        write_result(out, result)
    return result


def sweep_seconds(ours: Ours, micro_batch: int) -> float:
    """The Trainer's second step at a micro-batch."""
    made, turns = trainer(ours, micro_batch, 2, lambda: None)
    made.train()
    return turns.seconds[1]


@dataclass(frozen=True)
class Shape:
    """A decoder and a packed batch; the default is Qwen3-0.6B with 32 sequences of 2,048."""

    layers: int = 28
    hidden: int = 1024
    intermediate: int = 3072
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    sequence: int = 2048
    sequences: int = 32


@dataclass(frozen=True)
class Gpu:
    """An H100 SXM by its data sheet, and what share of it kernels reach: assumptions, not results."""

    flops: float = 989e12  # bf16, dense
    bytes_per_s: float = 3.35e12
    product_share: float = 0.70  # cuBLAS on products of this size
    attention_share: float = 0.45  # a fused attention, forward and backward together
    copy_share: float = 0.85


def predict(shape: Shape = Shape(), gpu: Gpu = Gpu()) -> dict[str, Any]:
    """What a step costs by counting: products and attention at a share of peak FLOP/s, all else by bytes moved.

    Elementwise work is counted in bytes: of an element of the float32 residual stream 28, forward and backward, for an
    addition with the norm that follows (`add_norm`), two of them a layer; of norms and rotary embedding of queries and
    keys, and of SwiGLU, what liger-kernel moves in bf16, twice that backward. The optimiser counts 28 bytes a weight,
    the bf16 copies 6 a pass.
    """
    tokens = shape.sequence * shape.sequences
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    weights = shape.layers * (2 * shape.hidden * (query + key) + 3 * shape.hidden * shape.intermediate)
    products = 6.0 * weights * tokens
    attention = 3 * 4.0 * query * shape.layers * tokens * (shape.sequence + 1) / 2
    stream, branches = 2 * 28 * shape.hidden, 2 * (2 + 2) * (query + key) + 3 * 2 * shape.intermediate
    elementwise = (stream + 3.0 * branches) * shape.layers * tokens
    optimiser = (28.0 + 2 * 6) * weights
    seconds = {
        "products": products / (gpu.flops * gpu.product_share),
        "attention": attention / (gpu.flops * gpu.attention_share),
        "elementwise": elementwise / (gpu.bytes_per_s * gpu.copy_share),
        "optimiser": optimiser / (gpu.bytes_per_s * gpu.copy_share),
    }
    total = sum(seconds.values())
    return {
        "kind": "predicted by counting, not measured",
        "shape": asdict(shape),
        "gpu": asdict(gpu),
        "weights": weights,
        "flops_per_token": (products + attention) / tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / total,
        "mfu": (products + attention) / gpu.flops / total,
    }
