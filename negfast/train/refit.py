"""A final refit: what a finished run chose on valid, for training again on everything before T_test."""

from dataclasses import asdict, dataclass
from typing import Any, Self

from negfast.data.dataset import date_of, day_of
from negfast.evaluate.model import Calibration


@dataclass(frozen=True)
class Chosen:
    """What a stage of the finished run left that the training data cannot tell: it was chosen on valid."""

    step: int  # of the weights that were kept
    scale: float  # of code logits
    calibration: Calibration | None  # of verdicts; None after align, which nobody asks


@dataclass(frozen=True)
class Refit:
    """How a run is trained that repeats another one on more data, without looking at valid again."""

    of: str  # the finished run
    until: int  # days since 1970: trained on events of days before
    stages: dict[str, Chosen]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"until": date_of(self.until)}

    @classmethod
    def from_json(cls, read: dict[str, Any]) -> Self:
        stages = {}
        for name, chosen in read["stages"].items():
            calibration = chosen["calibration"]
            calibration = None if calibration is None else Calibration(**calibration)
            stages[name] = Chosen(chosen["step"], chosen["scale"], calibration)
        return cls(read["of"], day_of(read["until"]), stages)
