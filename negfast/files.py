"""Files and directories that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from negfast.errors import InputError


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary name beside ``path`` to write to; on success it is fsynced and renamed to ``path``.

    If the block raises, the temporary file is removed and ``path`` is what it was before.
    Raises InputError where the file cannot be created.
    """
    path = Path(path)
    check_output_file(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    created = _make_parents(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        _remove_empty(created)
        raise


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary directory beside ``path`` to fill; on success it takes the place of ``path``.

    An existing directory ``path`` is replaced: it is moved aside, and removed once the new one has its name.
    If the block raises, the temporary directory is removed and ``path`` is what it was before.
    Raises InputError where the directory cannot be created.
    """
    path = Path(path)
    check_output(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside = path.with_name(f".{path.name}.{os.getpid()}.old")
    created = _make_parents(path)
    try:
        _mkdir(temporary)
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _sync(Path(folder, name))
            _sync(Path(folder))
        _swap(temporary, path, aside)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(created)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def check_output(path: str | os.PathLike[str]) -> None:
    """Raises InputError if ``path`` plainly cannot be written, so that long work does not find out at its end."""
    path = Path(path)
    if not path.name:
        raise InputError(f"{path}: found no name to write to")
    ancestor = next((p for p in path.absolute().parents if p.exists()), Path("/"))
    if not ancestor.is_dir():
        raise InputError(f"{path}: cannot be written: {ancestor} is not a directory")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be written: no permission to write in {ancestor}")


def check_output_file(path: str | os.PathLike[str]) -> None:
    """`check_output` of a file: a directory there cannot be replaced by one."""
    check_output(path)
    if Path(path).is_dir():
        raise InputError(f"{path}: cannot be written: is a directory")


def _swap(temporary: Path, path: Path, aside: Path) -> None:
    if not path.exists():
        os.rename(temporary, path)
        return
    os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except BaseException:
        os.rename(aside, path)
        raise


def _make_parents(path: Path) -> list[Path]:
    """Creates the missing parents of ``path``; returns them, deepest first."""
    check_output(path)
    missing = [p for p in path.absolute().parents if not p.exists()]
    for parent in reversed(missing):
        _mkdir(parent)
    return missing


def _mkdir(path: Path) -> None:
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
