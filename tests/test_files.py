"""Atomic writes, and progress where there is no terminal."""

import io
from pathlib import Path

import pytest

from negfast.errors import InputError
from negfast.files import atomic_directory, atomic_file
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
