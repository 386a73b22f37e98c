"""The feedback rule: which events are dislikes, which are likes (``rating<=5``, ``label==0``, ``is_hate``)."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from negfast.data.log import DISLIKE, EXPOSED, LIKE
from negfast.errors import InputError
from negfast.prepare.readers import Encoded, to_floats

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
TRUE, FALSE = ("true", "t", "1", "1.0", "yes"), ("false", "f", "0", "0.0", "no")


@dataclass(frozen=True)
class Rule:
    """``column comparison literal``; a bare boolean column has comparison None."""

    column: str
    comparison: str | None = None
    literal: str = ""
    quoted: bool = False  # a quoted literal is a string even if it looks like a number

    def __str__(self) -> str:
        return (
            f"{self.column}{self.comparison or ''}{self.literal!r}"
            if self.quoted
            else (f"{self.column}{self.comparison or ''}{self.literal}")
        )


def parse_rule(text: str) -> Rule:
    """Reads ``rating<=5``, ``action=='hide'`` or ``is_hate``. Raises InputError."""
    match = re.fullmatch(r"\s*([^<>=!]+?)\s*(?:(<=|>=|==|!=|<|>)\s*(.*?)\s*)?", text)
    if match is None or (match[2] and not match[3]):
        raise InputError(f"rule {text!r}: expected COLUMN, or COLUMN<=VALUE with one of <= < >= > == !=")
    column, comparison, literal = match[1], match[2], match[3] or ""
    quoted = len(literal) >= 2 and literal[0] == literal[-1] and literal[0] in "'\""
    rule = Rule(column, comparison, literal[1:-1] if quoted else literal, quoted)
    if comparison in ("<", "<=", ">", ">=") and _number(rule) is None:
        raise InputError(f"rule {text!r}: {comparison} needs a number, found {rule.literal!r}")
    return rule


def matches(rule: Rule, column: Encoded) -> np.ndarray:
    """Which events the rule holds for: bool [N]; False where the column is null. Raises InputError."""
    of_value = _of_values(rule, column)
    return np.append(of_value, False)[column.codes]  # code -1 (null) takes the appended False


def feedback(columns: Mapping[str, Encoded], dislike: Sequence[Rule], like: Sequence[Rule], rest: int) -> np.ndarray:
    """The feedback of every event, uint8 [N].

    An event is a dislike if any dislike rule holds, else a like if any like rule holds, else ``rest``
    (LIKE or EXPOSED). A null in a dislike rule's column tells nothing: such an event is EXPOSED unless
    another rule holds.
    """
    n_events = len(next(iter(columns.values())).codes)
    disliked, liked, unknown = (np.zeros(n_events, bool) for _ in range(3))
    for rule in dislike:
        disliked |= matches(rule, columns[rule.column])
        unknown |= columns[rule.column].codes < 0
    for rule in like:
        liked |= matches(rule, columns[rule.column])
    result = np.full(n_events, rest, np.uint8)
    result[unknown] = EXPOSED
    result[liked] = LIKE
    result[disliked] = DISLIKE
    return result


def _number(rule: Rule) -> float | None:
    if rule.quoted:
        return None
    try:
        return float(rule.literal)
    except ValueError:
        return None


def _of_values(rule: Rule, column: Encoded) -> np.ndarray:
    """The rule over the distinct values of the column, bool [V]."""
    values, number = column.values, _number(rule)
    if rule.comparison is None:
        return _truth(values, column, rule)
    compare = COMPARISONS[rule.comparison]
    if pa.types.is_boolean(values.type) and rule.literal.lower() in TRUE + FALSE:
        return compare(values.to_numpy(zero_copy_only=False), rule.literal.lower() in TRUE)
    if number is not None and (rule.comparison not in ("==", "!=") or _all_numbers(values)):
        return compare(to_floats(column, f"rule {rule}"), number)
    text = np.array(pc.cast(values, pa.string()).to_pylist(), dtype=object)
    return compare(text, rule.literal).astype(bool)


def _all_numbers(values: pa.Array) -> bool:
    try:
        pc.cast(values, pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True


def _truth(values: pa.Array, column: Encoded, rule: Rule) -> np.ndarray:
    words = [str(value).lower() for value in values.to_pylist()]
    for code, word in enumerate(words):
        if word not in TRUE + FALSE:
            where = column.where(code)
            raise InputError(
                f"{where}: column {rule.column!r} is {word!r}, expected a boolean (or compare it: {rule.column}==...)"
            )
    return np.array([word in TRUE for word in words], dtype=bool)
