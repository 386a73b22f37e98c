"""From ids as callers have them to indices of a data set; ids are read as `negfast prepare` reads them."""

from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from negfast.errors import InputError
from negfast.prepare.readers import Source, encode, to_strings

Column = Sequence[Any] | np.ndarray | pa.Array | pa.ChunkedArray  # of ids; a pandas Series is a Sequence to pyarrow


def column_of(name: str, values: Any) -> Source:
    """A table of one column ``name``. InputError for what pyarrow makes no column of."""
    if isinstance(values, (str, bytes)):
        raise InputError(f"{name}s: found {values!r}, expected a column of ids")
    try:
        if not isinstance(values, (pa.Array, pa.ChunkedArray)):
            values = pa.array(values, from_pandas=True)
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if pa.types.is_large_string(values.type) or pa.types.is_string_view(values.type):
            values = values.cast(pa.string())
        return Source(Path(f"{name}s"), pa.table({name: values}))
    except (pa.ArrowException, TypeError, ValueError) as error:
        message = " ".join(str(error).split())
        raise InputError(f"{name}s: found no column of ids, expected strings or integers: {message}") from error


def index_of(source: Source, column: str, known: Mapping[str, int]) -> np.ndarray:
    """The index of each row's id in ``known``, int64 [E], -1 where it is null or not there. InputError for what is no
    id."""
    ids = encode(source, column)
    values = to_strings(ids).to_pylist()
    index = np.fromiter(map(known.get, values, repeat(-1)), np.int64, len(values))
    return np.append(index, -1)[ids.codes]


def indices(name: str, values: Any, known: Mapping[str, int]) -> np.ndarray:
    """`index_of` of a column as callers have it."""
    if isinstance(values, np.ndarray) and values.dtype.kind == "U":
        values = values.tolist()
    if isinstance(values, list) and set(map(type, values)) == {str}:
        return np.fromiter(map(known.get, values, repeat(-1)), np.int64, len(values))
    return index_of(column_of(name, values), name, known)
