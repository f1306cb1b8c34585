from __future__ import annotations

import copy
import re
import tempfile
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from megatron_mdm.config import Config, config_from_dict, dump_config, load_config
from megatron_mdm.config.continuation import config_as_saved
from megatron_mdm.errors import ConfigError

TREE = {
    "run": {"dir": "runs/x"},
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_hidden_size": 128,
        "vocab_size": 100,
    },
    "data": {"train": [{"path": "a"}, {"path": "b"}], "seq_length": 32},
    "batch": {"global_batch_size": 8},
    "schedule": {"steps": 5},
}


def tree_with(**changes):
    """Keys are section__field or section."""
    tree = copy.deepcopy(TREE)
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            tree.setdefault(section, {})[field] = value
        else:
            tree[section] = value
    return tree


def message_of(tree) -> str:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(tree)
    return str(caught.value)


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


def sections_below(section) -> set[type[BaseModel]]:
    found = {section}
    for field in section.model_fields.values():
        for leaf in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(leaf, type) and issubclass(leaf, BaseModel):
                found |= sections_below(leaf)
    return found


def test_a_dumped_config_loads_to_an_equal_one(recipe, tmp_path):
    config = load_config(recipe, ["model.preset=dc-7M", "optimizer.lr=3e-5", "optimizer.min_lr=0"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_text_survives_the_round_trip(text):
    config = config_from_dict(tree_with(reporting__wandb_project=text))
    assert_round_trip(config)


@pytest.mark.parametrize("text", ["123e4567", "1e5", "-2E+3", "0x1f", "null", "yes", "1:30", ""])
def test_text_that_looks_like_another_type_survives_the_round_trip(text):
    assert_round_trip(config_from_dict(tree_with(reporting__wandb_project=text)))


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


@pytest.mark.parametrize("text", ["1e19", "1E19", "1e+19", "1.0e19", "10000000000000000000"])
def test_scientific_notation_is_a_number(recipe, text):
    assert load_config(recipe, [f"schedule.flops={text}"]).schedule.flops == 1e19


def test_words_that_only_resemble_numbers_stay_text(recipe):
    assert load_config(recipe, ["run.dir=1e19x"]).run.dir == "1e19x"
    assert load_config(recipe, ["run.dir='1e19'"]).run.dir == "1e19"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optimiser": {}}, "optimiser is not a known key: did you mean optimizer?"),
        ({"optimizer__min_lrr": 1}, "optimizer.min_lrr is not a known key: did you mean min_lr?"),
        ({"data__train": [{"pth": "x"}]}, "data.train.0.pth is not a known key: did you mean path"),
        (
            {"model__num_layrs": 3},
            "model.num_layrs is not a known key: did you mean num_layers?",
        ),
    ],
)
def test_a_misspelt_key_names_the_nearest(changes, told):
    assert message_of(tree_with(**changes)).startswith(told)


def test_a_key_like_no_other_lists_the_valid_ones():
    assert message_of(tree_with(run__zzz=1)).endswith(
        "valid keys are dir, seed, initial_weights, device, dtype, compile, num_threads."
    )


def test_a_misspelt_key_is_named_before_the_missing_one():
    tree = tree_with()
    tree["model"]["hiden_size"] = tree["model"].pop("hidden_size")
    assert "did you mean hidden_size?" in message_of(tree)


def test_a_config_is_frozen():
    config = config_from_dict(TREE)
    with pytest.raises(ValidationError, match="frozen"):
        config.run.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.run = config.run


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        ({}, "but none is set: set one, or state epochs for every source of data.train."),
        ({"steps": None}, "but none is set: set one, or state epochs for every source"),
        ({"steps": 1, "epochs": 2.5}, "schedule.steps=1 and schedule.epochs=2.5 are set: keep one"),
        (
            {"tokens": 1, "flops": 1e9, "steps": 3},
            "schedule.steps=3 and schedule.tokens=1 and schedule.flops=1000000000.0 are set",
        ),
        ({"steps": 9, "warmup_steps": 1, "warmup_fraction": 0.1}, "are both set: keep one."),
    ],
)
def test_a_run_has_exactly_one_length(schedule, told):
    assert told in message_of(tree_with(schedule=schedule))


@pytest.mark.parametrize("length", [{"steps": 3}, {"tokens": 9}, {"epochs": 0.5}, {"flops": 1e18}])
def test_each_length_is_accepted_alone(length):
    assert config_from_dict(tree_with(schedule=length)).schedule.model_dump(
        exclude_none=True
    ).items() >= (length.items())


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


