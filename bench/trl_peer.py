"""TRL's GRPOTrainer as a peer of `bench grpo`: its own training loop, timed from the start of a step to its end.

The first micro-batch's generation belongs to the step; fetching the prompts from the data set does not.
"""

import logging
import tempfile
import time
import warnings
from collections.abc import Callable

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer

VOCABULARY = 1024


def make_trainer(
    decoder: Qwen3Config,
    prompts: list[list[int]],
    group: int,
    levels: int,
    micro_batch: int,
    steps: int,
    reward: Callable[[torch.Tensor], torch.Tensor],
    callback: TrainerCallback,
    learning_rate: float = 1e-6,
) -> GRPOTrainer:
    """A trainer of ``steps`` steps on ``prompts`` (token ids), each step ``group`` answers of ``levels`` tokens each.

    ``reward`` gives float [n] for the first tokens int64 [n] of the answers.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    disable_progress_bar()
    words = {f"t{i}": i for i in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="t1", pad_token="t0", padding_side="left")
    torch.manual_seed(0)

    def reward_function(completion_ids: list[list[int]], **_: object) -> list[float]:
        return reward(torch.tensor([ids[0] for ids in completion_ids])).tolist()

    answers = len(prompts) * group
    with tempfile.TemporaryDirectory() as folder:
        Qwen3ForCausalLM(decoder).save_pretrained(folder)  # the trainer reads its reference policy from disk
        model = Qwen3ForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=answers // micro_batch,
            num_generations=group,
            max_completion_length=levels,
            generation_kwargs={"min_new_tokens": levels},  # an early end must not make its answers shorter
            max_steps=steps,
            learning_rate=learning_rate,
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
            use_cpu=True,
            bf16=False,
            shuffle_dataset=False,
            pad_to_multiple_of=None,
            dataloader_pin_memory=False,
            report_to=[],
            logging_steps=10**6,
            save_strategy="no",
            disable_tqdm=True,
        )
        data = Dataset.from_dict({"prompt": [" ".join(f"t{i}" for i in p) for p in prompts] * max(steps, 2)})
        return GRPOTrainer(
            model=model,
            reward_funcs=reward_function,
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[callback],
        )


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
