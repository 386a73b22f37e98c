"""What is settled, and refused, before a run does any work."""

from negfast.run_folder import RunFolder
from tests.tiny import SETTINGS, run_cli, train_arguments


def test_tensorboard_that_is_not_there_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("negfast.train.journal.find_spec", lambda _: None)
    out = tmp_path / "run"
    said = run_cli("train", "--preset", "smoke", "--set", "train.tensorboard=true", "--out", str(out), code=2)
    assert "train.tensorboard: found true, but tensorboard is not installed" in said and not out.exists()


def test_a_run_shows_the_model_that_it_inherits(tiny_run, tiny_data, tmp_path):
    out = tmp_path / "run"
    none = {"align__steps": 0, "sft__steps": 0, "grpo__steps": 0}
    command = [*train_arguments(tiny_data, out, model__hidden=64, **none), "--init", str(tiny_run)]
    for _ in range(2):  # the second time it goes on
        run_cli(*command)
    assert RunFolder(out).config.model.hidden == SETTINGS["model.hidden"] == 32
