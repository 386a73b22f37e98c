"""A final refit: a finished run's training again, on everything before T_test or on the whole log, with all that was
chosen on valid."""

import json
import os
import shutil
from collections.abc import Callable, Sequence

from negfast.data.dataset import Dataset, date_of, refuse_data_folder
from negfast.errors import InputError
from negfast.files import atomic_directory, check_output
from negfast.runtime.checkpoint import load_weights, read_state
from negfast.runtime.run_folder import Chosen, Refit, RunFolder


def start_refit(
    run: RunFolder, source: RunFolder, stages: Sequence[str], whole_log: bool, report: Callable[[str], None]
) -> None:
    """Makes ``run`` a refit of the finished ``source``, at its first step; one that is there already is left as it is.

    It has ``source``'s first weights, settings and calibration and, of each of ``stages``, the step and scale that were
    chosen on valid; semantic IDs are those of the data set. It learns from everything before T_test, with ``whole_log``
    from all events. InputError where ``source`` is unfinished or a refit itself, or ``run`` something else.
    """
    source.require_finished()
    dataset = Dataset.open(source.data)
    until = dataset.end_day if whole_log else dataset.test_day
    if run.exists:
        if run.refit is None or (run.path / run.refit.of).resolve() != source.path.resolve():
            raise InputError(f"{run.path}: found another run, expected nothing or the refit of {source.path}")
        if run.refit.until != until:
            found, expected = date_of(run.refit.until), date_of(until)
            raise InputError(f"{run.path}: found a refit on events before {found}, expected one before {expected}")
        return
    if run.path.exists():
        raise InputError(f"{run.path}: exists and is no run, expected nothing or the refit of {source.path}")
    if source.refit is not None:
        raise InputError(f"--refit {source.path}: is a refit itself, expected a run that chose on valid")
    check_output(run.path)
    refuse_data_folder(run.path)
    report(f"reading what {source.path} chose on valid")
    engine = source.finished_engine(None)
    chosen: dict[str, Chosen] = {}
    for stage in stages:
        folder = source.checkpoints / stage
        load_weights(folder, engine.policy)
        chosen[stage] = Chosen(read_state(folder)["step"], float(engine.policy.block.scale))
    here = run.path.resolve()
    shown = source.shown_calibration if read_state(source.final).get("shown_calibration") else None
    refit = Refit(os.path.relpath(source.path.resolve(), here), until, chosen, source.calibration, shown)
    description = source.read() | {
        "data": os.path.relpath(source.data.resolve(), here),
        "learned_until": date_of(refit.until),
        "refit": refit.to_json(),
    }
    with atomic_directory(run.path) as made:
        shutil.copytree(source.model, made / "model")
        shutil.copytree(source.initial, made / "checkpoints" / "initial")
        shutil.copy(source.path / "config.toml", made)
        (made / "run.json").write_text(json.dumps(description, indent=1) + "\n")
