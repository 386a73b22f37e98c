"""The C++ core (csrc/module.cpp). Arrays are C-contiguous, on the CPU and of exactly these types."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from negfast.errors import InputError

START: int  # feedback of a position that starts a history
GAPS: int  # buckets of the time since the event before

class ShardError(InputError): ...

FEATURE_TEXT: int  # numbers of an item's text vector
FEATURE_CONSTANTS: dict[str, float]  # of the features' formulas; times in seconds

class Features:
    """What the past says of users, items and pairs (csrc/features.hpp); see `negfast.data.features`."""

    width: int
    n_users: int
    n_items: int
    n_bytes: int  # of the state
    def __init__(
        self,
        by_day: bool,
        prior_rate: float,
        prior_value: float,
        has_values: bool,
        attributes: list[tuple[int, float]],
    ) -> None: ...
    def add_users(self, key: NDArray[np.uint64]) -> None: ...
    def add_values(self, column: NDArray[np.int32], content: NDArray[np.float32]) -> None: ...
    def add_items(
        self,
        key: NDArray[np.uint64],
        text: NDArray[np.float32],
        cell: NDArray[np.int32],
        value_start: NDArray[np.int64],
        value: NDArray[np.int32],
    ) -> None: ...
    def replay(
        self,
        user: NDArray[np.int32],
        item: NDArray[np.int32],
        time: NDArray[np.int64],
        feedback: NDArray[np.uint8],
        value: NDArray[np.float32],
        asked_user: NDArray[np.int32],
        asked_item: NDArray[np.int32],
        moment: NDArray[np.int64],
        out: NDArray[np.float32],
    ) -> None: ...
    def add(self, user: int, item: int, time: int, feedback: int, value: float = ...) -> None: ...
    def answer(self, user: int, items: NDArray[np.int32], moment: int) -> NDArray[np.float32]: ...
    def tables(self) -> dict[str, NDArray[Any]]: ...

HAS_BFLOAT16: bool  # whether the CPU multiplies bfloat16 numbers
VERDICT_MEMBERS: int  # networks of the verdict
VERDICT_WIDTH: int  # units of a layer of each

def sum_rows(table: NDArray[np.float32], place: NDArray[np.int64], none: int, out: NDArray[np.float32]) -> None: ...

class Decoder:
    """The built-in decoder for inference on the CPU (csrc/decoder.hpp); see `negfast.model.inference`."""

    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        intermediate: int,
        eps: float,
        bfloat16: bool,
    ) -> None: ...
    def add_layer(
        self,
        input_norm: NDArray[np.float32],
        query: NDArray[np.float32],
        key: NDArray[np.float32],
        value: NDArray[np.float32],
        query_norm: NDArray[np.float32],
        key_norm: NDArray[np.float32],
        out: NDArray[np.float32],
        post_norm: NDArray[np.float32],
        gate: NDArray[np.float32],
        up: NDArray[np.float32],
        down: NDArray[np.float32],
    ) -> None: ...
    def project(
        self,
        layer: int,
        hidden: NDArray[np.float32],
        cos: NDArray[np.float32],
        sin: NDArray[np.float32],
        query: NDArray[np.float32],
        key: NDArray[np.float32],
        value: NDArray[np.float32],
        threads: int,
    ) -> None: ...
    def attend(
        self,
        query: NDArray[np.float32],
        key: NDArray[np.float32],
        value: NDArray[np.float32],
        offsets: NDArray[np.int32],
        prompt: NDArray[np.int64],
        prefix: NDArray[np.int32],
        own_key: NDArray[np.float32],
        own_value: NDArray[np.float32],
        out: NDArray[np.float32],
        threads: int,
    ) -> None: ...
    def finish(self, layer: int, attention: NDArray[np.float32], hidden: NDArray[np.float32], threads: int) -> None: ...
    def norm(self, weight: NDArray[np.float32], hidden: NDArray[np.float32]) -> None: ...

class Verdict:
    """The verdict for inference on the CPU (csrc/verdict.hpp); see `negfast.model.verdict`."""

    def __init__(
        self,
        edges: NDArray[np.float32],
        first: NDArray[np.float32],
        first_bias: NDArray[np.float32],
        second: NDArray[np.float32],
        second_bias: NDArray[np.float32],
        last: NDArray[np.float32],
        wide: NDArray[np.float32],
        wide_bias: float,
    ) -> None: ...
    def logits(self, features: NDArray[np.float32], out: NDArray[np.float32], threads: int) -> None: ...

class Trees:
    """Boosted trees for inference on the CPU (csrc/trees.hpp); see `negfast.model.trees`."""

    def __init__(
        self,
        feature: NDArray[np.int32],
        threshold: NDArray[np.float32],
        unknown_right: NDArray[np.bool_],
        left_leaves: NDArray[np.int32],
        value: NDArray[np.float32],
    ) -> None: ...
    def logits(self, features: NDArray[np.float32], out: NDArray[np.float32], threads: int) -> None: ...

class EventSorter:
    """Takes events in any order and keeps at most ``memory_bytes`` of them in memory."""

    def __init__(self, folder: str, users: int, items: int, memory_bytes: int) -> None: ...
    def add(
        self,
        user: NDArray[np.int32],
        item: NDArray[np.int32],
        feedback: NDArray[np.uint8],
        time: NDArray[np.int64],
    ) -> None: ...
    def write(self, path: str, users: int, items: int, time_unit: int, threads: int) -> None: ...

class PackedParts:
    """Packed histories whose sizes are known and that `write` puts together in arrays of exactly these sizes."""

    @property
    def histories(self) -> int: ...
    @property
    def positions(self) -> int: ...
    @property
    def branches(self) -> int: ...
    @property
    def seen(self) -> int: ...
    @property
    def nodes(self) -> list[int]: ...
    def write(
        self,
        item: NDArray[np.int32],
        feedback: NDArray[np.uint8],
        gap: NDArray[np.uint8],
        cu_seqlens: NDArray[np.int32],
        prefix: NDArray[np.int32],
        branch_gap: NDArray[np.uint8],
        seen_item: NDArray[np.int32],
        seen_cu: NDArray[np.int32],
        seen_node: list[NDArray[np.int32]],
        seen_request: list[NDArray[np.int32]],
        seen_count: list[NDArray[np.int32]],
        seen_slot: list[NDArray[np.int32]],
        threads: int,
    ) -> None: ...

class Shard:
    """Files of one data set, oldest first, read as one."""

    def __init__(self, paths: list[str]) -> None: ...
    @property
    def n_users(self) -> int: ...
    @property
    def n_items(self) -> int: ...
    @property
    def n_events(self) -> int: ...
    def files(self) -> list[dict[str, Any]]: ...
    def offsets(self, users: NDArray[np.int32], out: NDArray[np.int64]) -> None: ...
    def read(
        self,
        users: NDArray[np.int32],
        offsets: NDArray[np.int64],
        item: NDArray[np.int32],
        feedback: NDArray[np.uint8],
        time: NDArray[np.int64],
        threads: int,
    ) -> None: ...
    def read_rows(
        self,
        users: NDArray[np.int32],
        offsets: NDArray[np.int64],
        table: NDArray[np.uint8],
        out: NDArray[np.uint8],
        threads: int,
    ) -> None: ...
    def pack(
        self,
        *,
        users: NDArray[np.int32],
        first: NDArray[np.int64],
        views: NDArray[np.uint8],
        branch_history: NDArray[np.int32],
        moments: NDArray[np.int64],
        item_nodes: NDArray[np.int32],
        threads: int,
    ) -> PackedParts: ...

def write_histories(
    path: str,
    offsets: NDArray[np.int64],
    item: NDArray[np.int32],
    feedback: NDArray[np.uint8],
    time: NDArray[np.int64],
    user_list: NDArray[np.uint32],
    users: int,
    items: int,
    time_unit: int,
    threads: int,
) -> None: ...
def request_days(
    offsets: NDArray[np.int64],
    item: NDArray[np.int32],
    feedback: NDArray[np.uint8],
    time: NDArray[np.int64],
    horizon: int,
    user: NDArray[np.int64],
    day: NDArray[np.int64],
    ahead: NDArray[np.uint8],
) -> int: ...
