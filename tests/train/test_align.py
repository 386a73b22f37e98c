"""The item-level tasks: what they are trained on, what they measure, and that they can be learned."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from negfast.config import load_config
from negfast.data.dataset import Dataset
from negfast.errors import InputError
from negfast.model.histories import Histories
from negfast.runtime.engine import build_engine
from negfast.runtime.likelihood import Targets, code_ranks, target_log_probs
from negfast.runtime.run_folder import RunFolder
from negfast.train import text
from negfast.train.align import AlignStage, CoDisliked, held_out_items
from negfast.train.step import MicroBatch


@pytest.fixture
def make_engine(tiny_run):
    """An engine over the tiny log, its weights before the first step but for a random code head."""

    def make(*overrides):
        run = RunFolder(tiny_run)
        config = load_config(tiny_run / "config.toml", None, ["align.held_out=0.2", *overrides])
        dataset = Dataset.open(run.data)
        torch.manual_seed(5)
        policy, tokenizer = run.load_policy(dataset)
        engine = build_engine(config, dataset, policy, tokenizer, torch.device("cpu"))
        torch.nn.init.normal_(policy.block.head.weight, std=0.3)
        return engine

    return make


def test_text_loss_is_that_of_the_stock_model(make_engine):
    """Packed examples of several kinds against transformers' own attention, one sequence at a time."""
    engine = make_engine()
    policy, items = engine.policy, np.arange(12)
    examples = text.title_examples(engine, items)[:7] + text.attribute_examples(engine, items)[:6]
    packed = text.pack(engine, examples, 1)
    found = text.text_nll(policy, text.target_states(engine, packed), packed.targets)
    stock = Qwen3ForCausalLM._from_config(policy.decoder.config, attn_implementation="eager")
    stock.model.load_state_dict(policy.decoder.state_dict())
    stock.tie_weights()
    expected = 0.0
    for example in examples:
        codes = [
            engine.policy.vocabulary.code_base(level + 1) + int(c)
            for level, c in enumerate(engine.data.codes[example.item])
        ]
        prompt = [policy.vocabulary.marker("item"), *codes, policy.vocabulary.marker("text"), *example.question]
        tokens = torch.tensor(prompt + example.target)
        log_p = stock(inputs_embeds=policy.embed(tokens, True)[None]).logits[0].log_softmax(-1)
        for place, token in enumerate(example.target):
            expected -= log_p[len(prompt) + place - 1, token]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_what_is_asked_and_answered(make_engine):
    engine = make_engine()
    say = engine.tokenizer.decode
    titles, genres = (make(engine, np.arange(3)) for make in (text.title_examples, text.attribute_examples))
    end = engine.tokenizer.eos_token
    for item, (title, genre) in enumerate(zip(titles, genres, strict=True)):
        assert say(title.target) == engine.data.items.text[item] + end and title.question == []
        assert (say(genre.question), say(genre.target)) == (
            "genre:",
            f" {engine.data.items.attributes['genre'][item][0]}{end}",
        )


def test_nothing_held_out_is_trained_on(make_engine, monkeypatch):
    engine = make_engine()
    held = set(np.flatnonzero(held_out_items(engine)).tolist())
    assert 5 < len(held) < 40
    stage = AlignStage(engine)
    assert set(stage.tasks) == {"title_sid", "sid_title", "sid_attributes", "pair"}
    tasks: dict[str, Any] = stage.tasks
    assert set(tasks["title_sid"].items) | held == set(range(engine.log.n_items))
    assert set(tasks["title_sid"].held) == held
    for name in ("sid_title", "sid_attributes"):
        assert {e.item for e in tasks[name].train}.isdisjoint(held) and {e.item for e in tasks[name].held} == held
    assert len(tasks["pair"].held) and set(tasks["pair"].held).isdisjoint(tasks["pair"].users)
    assert np.array_equal(held_out_items(engine), held_out_items(make_engine("train.seed=0")))
    assert not np.array_equal(held_out_items(engine), held_out_items(make_engine("train.seed=9")))


def every_pair(pairs: CoDisliked, item: int) -> Targets:
    """All items as targets of one prompt."""
    engine, items = pairs.engine, torch.arange(pairs.engine.log.n_items)
    vocabulary = engine.policy.vocabulary
    prompts = pairs.prompts(np.array([item]))
    histories = Histories.of_prompts(prompts, vocabulary.marker("gap-0"), engine.device, has_text=False)
    markers = torch.full_like(items, vocabulary.marker("next-dislike"))
    return Targets(histories, np.zeros(len(items), dtype=np.int64), markers, items)


