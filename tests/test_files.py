"""Atomic writes, and progress where there is no terminal."""

import fcntl
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from negfast.errors import InputError
from negfast.files import atomic_directory, atomic_file, check_page, locked
from negfast.progress import Progress


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "b.txt"
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert not any(tmp_path.iterdir())
    for text in ("one", "two"):
        with atomic_file(path) as temporary:
            temporary.write_text(text)
            assert temporary.parent == path.parent
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "two"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_a_directory_replaces_the_old_one_whole(tmp_path):
    path = tmp_path / "d"
    for name in ("one", "two"):
        with atomic_directory(path) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / name).write_text(name)
        assert [p.name for p in (path / "sub").iterdir()] == [name]
    with pytest.raises(RuntimeError), atomic_directory(path) as temporary:
        (temporary / "three").write_text("3")
        raise RuntimeError
    assert [p.name for p in (path / "sub").iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("writer", [atomic_file, atomic_directory])
def test_under_a_file_nothing_can_be_written(tmp_path, writer):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "y" / "x"):
        with pytest.raises(InputError, match="cannot be written"), writer(path):
            pass


def test_what_is_a_directory_cannot_be_written_as_a_file(tmp_path):
    for path, said in ((tmp_path, "is a directory"), (Path("."), "no name to write to")):
        with pytest.raises(InputError, match=said), atomic_file(path):
            pass
    with pytest.raises(InputError, match="no name to write to"), atomic_directory(Path(".")):
        pass
    assert not any(tmp_path.iterdir())


def test_plain_lines_come_at_intervals_and_at_the_end():
    stream = io.StringIO()
    with Progress("sft", 100, stream=stream, interval=3600) as bar:
        for step in range(1, 101):
            bar.update(step, f"loss {step}")
    assert stream.getvalue() == "sft: 100/100 steps, 0 s, loss 100\n"
    stream = io.StringIO()
    with Progress("sft", 10, stream=stream, interval=0, done=4) as bar:
        bar.update(5, "loss 1")
    first = stream.getvalue().split("\n")[0]
    assert first.startswith("sft: 5/10 steps, 0 s, 0 s left, loss 1")


def test_no_last_line_after_a_failure():
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Progress("sft", 100, stream=stream, interval=3600):
        raise RuntimeError
    assert stream.getvalue() == ""


HOLDER = """
import sys, time
from negfast.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_process_writes_at_a_time(tmp_path):
    path = tmp_path / "new" / "out.parquet"
    held = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert held.stdout is not None and held.stdout.readline() == "held\n"
    with pytest.raises(InputError) as error, locked(path):
        pass
    assert str(error.value) == f"{path}: is being written by process {held.pid}"
    held.kill()
    held.wait()
    with locked(path), pytest.raises(InputError, match=f"by process {os.getpid()}"), locked(path):
        pass
    with locked(path):  # given back
        pass
    assert not list(path.parent.iterdir())


def test_a_directory_has_one_lock_by_all_its_names(tmp_path):
    folder, link = tmp_path / "2026-11-25", tmp_path / "links" / "today"
    folder.mkdir()
    link.parent.mkdir()
    link.symlink_to(folder)
    with locked(folder), pytest.raises(InputError, match="today: is being written"), locked(link):
        pass


def test_a_folder_whose_parent_is_not_writable_is_locked_from_within(tmp_path, monkeypatch):
    """A directory that is mounted into a container."""
    folder, access = tmp_path / "run", os.access
    folder.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    with locked(folder):
        assert [path.name for path in folder.iterdir()] == [".lock"]
        with pytest.raises(InputError, match="is being written"), locked(folder):
            pass
    assert not list(folder.iterdir())


def test_a_holder_that_leaves_between_open_and_lock_is_no_holder(tmp_path, monkeypatch):
    """A second process that opened the lock file just before its holder removed it must not hold a file of no name."""
    path, lock = tmp_path / "x", tmp_path / ".x.lock"
    removed: list[Path] = []
    flock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        if not removed:
            lock.unlink()
            removed.append(lock)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(path):
        assert removed and lock.exists()


def test_permissions_follow_the_umask(tmp_path):
    """Some libraries make their files for the owner alone: no other account could read an export."""
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "file") as temporary:
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
        with atomic_directory(tmp_path / "folder") as temporary:
            os.close(os.open(temporary / "file", os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("file", "folder/file", "folder")]
    assert modes == [0o640, 0o640, 0o750]


def test_a_page_replaces_nothing_but_a_page(tmp_path):
    notes, page = tmp_path / "notes.html", tmp_path / "page.html"
    notes.write_text("<!DOCTYPE html><title>My notes</title>")
    page.write_text("<!DOCTYPE html><title>negfast: a run</title>")
    check_page(page)
    check_page(tmp_path / "new.html")
    for path, said in ((notes, "is no report of negfast"), (tmp_path / "notes.md", "'.md', expected .html")):
        with pytest.raises(InputError, match=said):
            check_page(path)
