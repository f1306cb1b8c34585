"""From a file and overrides to a configuration and back."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
import yaml
from config_examples import TREE, assert_sentence, tree_with
from hypothesis import given
from hypothesis import strategies as st

from megatron_mdm.config import Config, dump_config, load_config, parse_config
from megatron_mdm.core.errors import ConfigError


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


def test_a_dumped_config_loads_to_an_equal_one(recipe, tmp_path):
    config = load_config(recipe, ["model.preset=dc-7M", "optimizer.lr=3e-5", "optimizer.min_lr=0"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_text_survives_the_round_trip(text):
    config = parse_config(tree_with(reporting__wandb_project=text))
    assert_round_trip(config)


@pytest.mark.parametrize("text", ["123e4567", "1e5", "-2E+3", "0x1f", "null", "yes", "1:30", ""])
def test_text_that_looks_like_another_type_survives_the_round_trip(text):
    assert_round_trip(parse_config(tree_with(reporting__wandb_project=text)))


def assert_round_trip(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(path) == config


def test_overrides_reach_fields_sections_and_list_entries(recipe):
    overrides = [
        "optimizer.lr=1e-3",
        "data.train.1.path=other",
        "objective.kind=ar",
        "data.valid=[{path: held_out}]",
        "model.num_query_groups=2",
    ]
    config = load_config(recipe, overrides)
    assert config.optimizer.lr == 0.001
    assert [source.path for source in config.data.train] == ["a", "other"]
    assert config.objective.kind == "ar"
    assert config.data.valid[0].path == "held_out"
    assert config.model.query_groups == 2


@pytest.mark.parametrize("word", ["on", "off", "auto"])
def test_a_choice_of_on_and_off_takes_these_words(recipe, word):
    assert load_config(recipe, [f"run.compile={word}"]).run.compile == word


@pytest.mark.parametrize("override", ["seed", "seed=1", "run..seed=1", "=1", "run.seed"])
def test_an_argument_that_is_no_override_says_how_to_write_one(recipe, override):
    with pytest.raises(ConfigError, match=r"is not an override: write section\.key=value"):
        load_config(recipe, [override])


@pytest.mark.parametrize("key", ["data.train.7.path", "run.dir.deeper", "data.train.0.path.x"])
def test_an_override_that_leads_nowhere_is_refused(recipe, key):
    with pytest.raises(ConfigError, match=f"{re.escape(key)} does not lead to a field"):
        load_config(recipe, [f"{key}=1"])


def test_a_length_on_the_command_line_replaces_the_recipes(recipe):
    schedule = load_config(recipe, ["schedule.tokens=1e6"]).schedule
    assert (schedule.steps, schedule.tokens) == (None, 1_000_000)


@pytest.mark.parametrize("last", ["warmup_steps=3", "warmup_fraction=0.5"])
def test_a_warmup_on_the_command_line_replaces_the_other(recipe, last):
    overrides = ["schedule.warmup_steps=1", "schedule.warmup_fraction=0.1", f"schedule.{last}"]
    schedule = load_config(recipe, [*overrides, "schedule.steps=4"]).schedule
    found = schedule.warmup_steps, schedule.warmup_fraction
    assert found == ((3, None) if "steps" in last else (None, 0.5))


@pytest.mark.parametrize("text", ["1e19", "1E19", "1e+19", "1.0e19", "10000000000000000000"])
def test_scientific_notation_is_a_number(recipe, text):
    assert load_config(recipe, [f"schedule.flops={text}"]).schedule.flops == 1e19


def test_words_that_only_resemble_numbers_stay_text(recipe):
    assert load_config(recipe, ["run.dir=1e19x"]).run.dir == "1e19x"
    assert load_config(recipe, ["run.dir='1e19'"]).run.dir == "1e19"


def test_a_yaml_tag_runs_nothing(tmp_path):
    witness = tmp_path / "witness"
    path = tmp_path / "evil.yaml"
    path.write_text(f"run: !!python/object/apply:os.system ['touch {witness}']")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(path)
    path.write_text(yaml.safe_dump(TREE))
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(path, [f"run.dir=!!python/object/apply:os.system ['touch {witness}']"])
    assert not witness.exists()


def test_a_repeated_key_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("run:\n  dir: a\n  seed: 1\n  seed: 2\n")
    with pytest.raises(ConfigError, match=r"line 2, column 3: the key 'seed' stands twice"):
        load_config(path)


def test_a_merged_key_may_be_overridden(recipe):
    with recipe.open("a") as stream:
        stream.write("optimizer: {<<: {lr: 1.0e-3, beta2: 0.9}, lr: 5.0e-4}\n")
    optimizer = load_config(recipe).optimizer
    assert (optimizer.lr, optimizer.beta2) == (5e-4, 0.9)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "a: [",
        "\ta: 1",
        "a: *b",
        "a: 1\n---\nb: 1",
        "? [1]\n: 2",
        "run: 2024-13-45",
        "[" * 9000,
    ],
    ids=["empty", "scalar", "open", "tab", "alias", "two", "list key", "date", "deep"],
)
def test_a_broken_file_is_named(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert_sentence(str(caught.value))
    assert str(caught.value).startswith(str(path))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.yaml", "binary.yaml", "."):
        with pytest.raises(ConfigError, match=r"cannot be read .*: give --config a YAML file\."):
            load_config(tmp_path / name)
