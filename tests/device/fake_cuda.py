"""Training on a CUDA device that does not exist: what a step asks of a GPU, found on the CPU.

Tensors of the device have shapes, dtypes and no data (FakeTensorMode); fake_cuda.cpp lets them through autograd. A
tensor on the wrong device fails as it would on a GPU, and `Trace` sees every operator that is dispatched, forward and
backward. What happens within an operator of negfast.kernels is not seen: it is known by its fake implementation.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import KernelInterface

CUDA = torch.device("cuda", 0)
PROJECT = Path(__file__).parents[2]
LIGER = find_spec("liger_kernel")
assert LIGER is not None and LIGER.submodule_search_locations is not None
PLACES = {  # of code that is named where it makes the host wait
    **{str(PROJECT / folder) + "/": folder for folder in ("negfast", "kernels", "tests/device/traced")},
    **{folder + "/": "liger_kernel" for folder in LIGER.submodule_search_locations},
}
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten.lift_fresh.default}
# Operators whose result's shape depends on the data, or that look at it: the host waits.
WAIT = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten._unique2.default,
}
ANSWERED = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}
# Operators that add floating-point numbers on CUDA in any order: results differ from run to run. ("index_put" with
# accumulate sorts first.)
UNORDERED = {"index_add", "index_reduce", "scatter_add", "scatter_reduce", "cumsum", "bincount", "histc", "put"}
# Operators that launch nothing: views and allocations.
NO_LAUNCH = {
    *("view", "_unsafe_view", "_reshape_alias", "t", "transpose", "permute", "slice", "select", "expand", "squeeze"),
    *("unsqueeze", "detach", "alias", "as_strided", "split", "split_with_sizes", "unbind", "lift_fresh", "unflatten"),
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "device", "_local_scalar_dense"),
}


class Trace(TorchDispatchMode):
    """Counts what a step dispatches to the device. Enter it within `fake_cuda`.

    ``launches`` counts operators that launch kernels, ``captured`` those that CUDA graphs replay, ``waits`` those for
    which the host waits for the device, by the function of the project that asked; ``unordered`` those of `UNORDERED`;
    ``casts`` the elements of each parameter (by id) that were cast to bfloat16.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.launches: Counter[str] = Counter()
        self.captured: Counter[str] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.unordered: Counter[tuple[str, str, str]] = Counter()
        self.casts: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = [x for x in given if x.device == CUDA]
        if func in COPIES:
            self._copy(func, args, kwargs)
        elif func is torch.ops.aten._foreach_copy_.default:
            for to, source in zip(*args[:2], strict=True):
                self._copy(torch.ops.aten.copy_.default, (to, source), {})
        elif on_device and any(x.device.type == "cpu" and x.ndim for x in given):
            raise AssertionError(f"{func}: found a CPU tensor beside those of the device, at {_caller()}")
        name = func.overloadpacket.__name__
        if on_device and (func in WAIT or _waits(name, args, kwargs)):
            self.waits[_caller()] += 1
        if (on_device or str(kwargs.get("device", "")).startswith("cuda")) and name not in NO_LAUNCH:
            self.launches[name] += 1
        if name.rstrip("_") in UNORDERED and any(x.is_floating_point() for x in on_device):
            self.unordered[(*_caller(), name)] += 1
        if func in ANSWERED and isinstance(args[0], FakeTensor):
            return 1  # any number, so that the trace goes on
        return func(*args, **kwargs)

    def launch(self, kernel: Any, *args: Any, **kwargs: Any) -> None:
        """A launch of liger-kernel's, which has no fake implementation."""
        for tensor in (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)):
            assert tensor.device == CUDA, f"{kernel.__name__}: found a tensor on {tensor.device}, at {_caller()}"
        self.launches[kernel.__name__] += 1

    def replayed(self, parts: Sequence[Callable[[], Tensor]]) -> list[Callable[[], Tensor]]:
        """For `negfast.train.grpo.graphs.replayed`: what is captured must not wait; a replay is one launch."""
        launches, waits = Counter(self.launches), Counter(self.waits)
        outs = [part() for part in parts]
        assert self.waits == waits, f"within a CUDA graph: {self.waits - waits}"
        self.captured += self.launches - launches
        self.launches = launches
        return [partial(self._replay, out) for out in outs]

    def _replay(self, out: Tensor) -> Tensor:
        self.launches["graph"] += 1
        return out

    def _copy(self, func: Any, args: Any, kwargs: Any) -> None:
        if func is torch.ops.aten.copy_.default:
            to, source, queued = args[0].device, args[1], len(args) > 2 and args[2]
        else:
            to, source, queued = kwargs.get("device") or args[0].device, args[0], kwargs.get("non_blocking", False)
        if isinstance(source, nn.Parameter) and torch.bfloat16 in (kwargs.get("dtype"), args[0].dtype):
            self.casts[id(source)] += source.numel()
        if torch.device(to).type != source.device.type and not queued:
            self.waits[_caller()] += 1


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    """Whether the host must know the data for the shape of the result: a mask as index, repeats on the device without
    their sum."""
    if name in ("index", "index_put", "index_put_"):
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name != "repeat_interleave" or kwargs.get("output_size") is not None:
        return False
    return not isinstance(args[-1], int)  # inference mode shows repeats by one number, which the host has


