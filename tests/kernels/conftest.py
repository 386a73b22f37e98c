"""Tests under device/ launch Triton kernels: on the GPU where there is one, and anywhere in Triton's interpreter.

The interpreter must be chosen before Triton is first imported, so ``test_interpreted.py`` runs the folder in processes
of its own.
"""

import os

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE_LOST = "the device is lost to this process"
collect_ignore = [] if INTERPRETED or torch.cuda.is_available() else ["device"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """NEGFAST_TEST_PART=i/n runs every n-th test from the i-th: `bench gpu` shares the tests among processes."""
    if part := os.environ.get("NEGFAST_TEST_PART"):
        number, count = map(int, part.split("/"))
        config.hook.pytest_deselected(items=[item for n, item in enumerate(items) if n % count != number])
        items[:] = items[number::count]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """After an error of the device nothing in this process can be trusted: the other tests are not to fail for it."""
    if report.failed and "CUDA error" in report.longreprtext:
        pytest.exit(DEVICE_LOST)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed, printed by pytest where the test fails; KERNEL_SEED repeats one."""
    value = int(os.environ.get("KERNEL_SEED", int.from_bytes(os.urandom(3), "little")))
    print(f"KERNEL_SEED={value}")
    return value


if INTERPRETED:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    truncating_cast = InterpreterBuilder.cast_impl

    def rounding_cast(builder: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
        """GPUs round float32 to the nearest bfloat16; the interpreter cuts the bits off, twice the error."""
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return truncating_cast(builder, source, target)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
        return TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)

    InterpreterBuilder.cast_impl = rounding_cast

    integer_dot = InterpreterBuilder.create_dot

    def bfloat_dot(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
        """The interpreter multiplies the bits of bfloat16 as if they were integers."""
        if a.dtype.scalar == tl.bfloat16:
            a, b = truncating_cast(builder, a, tl.float32), truncating_cast(builder, b, tl.float32)
        return integer_dot(builder, a, b, *rest)

    InterpreterBuilder.create_dot = bfloat_dot

    def bfloat_arithmetic(name: str):
        integers = getattr(InterpreterBuilder, name)

        def compute(builder: InterpreterBuilder, left: TensorHandle, right: TensorHandle) -> TensorHandle:
            """The same for sums and products of elements."""
            if left.dtype.scalar != tl.bfloat16:
                return integers(builder, left, right)
            wide = (truncating_cast(builder, side, tl.float32) for side in (left, right))
            return rounding_cast(builder, integers(builder, *wide), tl.bfloat16)

        return compute

    for name in ("create_fadd", "create_fsub", "create_fmul"):
        setattr(InterpreterBuilder, name, bfloat_arithmetic(name))
