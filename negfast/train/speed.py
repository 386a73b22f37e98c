"""How fast a step was and how much of the machine it used: tokens/s, MFU, share of time spent on data, memory."""

import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from negfast import spans
from negfast.model.layout import GroupLayout
from negfast.model.policy import Policy

# Dense matrix FLOP/s in bfloat16 by the makers' data sheets; the name with the most words that are all there counts.
PEAKS = {
    "A100": 312e12,
    "A10": 125e12,
    "L4": 121e12,
    "L40S": 362e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
}


class Meter:
    """Counts the floating-point operations of a policy's decoder and takes the time of steps.

    A token costs 2 operations a weight of the layers it goes through, and attention 4 * head width * heads a pair of
    query and key; twice that again for the backward, where there is one. Of histories the last layer makes keys and
    values only. Heads, norms, the loss and the reference's forward are left out. MFU is this over
    the time and the peak of the device: for bfloat16 that of a GPU's data sheet, else what a large product in the
    policy's type reaches here, measured once.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy, self.operations = policy, 0.0
        layers = policy.decoder.layers
        self.layers = len(layers)
        products = {name: p.numel() for name, p in layers[-1].named_parameters() if p.ndim == 2}
        self.weights = sum(products.values())  # of a layer
        self.key_weights = sum(size for name, size in products.items() if "k_proj" in name or "v_proj" in name)
        config = policy.decoder.config.get_text_config()
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.pair = 4 * width * heads  # operations of a layer
        self.device = next(policy.parameters()).device
        self.peak = peak_flops(self.device, torch.bfloat16 if policy.in_bfloat16 else torch.float32)

    def __enter__(self) -> "Meter":
        self._hook = self.policy.decoder.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _count(self, _: nn.Module, __: tuple, inputs: dict) -> None:
        rows, layout = inputs["inputs_embeds"].shape[1], inputs["layout"]
        prompts, completions = attention_pairs(layout)
        once = (self.layers - 1) * (2.0 * self.weights * rows + self.pair * (prompts + completions))
        if layout.holds_prompts and layout.new_tokens and self.policy.drops_prompt_rows:
            kept = rows - layout.prompt_tokens
            once += 2.0 * (self.key_weights * rows + (self.weights - self.key_weights) * kept)
            once += self.pair * completions
        else:
            once += 2.0 * self.weights * rows + self.pair * (prompts + completions)
        self.operations += once * (3 if torch.is_grad_enabled() else 1)

    @contextmanager
    def step(self) -> Iterator[None]:
        """The step whose figures come next."""
        self.operations = 0.0
        waited, began = spans.data_seconds(), time.perf_counter()
        yield
        self.seconds = time.perf_counter() - began  # the step ends with a copy to the host, so CUDA is done too
        self.waited = spans.data_seconds() - waited

    def figures(self, tokens: int) -> dict[str, float]:
        """Of the last step; ``tokens`` of all ranks. Operations and memory are those of this rank."""
        return {
            "seconds": self.seconds,
            "tokens": tokens,
            "tokens_per_s": tokens / self.seconds,
            "mfu": self.operations / self.seconds / self.peak,
            "data_wait": self.waited / self.seconds,
            "peak_mib": peak_memory(self.device),
        }


def attention_pairs(layout: GroupLayout) -> tuple[float, float]:
    """Pairs of query and key of one layer in the layout's current call: of the prompts, and of the completions."""
    lengths = layout.host_lengths
    prompts = float((lengths * (lengths + 1) // 2).sum()) if layout.holds_prompts else 0.0
    if not layout.new_tokens:
        return prompts, 0.0
    own = layout.past_tokens + (layout.new_tokens + 1) / 2
    return prompts, layout.new_tokens * (layout.completions.seen + len(layout.completions) * own)


def peak_memory(device: torch.device) -> float:
    """MiB: what CUDA had allocated at most since the process began, or the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak matrix FLOP/s of a device: by data sheet for bfloat16 on GPUs in ``PEAKS``, else measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        known = data_sheet(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    return measured_flops(device, dtype)


def data_sheet(name: str) -> float | None:
    """What ``PEAKS`` says of a GPU by its name, as PyTorch gives it."""
    words = set(re.split(r"[\s-]", name))
    fitting = [key for key in PEAKS if words.issuperset(key.split())]
    return PEAKS[max(fitting, key=len)] if fitting else None


def measured_flops(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of a square product of ``size``, the best of five."""
    a = torch.ones(size, size, device=device, dtype=dtype)

    def seconds() -> float:
        began = time.perf_counter()
        _finish(a @ a)
        return time.perf_counter() - began

    return 2.0 * size**3 / min(seconds() for _ in range(5))


def _finish(result: Tensor) -> None:
    if result.device.type == "cuda":
        torch.cuda.synchronize(result.device)
