"""The Triton kernels beside eager code, torch.compile and the libraries that come closest, against the card's floors.

Inputs and eager baselines are those of the tests (tests/kernels/cases.py). Every system of a case does the same work;
what a peer leaves out is in its name. Bytes and FLOPs are the least that the case needs, the floor is the larger of
bytes over the measured copy bandwidth and FLOPs over the measured rate of a large bf16 product. Without a GPU nothing
is timed, since Triton's interpreter says nothing of speed: rows then hold the predicted floor of an H100.
"""

import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from negfast.kernels import fused_trie_grpo
from negfast.kernels.answer_attention import answer_attention
from negfast.kernels.prompt_attention import prompt_attention
from negfast.kernels.sid_cross_entropy import sid_cross_entropy
from negfast.kernels.trie_grpo import GRPOObjective, SampledTokens, log_policy, trie_grpo_reference
from negfast.kernels.trie_rows import dense_policy
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

H100_COPY = 3.0e12  # bytes/s, read plus written; about 90 % of the datasheet's 3.35e12. Predictions only
H100_MATRIX = 989e12  # dense bf16 FLOP/s of the datasheet. Predictions only
PACKAGES = "negfast", "torch", "triton", "liger-kernel", "flash-attn"
ROOT = Path(__file__).parents[1]


