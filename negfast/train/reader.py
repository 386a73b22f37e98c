"""What a stage reads for its steps: split where a token budget asks for it, and on CUDA read one step ahead.

Reading looks at no weights and at nothing that an earlier step left, so when it happens changes no result.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from itertools import islice
from typing import TypeVar

import torch

from negfast.config import Train
from negfast.errors import InputError
from negfast.staging import tensors_in
from negfast.train.step import Batch, MicroBatch, Stage

Place = TypeVar("Place")
Read = TypeVar("Read")


def read_step(stage: Stage, step: int, micro_batches: list[MicroBatch], budget: int) -> list[Batch]:
    """The batches of ``micro_batches`` of a step, halved until none has more than ``budget`` tokens (0: no bound).

    InputError where a micro-batch that is a single row of one of the stage's tasks has more.
    """
    return [
        part
        for micro_batch in micro_batches
        for part in _fitting(stage, step, micro_batch, stage.read(step, micro_batch), budget)
    ]


def _fitting(stage: Stage, step: int, micro_batch: MicroBatch, batch: Batch, budget: int) -> list[Batch]:
    if not budget or batch.tokens <= budget:
        return [batch]
    halves = micro_batch.halves()
    try:
        batches = [stage.read(step, half) for half in halves]
    except InputError as error:
        found = f"train.token_budget={budget}: {stage.name} step {step + 1} has a micro-batch of {batch.tokens} tokens"
        raise InputError(f"{found} that cannot be split: {error}") from None
    return [p for half, read in zip(halves, batches, strict=True) for p in _fitting(stage, step, half, read, budget)]


def reads_ahead(config: Train, device: torch.device) -> bool:
    """Whether a thread reads a step ahead of the one that computes."""
    return config.prefetch == "on" or (config.prefetch == "auto" and device.type == "cuda")


def read_steps(
    stage: Stage, steps: range, micro_batches: list[MicroBatch], config: Train, device: torch.device
) -> Generator[list[Batch], None, None]:
    """What `read_step` gives for each of ``steps``, read ahead where `reads_ahead` says so; close it at the end.

    On CUDA the thread copies on a stream of its own, and the caller's current stream waits for it, not the host.
    """
    if not reads_ahead(config, device):
        yield from (read_step(stage, step, micro_batches, config.token_budget) for step in steps)
        return
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))  # the tables that are read from lie there by then

    def read(step: int) -> tuple[list[Batch], torch.cuda.Event | None]:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            batches = read_step(stage, step, micro_batches, config.token_budget)
            return batches, None if stream is None else stream.record_event()

    with closing(read_ahead(read, steps, workers=1, ahead=2)) as ahead:  # the one asked for, and the next
        for batches, copied in ahead:
            if copied is not None:
                current = torch.cuda.current_stream(device)
                current.wait_event(copied)
                for tensor in tensors_in(batches):
                    tensor.record_stream(current)  # else its memory might serve the next copies too early
            yield batches


def read_ahead(
    read: Callable[[Place], Read], places: Iterable[Place], workers: int, ahead: int
) -> Generator[Read, None, None]:
    """``read(place)`` of every place in order, by ``workers`` threads that are at most ``ahead`` places further on.

    What a read raises comes out in its turn. Close the iterator to end the threads.
    """
    rest, pending = iter(places), deque[Future[Read]]()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="negfast-reader")
    try:
        while True:
            pending.extend(pool.submit(read, place) for place in islice(rest, ahead - len(pending)))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
