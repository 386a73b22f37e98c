"""A prior that is fitted: to the train days of its run, kept with it, and used by whoever opens it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from negfast.data.log import DISLIKE
from negfast.errors import InputError
from negfast.model.prompts import trending_items
from negfast.runtime.engine import mass_weights
from negfast.runtime.run_folder import RunFolder
from negfast.sid.mass_weights import decayed_mass, fit_weights
from negfast.train.run import open_stage


def test_the_weights_are_kept_with_the_run(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    fitted = ("prior.mass=fitted",)
    run, engine, _ = open_stage("sft", tiny_run / "config.toml", None, tiny_data, None, None, tmp_path / "run", fitted)
    data, settings = engine.data, engine.config.prior
    assert run.mass_weights == fit_weights(engine.log, engine.split.train)
    assert run.mass_weights == mass_weights(settings, data, data.valid_day)
    assert run.mass_weights != mass_weights(settings, data, data.test_day)  # a refit's
    log, prior = engine.log, engine.prompts.prior
    masses = run.mass_weights.masses(log, prior.first_day, int(log.day.max()))[..., engine.trie.leaf_item]
    torch.testing.assert_close(prior.mass[-1], torch.from_numpy(masses).float())
    assert prior.eps == 1.0
    of_dislikes = decayed_mass(log, DISLIKE, settings.half_life_days, prior.first_day, int(log.day.max()))
    wanted = trending_items(of_dislikes, engine.config.prompt.trending_cap)
    assert (engine.prompts.trending == wanted).all()  # dislikes alone, whatever the prior counts


def test_a_run_that_does_not_say_its_weights_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    read = run.read()
    del read["mass_weights"]
    run.description.write_text(json.dumps(read))
    with pytest.raises(InputError, match=r"run\.json: found no mass_weights"):
        run.finished_engine(tiny_run / read["data"])
