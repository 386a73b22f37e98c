"""The baselines of the table: what a model has to beat, each reading events up to t only."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from negfast.data.features import HistoryFeatures
from negfast.evaluate.baselines.knn import knn_predictions
from negfast.evaluate.baselines.ranking import ranking_predictions
from negfast.evaluate.baselines.rates import rate_predictions
from negfast.evaluate.baselines.sasrec import sasrec_predictions
from negfast.evaluate.predictions import Predictions, threshold_for_share
from negfast.evaluate.sets import EvalSet, SetColumns


def baseline_predictions(
    features: HistoryFeatures,
    evalsets: Sequence[EvalSet],
    columns: Sequence[SetColumns],
    fit_until: int,
    *,
    trained: bool = False,
) -> list[dict[str, Predictions]]:
    """Every baseline's predictions for every evaluation set, in the order of the table. ``columns`` are what
    ``features`` say of each set: the baselines see what the verdict sees.

    ``trained`` adds the two SASRec rows, which take as long to train as everything else together.

    ``fit_until`` (days since 1970) bounds what is learned: co-occurrence counts, the logistic and boosted models see
    only events of days before it, and so must the rates that ``features`` are smoothed towards. Pass the valid day, or
    the test day for a final refit. The running counts that they are applied to always end with the context. Where
    ``evalsets`` holds valid and test, thresholds for test are chosen on valid.
    """
    log = features.log
    predictions: list[dict[str, Predictions]] = [{} for _ in evalsets]
    for more in (
        ranking_predictions(log, evalsets),
        knn_predictions(log, evalsets, fit_until),
        *([sasrec_predictions(log, evalsets, fit_until)] if trained else []),
        rate_predictions(features, evalsets, columns, fit_until),
    ):
        for of_set, new in zip(predictions, more, strict=True):
            of_set |= new
    of_valid = next((p for evalset, p in zip(evalsets, predictions, strict=True) if evalset.name == "valid"), {})
    chosen = thresholds(of_valid)
    for evalset, of_set in zip(evalsets, predictions, strict=True):
        for name in chosen.keys() & of_set.keys() if evalset.name == "test" else ():
            of_set[name] = replace(of_set[name], filter_threshold=chosen[name])
    return predictions


def thresholds(of_valid: Mapping[str, Predictions]) -> dict[str, float]:
    """The threshold of each filter, from its scores of valid."""
    return {
        name: threshold_for_share(valid.filter_score)
        for name, valid in of_valid.items()
        if valid.filter_score is not None
    }
