"""As much of vLLM's interface as examples/vllm_constrained.py uses, computed by transformers: requests in one batch,
a logits processor that follows them, log-probabilities after it."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from vllm.v1.sample.logits_processor import BatchUpdate


@dataclass
class SamplingParams:
    max_tokens: int
    temperature: float
    logprobs: int
    extra_args: dict[str, Any] = field(default_factory=dict)


class LLM:
    def __init__(
        self,
        model: str,
        dtype: str,
        enable_prompt_embeds: bool,
        logits_processors: list,
        max_logprobs: int,
        logprobs_mode: str,
    ) -> None:
        assert enable_prompt_embeds and logprobs_mode == "processed_logprobs" and dtype == "float32"
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        config = SimpleNamespace(model_config=SimpleNamespace(model=model))
        self.processors = [made(config, torch.device("cpu"), False) for made in logits_processors]
        self.max_logprobs = max_logprobs

    @torch.no_grad()
    def generate(self, prompts: list[dict], params: list[SamplingParams], use_tqdm: bool) -> list[SimpleNamespace]:
        size, found = (
            len(prompts),
            [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[], logprobs=[])]) for _ in prompts],
        )
        outputs = [request.outputs[0] for request in found]
        added = [(row, params[row], None, outputs[row].token_ids) for row in range(size)]
        update: BatchUpdate | None = BatchUpdate(size, [], added, [])
        embed = self.model.get_input_embeddings()
        for _ in range(params[0].max_tokens):
            logits = []
            for prompt, output in zip(prompts, outputs, strict=True):
                drawn = embed(torch.tensor(output.token_ids, dtype=torch.int64))
                inputs = torch.cat([prompt["prompt_embeds"], drawn])[None]
                logits.append(self.model(inputs_embeds=inputs, logits_to_keep=1).logits[0, -1])
            batch = torch.stack(logits)
            for processor in self.processors:
                processor.update_state(update)
                batch = processor.apply(batch)
            update = None
            for row, log_p in enumerate(batch.log_softmax(-1)):
                assert params[row].temperature == 0 and params[row].logprobs <= self.max_logprobs
                best = log_p.topk(params[row].logprobs)
                pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                outputs[row].logprobs.append({token: SimpleNamespace(logprob=value) for token, value in pairs})
                outputs[row].token_ids.append(int(best.indices[0]))
        for processor in self.processors:
            processor.update_state(BatchUpdate(0, list(range(size)), [], []))
        return [SimpleNamespace(outputs=[output]) for output in outputs]
