"""Several processes, one model: who is there, sums of gradients and figures, and what only the first one does.

Every rank holds all weights and computes its micro-batches (`negfast.train.step`), rollouts included; after the last
backward one all-reduce adds the gradients up in buckets. It is not overlapped with the backward: for weights of
0.6 B in float32 that is 2.4 GB a step, some 10 ms between eight GPUs on NVLink (docs/scaling.md has the calculation).

A process belongs to a group if `torchrun` or `negfast train --gpus` said so in its environment (RANK, WORLD_SIZE).
Only the first rank writes files; all read the same file system.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from negfast.errors import InputError, TrainingError

BUCKET = 64 << 20  # bytes of gradients in one all-reduce
PATIENCE = timedelta(hours=2)  # others wait while rank 0 validates; whoever started the ranks ends those of a dead one
GRACE = 10.0  # seconds that other ranks get to end by themselves once one has failed, and again after SIGTERM


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device(device: torch.device) -> torch.device:
    """This rank's own device of the kind ``device``: cuda:LOCAL_RANK on CUDA."""
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    number = int(os.environ["LOCAL_RANK"])
    if number >= torch.cuda.device_count():
        raise InputError(f"rank {number} of this node: found {torch.cuda.device_count()} GPUs, expected one a rank")
    return torch.device("cuda", number)


def planned_size() -> int:
    """Ranks that the environment names, whether they have met yet or not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_size() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Joins the other ranks for the length of the block, if the environment names any: NCCL on CUDA, else gloo."""
    if planned_size() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with peers():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Ends the process of a rank at once, its output written.

    A thread of gloo may still hold the tensors of the last collective, since DTensor's caches keep the group alive; to
    give them back it takes Python's lock, and where the interpreter is on its way out that aborts the process (the
    discussion of pytorch/pytorch#179291).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def first_does(action: Callable[[], None]) -> None:
    """Rank 0 runs ``action`` while the others wait for it; where it fails they leave without a word."""
    error = None
    if rank() == 0:
        try:
            action()
        except Exception as raised:
            error = raised
    failed = any_rank(error is not None)
    if error is not None:
        raise error
    if failed:
        sys.exit(1)


def from_first(make: Callable[[], dict]) -> dict:
    """The JSON object that ``make`` gives on rank 0, on every rank."""
    made: dict = {}
    first_does(lambda: made.update(make()))
    if size() == 1:
        return made
    text = json.dumps(made).encode()
    length = int(add(torch.tensor([len(text) if rank() == 0 else 0], device=_device())).item())
    box = torch.zeros(length, dtype=torch.uint8, device=_device())
    if rank() == 0:
        box.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    return json.loads(bytes(add(box).tolist()))


def add(values: Tensor) -> Tensor:
    """The sum of ``values`` over ranks."""
    if size() > 1:
        with peers():
            dist.all_reduce(values)
    return values


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is set on any rank."""
    return flag if size() == 1 else add(torch.tensor([float(flag)], device=_device())).item() > 0


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces every gradient by its sum over ranks; a parameter that no rank has a gradient for stays without."""
    if size() == 1:
        return
    wanted = [p for p in parameters if p.requires_grad]
    present = torch.tensor([p.grad is not None for p in wanted], dtype=torch.float32, device=wanted[0].device)
    used = [p for p, count in zip(wanted, add(present).tolist(), strict=True) if count]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in used if p.grad is not None]
    for bucket in _buckets(gradients):
        flat = add(torch.cat([g.reshape(-1) for g in bucket]))
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def share_weights(module: nn.Module) -> None:
    """Gives every rank the parameters and buffers of rank 0."""
    if size() == 1:
        return
    from torch.distributed.tensor import DTensor  # a second of imports

    with peers(), torch.no_grad():
        for tensor in module.state_dict().values():
            if not isinstance(tensor, DTensor):  # such a part is this rank's alone
                dist.broadcast(tensor, 0)


def launch_gpus(count: int, arguments: Sequence[str]) -> int:
    """``launch`` with a GPU for each rank; InputError where there are fewer."""
    if torch.cuda.device_count() < count:
        raise InputError(f"--gpus {count}: found {torch.cuda.device_count()} GPUs; on CPUs use torchrun, see --help")
    return launch(arguments, count)


def launch(arguments: Sequence[str], count: int) -> int:
    """Runs ``python -m negfast ARGUMENTS`` as ``count`` ranks on this machine; the exit code of the whole.

    When one rank fails the others are ended, and its code is the result; a rank ended by a signal is named in a line
    on stderr. SIGINT and SIGTERM are passed on, so that all ranks stop at the same step.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "negfast", *arguments],
            env={**os.environ, **{k: str(v) for k, v in {**common, "RANK": n, "LOCAL_RANK": n}.items()}},
            start_new_session=True,  # a Ctrl-C at the terminal arrives once, through us
        )
        for n in range(count)
    ]

    def pass_on(number: int, _: object) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    before = {s: signal.signal(s, pass_on) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _wait(ranks)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen]) -> int:
    """Waits for all. After the first failure the others get ``GRACE`` seconds, then SIGTERM, then SIGKILL."""
    code, failed_at, warnings = 0, float("inf"), 0
    while None in (codes := [process.poll() for process in ranks]):
        failed = [(found, n) for n, found in enumerate(codes) if found]
        if failed and not code:
            (code, number), failed_at = min(failed), time.monotonic()  # one ended by a signal took the others along
            if code < 0:
                print(f"negfast: rank {number} was ended by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
                code = 1
        if time.monotonic() > failed_at + GRACE * (warnings + 1):
            warnings += 1
            for process in ranks:
                process.terminate() if warnings == 1 else process.kill()
        time.sleep(0.05)
    return code or next((1 if p.returncode < 0 else p.returncode for p in ranks if p.returncode), 0)


def _device() -> torch.device:
    """Where tensors of this rank's collectives lie."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one type, up to ``BUCKET`` bytes together or one alone."""
    bucket: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        if bucket and (filled + tensor.nbytes > BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filled += tensor.nbytes
    if bucket:
        yield bucket


@contextmanager
def peers() -> Iterator[None]:
    """Says in one line that a collective failed because another rank is gone."""
    try:
        yield
    except RuntimeError as error:  # gloo raises nothing more special
        raise gone(error) from error


def gone(error: RuntimeError) -> TrainingError:
    """What a collective's ``error`` means, in one line."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return TrainingError(f"rank {rank()}: another rank is gone or out of reach; the last checkpoint is good ({reason})")
