"""TRL's GRPOTrainer as a peer of `bench grpo`: its own training loop, timed from the start of a step to its end.

The first micro-batch's generation belongs to the step; fetching the prompts from the data set does not. It gets what
makes it fastest: no activation checkpointing, and the best of several micro-batches.
"""

import logging
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen3ForCausalLM,
    TrainerCallback,
)
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer

from bench.grpo_step import SHAPE, VOCABULARY, Case, dummy_reward
from bench.machine import resident_mib
from negfast.config import Model
from negfast.model.load import small_qwen3


class StepTimer(TrainerCallback):
    """Wall and CPU seconds of every step; ``between`` runs after each, outside of the clock."""

    def __init__(self, between: Callable[[], None] = lambda: None) -> None:
        self.between = between
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self._began = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.wall.append(time.perf_counter() - self._began[0])
        self.cpu.append(time.process_time() - self._began[1])
        self.between()


def peer_steps(
    case: Case,
    micro_batch: int,
    steps: int,
    between: Callable[[], None] = lambda: None,
    shape: Model = SHAPE,
    on_gpu: bool = False,
) -> StepTimer:
    """The times of ``steps`` steps on prompts of the case's lengths, in the peer's vocabulary."""
    prompts = [np.random.default_rng(b).integers(2, VOCABULARY, n).tolist() for b, n in enumerate(case.lengths)]
    timer = StepTimer(between)
    make_trainer(small_qwen3(shape, VOCABULARY), prompts, case, micro_batch, steps, timer, on_gpu).train()
    return timer


def sweep(case: Case, micro_batches: list[int]) -> dict[int, tuple[float, float]]:
    """(seconds, peak MiB) of a step at each micro-batch, each in a process of its own."""
    found = {}
    for size in micro_batches:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[size] = pool.apply(_step_and_peak, (case, size, torch.get_num_threads()))
        print(f"  peer at micro-batch {size}: {found[size][0]:.2f} s", flush=True)
    return found


def _step_and_peak(case: Case, micro_batch: int, threads: int) -> tuple[float, float]:
    torch.set_num_threads(threads)
    return peer_steps(case, micro_batch, 1).wall[0], resident_mib(peak=True)


def make_trainer(
    model: PreTrainedModel,
    prompts: list[list[int]],
    case: Case,
    micro_batch: int,
    steps: int,
    callback: TrainerCallback,
    on_gpu: bool = False,
) -> GRPOTrainer:
    """A trainer of ``steps`` steps on ``prompts`` (token ids); ``model`` is its policy and its reference. On a GPU it
    computes in bf16, with Liger's kernels and loss, and generates by vLLM where that is installed."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    disable_progress_bar()
    words = {f"t{i}": i for i in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="t1", pad_token="t0", padding_side="left")
    torch.manual_seed(0)

    def reward(completion_ids: list[list[int]], **_: object) -> list[float | None]:
        return dummy_reward(torch.tensor([ids[0] for ids in completion_ids])).tolist()

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # the trainer reads its reference policy from disk
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=case.completions // micro_batch,
            num_generations=case.group,
            max_completion_length=case.levels,
            generation_kwargs={"min_new_tokens": case.levels},  # an early end must not make its completions shorter
            max_steps=steps,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            weight_decay=0.01,
            beta=0.04,
            use_bias_correction_kl=False,  # the plain k3 of the GRPO paper
            num_iterations=1,
            loss_type="dr_grpo",
            scale_rewards="none",
            gradient_checkpointing=False,
            use_cpu=not on_gpu,
            bf16=on_gpu,
            use_liger_kernel=on_gpu,
            use_vllm=on_gpu and find_spec("vllm") is not None,
            vllm_mode="colocate",
            vllm_gpu_memory_utilization=0.3,
            shuffle_dataset=False,
            pad_to_multiple_of=None,
            dataloader_pin_memory=False,
            report_to=[],
            logging_steps=10**6,
            save_strategy="no",
            disable_tqdm=True,
        )
        data = Dataset.from_dict({"prompt": [" ".join(f"t{i}" for i in p) for p in prompts] * max(steps, 2)})
        trainer = GRPOTrainer(
            model=Qwen3ForCausalLM.from_pretrained(folder, attn_implementation="sdpa"),
            reward_funcs=reward,
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[callback],
        )
    trainer.remove_callback(PrinterCallback)
    return trainer