INVALID = {
    "section is a number": ({"model": 5}, "model=5 is not a section"),
    "section is null": ({"schedule": None}, "schedule=null is not a section"),
    "source is a number": ({"data__train": [3]}, "data.train.0=3 is not a section"),
    "no sources": ({"data__train": []}, "data.train=[] is not valid: it should have at least one"),
    "sources are text": ({"data__train": "x"}, "data.train='x' is not valid: it should be a list"),
    "negative": ({"model__num_layers": -1}, "model.num_layers=-1 is not valid: it should be grea"),
    "fraction": ({"model__num_layers": 2.5}, "model.num_layers=2.5 is not valid: it should be a"),
    "words": ({"run__seed": "many\nmore"}, "it should be a whole number."),
    "null": ({"model__num_layers": None}, "model.num_layers=null is not valid"),
    "true is no number": ({"run__seed": True}, "run.seed=true is not valid"),
    "true is no stage": ({"parallel__zero_stage": True}, "parallel.zero_stage=true is not valid"),
    "stage": ({"parallel__zero_stage": 4}, "it should be 0, 1, 2 or 3."),
    "choice": ({"objective__kind": "gpt"}, "objective.kind='gpt' is not valid: it should be 'mdm'"),
    "number for text": ({"run__dir": 5}, "run.dir=5 is not valid: it should be text"),
    "text for truth": ({"model__tie_embeddings": "maybe"}, "it should be true or false."),
    "infinite": ({"optimizer__lr": float("inf")}, "optimizer.lr=inf is not valid"),
    "not a number": ({"optimizer__lr": float("nan")}, "optimizer.lr=nan is not valid"),
    "probability": ({"model__hidden_dropout": 1.0}, "it should be less than 1."),
    "eps": ({"objective__eps": 0}, "objective.eps=0 is not valid: it should be greater than 0."),
    "short window": ({"data__seq_length": 1}, "it should be greater than or equal to 2."),
    "key is a number": ({"model": TREE["model"] | {1: 2}}, "model.1 is not a known key"),
    "learning rates": ({"optimizer__lr": 1e-6}, "optimizer.min_lr=2e-05 is greater than"),
    "heads": ({"model__hidden_size": 66}, "does not divide model.hidden_size=66"),
    "odd head": ({"model__head_dim": 3}, "model.head_dim=3 is odd"),
    "groups": ({"model__num_query_groups": 3}, "does not divide model.num_attention_heads=4"),
    "annealing": (
        {"objective": {"kind": "ar", "attention_annealing_steps": 9}},
        "objective.attention_annealing_steps=9 ends in full attention, which objective.kind=ar",
    ),
    "dropped keys": (
        {"objective": {"key_dropout": True}},
        "objective.key_dropout=true is an ablation of AR and objective.kind is mdm",
    ),
    "rates of no dropped keys": (
        {"objective": {"kind": "ar", "key_dropout_rate_per": "sample"}},
        "objective.key_dropout_rate_per=sample says how keys are dropped, and none are: set",
    ),
    "share of no dropped keys": (
        {"objective": {"kind": "ar", "key_dropout_ratio": 0.1}},
        "objective.key_dropout_ratio=0.1 says how keys are dropped, and none are: set",
    ),
    "no share of dropped keys": (
        {"objective": {"kind": "ar", "key_dropout": True, "key_dropout_ratio": 0}},
        "objective.key_dropout_ratio=0 is not valid: it should be greater than 0.",
    ),
    "mask": ({"model__mask_token_id": 101}, "use at most model.vocab_size=100"),
    "preset": ({"model__preset": "smdm\n-17M"}, "does not exist: the nearest are"),
}


@pytest.mark.parametrize(("changes", "told"), INVALID.values(), ids=INVALID)
def test_every_error_is_one_plain_sentence(changes, told):
    message = message_of(tree_with(**changes))
    assert told in message
    assert_sentence(message)


def assert_sentence(message: str) -> None:
    assert "\n" not in message
    assert message.endswith((".", "?"))
    assert not re.search(
        r"https?:|pydantic|Input|Value error|validation|dictionary|yaml\.", message
    )


@pytest.mark.parametrize("section", ["run", "model", "data", "batch", "schedule"])
def test_a_missing_section_is_named(section):
    tree = tree_with()
    del tree[section]
    assert message_of(tree) == f"The section {section} is missing: add it to the YAML file."


def test_a_missing_field_says_how_to_set_it():
    tree = tree_with()
    del tree["batch"]["global_batch_size"]
    assert message_of(tree) == (
        "batch.global_batch_size is missing: set it in the YAML file or as "
        "batch.global_batch_size=VALUE."
    )


def test_every_field_of_every_section_is_described():
    sections = sections_below(Config) - {Config}
    assert (
        len(sections) == len(Config.model_fields) + 2
    )  # and the two kinds of sources, inside data
    for section in sections:
        assert section.__doc__
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"


