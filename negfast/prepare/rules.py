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
from negfast.prepare.readers import NULLS, BadRows, Encoded, numbers_of, to_floats

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
        quote = "'" if '"' in self.column else '"'
        plain = re.fullmatch(r"[^\s<>=!'\"]([^<>=!]*[^\s<>=!])?", self.column)
        column = self.column if plain else f"{quote}{self.column}{quote}"
        return f"{column}{self.comparison or ''}" + (f"'{self.literal}'" if self.quoted else self.literal)


def parse_rule(text: str) -> Rule:
    """Reads ``rating<=5``, ``action=='hide'`` or ``is_hate``; a column whose name holds one of ``<>=!`` stands in
    quotes: ``"a=b"<=5``. Raises InputError."""
    match = re.fullmatch(r"""\s*(?:"([^"]+)"|'([^']+)'|([^<>=!]+?))\s*(?:(<=|>=|==|!=|<|>)\s*(.*?)\s*)?""", text)
    if match is None or (match[4] and not match[5]):
        raise InputError(f"rule {text!r}: expected COLUMN, or COLUMN<=VALUE with one of <= < >= > == !=")
    column, comparison, literal = match[1] or match[2] or match[3], match[4], match[5] or ""
    quoted = len(literal) >= 2 and literal[0] == literal[-1] and literal[0] in "'\""
    rule = Rule(column, comparison, literal[1:-1] if quoted else literal, quoted)
    if comparison in ("<", "<=", ">", ">=") and _number(rule) is None:
        raise InputError(f"rule {text!r}: {comparison} needs a number, found {rule.literal!r}")
    if comparison and rule.literal.strip().lower() in NULLS:
        raise InputError(f"rule {text!r}: {rule.literal!r} is how a missing value is written, which no rule matches")
    return rule


def matches(rule: Rule, column: Encoded, bad: BadRows | None = None) -> np.ndarray:
    """Which events the rule holds for: bool [N]; False where the column is null. Raises InputError, or gives rows
    whose value the rule cannot judge to ``bad`` where it skips them."""
    of_value = _of_values(rule, column, bad)
    return np.append(of_value, False)[column.codes]  # code -1 (null) takes the appended False


def feedback(
    columns: Mapping[str, Encoded],
    dislike: Sequence[Rule],
    like: Sequence[Rule],
    rest: int,
    bad: BadRows | None = None,
) -> tuple[np.ndarray, set[Rule]]:
    """The feedback of every event, uint8 [N], and the rules that hold for some of them.

    An event is a dislike if any dislike rule holds, else a like if any like rule holds, else ``rest``
    (LIKE or EXPOSED). A rule does not hold on a null. Where ``rest`` is LIKE, an event with a null in some rule's
    column is EXPOSED unless a rule holds, and one with nothing but nulls in them is bad: nothing tells what it is.
    Raises InputError for that.
    """
    n_events = len(next(iter(columns.values())).codes)
    disliked, liked = np.zeros(n_events, bool), np.zeros(n_events, bool)
    held = set()
    for rules, holds in ((dislike, disliked), (like, liked)):
        for rule in rules:
            found = matches(rule, columns[rule.column], bad)
            if found.any():
                held.add(rule)
            holds |= found
    result = np.full(n_events, rest, np.uint8)
    if rest == LIKE:
        nulls = np.stack([column.codes < 0 for column in columns.values()])
        result[nulls.any(0)] = EXPOSED
        _refuse_untold(columns, np.flatnonzero(nulls.all(0)), bad or BadRows())
    result[liked] = LIKE
    result[disliked] = DISLIKE
    return result, held


def _refuse_untold(columns: Mapping[str, Encoded], untold: np.ndarray, bad: BadRows) -> None:
    names = " and ".join(repr(name) for name in columns)
    bad.add(
        next(iter(columns.values())).source,
        untold,
        lambda row: (
            f"no value in {names}, so the event is neither a dislike nor a like (--rest exposed or a --like-rule"
            " makes such events exposures)"
        ),
    )


def _number(rule: Rule) -> float | None:
    if rule.quoted:
        return None
    try:
        return float(rule.literal)
    except ValueError:
        return None


def _of_values(rule: Rule, column: Encoded, bad: BadRows | None) -> np.ndarray:
    """The rule over the distinct values of the column, bool [V]."""
    values, number = column.values, _number(rule)
    if rule.comparison is None:
        return _truth(values, column, rule, bad or BadRows())
    compare = COMPARISONS[rule.comparison]
    if pa.types.is_boolean(values.type) and rule.literal.lower() in TRUE + FALSE:
        return compare(values.to_numpy(zero_copy_only=False), rule.literal.lower() in TRUE)
    if number is not None and rule.comparison not in ("==", "!="):
        return compare(to_floats(column, f"rule {rule}", bad), number)
    same = (np.array(pc.cast(values, pa.string()).to_pylist(), dtype=object) == rule.literal).astype(bool)
    if number is not None:  # a value that is a number is compared as one, whatever the others are
        numbers = numbers_of(values)
        _refuse_infinite(numbers, column, rule, bad or BadRows())
        same = np.where(np.isnan(numbers), same, numbers == number)
    return same if rule.comparison == "==" else ~same


def _refuse_infinite(numbers: np.ndarray, column: Encoded, rule: Rule, bad: BadRows) -> None:
    bad.add(
        column.source,
        column.rows(np.flatnonzero(np.isinf(numbers))),
        lambda row: f"rule {rule}: {rule.column} {column.value(row)!r} is not a number",
    )


def _truth(values: pa.Array, column: Encoded, rule: Rule, bad: BadRows) -> np.ndarray:
    words = [str(value).lower() for value in values.to_pylist()]
    known = np.array([word in TRUE + FALSE for word in words], dtype=bool)
    bad.add(
        column.source,
        column.rows(np.flatnonzero(~known)),
        lambda row: (
            f"column {rule.column!r} is {str(column.value(row)).lower()!r}, expected a boolean (or compare it: "
            f"{rule.column}==...)"
        ),
    )
    return np.array([word in TRUE for word in words], dtype=bool)
