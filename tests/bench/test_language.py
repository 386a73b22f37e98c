"""The language arm of the experiment on taste: what it asks, and what a question sees."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.language import BLOCK, Judge, Reader, Window, asked_logits, draw_windows, fine_tuned, questions
from negfast.data.dataset import Dataset
from negfast.data.log import DAY, DISLIKE, LIKE
from negfast.data.split import first_feedback
from negfast.model.load import train_tokenizer


def tiny_language_model(folder: Path) -> Path:
    tokenizer = train_tokenizer(["The grim story: dislike\nThe quiet story: like\n"] * 3, 300)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 5,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(tiny_language_model(tmp_path_factory.mktemp("language")), 1)


def test_windows_ask_about_first_judgements_of_the_days_once(tiny_data: Path) -> None:
    data = Dataset.open(tiny_data)
    log = data.log
    first = first_feedback(log)
    first = first[(log.before(data.end_day) & ~log.before(data.test_day))[first]]
    every = draw_windows(log, data.test_day, data.end_day, 10**6, np.random.default_rng(0))
    assert np.array_equal(questions(every), first)
    some = draw_windows(log, data.test_day, data.end_day, 60, np.random.default_rng(0))
    assert 60 <= len(questions(some)) < 60 + BLOCK and np.isin(questions(some), first).all()
    for window in every:
        assert len(np.unique(log.user[window.rows])) == 1 and (np.diff(window.rows) > 0).all()


@pytest.mark.parametrize("context", ["event", "day"])
def test_a_question_sees_what_came_before_its_moment(tiny_data: Path, reader: Reader, context: str) -> None:
    """Turning a judgement round changes later answers of the same user, and none before it or of its own moment."""
    data = Dataset.open(tiny_data)
    log, items = data.log, data.items
    windows = [Window(np.arange(*log.user_offsets[user : user + 2])[:12], np.ones(12, bool)) for user in (3, 4)]
    judge = Judge(reader)

    def asked(log) -> np.ndarray:
        packs = reader.packs(log, items, context, windows)
        assert len(packs) == 1
        return asked_logits(judge, packs, reader.states(packs))

    before, turned = asked(log), log.feedback.copy()
    row = windows[1].rows[5]
    turned[row] = LIKE if turned[row] == DISLIKE else DISLIKE
    changed = asked(replace(log, feedback=turned)) != before
    moments = log.moments(context)[questions(windows)]
    later = (log.user[questions(windows)] == log.user[row]) & (moments > log.time[row])
    if context == "day":
        assert np.array_equal(later, (log.user[questions(windows)] == 4) & (moments // DAY > log.day[row]))
    assert changed[later].all() and later.sum() > 3
    assert not changed[: np.flatnonzero(later)[0]].any()


def test_what_is_learned_is_what_is_told(tiny_data: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """After many steps the logits are those of the judgements that were learned from."""
    monkeypatch.setattr("bench.language.RATE", 1e-2)
    data = Dataset.open(tiny_data)
    windows = draw_windows(data.log, 0, data.valid_day, 40, np.random.default_rng(0))
    packs = reader.packs(data.log, data.items, "event", windows)
    states = reader.states(packs)
    judge = fine_tuned(reader, packs, states, 40, 0)
    found = asked_logits(judge, packs, states)
    label = data.log.feedback[questions(windows)] == DISLIKE
    assert found[label].mean() > found[~label].mean() + 1
    again = asked_logits(fine_tuned(reader, packs, states, 40, 0), packs, states)
    assert np.array_equal(found, again)
