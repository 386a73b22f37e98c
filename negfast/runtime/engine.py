"""Everything that stages, evaluation and serving share: data set, policy, trie, prior, histories on one device."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from negfast.config import Config
from negfast.data.dataset import Dataset
from negfast.data.features import HistoryFeatures
from negfast.data.log import DAY, EventLog
from negfast.data.split import Split, UserDays, user_days
from negfast.model.choice import TrieChooser
from negfast.model.fused_layers import fuse_layers
from negfast.model.histories import HistoryBuilder, item_text
from negfast.model.policy import Policy, narrow_stream
from negfast.sid.prior import DevicePrior
from negfast.sid.trie import Trie, build_trie

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from negfast.data.neighbours import ContentNeighbours, Neighbours

WIDTH_EVENTS = 100  # of the log are enough to count columns


@dataclass(frozen=True)
class Engine:
    """One job's parts, made by `build_engine`."""

    config: Config
    data: Dataset
    log: EventLog
    policy: Policy
    tokenizer: "PreTrainedTokenizerBase"  # missing where the engine only serves
    trie: Trie
    chooser: TrieChooser
    histories: HistoryBuilder
    device: torch.device
    fit_until: int  # days since 1970: what is learned or counted for training comes from events of days before

    @cached_property
    def features(self) -> HistoryFeatures:
        """Of the verdict; made when they are first asked for: no step is."""
        return history_features(self.data, self.fit_until, self.config.history.context)

    @cached_property
    def co_dislikes(self) -> "Neighbours":
        """Counted before T_valid."""
        from negfast.data.neighbours import co_dislike_neighbours

        return co_dislike_neighbours(self.log, self.data.valid_day)

    @cached_property
    def content(self) -> "ContentNeighbours":
        """Items of like content."""
        from negfast.data.neighbours import ContentNeighbours  # faiss and numba, which serving does without

        return ContentNeighbours(self.data.embedding)

    @cached_property
    def split(self) -> Split:
        return self.data.split()

    @cached_property
    def train_requests(self) -> UserDays:
        """Every active user-day whose future ends before ``fit_until``."""
        if self.fit_until == self.data.valid_day:
            return self.split.train
        return requests_before(self.data, self.fit_until)


def build_engine(
    config: Config,
    data: Dataset,
    policy: Policy,
    tokenizer: "PreTrainedTokenizerBase",
    device: torch.device,
    fit_until: int | None = None,
) -> Engine:
    """Puts the policy on ``device`` and builds the tables beside it. ``fit_until`` (days since 1970) is T_valid by
    default, later for a final refit."""
    fit_until = data.valid_day if fit_until is None else fit_until
    policy.in_bfloat16 = config.train.dtype == "bfloat16" or (config.train.dtype == "auto" and device.type == "cuda")
    if config.train.stream == "bfloat16" and policy.in_bfloat16:
        narrow_stream(policy)
    log, threads = data.log, torch.get_num_threads()
    trie = build_trie(data.codes, int(data.manifest["semantic_ids"]["codebook"]))
    prior = DevicePrior.build(trie, log, config.prior.half_life_days, config.prior.eps, device)
    text = None if policy.text_projection is None else item_text(data)
    histories = HistoryBuilder(data.shard, log, trie, policy.vocabulary, prior, config.history, device, threads, text)
    fuse_layers(policy.to(device), device)
    return Engine(
        config,
        data,
        log,
        policy,
        tokenizer,
        trie,
        TrieChooser(trie.to(device), config.prior.weight),
        histories,
        device,
        fit_until,
    )


def feature_width(data: Dataset) -> int:
    """How many features the verdict has, as `history_features` makes them of any log with these columns and items."""
    few, _ = data.log.of_users(np.unique(data.log.user[:WIDTH_EVENTS]))
    return HistoryFeatures(few, data.items, 0.5, 0.0, "day").width


def requests_before(data: Dataset, fit_until: int) -> UserDays:
    """Every active user-day whose future ends before ``fit_until``."""
    days = user_days(data.log, data.horizon)
    return days.only(days.moment + data.horizon * DAY <= data.log.cut(fit_until)[days.user])


def history_features(data: Dataset, fit_until: int, context: str) -> HistoryFeatures:
    """Features of the verdict, smoothed towards the rates and values of the events before ``fit_until``."""
    return HistoryFeatures.smoothed(data.log, data.items, fit_until, context, data.user_ids)