def _load_cases() -> Any:
    spec = importlib.util.spec_from_file_location("cases", ROOT / "tests" / "kernels" / "cases.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("cases", module)
    spec.loader.exec_module(module)
    return module


cases = _load_cases()


@dataclass(frozen=True)
class Case:
    """One size of one kernel, the least it must move and compute, and how to make its inputs on a device.

    ``build`` returns systems by name, calls that return the main result, to be compared with negfast's.
    """

    kernel: str
    shape: dict[str, Any]
    bytes: int
    flops: int
    build: Callable[[torch.device], dict[str, Callable[[], Any]]]


# --- the cases -------------------------------------------------------------------------------------------------------


def trie_grpo_case(rows: int, codebook: int, dtype: torch.dtype) -> Case:
    """Loss and gradient of one token a row under a reference with exact KL; the result compared is dlogits."""

    def build(device: torch.device) -> dict[str, Callable[[], Any]]:
        data = cases.wide_trie_case(1, device, rows, codebook, 16, dtype)
        objective = GRPOObjective(beta=0.04)
        arguments = (data.logits, data.tables, data.rows, data.tokens, data.code, data.counted, data.rewards, objective)
        valid, log_prior = dense_policy(data.tables, data.rows)
        answer = torch.arange(rows, device=device)
        sampled = SampledTokens(data.tokens.row.long(), data.code[0].long(), answer, data.counted[0])

        def dense(logits: Tensor, reference: Tensor) -> Tensor:
            log_ref = log_policy(reference, valid, log_prior, objective.temperature)
            return trie_grpo_reference(logits, valid, log_prior, sampled, data.rewards, objective, 1, log_ref).loss

        systems = {
            "negfast": lambda: fused_trie_grpo.launch(*arguments, data.reference)[5],
            "eager, dense mask and prior given": _gradient(dense, data.logits, data.reference),
            "torch.compile of eager": _gradient(_compiled(dense), data.logits, data.reference),
        }
        if device.type == "cuda" and _installed("liger-kernel"):
            systems["liger grpo (no trie, k3, advantages and log-probabilities given)"] = _liger_grpo(data)
        return systems

    moved = 3 * rows * codebook * dtype.itemsize + _table_bytes(rows, codebook) + 49 * rows
    shape = {"rows": rows, "codes": codebook, "dtype": str(dtype)[6:]}
    return Case("trie_grpo", shape, int(moved), 25 * rows * codebook, build)


def cross_entropy_case(rows: int, codebook: int, dtype: torch.dtype) -> Case:
    """Loss and gradient of one target a row; the result compared is dlogits."""

    def build(device: torch.device) -> dict[str, Callable[[], Any]]:
        data = cases.wide_trie_case(2, device, rows, codebook, 16, dtype)
        rest = (data.tables, data.rows, data.code[0])
        valid, log_prior = dense_policy(data.tables, data.rows)
        target = data.code[0].long()

        def dense(logits: Tensor) -> Tensor:
            return F.cross_entropy((logits.float() + log_prior).masked_fill(~valid, -torch.inf), target)

        systems = {
            "negfast": _gradient(lambda z: sid_cross_entropy(z, *rest).mean(), data.logits),
            "eager, dense mask and prior given": _gradient(dense, data.logits),
            "torch.compile of eager": _gradient(_compiled(dense), data.logits),
        }
        if device.type == "cuda" and _installed("liger-kernel"):
            from liger_kernel.transformers import LigerCrossEntropyLoss

            liger = LigerCrossEntropyLoss()
            systems["liger cross entropy (no trie)"] = _gradient(lambda z: liger(z * 1, target), data.logits)
        return systems

    moved = 3 * rows * codebook * dtype.itemsize + 2 * _table_bytes(rows, codebook) + 56 * rows
    shape = {"rows": rows, "codes": codebook, "dtype": str(dtype)[6:]}
    return Case("sid_cross_entropy", shape, int(moved), 24 * rows * codebook, build)


def prompt_case(prompts: int, length: int, heads: int, kv_heads: int, dim: int, backward: bool) -> Case:
    """Causal attention of equally long prompts, as padded peers like them best."""

    def build(device: torch.device) -> dict[str, Callable[[], Any]]:
        dtype = torch.bfloat16
        data = cases.attention_case(3, device, (length,) * prompts, heads, kv_heads, dim, dtype=dtype).prompts()

        def padded(x: Tensor) -> Tensor:
            return x.unflatten(0, (prompts, length)).transpose(1, 2)

        def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = F.scaled_dot_product_attention(padded(q), padded(k), padded(v), is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).flatten(0, 1)

        calls: dict[str, Callable[..., Tensor]] = {
            "negfast": lambda q, k, v: prompt_attention(q, k, v, *data.offsets, *data.sizes),
            "sdpa": sdpa,
        }
        if device.type == "cuda" and _installed("flash-attn"):
            from flash_attn import flash_attn_varlen_func

            (offsets,) = data.offsets
            calls["flash-attn"] = lambda q, k, v: flash_attn_varlen_func(
                q, k, v, offsets, offsets, length, length, causal=True
            )
        return _attention_systems(calls, data, backward)

    products = 2 if not backward else 2 + 5
    flops = products * 2 * heads * dim * prompts * length * (length + 1) // 2
    tensors = (2 if not backward else 5) * prompts * length * (heads + kv_heads) * dim
    shape: dict[str, Any] = {"prompts": prompts, "length": length, "heads": heads, "kv_heads": kv_heads, "dim": dim}
    shape["pass"] = "forward + backward" if backward else "forward"
    return Case("prompt_attention", shape, tensors * 2, flops, build)


def answer_case(
    prompts: int, group: int, length: int, new: int, heads: int, kv_heads: int, dim: int, backward: bool
) -> Case:
    """G answers of ``new`` tokens a prompt, all asked at once; ``new`` = 1 is the decode step."""

    def build(device: torch.device) -> dict[str, Callable[[], Any]]:
        dtype, lengths = torch.bfloat16, (length,) * prompts
        sizes = {"group": group, "new": new, "seen": new}
        data = cases.attention_case(4, device, lengths, heads, kv_heads, dim, **sizes, dtype=dtype).answers()

        def copied(q: Tensor, *keys: Tensor) -> Tensor:
            """As libraries without groups hold it: the prompt's keys and values once an answer."""
            prompt = (x.unflatten(0, (prompts, 1, length)).expand(-1, group, -1, -1, -1) for x in keys[:2])
            k, v = (
                torch.cat([p.flatten(0, 1), own], 1).transpose(1, 2) for p, own in zip(prompt, keys[2:], strict=True)
            )
            step = torch.arange(new, device=device)[:, None]
            seen = torch.arange(length + new, device=device) <= length + step
            q = q.transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(1, 2).view(data.grad.shape)

        def visible(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            own = j - length
            return (own < 0) | ((own // new == i // new) & (own % new <= i % new))

        mask = create_block_mask(visible, None, None, group * new, length + group * new, device=str(device))
        flex = _compiled(flex_attention)

        def shared(q: Tensor, *keys: Tensor) -> Tensor:
            prompt = (x.unflatten(0, (prompts, length)) for x in keys[:2])
            k, v = (
                torch.cat([p, own.reshape(prompts, group * new, kv_heads, dim)], 1).transpose(1, 2)
                for p, own in zip(prompt, keys[2:], strict=True)
            )
            out = flex(
                q.reshape(prompts, group * new, heads, dim).transpose(1, 2), k, v, block_mask=mask, enable_gqa=True
            )
            return out.transpose(1, 2).reshape(data.grad.shape)

        calls = {
            "negfast": lambda *tensors: answer_attention(*tensors, *data.offsets, *data.sizes),
            "sdpa, prompt copied per answer": copied,
        }
        if device.type == "cuda" or not backward:  # FlexAttention has no backward on the CPU
            calls["flex attention"] = shared
        return _attention_systems(calls, data, backward)

    queries = prompts * group * new * heads * dim
    prompt_keys = 2 * prompts * length * kv_heads * dim
    own_keys = 2 * prompts * group * new * kv_heads * dim
    elements = 2 * queries + prompt_keys + own_keys
    if backward:
        elements += 4 * queries + 2 * (prompt_keys + own_keys)
    flops = (2 if not backward else 7) * 2 * queries * length
    shape: dict[str, Any] = {
        "prompts": prompts,
        "group": group,
        "length": length,
        "new": new,
        "heads": heads,
        "kv_heads": kv_heads,
    }
    shape |= {"dim": dim, "pass": "forward + backward" if backward else "forward"}
    return Case("answer_attention", shape, elements * 2, flops, build)


def _table_bytes(rows: int, codebook: int) -> float:
    """Child bits and log masses of the nodes of ``wide_trie_case``, each once."""
    return min(rows, 2048) * (codebook / 8 + 0.3 * codebook * 4 * min(4, max(rows / 2048, 1)))


def all_cases() -> list[Case]:
    """From launch-bound to bandwidth-bound, and the shapes of Qwen3-0.6B's attention."""
    bf16 = torch.bfloat16
    sizes = [(64, 256, bf16), (1088, 256, bf16), (16_384, 256, bf16), (131_072, 256, bf16)]
    sizes += [(131_072, 256, torch.float32), (1024, 8192, bf16), (8192, 8192, bf16)]
    made = [trie_grpo_case(*size) for size in sizes]
    made += [cross_entropy_case(*sizes[n]) for n in (1, 3, 6)]
    for backward in (False, True):
        for prompts, length in ((4, 512), (4, 1024), (4, 2048), (2, 8192)):
            made.append(prompt_case(prompts, length, 16, 8, 128, backward))
        made.append(prompt_case(4, 2048, 16, 8, 64, backward))
        for group, length, new in ((16, 1024, 1), (16, 1024, 3), (64, 2048, 1), (64, 2048, 3)):
            made.append(answer_case(4, group, length, new, 16, 8, 128, backward))
    return made


def _gradient(function: Callable[..., Tensor], tensor: Tensor, *rest: Tensor) -> Callable[[], Tensor]:
    leaf = tensor.detach().requires_grad_()
    return lambda: torch.autograd.grad(function(leaf, *rest), leaf)[0]


def _attention_systems(calls: dict[str, Callable[..., Tensor]], data: Any, backward: bool) -> dict[str, Callable]:
    leaves = [tensor.detach().requires_grad_(backward) for tensor in data.tensors]
    if not backward:
        return {name: lambda c=call: c(*leaves) for name, call in calls.items()}
    return {name: lambda c=call: torch.autograd.grad(c(*leaves), leaves, data.grad)[0] for name, call in calls.items()}


def _compiled(function: Callable) -> Callable:
    """torch.compile on a GPU; on the CPU, where tests only compare results, the function itself."""
    return torch.compile(function, dynamic=False) if torch.cuda.is_available() else function


def _liger_grpo(data: Any) -> Callable[[], Tensor]:
    """Liger's loss over 64 tokens a sequence; it expects one position more than it has tokens."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    rows, codebook = data.logits.shape
    logits = F.pad(data.logits.view(rows // 64, 64, codebook), (0, 0, 0, 1))
    ids = data.code.view(rows // 64, 64).long()
    known = torch.zeros(rows // 64, 64, device=logits.device)
    advantage = torch.randn(rows // 64, device=logits.device)

    def loss(leaf: Tensor) -> Tensor:
        return triton_grpo_loss(
            leaf, known, known, ids, advantage, temperature=1.0, beta=0.04, inplace=False, loss_type="grpo", reduce=True
        )[0]

    return _gradient(loss, logits)


# --- running them ----------------------------------------------------------------------------------------------------


def run(out: Path | None = None, seconds: float = 240.0) -> dict[str, Any]:
    """The bench's JSON object, written to ``out`` if given. On a GPU it times for about ``seconds`` at most (cases
    beyond have status "not reached"); without one it predicts an H100's floor."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    floor = measure_floor(device) if on_gpu else {"copy_bytes_s": H100_COPY, "matrix_flop_s": H100_MATRIX}
    if not on_gpu:
        print("No GPU: Triton is not timed in its interpreter. The least an H100 would take:", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    for case in all_cases():
        if not on_gpu:
            found = [_row(case, "negfast", floor) | {"status": "predicted"}]
        elif time.monotonic() - began > seconds:
            found = [_row(case, "negfast", floor) | {"status": "not reached"}]
        else:
            found = time_case(case, device, floor)
        for row in found:
            print(_line(row), file=sys.stderr, flush=True)
        rows += found
    result = {
        "bench": "kernels",
        "device": torch.cuda.get_device_name() if on_gpu else "none; floors predicted for an H100",
        "versions": {"python": platform.python_version(), **_versions()},
        "rows": rows,
        "ratios": _ratios(rows),
        "floor": floor,
    }
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def measure_floor(device: torch.device) -> dict[str, float]:
    """Bytes/s (read plus written) of a large copy and FLOP/s of a large bf16 product."""
    from triton.testing import do_bench

    source = torch.randn(1 << 28, device=device)
    target = torch.empty_like(source)
    copy = do_bench(lambda: target.copy_(source), quantiles=[0.5])
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = do_bench(lambda: a @ b, quantiles=[0.5])
    return {"copy_bytes_s": 2e3 * source.nbytes / copy, "matrix_flop_s": 2e3 * 8192**3 / product}


def time_case(case: Case, device: torch.device, floor: dict[str, float]) -> list[dict[str, Any]]:
    """p20, p50, p80 of each system, each first compared with negfast's result; a peer that fails says why."""
    from triton.testing import do_bench

    rows = []
    systems = case.build(device)
    expected = systems["negfast"]()
    for name, call in systems.items():
        row = _row(case, name, floor)
        try:
            if "(no trie" not in name:
                row["difference"] = cases.relative_error(call(), expected)
            p20, p50, p80 = do_bench(call, warmup=25, rep=150, quantiles=[0.2, 0.5, 0.8])
            row |= {"p20_s": p20 / 1e3, "p50_s": p50 / 1e3, "p80_s": p80 / 1e3}
            row |= {"bytes_s": case.bytes / row["p50_s"], "of_floor": row["floor_s"] / row["p50_s"]}
        except Exception as error:
            if name == "negfast":
                raise
            row["status"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        rows.append(row)
    return rows


def _row(case: Case, system: str, floor: dict[str, float]) -> dict[str, Any]:
    least = max(case.bytes / floor["copy_bytes_s"], case.flops / floor["matrix_flop_s"])
    work = {"bytes": case.bytes, "flops": case.flops, "floor_s": least}
    return {"system": system, "case": {"kernel": case.kernel, **case.shape}, "status": "ok", **work}


def _ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The peer's median time over negfast's, case by case."""
    timed = [row for row in rows if "p50_s" in row]
    ours = {json.dumps(row["case"]): row["p50_s"] for row in timed if row["system"] == "negfast"}
    return [
        {"case": r["case"], "peer": r["system"], "figure": "p50_s", "ratio": r["p50_s"] / ours[json.dumps(r["case"])]}
        for r in timed
        if r["system"] != "negfast"
    ]


def _line(row: dict[str, Any]) -> str:
    shape = " ".join(f"{name} {value}" for name, value in row["case"].items() if name != "kernel")
    work = f"{row['bytes'] / 2**20:9.1f} MiB {row['flops'] / 1e9:9.2f} GFLOP, floor {1e6 * row['floor_s']:8.1f} us"
    time_ = f", {1e6 * row['p50_s']:8.1f} us" if "p50_s" in row else f", {row['status']}"
    return f"{row['case']['kernel']:18} {row['system'][:34]:34} {shape}: {work}{time_}"


def _installed(package: str) -> bool:
    with suppress(PackageNotFoundError):
        return bool(version(package))
    return False


def _versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES if _installed(package)}


if __name__ == "__main__":
    run()
