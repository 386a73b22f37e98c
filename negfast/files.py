"""Files and directories that appear whole or not at all, and are written by one process at a time."""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from negfast.errors import InputError

TABLES = (".parquet", ".csv")  # what serving writes


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary name beside ``path`` to write to; on success it is fsynced and renamed to ``path``.

    Its permissions follow the umask, whoever made it. If the block raises, the temporary file is removed and ``path``
    is what it was before. InputError where the file cannot be created.
    """
    path = Path(path)
    check_output_file(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    created = _make_parents(path)
    try:
        yield temporary
        _follow_umask(temporary)
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
                _follow_umask(Path(folder, name))
                _sync(Path(folder, name))
            _sync(Path(folder))
        _swap(temporary, path, aside)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(created)
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """No other process writes ``path`` within the block. Raises InputError where one is writing it.

    The lock is `flock` on ``.NAME.lock`` beside ``path`` (in it, where its folder is not writable), so the kernel
    releases it with the process, however that ends. A directory has one lock by all its names: links are followed. The
    file is removed at the end of the block; one that a killed process left does no harm.
    """
    path = Path(path)
    real = path.resolve() if path.is_dir() else path.absolute()
    inside = path.is_dir() and not os.access(real.parent, os.W_OK)
    created = [] if inside else _make_parents(real)
    place = real / ".lock" if inside else real.with_name(f".{real.name}.lock")
    descriptor = _take(place, path)
    try:
        yield
    finally:
        place.unlink(missing_ok=True)
        os.close(descriptor)
        _remove_empty(created)


def _take(place: Path, path: Path) -> int:
    """An open descriptor of the lock file ``place``, locked."""
    while True:
        try:
            descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if place.exists() and os.path.samestat(os.fstat(descriptor), place.stat()):  # else its holder removed it
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
            os.close(descriptor)
        except BlockingIOError:
            holder = os.pread(descriptor, 20, 0).decode() or "unknown"
            os.close(descriptor)
            raise InputError(f"{path}: is being written by process {holder}") from None


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


def check_table(path: str | os.PathLike[str]) -> None:
    """`check_output_file` of a table, whose suffix tells its format: .parquet or .csv."""
    check_output_file(path)
    if Path(path).suffix not in TABLES:
        raise InputError(f"{path}: found suffix {Path(path).suffix!r}, expected {' or '.join(TABLES)}")


def check_page(path: str | os.PathLike[str]) -> None:
    """`check_output_file` of a report: an .html file, which replaces nothing but another report of negfast."""
    path = Path(path)
    check_output_file(path)
    if path.suffix not in (".html", ".htm"):
        raise InputError(f"{path}: found suffix {path.suffix!r}, expected .html")
    if path.exists() and b"<title>negfast: " not in path.read_bytes()[:1000]:
        raise InputError(f"{path}: exists and is no report of negfast; choose another --out")


def check_input_file(path: str | os.PathLike[str]) -> None:
    """Raises InputError where ``path`` is no file."""
    if not Path(path).is_file():
        what = "is a directory, expected a file" if Path(path).is_dir() else "no such file"
        raise InputError(f"{path}: {what}")


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


def _follow_umask(path: Path) -> None:
    """Gives a file the permissions of a new one; some libraries make theirs for the owner alone."""
    umask = re.search(r"^Umask:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    path.chmod(0o666 & ~int(umask[1] if umask else "022", 8))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
