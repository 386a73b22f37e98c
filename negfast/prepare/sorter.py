"""The rows of a log in DuckDB: indexed and sorted by user and time within a memory limit, on disk beyond it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from negfast.errors import InputError

COLUMNS = {  # of a block; the last two may be missing
    "user": ("VARCHAR", pa.string()),
    "item": ("VARCHAR", pa.string()),
    "time": ("BIGINT", pa.int64()),  # ns since 1970
    "feedback": ("UTINYINT", pa.uint8()),
    "value": ("FLOAT", pa.float32()),
    "takes_back": ("UTINYINT", pa.uint8()),
}
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
        self._memory, self._rows, self._columns = memory, 0, list[str]()
        with self._errors():
            self._database = duckdb.connect(str(folder / "log.duckdb"), config=config)
            self._database.execute("BEGIN")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def __len__(self) -> int:
        return self._rows

    def add(self, block: pa.Table) -> None:
        """Takes rows with the columns of COLUMNS; every block has the same ones."""
        if not self._columns:
            self._columns = block.column_names
            kinds = ", ".join(f"{name} {COLUMNS[name][0]}" for name in self._columns)
            self._database.execute(f'CREATE TABLE log ({kinds}, "row" BIGINT)')
        rows = np.arange(self._rows, self._rows + len(block))
        self._rows += len(block)
        with self._errors():
            self._database.register("block", block.append_column("row", pa.array(rows)))
            self._database.execute("INSERT INTO log SELECT * FROM block")
            self._database.unregister("block")

    def ids(self, column: str) -> pa.StringArray:
        """The distinct ids of "user" or "item" in the order of (length, text): for integers, of their numbers."""
        with self._errors():
            found = self._database.sql(f'SELECT DISTINCT "{column}" FROM log').to_arrow_table()
        ids = found[column].cast(pa.string()).combine_chunks()
        keys = pa.table({"length": pc.utf8_length(ids), "text": ids})
        return ids.take(pc.sort_indices(keys, [("length", "ascending"), ("text", "ascending")]))

    def sorted(self, user_ids: pa.StringArray, item_ids: pa.StringArray) -> Iterator[dict[str, np.ndarray]]:
        """The rows, BATCH_ROWS at a time, as columns by name: user and item int32, indices into ``user_ids`` and
        ``item_ids``, which hold all of the log's; time int64 in seconds; the others as they came."""
        others = "".join(f", log.{name}" for name in self._columns if name not in ("user", "item", "time"))
        with self._errors():
            for name, ids in (("users", user_ids), ("items", item_ids)):
                index = pa.array(np.arange(len(ids), dtype=np.int32))
                self._database.register(name, pa.table({"id": ids, "index": index}))
            rows = self._database.sql(
                f"""SELECT users."index" AS "user", items."index" AS item, log.time // 1000000000 AS time{others}
                FROM log JOIN users ON log."user" = users.id JOIN items ON log.item = items.id
                ORDER BY users."index", log.time, log."row" """
            )
            for batch in rows.to_arrow_reader(BATCH_ROWS):
                yield {
                    name: column.to_numpy(zero_copy_only=False)
                    for name, column in zip(batch.schema.names, batch.columns, strict=True)
                }

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except duckdb.OutOfMemoryException as error:
            limit = "the memory of this machine" if self._memory is None else f"{self._memory / 2**30:.1f} GiB"
            raise InputError(f"--memory: sorting the log does not do with {limit}: {_one_line(error)}") from error
        except (duckdb.IOException, pa.ArrowException) as error:
            raise OSError(f"the log cannot be sorted: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
