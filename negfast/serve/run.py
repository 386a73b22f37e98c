"""A finished run that answers: `Run` of the Python API, which the commands that write tables call too."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from negfast.errors import InputError
from negfast.serve.context import Moment, check_run, context_day, context_moment, quick_imports
from negfast.serve.ids import Column, indices
from negfast.serve.predict import likely_lists, list_table
from negfast.serve.score import FirstKnown, Scores

if TYPE_CHECKING:
    from negfast.runtime.engine import Engine
    from negfast.runtime.run_folder import RunFolder
    from negfast.runtime.taste import Taste
    from negfast.runtime.verdict import Calibration
    from negfast.serve.live import Live
    from negfast.serve.profiles import Profiles

Given = Literal["feedback", "shown"]
Rank = Literal["likely", "taste"]


class Run:
    """A finished run over a data set; `negfast.load` opens one.

    ``users`` and ``items`` of its methods are columns of ids: a list, numpy array, pyarrow array or pandas Series of
    strings or integers, read as `negfast prepare` reads them. ``at`` is the moment that is looked from: an ISO date or
    time, a `datetime.datetime` or `numpy.datetime64`, UTC where it names no zone. The context is every event up to the
    end of the day before; of `score` by a run with ``history.context=event`` it is every event before the second. By
    default it is the log's end. Nothing later changes an answer, but what a run learned it has learned (`learned_until`
    in RUN/run.json).

    Pickling keeps the paths alone: the copy loads when it is first asked. Work is done with torch's threads
    (`torch.set_num_threads`), which are the caller's to set.
    """

    def __init__(self, path: Path, data: Path | None = None) -> None:
        check_run(path, data)
        self.path, self.data = path, data
        # the last that were asked for
        self._profiles: tuple[tuple[str | None, int], Profiles] | None = None
        self._taste: tuple[tuple[int, int, bytes], Taste] | None = None
        self._calibrations: dict[Given, Calibration] = {}

    def __reduce__(self) -> tuple[type["Run"], tuple[Path, Path | None]]:
        return Run, (self.path.absolute(), None if self.data is None else self.data.absolute())

    def __repr__(self) -> str:
        return f"negfast.load({str(self.path)!r}" + (")" if self.data is None else f", data={str(self.data)!r})")

    def score(self, users: Column, items: Column, at: Moment | None = None, given: Given = "feedback") -> Scores:
        """Calibrated probabilities that users dislike items, of E pairs given as two columns of E ids.

        ``given`` "feedback" asks for P(dislike | the user likes or dislikes the item), "shown" for P(dislike | the item
        is shown). The model abstains where nothing is known: the user or the item is not in the data set, or before the
        moment the user has no event and the item no like or dislike. Raises `negfast.InputError` for columns of
        different lengths, what is no id or no time, and where the run cannot answer for ``given``.
        """
        from negfast.runtime.verdict import Candidates, candidate_logits

        calibration = self._calibration(given)
        user, item = self._indices("user", users), self._indices("item", items)
        if len(user) != len(item):
            raise InputError(f"users and items: found {len(user):,} and {len(item):,}, expected as many")
        moment = context_moment(self._engine.config.history.context, self._engine.log, at)
        known = self._first_known.before(user, item, moment)
        rows = np.flatnonzero(known)
        candidates = Candidates(user[rows], item[rows], np.full(len(rows), moment))
        probability = np.full(len(user), np.nan)
        probability[rows] = calibration.probability(candidate_logits(self._engine, candidates))
        return Scores(probability, ~known)

    def predict(
        self,
        users: Column | None = None,
        top: int = 50,
        at: Moment | None = None,
        items: Column | None = None,
        not_items: Column | None = None,
        rank: Rank = "likely",
    ) -> pa.Table:
        """The ``top`` unseen items that each user will dislike: a table of user (string), rank (int32, from 1), item
        (string) and score (float32). Items that may be listed are all, or those of ``items``, without ``not_items``.

        ``rank`` "likely" puts first what the user will most probably dislike, so what everybody meets; the score is the
        probability of the item as the user's next dislike, among the items that may be listed. "taste" puts first what
        this user would dislike rather than others, out of the 500 items (``top``, if more) with most events of late;
        the score orders the items of a user (`negfast.runtime.taste`).

        Users (by default all of the data set) come in its order, each once; those that it does not have are left out.
        Raises `negfast.InputError` where no item may be listed, for what is no id or no time, and for lists that do not
        fit into memory.
        """
        listed = self._listed(items, not_items)
        day = context_day(self._engine.log, at)
        top, excluded, of_users = min(top, int(listed.sum())), np.flatnonzero(~listed), self._known("user", users)
        if rank == "likely":
            found = likely_lists(self._engine, of_users.astype(np.int32), day, top, excluded)
        elif rank == "taste":
            found = self._ranker(day, top, excluded).lists(of_users, top)
        else:
            raise InputError(f"rank: found {rank!r}, expected likely or taste")
        return list_table(rank, of_users, *found, self._user_ids, self._item_ids)

    def profile(
        self, users: Column | None = None, *, attribute: str | None = None, at: Moment | None = None
    ) -> pa.Table:
        """What kinds of items each user dislikes beyond their own and the items' dislike rates: a row for every user
        and category with anything to say. A category is a value of the item attribute; without ``attribute``, a cluster
        of items of like text, named by the words and attribute values most typical of it. Columns, as docs/serving.md
        explains them: user, category (string), dislikes, likes (int32), expected, dislike_rate, lift, lift_low,
        lift_high, expected_share (float32), items (string).

        Users as for `predict`. Raises `negfast.InputError` for an attribute that the items do not have.
        """
        from negfast.serve.profiles import Profiles

        key = attribute, context_day(self._engine.log, at)
        if self._profiles is None or self._profiles[0] != key:
            self._profiles = key, Profiles(self._engine, *key)
        return self._profiles[1].of(self._known("user", users), self._user_ids)

    def live(self) -> "Live":
        """The run's state at its data set's end, to which events can be added; see `negfast.serve.live.Live`."""
        from negfast.serve.live import Live

        ids = self._index["user"], self._index["item"]
        return Live(self._engine, self._calibration("feedback"), *ids, self._first_known)

    @cached_property
    def _folder(self) -> "RunFolder":
        with quick_imports():
            from negfast.runtime.run_folder import RunFolder
        return RunFolder(self.path)

    @cached_property
    def _engine(self) -> "Engine":
        return self._folder.finished_engine(self.data, serving=True)

    @cached_property
    def _first_known(self) -> FirstKnown:
        return FirstKnown(self._engine.log)

    @cached_property
    def _user_ids(self) -> pa.Array:
        return pa.array(self._engine.data.user_ids, pa.string())

    @cached_property
    def _item_ids(self) -> pa.Array:
        return pa.array(self._engine.data.items.ids, pa.string())

    @cached_property
    def _index(self) -> dict[str, dict[str, int]]:
        """The index of every id of users and of items."""
        ids = {"user": self._engine.data.user_ids, "item": self._engine.data.items.ids}
        return {column: dict(zip(of_column, range(len(of_column)), strict=True)) for column, of_column in ids.items()}

    def _ranker(self, day: int, top: int, excluded: np.ndarray) -> "Taste":
        from negfast.runtime.taste import Taste

        key = day, top, excluded.tobytes()
        if self._taste is None or self._taste[0] != key:
            self._taste = key, Taste(self._engine, day, top, excluded)
        return self._taste[1]

    def _calibration(self, given: Given) -> "Calibration":
        if given not in ("feedback", "shown"):
            raise InputError(f"given: found {given!r}, expected feedback or shown")
        if given not in self._calibrations:
            self._folder.require_finished()
            calibration = self._folder.calibration if given == "feedback" else self._folder.shown_calibration
            self._calibrations[given] = calibration
        return self._calibrations[given]

    def _indices(self, column: str, ids: Column) -> np.ndarray:
        return indices(column, ids, self._index[column])

    def _known(self, column: str, ids: Column | None) -> np.ndarray:
        """The distinct indices of ids that the data set has, ascending; all by default."""
        if ids is None:
            return np.arange(len(self._index[column]))
        index = self._indices(column, ids)
        return np.unique(index[index >= 0])

    def _listed(self, items: Column | None, not_items: Column | None) -> np.ndarray:
        """Which items may be listed, bool [I]. InputError where none may."""
        listed = np.full(self._engine.log.n_items, items is None)
        if items is not None:
            listed[self._known("item", items)] = True
        if not_items is not None:
            listed[self._known("item", not_items)] = False
        if not listed.any():
            raise InputError("--items and --not-items: found no item to list, expected at least one")
        return listed
