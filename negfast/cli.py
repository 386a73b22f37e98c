"""The command line. Exit codes: 0 done, 1 failed, 2 bad usage or input, 130 interrupted."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from negfast.config import ENCODERS, QUANTIZERS, SAMPLES
from negfast.errors import InputError, TrainingError
from negfast.files import check_page, locked

# Commands import what they run inside: --help and bad usage should not wait for torch.

PATH = click.Path(path_type=Path)
LOAD = Path("/proc/loadavg")


class Negfast(click.Group):
    """A group whose failures are one line on stderr and an exit code."""

    def main(self, *args: Any, **options: Any) -> Any:
        options["standalone_mode"] = False
        try:
            sys.exit(super().main(*args, **options) or 0)
        except InputError as error:
            _fail(str(error), 2)
        except click.ClickException as error:
            command = getattr(getattr(error, "ctx", None), "command_path", "negfast")
            _fail(f"{error.format_message()} (see {command} --help)", 2)
        except click.Abort:
            sys.exit(130)  # the stage has said how to resume
        except (TrainingError, OSError, MemoryError) as error:
            _fail(str(error) or type(error).__name__, 1)


def _fail(message: str, code: int) -> None:
    click.echo(f"negfast: {' '.join(message.split())}", err=True)
    sys.exit(code)


def others_run() -> bool:
    """Whether another process wants a CPU of this machine now: in each of five looks, 10 ms apart. False where the
    kernel does not tell."""
    if not LOAD.is_file():
        return False
    for _ in range(5):
        running = int(LOAD.read_text().split()[3].partition("/")[0])  # this process is one
        if running < 2:
            return False
        time.sleep(0.01)
    return True


def _version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    import torch
    import triton

    import negfast

    cuda = torch.version.cuda or "none"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    click.echo(f"negfast {negfast.__version__}")
    click.echo(f"torch {torch.__version__}, triton {triton.__version__}, CUDA {cuda} ({device})")
    context.exit()


@click.group(cls=Negfast, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show versions.")
def main() -> None:
    """Train LLM recommenders that know what users will dislike.

    On the built-in log of ratings, in about a minute:

    \b
    negfast train --preset smoke --out runs/smoke

    On your own log, from CSV to predictions:

    \b
    negfast prepare log.csv --dislike "rating<=2" --out data
    negfast train --data data --out runs/mine
    negfast predict runs/mine --top 50 --out dislikes.parquet

    \b
    negfast eval runs/mine                        the model beside baselines
    negfast score runs/mine candidates.parquet --out scored.parquet
    negfast COMMAND --help                        options and examples
    """
    # Idle OpenMP threads spin, which is fastest alone, and slow beside anything else. Read when torch loads.
    if "OMP_WAIT_POLICY" not in os.environ and others_run():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


@main.command()
@click.argument("files", nargs=-1, required=True, type=PATH, metavar="FILES...")
@click.option("--out", required=True, type=PATH, help="Directory to write.")
@click.option("--force", is_flag=True, help="Replace a data set that is there.")
@click.option("--recipe", metavar="NAME", help="FILES are those of a public log, as published; see below.")
@click.option(
    "--like", type=PATH, metavar="DIR|RUN",
    help="Add FILES to this data set (that of this run); items keep their semantic IDs, new ones get theirs.",
)  # fmt: skip
@click.option("--items", type=PATH, help="Item table; without it the items are those of the log.")
@click.option("--user-column", default="user", show_default=True)
@click.option("--item-column", default="item", show_default=True)
@click.option("--time-column", default="time", show_default=True)
@click.option("--value-column", help="A number to keep with each event, such as a rating.")
@click.option(
    "--time-unit", type=click.Choice(["auto", "s", "ms", "us", "ns", "iso"]), default="auto", show_default=True
)
@click.option(
    "--dislike", multiple=True, metavar="RULE",
    help="""Which events are dislikes: "rating<=2", "label==0", "action==hide", or a boolean column. Repeat for or.
    A column name that holds one of <>=! stands in quotes: '"a=b"<=2'.""",
)  # fmt: skip
@click.option(
    "--like-rule", multiple=True, metavar="RULE", help="Which events are likes; those of no rule are exposures then."
)
@click.option(
    "--rest", type=click.Choice(["like", "exposed"]), default="like", show_default=True,
    help="What the other events are where no --like-rule is given.",
)  # fmt: skip
@click.option("--from", "first_day", metavar="DATE", help="First day to keep, in UTC; earlier events are left out.")
@click.option("--until", "last_day", metavar="DATE", help="Last day to keep, in UTC; later events are left out.")
@click.option(
    "--skip-bad-rows", is_flag=True, help="Skip rows that cannot be read, count them and show ten; else one ends it."
)
@click.option("--drop-repeats", is_flag=True, help="Drop events that are the same as an earlier one, second and all.")
@click.option("--columns", metavar="A,B,...", help="Column names of an event file without header.")
@click.option("--separator", help="Field separator of the event file, if the suffix does not tell it.")
@click.option("--item-id-column", default="item", show_default=True)
@click.option("--item-text-column", help="Title or description; without it items have no text.")
@click.option(
    "--item-attributes", multiple=True, metavar="COLUMN[:SEP]",
    help='An attribute column, with the separator of its values: "genres:|". May be repeated.',
)  # fmt: skip
@click.option("--item-embedding", type=PATH, help=".npy, .safetensors or .parquet, a row for each item.")
@click.option("--item-columns", metavar="A,B,...", help="Column names of an item file without header.")
@click.option("--item-separator", help="Field separator of the item file, if the suffix does not tell it.")
@click.option(
    "--horizon",
    default=7,
    show_default=True,
    type=click.IntRange(min=1),
    help="Days of future that a request asks about.",
)
@click.option("--valid", metavar="DATE", help="First day of validation; chosen from the log by default.")
@click.option("--test", metavar="DATE", help="First day of test; chosen from the log by default.")
@click.option(
    "--split-within", metavar="COLUMN",
    help="A column of the items or events: split each of its communities by its own time, the last quarter of the "
    "events for valid and test. No user and no item may be in two.",
)  # fmt: skip
@click.option(
    "--levels", type=click.IntRange(min=1), help="Levels of the semantic IDs; 3, or more for millions of items."
)
@click.option("--codebook", type=click.IntRange(2, 65_536), help="Codes a level; 256, or more where --levels are few.")
@click.option(
    "--quantizer", default="rq-kmeans", show_default=True,
    type=click.Choice(QUANTIZERS), help="Of semantic IDs; random is a control.",
)  # fmt: skip
@click.option("--encoder", default="auto", show_default=True, type=click.Choice(ENCODERS), help="Of item text.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--memory", metavar="SIZE", help="Memory to do with, like 4GB; half of what is free by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object; the rest goes to stderr.")
@click.pass_context
def prepare(context: click.Context, files: tuple[Path, ...], out: Path, **options: Any) -> None:
    """Make a data set of an event log: validate, index, split, semantic IDs, shards.

    FILES is one event log, in files or directories of files: Parquet, CSV, TSV, `::`-separated (.dat) or JSON Lines,
    also as .gz or .zst. It needs a user, an item and a time column, and something that tells dislikes.

    \b
    negfast prepare log.parquet --dislike "rating<=2" --items items.csv --item-text-column title --out data
    negfast prepare log.tsv --user-column user_id --time-column time_ms --dislike label==0 --out data
    negfast prepare ratings.dat --columns user,item,rating,time --dislike "rating<=2" --out data
    negfast prepare clicks.csv --dislike action==hide --like-rule action==buy --out data

    With --recipe they are a public log's own files, events and items in any order; nothing is fetched:

    \b
    negfast prepare --recipe kuairand log_standard_*_pure.csv video_features_basic_pure.csv --out data
    negfast prepare --recipe yambda likes.parquet dislikes.parquet undislikes.parquet --out data
    negfast prepare --recipe amazon-reviews-2023 All_Beauty.jsonl.gz meta_All_Beauty.jsonl.gz --out data
    negfast prepare --recipe movielens ratings.csv movies.csv --out data
    negfast prepare --recipe movielens-dat ratings.dat movies.dat --out data
    negfast prepare --recipe movietweetings ratings.dat movies.dat --out data
    negfast prepare --recipe polis votes.csv comments.csv --out data
    negfast prepare --recipe community-notes notes-00000.tsv ratings-00000.tsv --out data
    negfast prepare --recipe vk-lsvd week_*.parquet items_metadata.parquet item_embeddings.npz --out data
    negfast prepare --recipe scholar-inbox rated_papers.csv implicit_interactions.csv --skip-bad-rows --out data
    negfast prepare --recipe piki piki_dataset.csv --out data
    negfast prepare --recipe voteview HS117_votes.csv HS117_rollcalls.csv --out data

    With --like they are new events of a data set that is there, in the same format:

    \b
    negfast prepare log-2026-11-25.csv --like data/2026-11-24 --items items.csv --out data/2026-11-25
    """
    from negfast import api

    as_json = options.pop("as_json")
    api.refuse_unused_of_prepare(_given(context) - {"as_json"})
    found = api.prepare(files, out, report=lambda line: click.echo(line, err=as_json), **options)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))


def _given(context: click.Context) -> set[str]:
    """The options that stand on the command line, be it with their default."""
    of_line = click.core.ParameterSource.COMMANDLINE
    return {name for name in context.params if context.get_parameter_source(name) == of_line}


@main.command()
@click.argument("path", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def inspect(path: Path, as_json: bool) -> None:
    """Show what a data set, shard, SID table, run or checkpoint holds, and verify its checksums.

    \b
    negfast inspect data
    negfast inspect data/events.nfs
    negfast inspect data/semantic_ids.safetensors
    negfast inspect runs/quickstart/final --json
    """
    from negfast.runtime.inspection import describe, report

    found = describe(path)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
    else:
        report(found, click.echo)


TRAIN_OPTIONS = (
    click.argument("config", required=False, type=PATH),
    click.option("--preset", metavar="NAME", help="quickstart, smoke (the whole job in about a minute) or nightly."),
    click.option("--data", type=PATH, help="Prepared data set; a built-in sample by default."),
    click.option("--sample", type=click.Choice(SAMPLES), help="Which built-in sample; movietweetings by default."),
    click.option("--model", type=PATH, help="Local directory of any HF decoder; a small Qwen3 by default."),
    click.option("--init", type=PATH, metavar="RUN", help="Start from the weights of a finished run."),
    click.option("--out", type=PATH, metavar="RUN", help="Run directory; an unfinished one is continued."),
    click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting, e.g. grpo.steps=500."),
)


def train_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(TRAIN_OPTIONS):
        command = option(command)
    return command


@main.command()
@train_options
@click.option("--gpus", type=click.IntRange(min=1), help="GPUs of this machine to train on; torchrun works too.")
@click.option("--replay", type=PATH, metavar="RUN/failed/STEP", help="Look for the cause of a NaN or inf.")
@click.option(
    "--refit", type=PATH, metavar="RUN",
    help="Train a finished run again on everything before the test day, with what it chose on valid.",
)  # fmt: skip
@click.option(
    "--whole-log", is_flag=True, help="With --refit: on all events, for production; no table is left to make."
)
@click.pass_context
def train(context: click.Context, gpus: int | None, replay: Path | None, **options: Any) -> None:
    """Train: align, sft, grpo, then the table on the test split.

    \b
    negfast train
    negfast train --preset smoke --out runs/smoke
    negfast train my.toml --data data --model Qwen3-0.6B --out runs/a --set grpo.steps=500
    negfast train --gpus 8 --data data --model Qwen3-0.6B --out runs/a
    negfast train --refit runs/a --out runs/a-refit
    negfast train --refit runs/a --whole-log --out runs/a-production
    negfast train --replay runs/a/failed/sft-000120
    """
    from negfast import api
    from negfast.runtime.distributed import launch_gpus, planned_size

    given = _given(context)
    if replay is not None:
        from negfast.train.run import replay as find_the_cause

        api.refuse(given, {"replay"}, "beside --replay, which settles it")
        find_the_cause(replay)
        return
    if gpus is not None and gpus > 1 and planned_size() == 1:
        sys.exit(launch_gpus(gpus, sys.argv[1:]))
    if gpus is not None and gpus != planned_size():
        raise click.UsageError(f"--gpus {gpus}: found {planned_size()} ranks started by torchrun", context)
    api.refuse_unused_of_train(given - {"gpus"})
    api.train(**options)


@main.command()
@train_options
@click.option("--stage", default="grpo", show_default=True, help="align, sft or grpo.")
@click.option("--steps", default=5, show_default=True, type=click.IntRange(min=1), help="Steps to record.")
def profile(stage: str, steps: int, **options: Any) -> None:
    """Record some training steps: a trace, its ranges, and the ten slowest operations.

    With a GPU and nsys on the path nsys records; else torch.profiler does. The run is started as `train` would.

    \b
    negfast profile --preset smoke --out runs/look
    negfast profile --stage sft --steps 10 --out runs/quickstart
    """
    from negfast.train.profile import profile as run
    from negfast.train.start import TrainOptions

    run(stage, steps, sys.argv[1:], TrainOptions(**options))


@main.command("eval")
@click.argument("run", type=PATH)
@click.option("--split", type=click.Choice(["valid", "test"]), default="test", show_default=True)
@click.option("--data", type=PATH, help="Data set; by default the one that the run was trained on.")
@click.option("--all-baselines", is_flag=True, help="Also those that have to be trained (SASRec): takes minutes.")
@click.option("--cost-dislike", type=float, metavar="X", help="Cost of a dislike that is shown.")
@click.option("--cost-like", type=float, metavar="Y", help="Cost of a like that is withheld, in the same unit.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the tables.")
def evaluate(run: Path, as_json: bool, **options: Any) -> None:
    """Measure a run beside the baselines: filter, matched pool, generation.

    With both costs: the threshold on P(dislike) that follows from them, Y / (X + Y), and what a filter at that
    threshold saves per 1,000 events of the split.

    \b
    negfast eval runs/quickstart
    negfast eval runs/quickstart --split valid --json
    negfast eval runs/quickstart --cost-dislike 5 --cost-like 1
    """
    from negfast import api

    found = api.evaluate(run, **options)
    if as_json:
        click.echo(json.dumps(found, allow_nan=False))
    else:
        from negfast.evaluate.table import print_table

        print_table(found)


@main.command()
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, metavar="PAGE.html", help="By default RUN/report.html.")
@click.pass_context
def report(context: click.Context, run: Path, out: Path | None) -> None:
    """Write one HTML page about a run: tables, curves, calibration, example users; nothing outside the file.

    \b
    negfast report runs/quickstart
    negfast report runs/quickstart --out quickstart.html
    """
    page = out or run / "report.html"
    check_page(page)
    from negfast.evaluate.report import write_page

    context.with_resource(locked(page))
    click.echo(str(write_page(run, out)))


SERVE_OPTIONS = (
    click.option("--data", type=PATH, help="Data set; by default the one that the run was trained on."),
    click.option(
        "--at", metavar="TIME",
        help="ISO date or time, UTC unless it names a zone. The context is every event up to the end of the day "
        "before: at 2013-08-01T18:30 that is the end of 2013-07-31. For `score` by a run with history.context=event it "
        "is every event before the second. Default: the log's end.",
    ),
    click.option("--part", metavar="I/N", help="Only the I-th of N parts, one a machine; docs/serving.md joins."),
)  # fmt: skip


def serve_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(SERVE_OPTIONS):
        command = option(command)
    return command


@main.command()
@click.argument("run", type=PATH)
@serve_options
@click.option("--top", default=50, show_default=True, type=click.IntRange(min=1), help="Items for each user.")
@click.option("--users", type=PATH, metavar="FILE", help="Only these users: a table with a column user.")
@click.option("--items", type=PATH, metavar="FILE", help="List only these items: a table with a column item.")
@click.option("--not-items", type=PATH, metavar="FILE", help="Never list these items, such as delisted ones.")
@click.option(
    "--rank", type=click.Choice(["likely", "taste"]), default="likely", show_default=True,
    help="What comes first: what is most probably disliked, or what this user would dislike rather than others.",
)  # fmt: skip
@click.option("--out", required=True, type=PATH, help=".parquet or .csv file: user, rank, item, score.")
def predict(run: Path, **options: Any) -> None:
    """Write what users are going to dislike. The same call resumes one that was killed.

    The score is the probability of the item as the user's next dislike, among the unseen items that may be listed. So
    a list holds what everybody meets. --rank taste lists what is the user's own; its score orders the items of a user.
    FILE is Parquet, CSV, TSV or JSON Lines.

    \b
    negfast predict runs/quickstart --top 50 --out dislikes.parquet
    negfast predict runs/quickstart --rank taste --out dislikes.parquet
    negfast predict runs/quickstart --at 2013-08-01 --out dislikes.csv
    negfast predict runs/quickstart --users today.csv --not-items delisted.csv --out dislikes.parquet
    """
    from negfast.serve.tables import predict_run

    predict_run(run, **options)


@main.command()
@click.argument("run", type=PATH)
@click.argument("candidates", type=PATH)
@serve_options
@click.option(
    "--given", type=click.Choice(["feedback", "shown"]), default="feedback", show_default=True,
    help="What the probability takes for granted; shown needs a log with exposures.",
)  # fmt: skip
@click.option("--out", required=True, type=PATH, help=".parquet or .csv file: the input plus score and abstain.")
def score(run: Path, candidates: Path, **options: Any) -> None:
    """Calibrated dislike probability of (user, item) pairs.

    CANDIDATES is a table with columns user and item: Parquet, CSV, TSV or JSON Lines. The score is
    P(dislike | the user gives feedback): of the items that the user would like or dislike, how many are disliked. Most
    of what is shown gets no feedback; --given shown asks for P(dislike | shown).

    The score is null, and `abstain` true, where nothing is known: the user or the item is not in the data set, or
    neither has the user an event nor the item a like or dislike.

    \b
    negfast score runs/quickstart candidates.parquet --out scored.parquet
    negfast score runs/quickstart candidates.csv --at 2013-08-01 --out scored.csv
    """
    from negfast.serve.tables import score_run

    score_run(run, candidates, **options)


@main.command("user-profiles")
@click.argument("run", type=PATH)
@click.option(
    "--attribute", metavar="NAME", help="Item attribute whose values are the categories; else clusters of item texts."
)
@serve_options
@click.option("--out", required=True, type=PATH, help=".parquet or .csv file, a row for each user and category.")
def user_profiles(run: Path, attribute: str | None, **options: Any) -> None:
    """What kinds of items each user dislikes beyond their own and the items' dislike rates.

    Counts, lift with a 95 % interval, the share expected next, and items as examples.

    \b
    negfast user-profiles runs/quickstart --out profiles.parquet
    negfast user-profiles runs/quickstart --attribute genres --out profiles.parquet
    """
    from negfast.serve.tables import profile_users

    profile_users(run, attribute, **options)


@main.command()
@click.argument("run", type=PATH)
@click.option("--data", type=PATH, help="Data set; by default the one that the run was trained on.")
@click.option("--events", type=PATH, metavar="FILE", help="Keep events here, and read those of before at the start.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65_535))
def serve(run: Path, data: Path | None, events: Path | None, host: str, port: int) -> None:
    """Score over HTTP, with events of a moment ago.

    POST /score, /predict and /events, GET /health, /metrics, and /docs for the rest. SIGHUP loads RUN anew; a link may
    name another run by then. SIGUSR2 restarts the process without losing a request. The environment variable
    NEGFAST_TOKEN is the bearer token that requests need; an address that others can reach needs one. Installed with
    `pip install "negfast[serve]"`.

    \b
    negfast serve runs/mine --events events.jsonl
    curl -d '{"user": "u1", "items": ["i1", "i2"]}' -H 'content-type: application/json' localhost:8000/score
    """
    try:
        from negfast.serve.service import serve_run
    except ModuleNotFoundError as error:
        raise InputError(f"serve: needs {error.name}; pip install 'negfast[serve]' brings it") from error
    serve_run(run, data, events, host, port)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def doctor(as_json: bool) -> None:
    """Say what is installed, which kernels run here, and what is missing.

    \b
    negfast doctor
    negfast doctor --json
    """
    from negfast.runtime.doctor import findings

    found = findings()
    if as_json:
        click.echo(json.dumps(dict(found), ensure_ascii=False))
        return
    width = max(len(name) for name, _ in found)
    for name, text in found:
        click.echo(f"{name:<{width}}  {text}")


@main.command()
@click.argument("run", type=PATH)
@click.option("--out", required=True, type=PATH, help="Directory to write.")
def export(run: Path, out: Path) -> None:
    """Write a run as a HF directory, with all that lists and scores need without negfast.

    \b
    negfast export runs/quickstart --out exported
    """
    from negfast import api

    api.export(run, out)
