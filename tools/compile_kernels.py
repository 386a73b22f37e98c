"""Compile every Triton kernel for GPUs one does not have, and print registers, spills and shared memory.

    python tools/compile_kernels.py [--target 80 90 100] [--kernel trie_grpo ...] [--defaults] [--json]

Launches are recorded from the very functions that run on a GPU, on tensors without data, and Triton compiles them as
it would there. No GPU is needed; TRITON_INTERPRET must not be set. Triton keeps what it compiled in its cache
directory, where the same build of Triton finds it on a GPU.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from negfast.kernels import (
    add_norm,
    attention_kernel,
    completion_attention,
    dispatch,
    prompt_attention,
    sid_cross_entropy,
    trie_grpo,
)
from negfast.kernels.trie_grpo import GRPOObjective
from negfast.kernels.trie_rows import RowTokens, TrieRows, TrieTables, row_inputs

TARGETS = (80, 90, 100)
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # in the names of cases


@dataclass(frozen=True)
class Launch:
    """One recorded launch: a kernel function and what it was given."""

    case: str
    kernel: triton.JITFunction
    grid: tuple[int, ...]
    arguments: tuple
    options: dict

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def is_default(self) -> bool:
        return "fp32" not in self.case and "max@" not in self.case


@dataclass
class Recorder:
    """Stands in a module for a kernel and notes its launches."""

    case: str
    kernel: triton.JITFunction
    launches: list[Launch]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def note(*arguments: object, **options: object) -> None:
            self.launches.append(Launch(self.case, self.kernel, grid, arguments, options))

        return note


@contextmanager
def recorded(case: str, module: ModuleType) -> Iterator[list[Launch]]:
    """Within it, launches of the module's kernels are noted and not run."""
    launches: list[Launch] = []
    kernels = {name: value for name, value in vars(module).items() if isinstance(value, triton.JITFunction)}
    for name, kernel in kernels.items():
        setattr(module, name, Recorder(case, kernel, launches))
    try:
        yield launches
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def trie_inputs(codebook: int, dtype: torch.dtype, count: int = 1024) -> tuple[Tensor, TrieTables, TrieRows, RowTokens]:
    """Logits, tables, rows and tokens of 16 prompts, 32 completions, 3 levels, and a trie of 100,000 nodes."""
    nodes, inner, seen, tokens = 100_000, 40_000, 5_000, 3 * 16 * 32
    tables = TrieTables(
        first_child=empty(inner + 1),
        child_bits=empty(inner, -(-codebook // 32)),
        leaf_count=empty(nodes),
        level_base=(0, 1, 300, inner),
        codebook=codebook,
    )
    seen_log = empty(seen, dtype=torch.float32)
    log_mass = empty(count * codebook, dtype=torch.float32)
    rows = TrieRows(empty(count), empty(count), empty(count), empty(seen), seen_log, log_mass, empty(count))
    logits = empty(count, codebook, dtype=dtype)
    code, counted = empty(3, 16 * 32), empty(3, 16 * 32, dtype=torch.bool)
    return logits, tables, rows, RowTokens(empty(count + 1), empty(tokens), empty(tokens), empty(tokens), code, counted)


def record_trie_grpo() -> list[Launch]:
    launches = []
    for codebook in (256, 1024, 8192):
        logits, tables, rows, tokens = trie_inputs(codebook, torch.bfloat16)
        read = (tokens.start, tokens.token, tokens.completion, tokens.code, tokens.counted)
        arguments = (logits, row_inputs(logits, tables, rows), tables.weight, read, empty(16, 32, dtype=torch.float32))
        old = empty(3, 16 * 32, dtype=torch.float32)
        cases: dict[str, tuple[GRPOObjective, Tensor | None]] = {"default": (GRPOObjective(), None)}
        if codebook != 1024:
            cases["grpo k3 max@8"] = (GRPOObjective(loss="grpo", kl="k3", set_size=8), old)
        for name, (objective, old_log_prob) in cases.items():
            with recorded(f"{codebook} codes bf16, {name}", trie_grpo) as noted:
                trie_grpo.launch(*arguments, logits, old_log_prob, json.dumps(asdict(objective)))
            launches += noted
    return launches


def record_sid_cross_entropy() -> list[Launch]:
    launches = []
    for codebook in (256, 8192):
        logits, tables, rows, _ = trie_inputs(codebook, torch.bfloat16)
        arguments = (logits, empty(len(logits)), row_inputs(logits, tables, rows), tables.weight)
        grad = empty(len(logits), dtype=torch.float32)
        with recorded(f"{codebook} codes bf16", sid_cross_entropy) as noted:
            sid_cross_entropy.launch_forward(*arguments)
            sid_cross_entropy.launch_backward(grad, *arguments)
        launches += noted
    return launches


def record_prompt_attention() -> list[Launch]:
    launches, offsets = [], empty(5)
    for dim, dtype in ((64, torch.bfloat16), (128, torch.bfloat16), (128, torch.float32)):
        query, key = empty(4096, 16, dim, dtype=dtype), empty(4096, 8, dim, dtype=dtype)
        lse = empty(4096, 16, dtype=torch.float32)
        case = f"head {dim} {TYPES[dtype]}"
        with recorded(case, prompt_attention) as noted, recorded(case, attention_kernel) as shared:
            prompt_attention.launch_forward(query, key, key, offsets, 1024, dim**-0.5)
            prompt_attention.launch_backward(query, query, key, key, query, lse, offsets, 1024, dim**-0.5)
        launches += noted + shared
    return launches


def record_completion_attention() -> list[Launch]:
    """Decode steps of large and small groups, P = 2048, and three tokens at once; each with a prefix a completion."""
    launches = []
    bf16, fp32 = torch.bfloat16, torch.float32
    sizes = [(64, 64, 1, bf16), (128, 64, 1, bf16), (128, 4, 1, bf16), (128, 64, 3, bf16), (128, 64, 3, fp32)]
    for dim, group, new, dtype in sizes:
        query, key = empty(4 * group, new, 16, dim, dtype=dtype), empty(8192, 8, dim, dtype=dtype)
        own, lse = empty(4 * group, 3, 8, dim, dtype=dtype), empty(4 * group, new, 16, dtype=fp32)
        rest = empty(5), empty(5), empty(4 * group), 2048, group, dim**-0.5
        case = f"head {dim} {TYPES[dtype]}, {group} x {new} new"
        with recorded(case, completion_attention) as noted, recorded(case, attention_kernel):
            completion_attention.launch_forward(query, key, key, own, own, *rest)
            completion_attention.launch_backward(query, query, key, key, own, own, query, lse, *rest)
        launches += noted
    return launches


def record_add_norm() -> list[Launch]:
    """The stream in float32 and in bfloat16, what is added in bfloat16; a norm without an addition."""
    launches, bf16 = [], torch.bfloat16
    for size, stream in ((1024, torch.float32), (1024, bf16), (2048, torch.float32)):
        x, branch, weight = empty(4096, size, dtype=stream), empty(4096, size, dtype=bf16), empty(size, dtype=stream)
        rstd = empty(4096, dtype=torch.float32)
        with recorded(f"{size}, stream {TYPES[stream].upper()}", add_norm) as noted:
            add_norm.launch_forward(x, branch, weight, 1e-6, bf16)
            add_norm.launch_forward(x, None, weight, 1e-6, bf16)
            add_norm.launch_backward(branch, x, x, weight, rstd, bf16)
        launches += noted
    return launches


KERNELS: dict[str, Callable[[], list[Launch]]] = {
    "trie_grpo": record_trie_grpo,
    "sid_cross_entropy": record_sid_cross_entropy,
    "prompt_attention": record_prompt_attention,
    "completion_attention": record_completion_attention,
    "add_norm": record_add_norm,
}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: 32-bit registers a thread, bytes of stack and spill instructions, shared bytes; the
    columns of its narrowest product of a warpgroup, 0 without."""

    family: str
    kernel: str
    case: str
    target: str
    warps: int
    stages: int
    registers: int
    stack: int
    spills: int
    shared: int
    tensor_core: str = field(default="")
    narrowest: int = 0


@dataclass(frozen=True)
class NoDevice:
    """Answers what Triton asks its driver before it compiles a launch."""

    capability: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # by which a process keeps what it compiled

    def get_current_stream(self, device: int) -> int:
        return 0


def launches_for(kernel: str, capability: int) -> list[Launch]:
    """Launches of a kernel's cases with the blocks that it would choose on a device of that capability."""
    dispatch.compile_for = capability
    return KERNELS[kernel]()


def compile_launch(family: str, launch: Launch, capability: int) -> Resources:
    driver.set_active(NoDevice(capability))
    compiled = launch.kernel.run(*launch.arguments, grid=launch.grid, warmup=True, **launch.options)
    usage, sass = inspect_cubin(compiled.asm["cubin"])
    matrix = [name for name in ("UTCHMMA", "HGMMA", "HMMA") if name in sass]
    return Resources(
        family=family,
        kernel=launch.name,
        case=launch.case,
        target=f"sm_{capability}",
        warps=compiled.metadata.num_warps,
        stages=compiled.metadata.num_stages,
        registers=int(usage["REG"]),
        stack=int(usage["STACK"]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        shared=compiled.metadata.shared,
        tensor_core=matrix[0] if matrix else "",
        narrowest=min(map(int, re.findall(r"HGMMA\.64x(\d+)x", sass)), default=0),
    )


def inspect_cubin(cubin: bytes) -> tuple[dict[str, str], str]:
    """(resource usage, disassembly) by the tools that Triton carries."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def ask(tool: str, *options: str) -> str:
            command = [str(tools / tool), *options, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", ask("cuobjdump", "-res-usage")))
        return usage, ask("nvdisasm", "-c")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the kernels ahead of time and print what they take.")
    parser.add_argument("--target", type=int, nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--kernel", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--defaults", action="store_true", help="bfloat16 and the default objective only")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET is set: kernels cannot be compiled in a process that interprets them")
    found = []
    if not options.json:
        print(f"{'kernel':34} {'case':30} {'target':7} {'warps':>5} {'regs':>5} {'spills':>6} {'shared':>7}  unit")
    for name in options.kernel:
        for target in options.target:
            for launch in launches_for(name, target):
                if options.defaults and not launch.is_default:
                    continue
                r = compile_launch(name, launch, target)
                found.append(r)
                if not options.json:
                    figures = f"{r.warps:5} {r.registers:5} {r.spills:6} {r.shared:7}  {r.tensor_core}"
                    print(f"{r.kernel:34} {r.case:30} {r.target:7} {figures}", flush=True)
    if options.json:
        print(json.dumps([asdict(r) for r in found]))
    if any(r.spills or r.stack for r in found):
        sys.exit("a kernel spills registers")


if __name__ == "__main__":
    main()
