"""Named ranges of a run, for a profiler's timeline, and the time spent waiting for data.

Off, which is the default, a range costs the look-up of a global. `negfast profile` switches them on: as NVTX ranges
where nsys listens, else as ranges of torch.profiler. The names: data, prompt, level 2 and on, reference, loss,
backward, optimiser, checkpoint.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

NOTHING: AbstractContextManager = nullcontext()
_mark: Callable[[str], AbstractContextManager] | None = None
_waited = 0.0


def span(name: str) -> AbstractContextManager:
    """``with span("loss"): ...``"""
    return NOTHING if _mark is None else _mark(name)


@contextmanager
def data() -> Iterator[None]:
    """The range "data": a step waits for its batch, read by itself or by another thread; its time is always counted."""
    global _waited
    began = time.perf_counter()
    with span("data"):
        yield
    _waited += time.perf_counter() - began


def data_seconds() -> float:
    """Seconds spent in ``data`` since the process began."""
    return _waited


@contextmanager
def marked_by(mark: Callable[[str], AbstractContextManager]) -> Iterator[None]:
    """Ranges are ``mark(name)`` within the block: `torch.cuda.nvtx.range` or `torch.profiler.record_function`."""
    global _mark
    before, _mark = _mark, mark
    try:
        yield
    finally:
        _mark = before