def _caller() -> tuple[str, str]:
    """(file, function) that dispatches now; of a backward, that which called for it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        for folder, name in PLACES.items():
            if file.startswith(folder):
                return f"{name}/{file.removeprefix(folder)}", function
        frame = frame.f_back
    return "", ""


@contextlib.contextmanager
def fake_cuda() -> Iterator[Trace]:
    """Within it CUDA is there."""
    trace = Trace()

    def read(value: Callable[[Tensor], Any]) -> Callable[..., Any]:
        def wait(tensor: Tensor, *_: object, **__: object) -> Any:
            trace.waits[_caller()] += 1
            return value(tensor)

        return wait

    changes: list[contextlib.AbstractContextManager] = [
        mock.patch.object(FakeTensorMode, "avoid_device_init", True),
        mock.patch.object(nn.Module, "_apply", _apply),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),
        mock.patch.object(FakeTensor, "__deepcopy__", _deepcopy, create=True),
        mock.patch.object(FakeTensor, "tolist", read(lambda tensor: np.ones(tensor.shape).tolist()), create=True),
        mock.patch.object(FakeTensor, "cpu", lambda tensor: tensor, create=True),  # always followed by numpy
        mock.patch.object(FakeTensor, "numpy", read(lambda tensor: np.ones(tensor.shape)), create=True),
        mock.patch("torch.cuda.is_available", lambda: True),
        mock.patch("torch.cuda.is_bf16_supported", lambda *_, **__: True),
        mock.patch("torch.cuda.get_device_capability", lambda *_: (9, 0)),
        mock.patch(
            "torch.cuda.get_device_properties",
            lambda *_: SimpleNamespace(name="NVIDIA H200", multi_processor_count=132),
        ),
        mock.patch("torch.cuda._exchange_device", lambda _: 0),
        mock.patch("torch.cuda._maybe_exchange_device", lambda _: 0),
        mock.patch("negfast.train.grpo.graphs.replayed", trace.replayed),
        mock.patch.object(KernelInterface, "__getitem__", lambda kernel, _: partial(trace.launch, kernel)),
    ]
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # a backward in its caller's thread
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(trace)


def _apply(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module's own, which cannot change a fake tensor's device in place. Shared parameters stay shared."""
    made: dict[int, tuple[Tensor, nn.Parameter]] = {}  # the old ones too, so that no id comes twice
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None:
                if id(old) not in made:
                    with torch.no_grad():
                        made[id(old)] = old, nn.Parameter(convert(old), old.requires_grad)
                part._parameters[name] = made[id(old)][1]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = convert(buffer)
    return module


def _deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """Tensor's own copies memory, of which there is none."""
    copied = tensor.detach().clone()
    memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
    return memo[id(tensor)]
