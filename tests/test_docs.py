"""Every command of README.md and docs/ is run, on a tiny log; what is written of settings and files is current."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from click.testing import CliRunner

from negfast.cli import main
from negfast.data.dataset import Dataset
from negfast.evaluate.report import ROWS
from tests.tiny import SETTINGS, run_cli, write_log

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNNABLE = [page for page in PAGES if "```sh" in page.read_text()]
HAS_DATA = {"daily.md": "data/yesterday", "configuration.md": "data"}  # where a page takes a data set for granted
SHELL_ONLY = (
    "curl",
    ".",
    ".venv/bin/pip",
    "pip",
    "git",
    "cd",
    "docker",
    "nsys",
)  # of a reader's shell, nothing to run here
OF_QUICKSTART = ("1074638", "1853728", "1430132")
SHORT = SETTINGS | {"grpo.steps": 2, "sft.steps": 2, "align.steps": 1}
TINY_MODEL, TINY_STEPS = (
    [word for key, value in SHORT.items() if key.startswith("model.") == model for word in ("--set", f"{key}={value}")]
    for model in (True, False)
)


def commands(page: Path) -> list[list[str]]:
    """The words of every command in the page's sh blocks; a line that ends in a backslash goes on."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader would have it: the files that the pages name, and finished runs of the names in them."""
    folder = tmp_path_factory.mktemp("reader")
    events, items = write_log(folder)
    for file in (events, items):  # docs/serving.md asks for items of the quickstart's log
        file.write_text(re.sub(r"\bi([123])(?=,)", lambda found: OF_QUICKSTART[int(found[1]) - 1], file.read_text()))
    header, *rows = events.read_text().splitlines()
    cut = max(int(row.split(",")[3]) for row in rows) - 3 * 86_400
    for name, late in (("early.csv", False), ("log-today.csv", True)):
        some = [row for row in rows if (int(row.split(",")[3]) > cut) == late]
        (folder / name).write_text("\n".join([header, *some]) + "\n")
    events.rename(folder / "log.csv")
    items.write_text(items.read_text().replace("genre\n", "genres\n", 1))
    shutil.copy(items, folder / "items-today.csv")
    fields = [
        "--dislike",
        "rating<=2",
        "--value-column",
        "rating",
        "--items",
        str(items),
        "--item-text-column",
        "title",
    ]
    small = ["--item-attributes", "genres", "--encoder", "tfidf", "--codebook", "16", "--horizon", "5"]
    run_cli("prepare", str(folder / "early.csv"), *fields, *small, "--out", str(folder / "base"))
    run = folder / "runs" / "yesterday"
    run_cli("train", "--preset", "smoke", "--data", str(folder / "base"), "--out", str(run), *TINY_MODEL, *TINY_STEPS)
    shutil.copytree(run, run.with_name("quickstart"))
    (folder / "my.toml").write_text("[grpo]\nbeta = 0.05\n")
    rng = np.random.default_rng(0)
    write_movielens(folder, rng)
    pairs = {"user": [f"u{i}" for i in rng.integers(0, 120, 30)], "item": [f"i{i}" for i in rng.integers(0, 90, 30)]}
    parquet.write_table(pa.table(pairs), folder / "candidates.parquet")
    return folder


@pytest.fixture
def desk(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, as the place where commands are typed."""
    copy = shutil.copytree(prepared, tmp_path / "desk")
    shutil.copytree(ROOT / "examples", copy / "examples")
    monkeypatch.chdir(copy)
    return copy


def write_movielens(folder: Path, rng: np.random.Generator) -> None:
    ratings = [
        f"{user},{rng.integers(0, 40)},{rng.integers(1, 11) / 2},{1_400_000_000 + day * 86_400 + user}"
        for user in range(30)
        for day in range(40)
    ]
    (folder / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *ratings]) + "\n")
    movies = [f"{i},Film {i} (19{50 + i}),{'Drama' if i % 2 else 'Comedy|War'}" for i in range(40)]
    (folder / "movies.csv").write_text("\n".join(["movieId,title,genres", *movies]) + "\n")


def follow(words: list[str], desk: Path) -> None:
    """Runs one command of a page; training is shortened, and a new data set of the page's log is made small."""
    program, *rest = words
    if program == "make":
        done = subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif program == "python" and rest[:2] == ["-m", "bench"]:
        assert (ROOT / "bench" / f"{rest[2]}.py").is_file()
    elif program == "python":
        assert (ROOT / rest[0]).is_file()
        if rest[0].startswith("examples/"):
            done = subprocess.run([sys.executable, ROOT / rest[0], *rest[1:]], cwd=desk, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    elif program == "negfast":
        if rest[0] == "serve":  # until it is stopped: tests/test_service.py runs it
            run_cli(*rest, "--help")
            return
        if rest[0] == "train" and "--refit" not in rest:
            assert "--init" not in rest or "nightly" in rest
            rest += TINY_STEPS if "--init" in rest else [*TINY_MODEL, *TINY_STEPS]
            rest += [] if "--data" in rest else ["--data", "base"]
        if "shown" in rest:
            run_cli(*rest, code=2)  # the reader's log has no exposures
            return
        if rest[0] == "prepare" and "--like" not in rest:
            rest += ["--encoder", "tfidf", "--codebook", "16", "--horizon", "5", "--force"]
        result = CliRunner().invoke(main, rest)
        assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}\n{result.exception!r}"
    else:
        assert program in SHELL_ONLY, f"{shlex.join(words)}: not run by any test"


@pytest.mark.parametrize("page", RUNNABLE, ids=[page.name for page in RUNNABLE])
def test_the_commands_of_a_page_run(page: Path, desk: Path) -> None:
    if page.name in HAS_DATA:
        shutil.copytree("base", HAS_DATA[page.name])
    for words in commands(page):
        follow(words, desk)
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(block, {})
    if page.name == "daily.md":
        assert len(Dataset.open("data/today").log) > len(Dataset.open("data/yesterday").log)
        assert (parquet.read_table("dislikes-today.parquet").num_rows, Path("runs/today/report.md").exists()) != (
            0,
            False,
        )


def test_the_items_of_the_examples_are_the_quickstarts(movietweetings) -> None:
    _, items = movietweetings
    assert set(OF_QUICKSTART) <= set(items.ids)
    events = (ROOT / "examples" / "events.csv").read_text().splitlines()[1:]
    assert {line.split(",")[1] for line in events} == set(OF_QUICKSTART)


def test_links_and_files_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_configuration_page_is_current() -> None:
    from tools.write_configuration import PAGE, configuration_page

    assert PAGE.read_text() == configuration_page(), "run python tools/write_configuration.py"


def test_the_method_page_explains_the_rows_as_the_report_does() -> None:
    page = (ROOT / "docs" / "method.md").read_text()
    for names, what in ROWS.items():
        shown = ", ".join(f"`{name}`" for name in names.split(", "))
        assert f"| {shown} | {what} |" in page


def test_every_command_has_help_with_an_example() -> None:
    assert set(main.commands) >= {
        "prepare",
        "inspect",
        "train",
        "eval",
        "predict",
        "score",
        "export",
        "report",
        "doctor",
    }
    for name in main.commands:
        text = CliRunner().invoke(main, [name, "--help"]).output
        assert f"negfast {name}" in text.split("Options:")[0].split("\n", 2)[2], name


def test_examples_are_python() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        compile(path.read_text(), str(path), "exec")
