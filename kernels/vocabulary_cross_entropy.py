"""Cross entropy over a whole vocabulary, a target a row: by liger-kernel where kernels run and it is installed.

For logits z [R, V] and a row's target c

    nll = logsumexp(z) - z[c],    d nll / d z[k] = softmax(z)[k] - [k = c]

Liger's kernel reads a row twice and writes the gradient over it, all in the forward pass; its backward multiplies the
rows by what flows back to them. Bytes: 3 R V elements forward and 2 R V backward, 20 R V in float32. FLOPs: about
10 R V, so memory bounds it. Liger looks at the targets' range, for which the host waits for the device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from negfast.kernels.dispatch import liger_cross_entropy, runs_liger

ROWS_AT_ONCE = 64  # of the entropies' temporaries, 37 MiB at 151,936 tokens


def vocabulary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """nll [R] of ``target`` int64 [R] after ``logits`` [R, V], in float32, or float64 where logits are.

    Do not read the logits afterwards: Liger's kernel writes their gradient into their memory. Raises ValueError on
    unsupported shapes, dtypes and devices.
    """
    if logits.ndim != 2 or target.shape != logits.shape[:1] or target.dtype != torch.int64:
        found = f"{tuple(logits.shape)} and {target.dtype} {tuple(target.shape)}"
        raise ValueError(f"logits and target: found {found}, expected [R, V] and torch.int64 [R]")
    if not runs_liger(logits.device):
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target, reduction="none")
    if logits.dtype == torch.float64:
        raise ValueError("logits: found torch.float64, expected float32, bfloat16 or float16")
    # Liger's loss has the type of its logits
    return liger_cross_entropy()(logits.float(), target)


@torch.no_grad()
def row_entropy(logits: Tensor) -> Tensor:
    """Entropy [R] of softmax(logits) over rows [R, V], some rows at a time."""
    log_p = (rows.log_softmax(-1) for rows in logits.split(ROWS_AT_ONCE))
    return torch.cat([-(rows.exp() * rows).sum(-1) for rows in log_p])
