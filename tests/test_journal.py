"""The event file: what was acknowledged is there after a kill, and damage is found where it is."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from negfast.errors import InputError
from negfast.serve.journal import Event, Journal

EVENTS = [
    Event(f"u{n}", 'an "item", é\u2028', 1_000 + n, "dislike", n / 3, None if n % 2 else "text") for n in range(5)
]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "events.jsonl"
    journal = Journal(path)
    journal.append(EVENTS[:2])
    journal.append(EVENTS[2:])
    journal.close()
    return path


def read(path, first=0):
    journal = Journal(path)
    try:
        return list(journal.read(first))
    finally:
        journal.close()


def test_events_come_back_in_their_order(path):
    assert read(path) == EVENTS
    assert read(path, 3) == EVENTS[3:]


def test_a_line_that_was_cut_short_is_taken_off_and_said(path, capfd):
    whole = path.read_bytes()
    for cut in range(len(whole.splitlines(keepends=True)[-1]) - 1):
        path.write_bytes(whole[: len(whole) - 1 - cut])
        assert read(path) == EVENTS[:4]
        assert "cut short" in capfd.readouterr().err
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])


def test_events_go_on_after_a_cut(path):
    path.write_bytes(path.read_bytes()[:-3])
    journal = Journal(path)
    journal.append(EVENTS[4:])
    journal.close()
    assert read(path) == EVENTS


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found_in_its_line(tmp_path_factory, place, bit):
    path = tmp_path_factory.mktemp("journal") / "events.jsonl"
    journal = Journal(path)
    journal.append(EVENTS)
    journal.close()
    damaged = bytearray(path.read_bytes())
    place %= len(damaged)
    line = bytes(damaged[:place]).count(b"\n") + 1
    damaged[place] ^= 1 << bit
    path.write_bytes(damaged)
    if place == len(damaged) - 1:  # the end of the last line is gone: nobody can tell that from a cut
        assert read(path) == EVENTS[:-1]
        return
    with pytest.raises(InputError, match=rf"events.jsonl: line {line}: damaged"):
        read(path)


@pytest.mark.parametrize("change", [lambda lines: lines[1:], lambda lines: [lines[1], lines[0], *lines[2:]]])
def test_missing_and_moved_lines_are_found(path, change):
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(InputError, match="line 1: damaged"):
        read(path)


def test_a_second_process_is_refused(path):
    journal = Journal(path)
    with pytest.raises(InputError, match="is being written by process"):
        Journal(path)
    journal.close()
    read(path)


def test_a_full_disk_leaves_no_trace(path, monkeypatch):
    journal = Journal(path)
    before, pwrite = path.read_bytes(), os.pwrite

    def full(file, block, place):
        if place > len(before):
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, block[:7], place)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        journal.append(EVENTS)
    assert path.read_bytes() == before
    monkeypatch.undo()
    journal.append(EVENTS)
    journal.close()
    assert read(path) == EVENTS + EVENTS


def test_what_append_returned_from_survives_a_kill(tmp_path):
    path = tmp_path / "events.jsonl"
    script = f"""
import sys
from pathlib import Path
from negfast.serve.journal import Event, Journal
journal = Journal(Path({str(path)!r}))
for n in range(10**9):
    journal.append([Event("u", "i", n, "like")])
    print(n, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(50)]
        process.send_signal(signal.SIGKILL)
        told += [int(line) for line in process.stdout]
    times = [event.time for event in read(path)]
    assert times[: len(told)] == told and len(times) - len(told) in (0, 1)
