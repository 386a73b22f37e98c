"""A run and its data set belong together: data that has changed since is refused, data that extends it is not."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from negfast.data.dataset import Dataset
from negfast.errors import InputError
from negfast.runtime.run_folder import FORMAT, RunFolder
from tests.tiny import prepare_log, run_cli, train_arguments, write_log


@pytest.fixture(scope="module")
def changed(tiny_data: Path, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the tiny run, and with its data prepared again from a log of other ratings."""
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(tiny_run, folder / "run")
    events, items = write_log(folder)
    events.write_text(events.read_text().replace(",5,", ",2,", 50))
    prepare_log(folder, events, items)
    description = json.loads((folder / "run/run.json").read_text())
    (folder / "run/run.json").write_text(json.dumps(description | {"data": "../data"}))
    parquet.write_table(pa.table({"user": ["u0"], "item": ["i0"]}), folder / "pairs.parquet")
    return folder


def test_it_can_be_prepared_again_to_the_same_fingerprint(tiny_data: Path, changed: Path, tmp_path: Path):
    again = prepare_log(tmp_path, *write_log(tmp_path))
    assert Dataset.open(again).fingerprint == Dataset.open(tiny_data).fingerprint
    assert Dataset.open(again).fingerprint != Dataset.open(changed / "data").fingerprint


def test_training_is_not_resumed(changed: Path):
    table = (changed / "run/report.md").read_bytes()
    assert "has changed since" in run_cli(*train_arguments(changed / "data", changed / "run"), code=2)
    assert "has changed since" in run_cli("train", "--out", str(changed / "run"), code=2)
    assert (changed / "run/report.md").read_bytes() == table


@pytest.mark.parametrize(
    "command",
    [
        ("eval", "RUN"),
        ("predict", "RUN", "--out", "OUT"),
        ("score", "RUN", "PAIRS", "--out", "OUT"),
        ("train", "--refit", "RUN", "--out", "OUT"),
        ("train", "--preset", "smoke", "--data", "DATA", "--init", "RUN", "--out", "OUT"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_nothing_is_made_of_it(changed: Path, command: tuple[str, ...]):
    places = {"RUN": changed / "run", "OUT": changed / "out.parquet", "PAIRS": changed / "pairs.parquet"}
    places |= {"DATA": changed / "data"}
    said = run_cli(*(str(places.get(word, word)) for word in command), code=2)
    assert "is not the data set that" in said and "has changed since" in said
    assert not (changed / "out.parquet").exists()


def test_a_data_set_that_extends_it_is_taken(tiny_data: Path, tiny_run: Path, tmp_path: Path):
    data = Dataset.open(tiny_data)
    (tmp_path / "day.csv").write_text(f"user,item,rating,time\nu0,i1,1,{int(data.log.time.max()) + 1}\n")
    run_cli("prepare", str(tmp_path / "day.csv"), "--like", str(tiny_data), "--out", str(tmp_path / "data"))
    extended = Dataset.open(tmp_path / "data")
    assert extended.extends == [data.fingerprint]
    RunFolder(tiny_run).check_data(extended)


def test_a_run_of_another_format_is_refused(tiny_run: Path, tmp_path: Path):
    shutil.copytree(tiny_run, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    run.description.write_text(json.dumps(run.read() | {"format": FORMAT - 1}))
    with pytest.raises(InputError, match=f"found a run of format {FORMAT - 1}, expected {FORMAT}; train it again"):
        run.finished_engine(None)