def test_code_ranks_are_those_of_whole_items(make_engine):
    """The probabilities of whole items, summed by brute force, rank the codes of every true node alike."""
    engine = make_engine()
    pairs = CoDisliked(engine, 8, 10**6, 0.0)
    n_items = engine.log.n_items
    codes = engine.data.codes
    with torch.no_grad():
        ranks = code_ranks(engine, every_pair(pairs, 3)).numpy()
        log_p = target_log_probs(engine, every_pair(pairs, 3), None, 0).double().numpy()
    mass = np.exp(log_p)
    np.testing.assert_allclose(mass.sum(), 1, rtol=1e-4)
    for item in range(n_items):
        for level in range(3):
            siblings = (codes[:, :level] == codes[item, :level]).all(1)
            by_code = np.bincount(codes[siblings, level], weights=mass[siblings])
            assert ranks[item, level] == (by_code > by_code[codes[item, level]]).sum()
    assert (ranks == 0).all(1).sum() == 1 and ranks[:, 0].mean() > 0


def test_equal_codes_are_ranked_in_their_order(make_engine):
    """A head of zeros says nothing, so it finds nothing: only the trie's lowest codes come first."""
    engine = make_engine()
    torch.nn.init.zeros_(engine.policy.block.head.weight)
    stage = AlignStage(engine)
    titles: Any = stage.tasks["title_sid"]
    ranks = titles.ranks(np.arange(engine.log.n_items))
    used = np.unique(engine.data.codes[:, 0])
    assert np.array_equal(ranks[:, 0], np.searchsorted(used, engine.data.codes[:, 0]))


def test_pair_hits_are_those_of_an_exhaustive_ranking(make_engine):
    engine = make_engine("eval.beam=90")
    pairs = CoDisliked(engine, 8, 10**6, 0.1)
    hits = pairs.accuracy()["hit@20"]
    first, second = pairs.draw(pairs.held, 100, np.random.default_rng(1))
    with torch.no_grad():
        ranks = {}
        for item in np.unique(first):
            log_p = target_log_probs(engine, every_pair(pairs, item), None, 0)
            log_p[item] = -torch.inf
            ranks[item] = log_p.argsort(descending=True).argsort().numpy()
    assert all(a != b for a, b in zip(first, second, strict=True))
    expected = np.mean([ranks[a][b] < 20 for a, b in zip(first, second, strict=True)])
    assert 0 < expected < 1 and hits == pytest.approx(expected, abs=0.2)  # two samples of pairs


def test_tasks_are_learned_and_speak_of_items_never_trained_on(make_engine):
    """Titles begin with a word that names the genre, and semantic IDs group them by it."""
    engine = make_engine("align.pairs=0", "align.titles=16")
    stage = AlignStage(engine)
    before = stage.outcome()
    optimizer = torch.optim.AdamW(engine.policy.parameters(), lr=5e-3)
    for step in range(90):
        result = stage.step(stage.read(step))
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = stage.outcome()
    assert after.keys() == before.keys()
    assert after["sid_attributes_genre_exact"] > 0.6 > 0.3 > before["sid_attributes_genre_exact"]
    assert after["sid_title_token"] > before["sid_title_token"] + 0.3
    assert after["title_sid_level1"] > before["title_sid_level1"] + 0.15
    assert after["title_sid_level1"] > after["title_sid_level1_chance"]
    assert after["title_sid_train_item"] > before["title_sid_train_item"]


def test_the_scale_of_another_run_is_not_kept(make_engine):
    """--init brings the scale that its valid days chose; align learns codes at their full scale."""
    stage, other = AlignStage(make_engine()), AlignStage(make_engine())
    other.policy.block.scale.fill_(0.1)
    assert other.step(other.read(0)).loss.item() == stage.step(stage.read(0)).loss.item()
    assert float(other.policy.block.scale) == 1


def test_shares_add_up(make_engine):
    engine = make_engine()
    stage = AlignStage(engine)
    whole = stage.step(stage.read(2))
    parts = [stage.step(stage.read(2, MicroBatch(index, 3))) for index in range(3)]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss, rtol=1e-4, atol=1e-5)
    assert sum(part.tokens for part in parts) == whole.tokens


def test_a_count_of_zero_switches_a_task_off(make_engine):
    off = [f"align.{name}=0" for name in ("titles", "sid_titles", "attributes", "pairs")]
    assert set(AlignStage(make_engine(*off[:3])).tasks) == {"pair"}
    assert set(AlignStage(make_engine(*off[1:])).tasks) == {"title_sid"}
    with pytest.raises(InputError, match="every task is off"):
        AlignStage(make_engine(*off))
    assert AlignStage(make_engine(*off, "align.steps=0")).tasks == {}


def test_without_anything_held_out_nothing_is_measured(make_engine):
    stage = AlignStage(make_engine("align.held_out=0"))
    assert stage.outcome() == {}


def test_a_run_notes_what_align_learned(tiny_run):
    events = [json.loads(line) for line in (tiny_run / "events.jsonl").read_text().splitlines()]
    [outcome] = [event for event in events if event["event"] == "outcome"]
    assert outcome["stage"] == "align" and 0 <= outcome["title_sid_level1"] <= 1
    assert f"| title_sid_level1 | {outcome['title_sid_level1']:.3f} |" in (tiny_run / "report.md").read_text()
