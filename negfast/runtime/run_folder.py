"""A run directory: where things lie in it, and how a policy comes back out of it."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch

from negfast.config import Config, load_config
from negfast.data.dataset import Dataset, date_of, day_of
from negfast.errors import InputError
from negfast.model import qwen3
from negfast.model.histories import text_width
from negfast.model.policy import Policy
from negfast.runtime.checkpoint import STATE, load_weights, read_object, read_state
from negfast.runtime.engine import Engine, build_engine
from negfast.runtime.machine import choose_device, use_threads
from negfast.runtime.verdict import Calibration
from negfast.sid.tokens import CodeVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 7  # of run.json and of what lies beside it

T = TypeVar("T")


@dataclass(frozen=True)
class Chosen:
    """What a stage of a finished run left that training data cannot tell: it was chosen on valid."""

    step: int  # of the weights that were kept
    scale: float  # of code logits


@dataclass(frozen=True)
class Refit:
    """What a final refit repeats: it trains on more data and never looks at valid (`negfast.train.refit`)."""

    of: str  # the finished run, relative to this one
    until: int  # days since 1970: trained on events of days before
    stages: dict[str, Chosen]
    calibration: Calibration  # of P(dislike | feedback)
    shown: Calibration | None = None  # of P(dislike | shown)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"until": date_of(self.until)}

    @classmethod
    def from_json(cls, read: dict[str, Any]) -> Self:
        stages = {name: Chosen(**chosen) for name, chosen in read["stages"].items()}
        shown = None if read.get("shown") is None else Calibration(**read["shown"])
        return cls(read["of"], day_of(read["until"]), stages, Calibration(**read["calibration"]), shown)


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

    @property
    def report(self) -> Path:
        return self.path / "report.md"

    @property
    def exists(self) -> bool:
        return self.description.is_file()

    @property
    def data(self) -> Path:
        return Path(os.path.normpath(self.path.resolve() / self._entry("data", str)))

    @property
    def config(self) -> Config:
        return load_config(self.path / "config.toml")

    @property
    def calibration(self) -> Calibration:
        state = read_state(self.final)
        return _parsed(self.final / STATE, "calibration", lambda: Calibration(**state["calibration"]))

    @property
    def shown_calibration(self) -> Calibration:
        """Of P(dislike | shown). InputError where the run has none."""
        state = read_state(self.final)
        if state.get("shown_calibration") is None:
            raise InputError(
                f"{self.path}: its log has no exposures with dislikes among them on valid, so it cannot tell "
                "P(dislike | shown)"
            )
        return _parsed(self.final / STATE, "shown_calibration", lambda: Calibration(**state["shown_calibration"]))

    @property
    def learned_until(self) -> int:
        """Days since 1970: nothing in the weights comes from events of this day or later, those of --init included."""
        return self._entry("learned_until", day_of)

    def _entry(self, name: str, parse: Callable[[Any], T]) -> T:
        """A part of run.json. InputError where it has none, or a damaged one."""
        read = self.read()
        if name not in read:
            raise InputError(f"{self.description}: damaged: found no {name}")
        return _parsed(self.description, name, lambda: parse(read[name]))

    @property
    def refit(self) -> Refit | None:
        """What the run repeats, where it is a final refit."""
        return None if self.read().get("refit") is None else self._entry("refit", Refit.from_json)

    def read(self) -> dict:
        if not self.exists:
            raise InputError(f"{self.path}: found no run.json, expected a run directory")
        read = read_object(self.description)
        if (version := read.get("format")) != FORMAT:
            raise InputError(f"{self.description}: found a run of format {version}, expected {FORMAT}; train it again")
        return read

    def require_finished(self) -> None:
        self.read()
        if not self.final.is_dir():
            raise InputError(f"{self.path}: the run is unfinished; `negfast train --out {self.path}` resumes it")

    def check_data(self, dataset: Dataset) -> None:
        """InputError unless the data set is the one that the run was trained on, or extends it."""
        if self._entry("fingerprint", str) not in (dataset.fingerprint, *dataset.extends):
            raise InputError(
                f"{dataset.path}: is not the data set that {self.path} was trained on, or has changed since; expected "
                "that one, or one that `prepare --like` made of it"
            )

    def load_policy(self, dataset: Dataset) -> tuple[Policy, "PreTrainedTokenizerBase"]:
        """The run's policy, its weights still to be loaded, and its tokenizer."""
        from negfast.model.load import rebuild_policy  # transformers: seconds

        shape = dataset.codes.shape[1], int(dataset.manifest["semantic_ids"]["codebook"])
        config = self.config
        widths = self._entry("verdict_features", int), text_width(dataset, config.history)
        return rebuild_policy(self.model, config.model, *shape, *widths)

    def serving_policy(self, dataset: Dataset) -> Policy | None:
        """The run's policy without transformers, its weights still to be loaded; None for another decoder."""
        config = self.config
        shape = qwen3.read_config(self.model)
        if shape is None or config.model.lora_rank:
            return None
        sids = dataset.codes.shape[1], int(dataset.manifest["semantic_ids"]["codebook"])
        vocabulary = CodeVocabulary(shape.vocab_size, *sids)
        with torch.random.fork_rng(devices=[]):
            widths = self._entry("verdict_features", int), text_width(dataset, config.history)
            return Policy(qwen3.Qwen3(shape), vocabulary, *widths)

    def finished_engine(self, data: Path | None, serving: bool = False) -> Engine:
        """An engine with the run's final weights over ``data`` (default: the data it was trained on), for inference.

        ``serving`` makes it in less time, to the same bits, but without a tokenizer; torch's threads stay what they
        are. Raises InputError where the run is unfinished or the data does not belong to it.
        """
        self.require_finished()
        if data is None and not self.data.is_dir():
            raise InputError(f"{self.path}: found no data set at {self.data}, which it was trained on; was one moved?")
        dataset = Dataset.open(self.data if data is None else data)
        self.check_data(dataset)
        config = self.config
        if not serving:
            use_threads(config.train.threads)
        device = choose_device(config.train.device)
        tokenizer: Any = None
        policy = self.serving_policy(dataset) if serving and device.type == "cpu" else None
        if policy is None:
            policy, tokenizer = self.load_policy(dataset)
        # rates are smoothed towards those of training, whatever days the data set has by now
        engine = build_engine(config, dataset, policy, tokenizer, device, self.learned_until)
        load_weights(self.final, engine.policy)
        engine.policy.eval().requires_grad_(False)
        return engine


def _parsed(file: Path, name: str, parse: Callable[[], T]) -> T:
    """What ``parse`` makes of the part ``name`` of a file; InputError where it cannot."""
    try:
        return parse()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: damaged: {name}: {type(error).__name__} {error}") from error