def test_sources_that_all_state_their_epochs_give_the_run_its_length():
    sources = [{"path": "a", "epochs": 2}, {"path": "b", "epochs": 0.5}]
    config = config_from_dict(tree_with(schedule={}, data__train=sources))
    assert [source.epochs for source in config.data.train] == [2, 0.5]
    assert config.schedule.steps is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"data__train": [{"path": "a", "weight": 1, "epochs": 2}, {"path": "b"}]},
            "data.train has weight=1.0 and epochs=2.0 for a: keep one.",
        ),
        (
            {"data__train": [{"path": "a", "epochs": 5, "max_epochs": 4}]},
            "data.train has epochs=5.0 over max_epochs=4.0 for a: lower epochs or raise",
        ),
        (
            {"data__train": [{"path": "a", "weight": 1}, {"path": "b"}]},
            "data.train gives a a weight and b neither a weight nor epochs: give each source one",
        ),
        (
            {"data__train": [{"path": "a", "epochs": 2}]},
            "schedule.steps=5 and the epochs that every source of data.train states both fix",
        ),
        ({"data__train": [{"path": "a", "weight": 0}]}, "data.train.0.weight=0 is not valid"),
        ({"data__train": [{"path": "a", "max_unique_tokens": 0}]}, "data.train.0.max_unique_tok"),
        ({"data__order": "random"}, "data.order='random' is not valid"),
        (
            {"data__order": "shifted", "objective": {"noise": "repeated"}},
            "objective.noise=repeated belongs to windows that come back",
        ),
    ],
)
def test_impossible_mixtures_are_refused(changes, told):
    assert told in message_of(tree_with(**changes))


def test_the_mask_token_is_a_row_of_its_own_unless_the_vocabulary_has_one():
    model = config_from_dict(TREE).model
    assert (model.mask_id, model.embedding_rows, model.head_rows) == (100, 128, 128)
    full = config_from_dict(tree_with(model__vocab_size=128)).model
    assert (full.mask_id, full.embedding_rows, full.head_rows) == (128, 256, 128)
    tied = config_from_dict(tree_with(model__vocab_size=128, model__tie_embeddings=True)).model
    assert tied.head_rows == tied.embedding_rows == 256
    assert config_from_dict(tree_with(model__mask_token_id=0)).model.mask_id == 0


def test_rows_that_no_token_uses_stand_before_the_row_of_the_mask():
    model = config_from_dict(tree_with(model__padded_vocab_size=256)).model
    assert (model.vocab_size, model.vocabulary_rows, model.mask_id) == (100, 256, 256)
    assert (model.embedding_rows, model.head_rows) == (384, 256)
    # Some models mask with one of them.
    inside = config_from_dict(tree_with(model__padded_vocab_size=256, model__mask_token_id=101))
    assert (inside.model.mask_id, inside.model.embedding_rows) == (101, 384)
    assert message_of(tree_with(model__padded_vocab_size=99)) == (
        "model.padded_vocab_size=99 has no rows for all of model.vocab_size=100: use at least as "
        "many, or leave it out."
    )
    message = message_of(tree_with(model__padded_vocab_size=256, model__mask_token_id=257))
    assert "use at most model.padded_vocab_size=256, or leave it out." in message


def test_a_budget_says_which_n_it_counts_and_a_saved_one_what_it_meant():
    tree = {
        "run": {"dir": "r"},
        "model": {"preset": "dc-7M"},
        "data": {"train": [{"path": "a"}], "seq_length": 8},
        "batch": {"global_batch_size": 1},
        "schedule": {"flops": 1e12},
    }
    now = config_from_dict(tree)
    assert now.schedule.flops_parameters == "with_embeddings"
    # What it says is read back, also where the preset is taken away.
    saved = now.model_dump(mode="json")
    assert config_as_saved(saved) == now
    saved["model"]["preset"] = None
    assert config_as_saved(saved).schedule.flops_parameters == "with_embeddings"
    # Before there was the field, all budgets counted without embeddings.
    del saved["schedule"]["flops_parameters"]
    assert config_as_saved(saved).schedule.flops_parameters == "without_embeddings"
    assert config_from_dict(tree | {"schedule": {"steps": 1}}).schedule.flops_parameters is None
    with pytest.raises(ConfigError, match=r"schedule\.flops_parameters"):
        config_from_dict(tree | {"schedule": {"flops": 1e12, "flops_parameters": "all"}})


def test_paths_begin_at_home_and_are_not_empty(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = {"train": [{"path": "~/data/web"}]}
    config = config_from_dict(tree_with(run__dir="~/runs/a") | {"data": data})
    assert config.run.dir == str(tmp_path / "runs/a")
    assert config.data.train[0].path == str(tmp_path / "data/web")
    with pytest.raises(
        ConfigError, match=r"^run\.dir='?'? is not valid: it should not be empty\.$"
    ):
        config_from_dict(tree_with(run__dir=""))
