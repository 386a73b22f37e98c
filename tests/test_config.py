"""Configuration: what wins, what is refused and how it says so, and that the written file reads back."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from negfast.config import PRESETS, Config, load_config, to_toml
from negfast.errors import InputError


def settings_of(config):
    return [(s.name, f) for s in dataclasses.fields(config) for f in dataclasses.fields(getattr(config, s.name))]


def values_within(kind, bounds):
    """A strategy for the values that a setting allows, from its type and bounds."""
    if kind is str:
        return st.sampled_from(bounds["choices"]) if bounds["choices"] else st.text(max_size=8).filter(is_plain)
    if kind is bool:
        return st.booleans()
    low = bounds["low"] if bounds["above"] is None else bounds["above"]
    if kind is int:
        return st.integers(low, bounds["high"])
    return st.floats(
        low, bounds["high"], exclude_min=bounds["above"] is not None, allow_nan=False, allow_infinity=False
    )


def is_plain(text):
    """TOML files are UTF-8 and hold no DEL."""
    return text.isprintable() and "\x7f" not in text


@st.composite
def configs(draw):
    config = Config()
    for section, setting in settings_of(config):
        value = draw(values_within(setting.type, setting.metadata))
        part = dataclasses.replace(getattr(config, section), **{setting.name: value})
        config = dataclasses.replace(config, **{section: part})
    return config


@given(config=configs())
@settings(max_examples=30, deadline=None)
def test_what_is_written_reads_back(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(to_toml(config), "utf-8")
    assert load_config(path) == config


def test_defaults_keep_their_own_bounds(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(to_toml(Config()))
    assert load_config(path) == Config() == load_config()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid(preset):
    config = load_config(preset=preset)
    for section, overrides in PRESETS[preset].items():
        for key, value in overrides.items():
            assert getattr(getattr(config, section), key) == value


def test_the_last_one_wins(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("[grpo]\nsteps = 7\nlr = 1\n[sft]\nsteps = 8\n")
    config = load_config(path, "smoke", ["grpo.lr=3e-5", "grpo.lr=4e-5", "train.device=cuda:1"])
    assert config.grpo.steps == 7  # file over preset
    assert config.grpo.group == PRESETS["smoke"]["grpo"]["group"]  # preset over default
    assert config.grpo.lr == 4e-5  # the later --set over the file
    assert config.sft.steps == 8
    assert config.train.device == "cuda:1"  # a bare word is a string
    assert config.align.lr == Config().align.lr


def test_an_integer_is_a_number_and_stays_float():
    lr = load_config(overrides=["sft.lr=1"]).sft.lr
    assert lr == 1.0
    assert type(lr) is float


def out_of_range():
    """Every setting with a value just outside each of its bounds."""
    for section, setting in settings_of(Config()):
        bounds, name = setting.metadata, f"{section}.{setting.name}"
        step = 1 if setting.type is int else 1e-6
        if bounds["low"] is not None:
            yield name, bounds["low"] - step, f"expected at least {bounds['low']}"
        if bounds["high"] is not None:
            yield name, bounds["high"] + step, f"expected at most {bounds['high']}"
        if bounds["above"] is not None:
            yield name, bounds["above"], f"expected more than {bounds['above']}"
        if bounds["choices"]:
            yield name, "nonsense", f"expected one of {', '.join(bounds['choices'])}"


def refusal(override):
    with pytest.raises(InputError) as error:
        load_config(overrides=[override])
    message = str(error.value)
    assert message.startswith("--set")
    assert "\n" not in message
    return message


def test_every_bound_is_kept():
    cases = list(out_of_range())
    assert len(cases) > 30
    for name, value, expected in cases:
        message = refusal(f"{name}={value}")
        assert name in message
        assert expected in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.stepz=1", "unknown key 'grpo.stepz', did you mean 'grpo.steps'?"),
        ("gpro.steps=1", "unknown section 'gpro', did you mean 'grpo'?"),
        ("prior.zzz=1", "unknown key 'prior.zzz', expected one of weight, half_life_days, eps"),
        ("grpo.steps=many", "grpo.steps is 'many', expected an integer"),
        ("grpo.steps=1.5", "grpo.steps is 1.5, expected an integer"),
        ("grpo.steps=true", "grpo.steps is True, expected an integer"),
        ("grpo.lr=true", "grpo.lr is True, expected a number"),
        ("train.device=1", "train.device is 1, expected a string"),
        ("grpo.lr=inf", "grpo.lr is inf, expected a finite number"),
        ("grpo.lr=nan", "grpo.lr is nan, expected a finite number"),
        ("grpo.steps", "'grpo.steps': expected section.key=value"),
        ("steps=1", "'steps=1': expected section.key=value"),
        ("history.window=3", "history.window is 3, expected at least 4"),
        ("sft.requests=64", "unknown key 'sft.requests', expected one of steps, "),
    ],
)
def test_a_bad_override_is_named(override, message):
    assert message in refusal(override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[grpo]\nstep = 1\n", "unknown key 'grpo.step', did you mean 'grpo.steps'?"),
        ("grpo = 1\n", "grpo is 1, expected a section [grpo]"),
        ("[grpo\n", "not TOML"),
        ("[grpo]\nsteps = -1\n", "grpo.steps is -1, expected at least 0"),
        ("[prompt]\ndislikes = 50\n", "unknown section 'prompt'"),
        ("[sft]\nverdicts = 64\n", "unknown key 'sft.verdicts'"),
        ("[grpo]\nrequests = 64\n", "unknown key 'grpo.requests'"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    path = tmp_path / "my.toml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_config(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_missing_file_and_unknown_preset(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(InputError, match="expected one of quickstart, smoke"):
        load_config(preset="fast")
