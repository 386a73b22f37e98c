"""The plain-transformers example finds what an exhaustive search over the export finds."""

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import run_cli

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_constrained_generation_ranks_every_unseen_item(tiny_run: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "exported"
    run_cli("export", str(tiny_run), "--out", str(out))
    seen = ["i1", "i2", "i3"]
    command = [
        sys.executable,
        str(EXAMPLES / "transformers_constrained.py"),
        str(out),
        "--liked",
        *seen[:2],
        "--disliked",
        seen[2],
    ]
    done = subprocess.run([*command, "--top", "50"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [line.split("  ")[:2] for line in done.stdout.splitlines()]
    assert len({item for _, item in found}) == len(found) == 50 and not {item for _, item in found} & set(seen)

    monkeypatch.syspath_prepend(str(EXAMPLES))
    from transformers_constrained import Trie, prompt

    rows = parquet.read_table(out / "sid_table.parquet").to_pylist()
    tokens = {row["item"]: row["tokens"] for row in rows}
    items = [row["item"] for row in rows]
    trie = Trie(out, [items.index(item) for item in seen])
    start = prompt(AutoTokenizer.from_pretrained(out), tokens, seen[:2], seen[2:])
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    exact = {}
    for item in set(items) - set(seen):
        with torch.no_grad():
            logits = model(torch.tensor([start + tokens[item]])).logits[0, len(start) - 1 : -1]
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
