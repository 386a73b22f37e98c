"""Lists of finished runs on a split: made once and kept beside the run."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from negfast.config import Reward
from negfast.evaluate.predictions import TOP, Predictions
from negfast.evaluate.sets import EvalSet
from negfast.files import atomic_file
from negfast.runtime.checkpoint import WEIGHTS, load_weights, read_state
from negfast.runtime.engine import Engine
from negfast.runtime.generation import generate
from negfast.runtime.run_folder import RunFolder
from negfast.train.expected import expected_rewards, reward_table


def predictions_of(run: RunFolder, names: Sequence[str], evalset: EvalSet, reward: Reward) -> dict[str, Predictions]:
    """Lists of "prior" and of the weights of "sft" and "grpo", with their expected rewards by ``reward``.

    Each is kept in RUN/predictions under the checksum of its weights, so that weights which GRPO left unchanged are
    evaluated once. Delete the folder after a change of the evaluation.
    """
    engine: Engine | None = None
    found = {}
    for name in names:
        weights = "prior" if name == "prior" else read_state(run.checkpoints / name)["files"][WEIGHTS]["sha256"][:16]
        kept = run.path / "predictions" / f"{evalset.name}-{weights}.safetensors"
        wanted = {"reward": json.dumps(asdict(reward))}
        if not kept.exists() or _metadata(kept)["reward"] != wanted["reward"]:
            engine = run.finished_engine(None) if engine is None else engine
            _keep(kept, _predict(run, engine, name, evalset, reward), wanted)
        found[name] = _read(kept)
    return found


def _predict(run: RunFolder, engine: Engine, name: str, evalset: EvalSet, reward: Reward) -> dict[str, np.ndarray]:
    if name == "prior":
        engine.policy.block.scale.zero_()  # the prior alone chooses
    else:
        load_weights(run.checkpoints / name, engine.policy)
    generated = generate(engine, evalset.requests, TOP, with_policy=name != "prior")[0]
    rewards = expected_rewards(engine, evalset.requests, reward_table(engine, evalset.requests, reward))
    return {"generated": generated, "expected_reward": rewards}


def _keep(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    with atomic_file(path) as temporary:
        save_file(arrays, temporary, metadata)


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "numpy") as file:
        return file.metadata()


def _read(path: Path) -> Predictions:
    kept = load_file(path)
    return Predictions(kept["generated"], expected_reward=kept["expected_reward"])
