"""``python -m bench.experiments.alignment``: can titles be learned at all, and of titles never seen what?

The title task of align alone, trained for longer and longer: first codes of held-out titles against chance, and against
those of titles it was trained on.
"""

import json
from pathlib import Path

import click

from bench.command import Experiment, numbers
from bench.machine import write_result
from negfast.runtime.checkpoint import load_weights
from negfast.train.align import AlignStage, TitleToSid
from negfast.train.journal import Journal
from negfast.train.loop import run_stage
from negfast.train.run import open_stage

RESULT = Path(__file__).parents[1] / "results" / "alignment.json"
OTHERS = ("align.sid_titles=0", "align.attributes=0", "align.pairs=0", "align.verdicts=0")


@click.command(cls=Experiment)
@click.option("--runs", default=Path("runs/alignment"), type=click.Path(path_type=Path), show_default=True)
@click.option("--steps", default="60,240,960", show_default=True, help="A run each.")
@click.option("--titles", default=96, show_default=True, help="Of a step.")
@click.option("--data", type=click.Path(path_type=Path), help="Prepared data set; the built-in MovieTweetings else.")
@click.option("--model", type=click.Path(path_type=Path), help="HF decoder; the built-in small one else.")
@click.option("--set", "overrides", multiple=True, help="section.key=value, of the runs.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", default=RESULT, type=click.Path(path_type=Path), show_default=True)
def main(
    runs: Path,
    steps: str,
    titles: int,
    data: Path | None,
    model: Path | None,
    overrides: tuple[str, ...],
    seed: int,
    out: Path,
) -> None:
    """Trains the title task for each number of steps and measures it."""
    rows: list[dict[str, float]] = []
    for number in numbers(steps, "--steps"):
        folder = runs / f"{number}-{seed}"
        settings = (f"align.titles={titles}", f"align.steps={number}", f"train.seed={seed}", *OTHERS, *overrides)
        rows.append(measured(folder, number, data, model, settings))
        data = data or folder / "data"
        print(json.dumps(rows[-1]), flush=True)
        write_result(out, {"seed": seed, "titles": titles, "rows": rows})


def measured(
    folder: Path, steps: int, data: Path | None, model: Path | None, settings: tuple[str, ...]
) -> dict[str, float]:
    """What the title task has learned after so many steps, and how often it has seen each title by then."""
    run, engine, stage = open_stage("align", None, "quickstart", data, model, None, folder, settings)
    assert isinstance(stage, AlignStage)
    [task] = stage.tasks.values()
    assert isinstance(task, TitleToSid)
    if (run.checkpoints / "align").is_dir():
        load_weights(run.checkpoints / "align", engine.policy)
    else:
        journal = Journal(run.path, {"align": steps}, None)
        run_stage(stage, 0, engine.policy, run.path, engine.config.train, journal, None, None, 0)
    return {"steps": steps, "epochs": steps * task.batch / len(task.items), **stage.outcome()}


if __name__ == "__main__":
    main()
