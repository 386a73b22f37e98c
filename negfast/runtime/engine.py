"""Everything that stages, evaluation and serving share: data set, policy, trie, prior, prompts on one device."""

import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from negfast.config import Config, Prior
from negfast.data.dataset import Dataset
from negfast.data.features import HistoryFeatures
from negfast.data.log import DISLIKE, EventLog
from negfast.data.split import Requests, Split, all_requests
from negfast.errors import InputError
from negfast.model.choice import TrieChooser
from negfast.model.fused_layers import fuse_layers
from negfast.model.policy import Policy
from negfast.model.prompts import PromptBuilder, trending_items
from negfast.runtime import distributed
from negfast.sid.mass_weights import MassWeights, decay_weights, decayed_mass, fit_weights
from negfast.sid.prior import DevicePrior
from negfast.sid.trie import Trie, build_trie

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    prompts: PromptBuilder
    features: HistoryFeatures
    device: torch.device
    fit_until: int  # days since 1970: what is learned or counted for training comes from events of days before

    @cached_property
    def split(self) -> Split:
        return self.data.split()

    @cached_property
    def train_requests(self) -> Requests:
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
    weights: MassWeights,
    fit_until: int | None = None,
) -> Engine:
    """Puts the policy on ``device`` and builds the tables beside it: the community prior by ``weights``, as the run
    keeps them (`mass_weights`). ``fit_until`` (days since 1970) is T_valid by default, later for a final refit."""
    fit_until = data.valid_day if fit_until is None else fit_until
    policy.in_bfloat16 = config.train.dtype == "bfloat16" or (config.train.dtype == "auto" and device.type == "cuda")
    log, threads = data.log, torch.get_num_threads()
    trie = build_trie(data.codes, int(data.manifest["semantic_ids"]["codebook"]))
    first_day, last_day = int(log.day.min()) - 1, int(log.day.max())
    dislike_mass, like_mass = weights.masses(log, first_day, last_day)
    lately_disliked = dislike_mass  # a fitted one holds likes too
    if config.prior.mass != "decay":
        lately_disliked = decayed_mass(log, DISLIKE, config.prior.half_life_days, first_day, last_day)
    prior = DevicePrior.build(trie, dislike_mass, like_mass, first_day, weights.eps, device)
    prompts = PromptBuilder(
        data.shard,
        trie,
        policy.vocabulary,
        prior,
        trending_items(lately_disliked, config.prompt.trending_cap),
        config.prompt,
        device,
        threads,
    )
    fuse_layers(policy.to(device), device)
    return Engine(
        config,
        data,
        log,
        policy,
        tokenizer,
        trie,
        TrieChooser(trie.to(device), config.prior.weight),
        prompts,
        history_features(data, fit_until),
        device,
        fit_until,
    )


def mass_weights(settings: Prior, data: Dataset, fit_until: int) -> MassWeights:
    """What makes the community prior by ``settings``; fitted to futures that end before ``fit_until``."""
    if settings.mass == "decay":
        return decay_weights(settings.half_life_days, settings.eps)
    return fit_weights(data.log, requests_before(data, fit_until))


def requests_before(data: Dataset, fit_until: int) -> Requests:
    """Every active user-day whose future ends before ``fit_until``."""
    requests = all_requests(data.log, data.horizon)
    return requests.take(requests.day.astype(np.int64) + data.horizon < fit_until)


def history_features(data: Dataset, fit_until: int) -> HistoryFeatures:
    """Features of the verdict's prior, smoothed towards the rates and values of the events before ``fit_until``."""
    log = data.log
    early = (log.day < fit_until) & log.judged
    rate = float((log.feedback[early] == DISLIKE).mean()) if early.any() else 0.5
    value = np.zeros(0) if log.value is None else log.value[early]
    known = value[np.isfinite(value)]
    return HistoryFeatures(log, data.items, rate, float(known.mean()) if len(known) else 0.0)


def choose_device(name: str) -> torch.device:
    """The device of ``train.device``: "auto" takes CUDA where there is one. InputError where it is not to be had."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"train.device: found {name!r}, expected auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"train.device: found {name!r}, expected auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device: found cuda, but this machine has no usable CUDA device")
    if device.index is not None:
        torch.cuda.set_device(device)  # where kernels are launched and streams are taken from
    return device


def use_threads(count: int) -> None:
    """Sets the CPU threads of `train.threads`; 0 takes all that the process may use, shared with the other ranks."""
    torch.set_num_threads(count or max(1, len(os.sched_getaffinity(0)) // distributed.local_size()))
