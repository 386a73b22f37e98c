"""The embedded Polis conversations: what they hold, their split, and the settings that a run of them gets."""

import pytest

from negfast.config import SAMPLES
from negfast.data.log import DISLIKE, LIKE
from negfast.prepare.build import SemanticIdSettings
from negfast.prepare.samples import POLIS, SETTINGS, prepare_polis
from negfast.runtime.run_folder import RunFolder
from negfast.train.start import TrainOptions, settings_of
from tests.tiny import run_cli


@pytest.mark.job
def test_the_conversations_are_split_each_by_its_own_time(tmp_path):
    data = prepare_polis(tmp_path / "data", semantic_ids=SemanticIdSettings(encoder="tfidf"), report=lambda _: None)
    counts = data.log.feedback_counts()
    assert (data.manifest["counts"]["users"], len(data.log)) == (5357, 227_085)
    assert (counts["dislikes"], counts["likes"]) == (50_589, 136_695)
    conversations = [values[0] for values in data.items.attributes["conversation"]]
    assert len(set(conversations)) == 11 and all(data.items.text)
    late = ~data.log.before(data.valid_day)
    judged = (data.log.feedback == DISLIKE) | (data.log.feedback == LIKE)
    for name in set(conversations):  # each has events to validate and test on
        of = [conversations[item] == name for item in data.log.item[late & judged].tolist()]
        assert any(of), name
    assert "Attribution to The Computational Democracy Project" in (POLIS / "LICENSE").read_text()


def test_a_run_of_the_sample_has_its_settings_and_place():
    assert tuple(SETTINGS) == SAMPLES
    run, settings = settings_of(TrainOptions(sample="polis"))
    assert settings.history.context == "event" and run == RunFolder(run.path) and run.path.name == "polis"
    _, chosen = settings_of(TrainOptions(sample="polis", overrides=("history.context=day",)))
    assert chosen.history.context == "day"
    assert settings_of(TrainOptions())[1].history.context == "day"


def test_a_sample_beside_data_is_refused(tiny_data, tmp_path):
    out = tmp_path / "run"
    said = run_cli("train", "--sample", "polis", "--data", str(tiny_data), "--out", str(out), code=2)
    assert "--sample polis: has no place beside --data" in said and not out.exists()
