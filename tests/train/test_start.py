"""What is settled, and refused, before a run does any work."""

import re
from typing import Any

import pytest
from safetensors.torch import load_file

from negfast.config import load_config
from negfast.errors import InputError
from negfast.runtime.run_folder import RunFolder
from negfast.train.combinations import check_combinations
from tests.tiny import SETTINGS, run_cli, train_arguments


def test_tensorboard_that_is_not_there_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("negfast.train.journal.find_spec", lambda _: None)
    out = tmp_path / "run"
    said = run_cli("train", "--preset", "smoke", "--set", "train.tensorboard=true", "--out", str(out), code=2)
    assert "train.tensorboard: found true, but tensorboard is not installed" in said and not out.exists()


def test_a_run_shows_the_model_that_it_inherits(tiny_run, tiny_data, tmp_path):
    out = tmp_path / "run"
    none: dict[str, Any] = {"align__steps": 0, "sft__steps": 0, "grpo__steps": 0}
    command = train_arguments(tiny_data, out, tiny_run, **none)
    for _ in range(2):  # the second time it goes on
        run_cli(*command)
    assert RunFolder(out).config.model.hidden == SETTINGS["model.hidden"] == 32


def test_a_run_from_another_fits_the_verdict_anew(tiny_run, tiny_data, tmp_path):
    """On the same data and seed it ends where the first fit ended: it does not go on from there."""
    out = tmp_path / "run"
    none: dict[str, Any] = {"align__steps": 0, "sft__steps": 0, "grpo__steps": 0}
    run_cli(*train_arguments(tiny_data, out, tiny_run, **none))
    first = load_file(out / "checkpoints" / "initial" / "policy.safetensors")
    assert not first["verdict.wide.weight"].any() and not first["verdict.last"].any()
    ended, before = (load_file(run / "final" / "policy.safetensors") for run in (out, tiny_run))
    assert ended["verdict.wide.weight"].any()
    wide = [float(weights["verdict.wide.weight"].norm()) for weights in (ended, before)]
    assert wide[0] == pytest.approx(wide[1], rel=0.1)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.kv_heads=3", "model.heads: found 2, expected a multiple of model.kv_heads=3"),
        ("model.head_dim=33", "model.head_dim: found 33, expected an even number"),
    ],
)
def test_a_shape_that_is_none_is_refused_before_there_is_a_run(tiny_data, tmp_path, setting, said):
    out = tmp_path / "run"
    assert said in run_cli(*train_arguments(tiny_data, out), "--set", setting, code=2)
    assert not out.exists()


def test_views_that_are_more_than_all_are_refused():
    with pytest.raises(InputError, match=r"sft\.negative_view \+ sft\.positive_view: found 1\.3, expected at most 1"):
        check_combinations(load_config(overrides=("sft.negative_view=0.9", "sft.positive_view=0.4")))


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        (("grpo.mixed_share=0.5",), "grpo.mixed_share: found 0.5, but it does nothing with grpo.schedule=mixed"),
        (("grpo.schedule=static", "grpo.negative_phase=0.1"), "grpo.negative_phase: found 0.1"),
        (("grpo.clip_high=0.3",), "grpo.clip_high: found 0.3, but it does nothing with grpo.epochs=1"),
        (("grpo.beta=0", "grpo.kl=k3"), "grpo.kl: found k3"),
        (("reward.collab_weight=0", "reward.collab_cap=0.3"), "reward.collab_cap: found 0.3"),
        (("prior.weight=0", "prior.eps=0.5"), "prior.eps: found 0.5"),
    ],
)
def test_a_setting_that_does_nothing_beside_others_is_refused(settings, idle):
    with pytest.raises(InputError, match=re.escape(idle)):
        check_combinations(load_config(overrides=settings))


def test_the_same_settings_are_taken_where_they_do_something():
    check_combinations(load_config(overrides=("grpo.epochs=2", "grpo.clip_high=0.3")))
    check_combinations(load_config(overrides=("grpo.schedule=progressive", "grpo.negative_phase=0.1")))


def test_settings_that_another_option_makes_meaningless_are_refused(tiny_run, tiny_data, tmp_path):
    for options, said in (
        (("--model", str(tmp_path)), "model.hidden: does nothing beside --model"),
        (("--init", str(tiny_run), "--data", str(tiny_data)), "model.hidden: does nothing beside --init"),
    ):
        command = ["train", "--set", "model.hidden=64", *options, "--out", str(tmp_path / "run")]
        assert said in run_cli(*command, code=2)
    command = ["train", "--set", "sample.encoder=tfidf", "--data", str(tiny_data), "--out", str(tmp_path / "run")]
    assert "sample.encoder: does nothing beside --data" in run_cli(*command, code=2)
    assert not (tmp_path / "run").exists()


def test_an_execution_setting_is_asked_of_a_run_as_it_is(tiny_run):
    """Without preset and file the run's own settings are meant, not the quickstart's."""
    run_cli("train", "--out", str(tiny_run), "--set", "train.threads=2")
    said = run_cli("train", "--out", str(tiny_run), "--set", "sft.steps=9", code=2)
    assert "was started with other settings" in said
