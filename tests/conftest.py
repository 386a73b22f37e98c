import os
import re
from importlib.resources import files
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: tests start processes beside each other

import numpy as np
import pytest
from hypothesis import settings

from negfast.data.items import ItemTable
from negfast.data.log import DISLIKE, LIKE, EventLog
from tests.tiny import prepare, run_cli, train_arguments

settings.register_profile("suite", deadline=None)  # machines are slow at times; results, not times, are tested
settings.load_profile("suite")


# What `make check` leaves to `make test`: tests that train, prepare or evaluate whole logs, and those of kernels.
JOB_FIXTURES = {"tiny_run", "tiny_data", "movietweetings"}
JOB_FILES = (
    "kernels/",
    "bench/",
    "data/test_shards",
    "model/test_group_pass",
    "device/",
    "test_docs",
    "test_main_job",
    "test_nightly",
    "test_examples",
    "test_smollm2",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        place = item.nodeid.removeprefix("tests/")
        if place.startswith(JOB_FILES) or JOB_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.job)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over ``tiny_data``."""
    run = tmp_path_factory.mktemp("run") / "run"
    run_cli(*train_arguments(tiny_data, run))
    return run


def _lines(name: str) -> list[str]:
    import zstandard  # here: a GPU machine that runs the kernel tests alone may lack it

    data = files("negfast.prepare").joinpath(f"samples/movietweetings/{name}.zst").read_bytes()
    return zstandard.ZstdDecompressor().decompress(data).decode("utf-8").splitlines()


@pytest.fixture(scope="session")
def movietweetings() -> tuple[EventLog, ItemTable]:
    """The sample, read without the package: rating <= 5 is a dislike, the rest are likes; items as in movies.dat."""
    movies = [line.split("::") for line in _lines("movies.dat")]
    year = [re.search(r"\((\d{4})\)$", title) for _, title, _ in movies]
    items = ItemTable(
        ids=[imdb for imdb, _, _ in movies],
        text=[title for _, title, _ in movies],
        attributes={
            "genres": [tuple(genre for genre in genres.split("|") if genre) for _, _, genres in movies],
            "year": [(match[1],) if match else () for match in year],
        },
    )
    row_of = {int(imdb): row for row, imdb in enumerate(items.ids)}
    user, imdb, rating, time = np.array([line.split("::") for line in _lines("ratings.dat")], dtype=np.int64).T
    item = np.array([row_of[i] for i in imdb], dtype=np.int32)
    users, user = np.unique(user, return_inverse=True)
    order = np.lexsort((time, user))
    log = EventLog(
        user_offsets=np.concatenate([[0], np.cumsum(np.bincount(user, minlength=len(users)))]),
        item=item[order],
        feedback=np.where(rating <= 5, DISLIKE, LIKE).astype(np.uint8)[order],
        time=time[order],
        value=rating.astype(np.float32)[order],
        n_items=len(items),
    )
    return log, items
