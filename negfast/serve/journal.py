"""The events that a service was told: an append-only file that outlives a kill, a crash and a full disk.

One JSON object a line. Its last key, ``crc``, is the CRC-32 of all bytes of the file before it, so a byte that was
changed, a line that is missing and lines in another order are found where they are. An event is in the file, and the
file on the disk, before it is acknowledged.
"""

import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from negfast.errors import InputError
from negfast.files import check_output_file, locked

CRC = ', "crc": "'
END = '"}\n'


@dataclass(frozen=True)
class Event:
    """What a user did with an item."""

    user: str
    item: str
    time: int  # seconds since 1970, UTC
    feedback: str  # "shown", "like", "dislike" or "withdrawn"
    value: float | None = None  # a rating or the like
    text: str | None = None  # of the item, where it may not be known yet
    key: str | None = None  # the client's name of the event


class Journal:
    """An open event file. One process at a time has it; InputError for a second."""

    def __init__(self, path: Path) -> None:
        """Opens or makes ``path`` and checks every line.

        A last line that was cut short was never acknowledged: it is taken off, with a word on stderr. Raises InputError
        for damage anywhere else, with the line.
        """
        check_output_file(path)
        self.path = path
        self._lock = locked(path)
        self._lock.__enter__()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self.size, self._crc, self.events = self._check()
            if (whole := os.fstat(self._file).st_size) > self.size:
                print(f"{path}: took off {whole - self.size} bytes of an event that was cut short", file=sys.stderr)
                self._cut()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise

    def append(self, events: Sequence[Event]) -> None:
        """Adds events; on return they are on the disk. OSError, and no trace of them, where there is no room."""
        crc, lines = self._crc, []
        for event in events:
            body = json.dumps(asdict(event), ensure_ascii=False)[:-1] + CRC
            crc = zlib.crc32(body.encode(), crc)
            end = f"{crc:08x}{END}"
            lines.append(body + end)
            crc = zlib.crc32(end.encode(), crc)
        block = "".join(lines).encode()
        try:
            written = 0
            while written < len(block):
                written += os.pwrite(self._file, block[written:], self.size + written)
            os.fdatasync(self._file)
        except OSError:
            with suppress(OSError):
                self._cut()
            raise
        self.size, self._crc, self.events = self.size + len(block), crc, self.events + len(events)

    def read(self, first: int = 0) -> Iterator[Event]:
        """The events from number ``first`` on, in the order in which they came."""
        with open(self.path, "rb") as file:
            for number, line in enumerate(file):
                if number >= self.events:
                    return
                if number >= first:
                    yield _event(json.loads(line), f"{self.path}: line {number + 1}")

    def close(self) -> None:
        os.close(self._file)
        self._lock.__exit__(None, None, None)

    def _cut(self) -> None:
        os.ftruncate(self._file, self.size)
        os.fsync(self._file)

    def _check(self) -> tuple[int, int, int]:
        """Bytes, CRC-32 and number of the whole lines."""
        size = crc = events = 0
        with open(self.path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                body, found, _ = line.rpartition(CRC.encode())
                expected = f"{zlib.crc32(body + found, crc):08x}{END}".encode()
                if line != body + found + expected:
                    raise InputError(
                        f"{self.path}: line {events + 1}: damaged: its checksum does not match; the {events:,} lines "
                        "before it are whole"
                    )
                crc = zlib.crc32(line, crc)
                size, events = size + len(line), events + 1
        return size, crc, events


def _event(read: dict[str, Any], where: str) -> Event:
    read.pop("crc")
    try:
        return Event(**read)
    except TypeError as error:
        raise InputError(f"{where}: found {', '.join(read)}, expected {', '.join(Event.__annotations__)}") from error
