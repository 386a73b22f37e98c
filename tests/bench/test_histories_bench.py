"""The sides of `bench histories` train the same targets: whole histories, a history a request, the Trainer's rows."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.histories import Task, measure, ratios_of, run
from bench.history_sides import RowModel, apart, count_targets, open_stage, rows_of, shared
from negfast.errors import InputError
from negfast.train.sft import SftBatch, SftStage
from tests.tiny import SETTINGS
from tests.train.small import take_norms_in_their_own_dtype

SHAPE = [f"{key}={value}" for key, value in SETTINGS.items() if key.startswith("model.")]
OVERRIDES = [*SHAPE, "sft.histories=6", "sft.requests_per_history=20", "history.window=24"]


@pytest.fixture(params=["events", "codes"])
def stage(request: pytest.FixtureRequest, tiny_data: Path) -> SftStage:
    made = open_stage(tiny_data, [*OVERRIDES, f"history.positions={request.param}", "history.context=event"])
    torch.nn.init.normal_(made.engine.policy.block.head.weight, std=0.2)
    return made


def loss_and_gradient(stage: SftStage, batches: list[SftBatch]) -> tuple[float, list[torch.Tensor]]:
    stage.engine.policy.zero_grad()
    loss = 0.0
    for batch in batches:
        part = stage.step(batch).loss
        part.backward()
        loss += part.item()
    return loss, [p.grad.clone() for p in stage.engine.policy.parameters() if p.grad is not None]


def test_histories_and_requests_are_the_same_step(stage: SftStage) -> None:
    take_norms_in_their_own_dtype(stage.engine.policy)
    stage.engine.policy.double()
    together, each = shared(stage, 1, 2), apart(stage, 1, 3)
    assert count_targets(together) == count_targets(each) > 50
    positions = [sum(len(batch.histories.tokens) for batch in batches) for batches in (each, together)]
    assert positions[0] > 3 * positions[1]
    loss, gradient = loss_and_gradient(stage, together)
    other_loss, other_gradient = loss_and_gradient(stage, each)
    assert abs(loss - other_loss) < 1e-7 * abs(loss)
    assert len(gradient) == len(other_gradient) > 10
    for found, expected in zip(other_gradient, gradient, strict=True):
        assert (found - expected).norm() <= 1e-7 * expected.norm()


def test_rows_hold_what_a_branch_sees_and_its_target(stage: SftStage) -> None:
    batches = apart(stage, 1, 1)
    rows = rows_of(stage, batches[0])
    assert len(rows) == count_targets(batches)
    assert sum(len(row["labels"]) for row in rows) > sum(batch.tokens for batch in batches)
    items, vocabulary = batches[0].items, stage.engine.policy.vocabulary
    assert items is not None
    last = rows[len(items.targets.items) - 1]
    levels = stage.engine.trie.levels
    codes = stage.engine.histories.item_token_ids[items.targets.items[-1]]
    assert last["labels"][-levels:].tolist() == codes.tolist() and (last["labels"][:-levels] == -100).all()
    assert last["input_ids"][-levels, 0] == items.targets.markers[-1]
    assert last["input_ids"][1 - levels :, 0].tolist() == codes[:-1].tolist()
    assert last["input_ids"][0, -2] == vocabulary.marker("history") or last["input_ids"][0, 0] == vocabulary.marker(
        "history"
    )
    some = rows[:2]
    padded = {
        name: torch.nn.utils.rnn.pad_sequence([row[name] for row in some], True, fill)
        for name, fill in {"input_ids": vocabulary.marker("none"), "labels": -100}.items()
    }
    model = RowModel(stage)
    together = model(**padded)["loss"]
    alone = [model(**{name: value.unsqueeze(0) for name, value in row.items()})["loss"] for row in some]
    assert together.item() == pytest.approx(np.mean([loss.item() for loss in alone]), rel=1e-5)


def test_sides_take_turns(tiny_data: Path) -> None:
    rows = measure(Task("tiny", tiny_data, tuple(OVERRIDES), 2, 1), None, peers=True)
    assert [row["system"] for row in rows] == ["histories", "requests", "trainer"]
    assert rows[0]["targets"] == rows[1]["targets"]
    assert rows[0]["flops"] < rows[1]["flops"] < rows[2]["flops"]
    assert rows[0]["positions"] < rows[1]["positions"] < rows[2]["positions"]
    ratios = ratios_of(rows)
    assert [ratio["peer"] for ratio in ratios] == ["requests", "trainer"]
    assert all(ratio["predicted"] > 1 and ratio["ratio"] > 0 for ratio in ratios)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"only": "polls"}, "--only: found 'polls'"),
        ({"only": "polis", "data": Path("nowhere")}, "--data: found no folder 'polis' in nowhere"),
        ({"settings": "history.windows=3"}, "unknown key 'history.windows'"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: dict, found: str) -> None:
    with pytest.raises(InputError, match=found):
        run(**options)
