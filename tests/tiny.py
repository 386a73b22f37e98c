"""A log small enough to train on in seconds, written as a user would have it, and runs of it."""

from pathlib import Path

import numpy as np
from click.testing import CliRunner

from negfast.cli import main

USERS, ITEMS, DAYS = 120, 90, 70
SETTINGS = {
    "model.hidden": 32,
    "model.layers": 2,
    "model.heads": 2,
    "model.kv_heads": 1,
    "model.head_dim": 16,
    "model.intermediate": 48,
    "model.text_vocab": 300,
    "history.window": 32,
    "align.steps": 4,
    "align.titles": 8,
    "align.pairs": 8,
    "sft.steps": 6,
    "sft.warmup": 2,
    "sft.histories": 16,
    "sft.requests_per_history": 2,
    "sft.validate_every": 3,
    "grpo.steps": 4,
    "grpo.warmup": 1,
    "grpo.histories": 4,
    "grpo.requests_per_history": 2,
    "grpo.group": 4,
    "grpo.validate_every": 2,
    "train.threads": 1,
    "train.checkpoint_every": 2,
    "eval.beam": 50,
    "eval.valid_requests": 24,
    "eval.resamples": 20,
}


def write_log(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """events.csv (user,item,rating,time) and items.csv (item,title,genre): tastes by genre, clear enough to learn."""
    rng = np.random.default_rng(seed)
    genre = rng.integers(0, 4, ITEMS)
    hated = rng.integers(0, 4, USERS)
    lines = ["user,item,rating,time"]
    for user in range(USERS):
        days = np.sort(rng.choice(DAYS, 24, replace=False))
        items = rng.choice(ITEMS, 48, replace=False)
        for place, item in enumerate(items):
            bad = rng.random() < (0.75 if genre[item] == hated[user] else 0.08)
            time = 1_600_000_000 + int(days[place // 2]) * 86_400 + int(rng.integers(0, 80_000))
            lines.append(f"u{user},i{item},{1 if bad else 5},{time}")
    events = folder / "events.csv"
    events.write_text("\n".join(lines) + "\n")
    words = ["grim", "sweet", "wild", "quiet"]
    table = ["item,title,genre"] + [f"i{i},The {words[genre[i]]} story {i},{words[genre[i]]}" for i in range(ITEMS)]
    items_file = folder / "items.csv"
    items_file.write_text("\n".join(table) + "\n")
    return events, items_file


def prepare(folder: Path) -> Path:
    """A prepared data set of `write_log`."""
    return prepare_log(folder, *write_log(folder))


def prepare_log(folder: Path, events: Path, items: Path, *options: str) -> Path:
    """A prepared data set of such files; ``options`` more for `negfast prepare`."""
    out = folder / "data"
    command = ["prepare", str(events), "--items", str(items), "--dislike", "rating<=2", "--value-column", "rating"]
    command += ["--item-text-column", "title", "--item-attributes", "genre", "--encoder", "tfidf", "--levels", "3"]
    command += ["--codebook", "16", "--horizon", "5", "--out", str(out), *options]
    run_cli(*command)
    return out


def train_arguments(
    data: Path, out: Path, init: Path | None = None, model: Path | None = None, **changes: object
) -> list[str]:
    """A `train` command with the tiny settings. A run ``init`` to start from, or a ``model``, brings its own shape."""
    brought = init is not None or model is not None
    shape = {key: value for key, value in SETTINGS.items() if not (brought and key.startswith("model."))}
    settings = {**shape, **{key.replace("__", "."): value for key, value in changes.items()}}
    command = ["train", "--preset", "smoke", "--data", str(data), "--out", str(out)]
    for option, path in (("--init", init), ("--model", model)):
        command += [] if path is None else [option, str(path)]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    return command


def run_cli(*command: str, code: int = 0) -> str:
    """What the command prints to stdout and stderr; fails if it exits with another code."""
    result = CliRunner().invoke(main, list(command))
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output
