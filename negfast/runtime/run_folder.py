"""A run directory: where things lie in it, and how a policy comes back out of it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from negfast.config import Config, load_config
from negfast.data.dataset import Dataset, date_of, day_of
from negfast.errors import InputError
from negfast.model.load import rebuild_policy
from negfast.model.policy import Policy
from negfast.runtime.checkpoint import load_weights, read_state
from negfast.runtime.engine import Engine, build_engine
from negfast.runtime.machine import choose_device, use_threads
from negfast.runtime.verdict import Calibration

FORMAT = 2  # of run.json and of what lies beside it


@dataclass(frozen=True)
class Chosen:
    """What a stage of a finished run left that training data cannot tell: it was chosen on valid."""

    step: int  # of the weights that were kept
    scale: float  # of code logits
    calibration: Calibration | None  # of verdicts; None after align, which trains none to the end


@dataclass(frozen=True)
class Refit:
    """What a final refit repeats: it trains on more data and never looks at valid (`negfast.train.refit`)."""

    of: str  # the finished run, relative to this one
    until: int  # days since 1970: trained on events of days before
    stages: dict[str, Chosen]

    def calibration(self, stage: str) -> Calibration:
        calibration = self.stages[stage].calibration
        assert calibration is not None, f"{stage} has no calibration"
        return calibration

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"until": date_of(self.until)}

    @classmethod
    def from_json(cls, read: dict[str, Any]) -> Self:
        stages = {}
        for name, chosen in read["stages"].items():
            calibration = None if chosen["calibration"] is None else Calibration(**chosen["calibration"])
            stages[name] = Chosen(chosen["step"], chosen["scale"], calibration)
        return cls(read["of"], day_of(read["until"]), stages)


@dataclass(frozen=True)
class RunFolder:
    """Where things lie in a run directory."""

    path: Path

    @property
    def description(self) -> Path:
        return self.path / "run.json"

    @property
    def model(self) -> Path:
        """Model configuration and tokenizer."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def initial(self) -> Path:
        """The weights before the first step."""
        return self.checkpoints / "initial"

    @property
    def final(self) -> Path:
        return self.path / "final"

    def weights(self, stage: str) -> Path:
        """What a stage of a finished run left."""
        return self.final if stage == "grpo" else self.checkpoints / stage

    @property
    def report(self) -> Path:
        return self.path / "report.md"

    @property
    def exists(self) -> bool:
        return self.description.is_file()

    @property
    def data(self) -> Path:
        return self.path / self.read()["data"]

    @property
    def config(self) -> Config:
        return load_config(self.path / "config.toml")

    @property
    def calibration(self) -> Calibration:
        return Calibration(**read_state(self.final)["calibration"])

    @property
    def learned_until(self) -> int:
        """Days since 1970: nothing in the weights comes from events of this day or later, those of --init included."""
        return day_of(self._said("learned_until"))

    def _said(self, name: str) -> Any:
        """A part of run.json. InputError where it has none."""
        read = self.read()
        if name not in read:
            raise InputError(f"{self.description}: damaged: found no {name}")
        return read[name]

    @property
    def refit(self) -> Refit | None:
        """What the run repeats, where it is a final refit."""
        description = self.read().get("refit")
        return None if description is None else Refit.from_json(description)

    def read(self) -> dict:
        if not self.exists:
            raise InputError(f"{self.path}: found no run.json, expected a run directory")
        try:
            read = json.loads(self.description.read_text())
            version = read.get("format")
        except (ValueError, AttributeError) as error:
            raise InputError(f"{self.description}: damaged: {error}") from error
        if version != FORMAT:
            raise InputError(f"{self.description}: found a run of format {version}, expected {FORMAT}; train it again")
        return read

    def require_finished(self) -> None:
        self.read()
        if not self.final.is_dir():
            raise InputError(f"{self.path}: the run is unfinished; `negfast train --out {self.path}` resumes it")

    def check_data(self, dataset: Dataset) -> None:
        """InputError unless the data set is the one that the run was trained on, or extends it."""
        if self._said("fingerprint") not in (dataset.fingerprint, *dataset.extends):
            raise InputError(
                f"{dataset.path}: is not the data set that {self.path} was trained on, or has changed since; expected "
                "that one, or one that `prepare --like` made of it"
            )

    def load_policy(self, dataset: Dataset) -> tuple[Policy, PreTrainedTokenizerBase]:
        """The run's policy, its weights still to be loaded, and its tokenizer."""
        shape = dataset.codes.shape[1], int(dataset.manifest["semantic_ids"]["codebook"])
        config = self.config
        return rebuild_policy(self.model, config.model, *shape, self.read()["verdict_features"])

    def finished_engine(self, data: Path | None) -> Engine:
        """An engine with the run's final weights over ``data`` (default: the data it was trained on), for inference.

        Raises InputError where the run is unfinished or the data does not belong to it.
        """
        self.require_finished()
        dataset = Dataset.open(self.data if data is None else data)
        self.check_data(dataset)
        config = self.config
        use_threads(config.train.threads)
        policy, tokenizer = self.load_policy(dataset)
        until = None if self.refit is None else self.refit.until
        device = choose_device(config.train.device)
        engine = build_engine(config, dataset, policy, tokenizer, device, until)
        load_weights(self.final, engine.policy)
        engine.policy.eval().requires_grad_(False)
        return engine
