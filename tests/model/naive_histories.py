"""What a branch sees of a user's history, event by event: `negfast.model.histories` written out anew."""

from negfast.data.log import DISLIKE, LIKE
from negfast.data.shards import GAPS
from negfast.model.histories import MIXED
from negfast.runtime.engine import Engine
from negfast.sid.tokens import FEEDBACK

Position = list[int]  # token ids that are added up


def naive_start(events: int, window: int) -> int:
    """The first of a user's events that a branch with ``events`` before it sees."""
    start = 0
    while events - start > window:
        start += window - window // 4
    return start


def naive_prefix(engine: Engine, user: int, moment: int, view: int = MIXED) -> tuple[list[Position], int]:
    """The positions that a branch at ``moment`` sees, and the token of the time since the last of them."""
    log, vocabulary, history = engine.log, engine.policy.vocabulary, engine.config.history
    rows = [r for r in range(log.user_offsets[user], log.user_offsets[user + 1]) if log.time[r] < moment]
    rows = rows[naive_start(len(rows), history.window) :]
    kinds = {LIKE: bool(view & 1), DISLIKE: bool(view & 2)}
    rows = [r for r in rows if kinds.get(int(log.feedback[r]), view == MIXED)]
    positions, last = [[vocabulary.marker("history"), vocabulary.marker("gap-0")]], None
    for r in rows:
        marks = [vocabulary.marker(FEEDBACK[log.feedback[r]]), gap_token(engine, last, log.time[r])]
        positions += spelt(engine, int(log.item[r]), marks)
        last = log.time[r]
    return positions, gap_token(engine, last, moment)


def spelt(engine: Engine, item: int, marks: Position) -> list[Position]:
    """An item and what is said of it: one position, or its codes and another."""
    if engine.config.history.text:  # the text of item i counts as a token after those of the block
        marks = [*marks, engine.policy.vocabulary.base + engine.policy.vocabulary.size + item]
    codes = engine.policy.vocabulary.item_tokens(engine.trie.codes[item : item + 1])[0].tolist()
    if engine.config.history.positions == "events":
        return [[*codes, *marks]]
    return [*([code] for code in codes), marks]


def gap_token(engine: Engine, last: int | None, time: int) -> int:
    bucket = 0 if last is None else min(GAPS - 1, 1 + (int(time - last) // 64).bit_length())
    return engine.policy.vocabulary.marker(f"gap-{bucket}")
