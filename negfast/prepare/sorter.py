"""The rows of a log on disk, indexed and sorted by user and time by DuckDB within a memory limit."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

from negfast.errors import InputError

BATCH_ROWS = 1 << 17  # of the sorted rows


class LogSorter:
    """Takes a log block by block, then gives its ids, and its rows in the order of (user, time, arrival).

    Everything lies in ``folder``, an empty directory that goes with the sorter's context; ``memory``, bytes, is
    DuckDB's limit (None: its default). Raises InputError where that is too little, OSError where the disk is full.
    """

    def __init__(self, folder: Path, memory: int | None = None) -> None:
        config: dict[str, str | bool | int | float | list[str]] = {
            "temp_directory": str(folder / "spilled"),
            "threads": len(os.sched_getaffinity(0)),
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        }
        if memory is not None:
            config["memory_limit"] = f"{memory >> 20}MiB"
        self._memory, self._path, self._rows = memory, folder / "log.parquet", 0
        self._writer: parquet.ParquetWriter | None = None
        self._found: dict[str, tuple[pa.Array, pa.StringArray]] = {}  # distinct values and ids
        self._database = duckdb.connect(":memory:", config=config)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
        self._database.close()

    def __len__(self) -> int:
        return self._rows

    def add(self, block: pa.Table) -> None:
        """Takes rows: user and item (strings or int64), time (int64, ns since 1970), and what is to come with them; the
        same columns in every block."""
        with self._errors():
            if self._writer is None:
                integers = [column.name for column in block.schema if pa.types.is_int64(column.type)]
                others = [name for name in block.schema.names if name not in integers]
                self._writer = parquet.ParquetWriter(
                    self._path,
                    block.schema,
                    compression=dict.fromkeys(integers, "none") | dict.fromkeys(others, "lz4"),
                    use_dictionary=others,
                    column_encoding=dict.fromkeys(integers, "DELTA_BINARY_PACKED"),  # half the time of LZ4, and smaller
                    write_statistics=False,
                )
            self._writer.write_table(block)
        self._rows += len(block)

    def end(self) -> None:
        """All rows are there."""
        with self._errors():
            if self._writer is not None:
                self._writer.close()

    def ids(self, column: str) -> pa.StringArray:
        """The distinct ids of "user" or "item" in the order of (length, text): for integers, of their numbers."""
        with self._errors():
            rows = self._database.read_parquet(str(self._path))
            found = rows.select(f'"{column}"').distinct().to_arrow_table()
        values = found[column].combine_chunks()
        if _by_number(values):
            order = pc.sort_indices(values)
        else:
            ids = values.cast(pa.string())
            keys = pa.table({"length": pc.utf8_length(ids), "text": ids})
            order = pc.sort_indices(keys, [("length", "ascending"), ("text", "ascending")])
        values = values.take(order)
        ids = values.cast(pa.string())
        self._found[column] = values, ids
        return ids

    def sorted(self, user_ids: pa.StringArray, item_ids: pa.StringArray) -> Iterator[dict[str, np.ndarray]]:
        """The rows, BATCH_ROWS at a time, as columns by name: user and item int32, indices into ``user_ids`` and
        ``item_ids``, which hold all that `ids` gave of both; time int64 in seconds; the others as they came."""
        assert self._writer is not None
        others = "".join(f", log.{name}" for name in self._writer.schema.names if name not in ("user", "item", "time"))
        with self._errors():
            for name, ids in (("user", user_ids), ("item", item_ids)):
                values, own = self._found[name]
                index = np.arange(len(own), dtype=np.int32) if ids is own else pc.index_in(own, value_set=ids)
                self._database.register(f"{name}s", pa.table({"id": values, "index": index}))
            log = self._database.read_parquet(str(self._path), file_row_number=True)
            self._database.register("log", log)
            users, own = self._found["user"]
            user, join = 'users."index"', 'JOIN users ON log."user" = users.id'
            if in_order := user_ids is own and _by_number(users):  # no join: the sorted users tell their index
                user, join = f'log."user"::{_narrow(users[-1].as_py())}', ""
            rows = self._database.sql(
                f"""SELECT {user} AS "user", items."index" AS item, log.time // 1000000000 AS time{others}
                FROM log {join} JOIN items ON log.item = items.id
                ORDER BY {user}, log.time, log.file_row_number::{_narrow(self._rows)}"""
            )
            for batch in rows.to_arrow_reader(BATCH_ROWS):
                columns = {
                    name: column.to_numpy(zero_copy_only=False)
                    for name, column in zip(batch.schema.names, batch.columns, strict=True)
                }
                if in_order:
                    found = columns["user"]
                    first = int(np.searchsorted(users.to_numpy(), found[0]))
                    columns["user"] = first + np.cumsum(np.append(False, found[1:] != found[:-1]), dtype=np.int32)
                yield columns

    def times_at(self, shares: Sequence[float], rows: pa.RecordBatchReader) -> tuple[np.ndarray, np.ndarray]:
        """Of rows of "part" (int32) and "time" (int64): the parts, int32 [P], and for each the times at ``shares`` of
        its rows in the order of time, and the last time, int64 [P, len(shares) + 1]."""
        at = "".join(f"min(time) FILTER (place >= floor({share}::DOUBLE * rows)), " for share in shares)
        placed = """SELECT part, time, row_number() OVER (PARTITION BY part ORDER BY time) - 1 AS place,
            count(*) OVER (PARTITION BY part) AS rows FROM times"""
        with self._errors():
            self._database.register("times", rows)
            found = self._database.sql(f"SELECT part, {at}max(time) FROM ({placed}) GROUP BY part").fetchnumpy()
        part, *times = found.values()
        return part, np.stack(times, axis=1)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except duckdb.OutOfMemoryException as error:
            limit = "the memory of this machine" if self._memory is None else f"{self._memory / 2**30:.1f} GiB"
            raise InputError(f"--memory: sorting the log does not do with {limit}: {_one_line(error)}") from error
        except (duckdb.InterruptException, RuntimeError) as error:
            if "interrupted" not in str(error):
                raise
            raise KeyboardInterrupt from error
        except (duckdb.IOException, pa.ArrowException) as error:
            raise OSError(f"the log cannot be sorted: {_one_line(error)}") from error


def _by_number(ids: pa.Array) -> bool:
    """Whether the order of (length, text) is that of the numbers."""
    return pa.types.is_integer(ids.type) and pc.min(ids).as_py() >= 0


def _narrow(largest: int) -> str:
    """The type of numbers from 0 to ``largest``: the smaller the keys, the faster the sort."""
    return "UINTEGER" if largest < 1 << 32 else "BIGINT"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
