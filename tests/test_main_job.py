"""The main job through the command line: train, resume, eval, predict, score, export, and what is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from negfast.data.dataset import Dataset
from negfast.data.log import DAY
from negfast.evaluate.sets import evaluation_set
from negfast.runtime.generation import generate
from negfast.runtime.run_folder import RunFolder
from tests.tiny import run_cli, train_arguments


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_holds_what_it_should(tiny_run):
    for name in ("config.toml", "metrics.jsonl", "events.jsonl", "checkpoints", "final", "report.md"):
        assert (tiny_run / name).exists(), name
    steps = [(line["stage"], line["step"]) for line in lines(tiny_run / "metrics.jsonl")]
    expected = [("align", s) for s in range(1, 5)] + [("sft", s) for s in range(1, 7)]
    assert steps == expected + [("grpo", s) for s in range(1, 5)]
    for line in lines(tiny_run / "metrics.jsonl"):
        assert np.isfinite(line["loss"])
        assert (line["reward"] is not None) == (line["kl"] is not None) == (line["stage"] == "grpo")
    events = lines(tiny_run / "events.jsonl")
    assert events[0] == {"event": "start", "resumed_from": None} and events[-1]["event"] == "finished"
    told = [event for event in events if event["event"] == "implementations"]
    assert len(told) == 1 and told[0]["trie_grpo"] == told[0]["prompt_attention"] == "eager reference"
    report = (tiny_run / "report.md").read_text()
    for name in ("decay-4d", "boosted", "prior", "verdict", "sft", "grpo"):
        assert name in report


def test_finished_run_prints_its_table_again(tiny_run, tiny_data):
    before = (tiny_run / "metrics.jsonl").read_bytes()
    assert "grpo" in run_cli(*train_arguments(tiny_data, tiny_run))
    assert "grpo" in run_cli("train", "--out", str(tiny_run))
    assert (tiny_run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("moment", ["align", "sft", "grpo"])
def test_killed_run_goes_on_to_the_same_bits(tiny_run, tiny_data, tmp_path, moment):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "negfast", *train_arguments(tiny_data, run)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        metrics = run / "metrics.jsonl"
        if metrics.exists() and sum(f'"stage": "{moment}"' in line for line in metrics.open()) >= 3:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run_cli("train", "--out", str(run))
    assert (run / "metrics.jsonl").read_bytes() == (tiny_run / "metrics.jsonl").read_bytes()
    restart = [line for line in lines(run / "events.jsonl") if line["event"] == "start"][-1]
    assert restart["resumed_from"]["step"] >= 2
    weights = "final/policy.safetensors"
    assert (run / weights).read_bytes() == (tiny_run / weights).read_bytes()


def test_a_run_killed_while_its_verdict_is_fitted_ends_with_the_same_bits(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    description = RunFolder(run).read() | {"data": str(RunFolder(tiny_run).data)}
    (run / "run.json").write_text(json.dumps(description))
    shutil.rmtree(run / "final")
    (run / "report.md").unlink()
    said = run_cli("train", "--out", str(run))
    assert re.search(r"verdict: fitted on ([\d,]+) of \1 judgements, [\d.]+ s\ncalibration on valid: ", said)
    for name in ("metrics.jsonl", "report.md", "final/policy.safetensors", "final/state.json"):
        assert (run / name).read_bytes() == (tiny_run / name).read_bytes(), name


def test_the_verdict_is_fitted_after_the_last_stage(tiny_run):
    """Every checkpoint before the final weights has it as it began."""
    folders = [*(tiny_run / "checkpoints").iterdir(), tiny_run / "final"]
    assert {"initial", "align", "sft", "grpo", "best-sft"} <= {folder.name for folder in folders}
    weights = {folder.name: load_file(folder / "policy.safetensors") for folder in folders}
    assert [name for name, tensors in weights.items() if tensors["verdict.wide.weight"].any()] == ["final"]


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_gives_the_same_bits(tiny_data, tmp_path):
    """Each kill comes within a few steps of where the restart began, so they are spread over all stages, and each
    restart goes on from a checkpoint where one was left. The killed one reads ahead, the other does not."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    steps: dict[str, Any] = {"align__steps": 20, "sft__steps": 20, "grpo__steps": 20}
    run_cli(*train_arguments(tiny_data, whole, **steps))
    rng = np.random.default_rng()
    metrics, checkpoints = run / "metrics.jsonl", run / "checkpoints"
    stages, resumed = set(), 0
    for _ in range(20):
        left = any(path.name != "initial" and path.name[0] != "." for path in checkpoints.glob("*-*"))
        before = len(lines(run / "events.jsonl")) if left else 0
        last = steps_of(metrics)
        wanted, wait = last + int(rng.integers(1, 6)), rng.uniform(0, 0.2)
        process = subprocess.Popen(
            [sys.executable, "-m", "negfast", *train_arguments(tiny_data, run, **steps, train__prefetch="on")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not (started(run, before) and steps_of(metrics) >= min(wanted, 58)):
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if left:
            start = [line for line in lines(run / "events.jsonl") if line["event"] == "start"][-1]
            assert start["resumed_from"]["step"] > 0
            resumed += 1
        if steps_of(metrics):
            stages.add(lines(metrics)[-1]["stage"])
    assert resumed >= 15 and stages == {"align", "sft", "grpo"}
    run_cli("train", "--out", str(run))
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def steps_of(metrics: Path) -> int:
    """Whole lines of a file that may be cut short."""
    return metrics.read_text().count("\n") if metrics.exists() else 0


def started(run: Path, before: int) -> bool:
    """Whether a process has opened its journal since there were ``before`` events."""
    return steps_of(run / "events.jsonl") > before


def test_interrupt_saves_and_says_how_to_go_on(tiny_data, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "negfast", *train_arguments(tiny_data, run, sft__steps=2000)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (run / "metrics.jsonl").exists() or '"sft"' not in (run / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and f"negfast train --out {run}" in said and "Traceback" not in said
    assert any(path.name.startswith("1-sft-") for path in (run / "checkpoints").iterdir())


def test_eval_json_has_every_row_and_metric(tiny_run):
    output = run_cli("eval", str(tiny_run), "--json")
    answer = json.loads(output[output.index("{") :])
    assert set(answer) >= {"split", "requests", "primary_requests", "users", "rows"} and answer["split"] == "test"
    rows = {row["name"]: row for row in answer["rows"]}
    assert set(rows) >= {"popularity", "decay-4d", "item-rate", "logistic", "boosted"}
    assert list(rows)[-4:] == ["prior", "verdict", "sft", "grpo"]
    of_filter, of_lists = ("filter_auc", "filter_reduction", "pool_hr@10"), ("FHR@20", "soft_FHR@20")
    for name, own, others in (
        ("verdict", of_filter, of_lists),
        ("sft", of_lists, of_filter),
        ("grpo", of_lists, of_filter),
    ):
        assert not rows[name].keys() & set(others)
        for metric in own:
            cell = rows[name][metric]
            assert cell["low"] <= cell["mean"] <= cell["high"]
    report = json.loads((tiny_run / "report.json").read_text())
    assert report["rows"] == answer["rows"]


def test_prior_is_decay_up_to_ties(tiny_run):
    rows = {row["name"]: row for row in json.loads((tiny_run / "report.json").read_text())["rows"]}
    assert abs(rows["prior"]["FHR@20/all"]["mean"] - rows["decay-4d"]["FHR@20/all"]["mean"]) < 0.05


def test_predict_gives_every_user_unseen_items_in_order(tiny_run, tmp_path):
    out = tmp_path / "predictions.parquet"
    run_cli("predict", str(tiny_run), "--top", "7", "--out", str(out))
    table = parquet.read_table(out)
    assert table.column_names == ["user", "rank", "item", "score"]
    data = Dataset.open(RunFolder(tiny_run).data)
    rows = table.to_pylist()
    assert {row["user"] for row in rows} == set(data.user_ids)
    ids = {item: i for i, item in enumerate(data.items.ids)}
    for index, user in enumerate(data.user_ids[:20]):
        own = [row for row in rows if row["user"] == user]
        assert [row["rank"] for row in own] == list(range(1, len(own) + 1)) and len(own) == 7
        scores = [row["score"] for row in own]
        assert scores == sorted(scores, reverse=True) and min(scores) > 0 and sum(scores) <= 1 + 1e-6
        seen = set(data.log.item[data.log.user_offsets[index] : data.log.user_offsets[index + 1]].tolist())
        assert not {ids[row["item"]] for row in own} & seen


def test_score_is_a_probability_in_the_order_of_the_input(tiny_run, tmp_path):
    data = Dataset.open(RunFolder(tiny_run).data)
    rng = np.random.default_rng()
    users = [data.user_ids[i] for i in rng.integers(0, len(data.user_ids), 60)]
    items = [data.items.ids[i] for i in rng.integers(0, len(data.items), 60)]
    asked, out = tmp_path / "asked.parquet", tmp_path / "scored.parquet"
    parquet.write_table(pa.table({"user": users, "item": items, "note": list(range(60))}), asked)
    run_cli("score", str(tiny_run), str(asked), "--out", str(out))
    scored = parquet.read_table(out)
    assert scored["note"].to_pylist() == list(range(60)) and scored["user"].to_pylist() == users
    score = scored["score"].to_numpy()
    assert (score > 0).all() and (score < 1).all() and np.ptp(score) > 0
    shuffled = rng.permutation(60)
    parquet.write_table(pa.table({"user": users, "item": items}).take(pa.array(shuffled)), asked)
    run_cli("score", str(tiny_run), str(asked), "--out", str(out))
    assert np.allclose(parquet.read_table(out)["score"].to_numpy(), score[shuffled], atol=1e-6)


def test_looking_from_an_earlier_day_reads_nothing_later(tiny_run, tiny_data, tmp_path):
    """A log whose later events are all changed gives the same predictions and scores at the earlier day."""
    engine = RunFolder(tiny_run).finished_engine(None)
    day = engine.data.test_day
    before = tmp_path / "before.parquet"
    run_cli("predict", str(tiny_run), "--at", str(np.datetime64(day, "D")), "--top", "5", "--out", str(before))
    changed = tmp_path / "changed"
    shutil.copytree(tiny_data, changed)
    change_the_future(changed, day)
    after = tmp_path / "after.parquet"
    command = ["predict", str(tiny_run), "--data", str(changed), "--at", str(np.datetime64(day, "D"))]
    run_cli(*command, "--top", "5", "--out", str(after))
    assert parquet.read_table(before).equals(parquet.read_table(after))


def change_the_future(data: Path, day: int) -> None:
    """Flips feedback and permutes items of every event from ``day`` on, and rewrites the data set around it."""
    from dataclasses import replace

    from negfast.data.dataset import EVENTS, MANIFEST, file_record
    from negfast.data.shards import write_shard

    before, log = Dataset.open(data).fingerprint, Dataset.open(data).log
    later = log.day >= day
    item, feedback = log.item.copy(), log.feedback.copy()
    item[later] = np.random.default_rng(1).permutation(log.n_items)[item[later]]
    feedback[later] = 3 - feedback[later]
    write_shard(data / EVENTS, replace(log, item=item, feedback=feedback))
    manifest = json.loads((data / MANIFEST).read_text())
    manifest["extends"] = [before]  # so that a run of the data before takes it
    manifest["files"][EVENTS] = file_record(data / EVENTS)
    (data / MANIFEST).write_text(json.dumps(manifest))


def test_histories_and_prior_do_not_see_the_future(tiny_run, tiny_data, tmp_path):
    engine = RunFolder(tiny_run).finished_engine(None)
    day = engine.data.test_day
    changed = tmp_path / "changed"
    shutil.copytree(tiny_data, changed)
    change_the_future(changed, day + 1)
    other = RunFolder(tiny_run).finished_engine(changed)
    users = np.arange(engine.log.n_users, dtype=np.int32)
    moments = np.full(len(users), (day + 1) * DAY)
    for view in (1, 2, 3):
        a, b = (e.histories.build(users, moments, view) for e in (engine, other))
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.gap, b.gap)
        assert a.prior is not None and b.prior is not None
        for left, right in zip(a.prior.seen_mass, b.prior.seen_mass, strict=True):
            assert torch.equal(left, right)
    prior, changed_prior = engine.histories.prior, other.histories.prior
    rows = torch.arange(prior.levels[0].days)
    up_to = day - prior.first_day + 1
    for level in range(1, engine.trie.levels + 1):
        for branch in (0, 1):
            nodes = torch.arange(engine.trie.node_counts[level])[:, None]
            left, right = (p.mass(level, branch, rows, nodes) for p in (prior, changed_prior))
            assert torch.equal(left[:, :up_to], right[:, :up_to]) and not torch.equal(left, right)
    pairs = (users, np.zeros_like(users), moments)
    assert np.array_equal(engine.features.rich(*pairs), other.features.rich(*pairs), equal_nan=True)


def test_exported_model_opens_in_transformers_and_gives_the_policys_logits(tiny_run, tmp_path):
    out = tmp_path / "exported"
    run_cli("export", str(tiny_run), "--out", str(out))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    engine = RunFolder(tiny_run).finished_engine(None)
    vocabulary = engine.policy.vocabulary
    assert tokenizer.convert_tokens_to_ids("<|next-dislike|>") == vocabulary.marker("next-dislike")
    assert tokenizer.convert_tokens_to_ids("<|s2_3|>") == vocabulary.code_base(2) + 3
    evalset = evaluation_set(engine.log, engine.split, "test")
    histories = engine.histories.build(evalset.requests.user[:1], evalset.requests.moment[:1])
    hidden = histories.start(engine.policy, "next-dislike")
    marker = torch.full_like(histories.tokens[:1], vocabulary.marker("none"))
    marker[0, :2] = torch.tensor([vocabulary.marker("next-dislike"), histories.gap[0]])
    with torch.no_grad():
        embedded = model.get_input_embeddings()(torch.cat([histories.tokens, marker])).sum(1)
        logits = model(inputs_embeds=embedded[None]).logits[0, -1]
    assert torch.allclose(logits, engine.policy.full_logits(hidden)[0], atol=1e-4)
    assert json.loads((out / "items.json").read_text())["id"] == engine.data.items.ids


def test_generated_items_are_those_of_a_wider_beam(tiny_run):
    """On a catalogue this small the default beam is exact."""
    engine = RunFolder(tiny_run).finished_engine(None)
    requests = evaluation_set(engine.log, engine.split, "test").requests
    items, score = generate(engine, requests, top=10)
    assert (np.diff(score, axis=1) <= 1e-6).all() and (items >= 0).all()


def test_inspect_describes_run_checkpoint_and_table(tiny_run, tiny_data, tmp_path):
    assert "checkpoints/sft: " in run_cli("inspect", str(tiny_run))
    checkpoint = run_cli("inspect", str(tiny_run / "final"))
    assert "calibration" in checkpoint and "block.rows" in checkpoint
    assert "codes" in run_cli("inspect", str(tiny_data / "semantic_ids.safetensors"))
    copy = shutil.copytree(tiny_run, tmp_path / "run")
    weights = bytearray((copy / "checkpoints" / "sft" / "policy.safetensors").read_bytes())
    weights[-3] ^= 1
    (copy / "checkpoints" / "sft" / "policy.safetensors").write_bytes(weights)
    for path in (copy, copy / "checkpoints" / "sft"):
        assert "policy.safetensors: damaged: its SHA-256" in run_cli("inspect", str(path), code=2)
    (copy / "run.json").write_text('{"data": "da')
    for command in (["inspect", str(copy)], ["eval", str(copy)]):
        assert "run.json: damaged" in run_cli(*command, code=2)
    save_file({"a": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "brain.safetensors")
    assert "bfloat16" in run_cli("inspect", str(tmp_path / "brain.safetensors"))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((tiny_run / "final" / "policy.safetensors").read_bytes()[:-100])
    assert "damaged" in run_cli("inspect", str(damaged), code=2)


def test_an_export_replaces_nothing_but_an_export(tiny_run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for _ in range(2):  # into an empty folder, and in place of the first
        run_cli("export", str(tiny_run), "--out", str(out))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for taken in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex"):
        assert "exists and is no export" in run_cli("export", str(tiny_run), "--out", str(taken), code=2)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_a_run_in_a_linked_folder_finds_its_data(tiny_data, tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "deep" / "er")
    run = tmp_path / "runs" / "a"
    none: dict[str, Any] = {"align__steps": 0, "sft__steps": 0, "grpo__steps": 0}
    shutil.copytree(tiny_data, tmp_path / "data")
    for _ in range(2):  # the second time it finds itself
        run_cli(*train_arguments(tmp_path / "data", run, **none))
    assert RunFolder(run).finished_engine(None).data.path.resolve() == (tmp_path / "data").resolve()


def test_refusals(tiny_run, tiny_data, tmp_path):
    def refused(*command: str) -> str:
        output = run_cli(*command, code=2).strip().splitlines()
        assert output[-1].startswith("negfast: ") and not any("Traceback" in line for line in output)
        return output[-1]

    empty = tmp_path / "model"
    empty.mkdir()
    nowhere = tmp_path / "nowhere"
    assert "config.json" in refused(*train_arguments(tiny_data, nowhere, model=empty))
    assert not nowhere.exists()
    assert "other settings" in refused(*train_arguments(tiny_data, tiny_run, sft__steps=7))
    assert "run.json" in refused("eval", str(tmp_path))
    for command in ("predict", "user-profiles"):
        more = ["--attribute", "genre"] if command == "user-profiles" else []
        assert "is a directory" in refused(command, str(tiny_run), *more, "--out", str(tmp_path))
    late = "9999-12-31T23:00:00-05:00"
    assert "--at" in refused("predict", str(tiny_run), "--at", late, "--out", str(tmp_path / "x.parquet"))
    assert "sliding" not in refused("predict", str(tiny_run), "--at", "yesterday", "--out", str(tmp_path / "x.parquet"))
    asked = tmp_path / "asked.parquet"
    parquet.write_table(pa.table({"user": ["nobody", "else"], "item": ["i1", "i2"]}), asked)
    assert "no user is known, the first is 'nobody'" in refused(
        "score", str(tiny_run), str(asked), "--out", str(tmp_path / "y.parquet")
    )
    assert "cuda" in refused(*train_arguments(tiny_data, nowhere, train__device="cuda")) or torch.cuda.is_available()


def test_data_of_another_run_is_refused(tiny_run, tmp_path):
    from tests.tiny import write_log

    events, _ = write_log(tmp_path, seed=1)
    other = tmp_path / "other"
    command = ["prepare", str(events), "--dislike", "rating<=2", "--horizon", "5", "--codebook", "16"]
    run_cli(*command, "--out", str(other))
    output = run_cli("eval", str(tiny_run), "--data", str(other), code=2)
    assert "is not the data set that" in output.strip().splitlines()[-1]


def test_any_local_decoder_trains(tiny_data, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from negfast.model.load import train_tokenizer

    folder = tmp_path / "llama"
    tokenizer = train_tokenizer(["some text to learn from"] * 3, 300)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 5,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run = tmp_path / "run"
    short: dict[str, Any] = {"align__steps": 1, "sft__steps": 1, "grpo__steps": 1}
    run_cli(*train_arguments(tiny_data, run, model=folder, **short))
    assert (run / "report.md").exists()
    out = tmp_path / "exported"
    run_cli("export", str(run), "--out", str(out))
    tokens = AutoTokenizer.from_pretrained(out)
    assert tokens.convert_tokens_to_ids("<|none|>") == len(tokenizer) + 5
    assert os.path.exists(out / "model.safetensors")
