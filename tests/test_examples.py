"""The plain-transformers example finds what an exhaustive search over the export finds."""

import copy
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from transformers import AutoModelForCausalLM

from negfast.data.dataset import Dataset
from negfast.data.log import EventLog
from negfast.data.shards import open_shard, write_shard
from negfast.runtime.run_folder import RunFolder
from tests.tiny import run_cli

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_constrained_generation_ranks_every_unseen_item(tiny_run: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "exported"
    run_cli("export", str(tiny_run), "--out", str(out))
    seen, at = ["i1", "i2", "i3"], 1_600_400_000
    events = tmp_path / "events.csv"
    lines = [f"{seen[2]},dislike,1600090000", f"{seen[0]},like,1600000000", f"{seen[1]},like,1600000070"]
    later = f"i4,like,{at}"  # at the second that is asked about
    events.write_text("\n".join(["item,feedback,time", *lines, later]) + "\n")
    command = [sys.executable, str(EXAMPLES / "transformers_constrained.py"), str(out), str(events), "--at", str(at)]
    done = subprocess.run([*command, "--top", "50"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [line.split("  ")[:2] for line in done.stdout.splitlines()]
    assert len({item for _, item in found}) == len(found) == 50 and not {item for _, item in found} & set(seen)

    monkeypatch.syspath_prepend(str(EXAMPLES))
    from transformers_constrained import Trie, history_sums, read_about, read_events

    rows = parquet.read_table(out / "sid_table.parquet").to_pylist()
    tokens = {row["item"]: row["tokens"] for row in rows}
    items = [row["item"] for row in rows]
    about = read_about(out)
    trie = Trie(out, about, [items.index(item) for item in seen])
    sums = history_sums(about, tokens, read_events(events, tokens, at), at)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    embed = model.get_input_embeddings()
    start = embed(torch.tensor(sums)).sum(1)
    assert_the_positions_are_those_of_training(tiny_run, sums)
    exact = {}
    for item in set(items) - set(seen):
        with torch.no_grad():
            inputs = torch.cat([start, embed(torch.tensor(tokens[item]))])
            logits = model(inputs_embeds=inputs[None]).logits[0, len(start) - 1 : -1]
        allowed = [trie.children(tokens[item][:level])[0].tolist() for level in range(trie.levels)]
        parts = [
            row[codes].log_softmax(0)[codes.index(t)]
            for row, codes, t in zip(logits, allowed, tokens[item], strict=True)
        ]
        exact[item] = float(torch.stack(parts).sum().exp())
    assert sum(exact.values()) == pytest.approx(1, abs=1e-4)
    for score, item in found:
        assert float(score) == pytest.approx(exact[item], abs=2e-5)
    assert min(float(score) for score, _ in found) >= sorted(exact.values())[-50] - 2e-5


def test_ray_scores_what_the_command_scores(tiny_run: Path, tmp_path: Path) -> None:
    """On two local workers; the development environment has Ray."""
    data = Dataset.open(RunFolder(tiny_run).data)
    rng = np.random.default_rng(0)
    pairs = {"user": rng.choice([*data.user_ids, "nobody"], 300), "item": rng.choice(data.items.ids, 300)}
    candidates = tmp_path / "pairs.parquet"
    parquet.write_table(pa.table(pairs | {"n": np.arange(300)}), candidates)
    command = [sys.executable, str(EXAMPLES / "ray_score.py"), str(tiny_run), str(candidates), str(tmp_path / "scored")]
    done = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    run_cli("score", str(tiny_run), str(candidates), "--out", str(tmp_path / "whole.parquet"))
    found, whole = parquet.read_table(tmp_path / "scored").sort_by("n"), parquet.read_table(tmp_path / "whole.parquet")
    assert found.drop(["score"]).equals(whole.drop(["score"]))
    np.testing.assert_allclose(found["score"].to_numpy(), whole["score"].to_numpy(), rtol=1e-5)


def assert_the_positions_are_those_of_training(run: Path, sums: list[list[int]]) -> None:
    """For the same three events in a log, `HistoryBuilder` gives the same tokens, whatever their order in a sum."""
    engine = RunFolder(run).finished_engine(None)
    index = [engine.data.items.ids.index(item) for item in ("i1", "i2", "i3")]
    times = np.array([1_600_000_000, 1_600_000_070, 1_600_090_000])
    log = EventLog(
        np.array([0, 3]), np.array(index, np.int32), np.array([1, 1, 2], np.uint8), times, None, engine.log.n_items
    )
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder) / "events.nfs", log)
        builder = copy.copy(engine.histories)
        builder.shard, builder.log = open_shard(Path(folder) / "events.nfs"), log
        histories = builder.build(np.zeros(1, np.int32), np.array([1_600_400_000]), requests=np.zeros(1, bool))
    none = engine.policy.vocabulary.marker("none")
    expected = [sorted(token for token in row if token != none) for row in histories.tokens.tolist()]
    assert [sorted(token for token in row if token != none) for row in sums[:-1]] == expected
    assert histories.gap.item() in sums[-1]
