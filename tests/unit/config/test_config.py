from __future__ import annotations

import pytest
import yaml
from config_examples import TREE, message_of, tree_with
from pydantic import ValidationError

from megatron_mdm.config import Config, load_config, parse_config
from megatron_mdm.config.continuation import list_computed_fields
from megatron_mdm.config.reference import list_sections
from megatron_mdm.core.errors import ConfigError


def test_a_config_is_frozen():
    config = parse_config(TREE)
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
    assert parse_config(tree_with(schedule=length)).schedule.model_dump(
        exclude_none=True
    ).items() >= (length.items())


def test_every_field_of_every_section_is_described():
    sections = [section for _, section in list_sections()]
    assert len(sections) > len(Config.model_fields)
    for section in sections:
        assert section.__doc__
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"


def test_sources_that_all_state_their_epochs_give_the_run_its_length():
    sources = [{"path": "a", "epochs": 2}, {"path": "b", "epochs": 0.5}]
    config = parse_config(tree_with(schedule={}, data__train=sources))
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
        (
            {"data__order": "documents", "objective": {"noise": "repeated"}},
            "come back, and those of data.order=documents do not: use data.order=shuffle or fixed.",
        ),
    ],
)
def test_impossible_mixtures_are_refused(changes, told):
    assert told in message_of(tree_with(**changes))


def test_the_mask_token_is_a_row_of_its_own_unless_the_vocabulary_has_one():
    model = parse_config(TREE).model
    assert (model.mask_id, model.embedding_rows, model.head_rows) == (100, 128, 128)
    full = parse_config(tree_with(model__vocab_size=128)).model
    assert (full.mask_id, full.embedding_rows, full.head_rows) == (128, 256, 128)
    tied = parse_config(tree_with(model__vocab_size=128, model__tie_embeddings=True)).model
    assert tied.head_rows == tied.embedding_rows == 256
    assert parse_config(tree_with(model__mask_token_id=0)).model.mask_id == 0


def test_rows_that_no_token_uses_stand_before_the_row_of_the_mask():
    model = parse_config(tree_with(model__padded_vocab_size=256)).model
    assert (model.vocab_size, model.vocabulary_rows, model.mask_id) == (100, 256, 256)
    assert (model.embedding_rows, model.head_rows) == (384, 256)
    # Some models mask with one of them.
    inside = parse_config(tree_with(model__padded_vocab_size=256, model__mask_token_id=101))
    assert (inside.model.mask_id, inside.model.embedding_rows) == (101, 384)
    assert message_of(tree_with(model__padded_vocab_size=99)) == (
        "model.padded_vocab_size=99 has no rows for all of model.vocab_size=100: use at least as "
        "many, or leave it out."
    )
    message = message_of(tree_with(model__padded_vocab_size=256, model__mask_token_id=257))
    assert "use at most model.padded_vocab_size=256, or leave it out." in message


def test_a_budget_says_which_n_it_counts_also_where_it_is_saved():
    tree = {
        "run": {"dir": "r"},
        "model": {"preset": "dc-7M"},
        "data": {"train": [{"path": "a"}], "seq_length": 8},
        "batch": {"global_batch_size": 1},
        "schedule": {"flops": 1e12},
    }
    now = parse_config(tree)
    assert now.schedule.flops_parameters == "with_embeddings"
    # What it says is read back, also where the preset is taken away.
    saved = now.model_dump(mode="json")
    assert parse_config(saved) == now
    saved["model"]["preset"] = None
    assert parse_config(saved).schedule.flops_parameters == "with_embeddings"
    assert parse_config(tree | {"schedule": {"steps": 1}}).schedule.flops_parameters is None
    with pytest.raises(ConfigError, match=r"schedule\.flops_parameters"):
        parse_config(tree | {"schedule": {"flops": 1e12, "flops_parameters": "all"}})


def test_a_mixture_says_how_large_its_groups_are_also_where_it_is_saved():
    batch = {"micro_batch_size": 4, "global_batch_size": 8}
    run = parse_config(tree_with(objective={"kind": "mixture"}, batch=batch))
    assert run.objective.group_size == 4
    assert run.model_dump(mode="json")["objective"]["group_size"] == 4
    smaller = parse_config(
        {**run.model_dump(mode="json"), "batch": {**batch, "micro_batch_size": 2}}
    )
    assert smaller.objective == run.objective
    # With other micro batches it would be another run.
    other = tree_with(objective={"kind": "mixture"}, batch={**batch, "micro_batch_size": 2})
    fields = [list_computed_fields(one) for one in (run, parse_config(other))]
    changed = {name for name in fields[0] if fields[0][name] != fields[1][name]}
    assert changed == {"objective.group_size"}


def test_paths_begin_at_home_and_are_not_empty(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = {"train": [{"path": "~/data/web"}]}
    config = parse_config(tree_with(run__dir="~/runs/a") | {"data": data})
    assert config.run.dir == str(tmp_path / "runs/a")
    assert config.data.train[0].path == str(tmp_path / "data/web")
    with pytest.raises(
        ConfigError, match=r"^run\.dir='?'? is not valid: it should not be empty\.$"
    ):
        parse_config(tree_with(run__dir=""))


def test_an_override_reaches_into_lists_and_adds_the_next_entry(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(TREE))
    first = TREE["data"]["train"][0]["path"]
    config = load_config(path, ["data.train.1.path=b", "data.valid.0.path=c"])
    assert [one.path for one in config.data.train] == [first, "b"]
    assert [one.path for one in config.data.valid] == ["c"]
    assert load_config(path, ["hooks=[]"]).hooks == []
    with pytest.raises(ConfigError, match=r"data\.train\.3\.path"):
        load_config(path, ["data.train.3.path=b"])
