"""Checkpoints: weights and optimiser state as safetensors, the rest as JSON; written beside, fsynced, renamed."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from negfast.errors import InputError
from negfast.files import atomic_directory

WEIGHTS, OPTIMIZER, STATE = "policy.safetensors", "optimizer.safetensors", "state.json"


def save_checkpoint(
    folder: Path, policy: nn.Module, optimizer: torch.optim.Optimizer | None = None, state: dict | None = None
) -> None:
    """Writes ``folder`` whole or not at all."""
    with atomic_directory(folder) as temporary:
        save_file(unique_tensors(policy), temporary / WEIGHTS)
        if optimizer is not None:
            save_file(optimizer_tensors(policy, optimizer), temporary / OPTIMIZER)
        (temporary / STATE).write_text(json.dumps(state or {}, indent=1) + "\n")


def load_weights(folder: Path, policy: nn.Module) -> None:
    """Loads a checkpoint's weights into ``policy``; InputError where they are missing, damaged or do not fit."""
    tensors = _read(folder / WEIGHTS)
    wanted = unique_tensors(policy)
    for name, tensor in wanted.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise InputError(f"{folder / WEIGHTS}: {name}: found {found}, expected shape {tuple(tensor.shape)}")
    policy.load_state_dict(tensors, strict=False)


def load_optimizer(folder: Path, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads the optimiser's moments and step counts of a checkpoint."""
    tensors = _read(folder / OPTIMIZER)
    for name, parameter in policy.named_parameters():
        entry = {key.rpartition("|")[2]: value for key, value in tensors.items() if key.rpartition("|")[0] == name}
        if entry:
            optimizer.state[parameter] = entry


def read_state(folder: Path) -> dict:
    return json.loads((folder / STATE).read_text())


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of ``folder`` that is furthest along, by (stage number, step) in its name; None without any."""
    if not folder.is_dir():
        return None
    found = [p for p in folder.iterdir() if p.is_dir() and p.name[0].isdigit()]
    return max(found, key=lambda p: tuple(int(part) for part in p.name.split("-")[::2]), default=None)


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Removes all but the ``keep`` checkpoints that are furthest along."""
    found = [p for p in folder.iterdir() if p.is_dir() and p.name[0].isdigit()]
    found.sort(key=lambda p: tuple(int(part) for part in p.name.split("-")[::2]))
    for path in found[: max(len(found) - keep, 0)]:
        shutil.rmtree(path)


def unique_tensors(policy: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without second names of tied tensors, contiguous."""
    seen, tensors = set(), {}
    for name, tensor in policy.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.contiguous()
    return tensors


def optimizer_tensors(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}|{key}": value.contiguous()
        for name, parameter in policy.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: found nothing, expected a checkpoint file") from error
    except SafetensorError as error:
        raise InputError(f"{path}: damaged: {error}") from error
