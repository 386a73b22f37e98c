"""A damaged, truncated, unknown or half-written shard is refused or never seen."""

import errno
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from negfast.data.log import DAY, EventLog
from negfast.data.shards import ShardBuilder, append_shard, open_shard, write_shard
from negfast.errors import InputError

from .shard_logs import random_log


def read_all(path) -> list[list[int]]:
    return [column.tolist() for column in open_shard(path).get_many()]


@pytest.fixture(params=[1, DAY], ids=["seconds", "days"])
def small_shard(request, tmp_path):
    path = tmp_path / "events.nfs"
    write_shard(path, random_log(np.random.default_rng(1), 70, 25, 12, times=9 * DAY), request.param)
    return path


@pytest.mark.job
def test_every_flipped_byte_is_noticed(small_shard):
    whole = small_shard.read_bytes()
    expected = read_all(small_shard)
    rng = np.random.default_rng()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= int(rng.integers(1, 256))
        small_shard.write_bytes(damaged)
        with pytest.raises(InputError):
            read_all(small_shard)
    small_shard.write_bytes(whole)
    assert read_all(small_shard) == expected


@pytest.mark.job
def test_every_truncation_is_noticed(small_shard):
    whole = small_shard.read_bytes()
    for length in range(len(whole)):
        small_shard.write_bytes(whole[:length])
        with pytest.raises(InputError):
            open_shard(small_shard)
    small_shard.write_bytes(whole + b"\0")
    with pytest.raises(InputError, match="bytes"):
        open_shard(small_shard)


@pytest.mark.parametrize(
    ("offset", "message"),
    [(0, "expected a negfast shard"), (8, "shard version: found 3, expected 1"), (15, "unknown feature bits 33554432")],
)
def test_unknown_kinds_versions_and_features_are_refused(small_shard, offset, message):
    content = bytearray(small_shard.read_bytes())
    content[offset] ^= 2
    small_shard.write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_shard(small_shard)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        open_shard(tmp_path / "events.nfs")
    with pytest.raises(InputError, match="no regular file"):
        open_shard(tmp_path)


def test_a_damaged_or_missing_part_is_refused(small_shard):
    one = np.zeros(1, np.int32), np.zeros(1, np.int32), np.ones(1, np.uint8), np.array([99 * DAY])
    part = append_shard(small_shard, *one, n_users=70, n_items=25)
    whole = part.read_bytes()
    for position in range(len(whole)):
        part.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        with pytest.raises(InputError):
            read_all(small_shard)
    write_shard(part, EventLog(np.array([0, 1]), *one[1:], None, 1))  # a whole shard, but not the one appended
    with pytest.raises(InputError, match="expected"):
        open_shard(small_shard)
    part.unlink()
    with pytest.raises(InputError, match="No such file"):
        open_shard(small_shard)
    parts = small_shard.with_name("events.nfs.parts")
    parts.write_text("{")
    with pytest.raises(InputError, match="damaged list of parts"):
        open_shard(small_shard)


BUILDS = """
import sys
import numpy as np
from negfast.data.shards import ShardBuilder
rng = np.random.default_rng(2)
n = 300_000
events = rng.integers(0, 9000, n).astype(np.int32), rng.integers(0, 999, n).astype(np.int32)
events += np.ones(n, np.uint8), rng.integers(0, 10**6, n)
while True:
    builder = ShardBuilder(sys.argv[1], 9000, 999, memory_bytes=1 << 20)
    builder.add(*events)
    builder.finish(threads=2)
    print("built", flush=True)
"""


@pytest.mark.job
def test_a_killed_build_leaves_the_old_shard_or_the_new_one(tmp_path):
    """A process builds in a loop; at a random moment of that it is killed, twelve times."""
    path = tmp_path / "events.nfs"
    write_shard(path, random_log(np.random.default_rng(0), 40, 20, 30))
    old = path.read_bytes()
    new = None
    rng = np.random.default_rng()
    for _ in range(12):
        with subprocess.Popen([sys.executable, "-c", BUILDS, str(path)], stdout=subprocess.PIPE) as build:
            assert build.stdout is not None
            assert build.stdout.readline() == b"built\n"
            new = new or path.read_bytes()
            path.write_bytes(old)
            time.sleep(rng.uniform(0, 0.15))
            build.send_signal(signal.SIGKILL)
        assert path.read_bytes() in (old, new)
        assert not any("scratch" in p.name for p in tmp_path.iterdir())


def test_a_list_of_parts_of_a_replaced_base_is_not_read(small_shard):
    one = np.zeros(1, np.int32), np.zeros(1, np.int32), np.ones(1, np.uint8), np.array([99 * DAY])
    append_shard(small_shard, *one, n_users=70, n_items=25)
    parts = small_shard.with_name("events.nfs.parts")
    kept = parts.read_bytes()
    builder = ShardBuilder(small_shard, 1, 1)
    builder.add(*one)
    builder.finish()
    assert not parts.exists()
    parts.write_bytes(kept)  # as if the build had been killed just before it removed the list
    assert open_shard(small_shard).n_events == 1


def test_a_file_that_cannot_be_made_is_an_error_of_the_system(tmp_path):
    log = EventLog(np.array([0, 1]), np.zeros(1, np.int32), np.ones(1, np.uint8), np.zeros(1, np.int64), None, 1)
    with pytest.raises(OSError, match=r"none/x\.nfs: No such file or directory") as error:
        write_shard(tmp_path / "none" / "x.nfs", log)
    assert error.value.errno == errno.ENOENT
