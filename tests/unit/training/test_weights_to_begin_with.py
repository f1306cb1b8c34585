from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from plan_examples import changed, plan_of, refusal, write_checkpoint

from megatron_mdm.core.errors import CheckpointError, ConfigError


@pytest.fixture
def source(tree, tmp_path):
    """Another run of the same model."""
    return changed(tree, run={"dir": str(tmp_path / "source")})


def beginning_with(path):
    return {"initial_weights": str(path)}


@pytest.mark.parametrize("kind", ["training", "weights"])
def test_a_new_run_begins_with_the_weights_of_a_checkpoint(tree, source, kind):
    write_checkpoint(source, step=2, kind=kind)
    path = write_checkpoint(source, step=7, kind=kind)
    for given in (path, path.parent, path.parent.parent):
        plan = plan_of(tree, run=beginning_with(given))
        assert (plan.initial_weights, plan.resume_from) == (path, None)
    earlier = path.with_name("step_00000002")
    assert plan_of(tree, run=beginning_with(earlier)).initial_weights == earlier


def test_a_run_without_the_field_draws_its_weights(tree):
    assert plan_of(tree).initial_weights is None


def test_a_resumed_run_does_not_read_them_again(tree, source):
    given = write_checkpoint(source)
    saved = write_checkpoint(tree, run=beginning_with(given))
    shutil.rmtree(given)
    for run in (beginning_with(given), beginning_with("/moved/elsewhere"), {}):
        plan = plan_of(tree, run=run)
        assert (plan.resume_from, plan.initial_weights) == (saved, None)


@pytest.mark.parametrize(
    ("field", "value", "saved"),
    [
        ("num_layers", 4, "2"),
        ("hidden_size", 32, "16"),
        ("num_attention_heads", 2, "4"),
        ("num_query_groups", 2, "4"),
        ("head_dim", 8, "4"),
        ("ffn_hidden_size", 48, "24"),
        ("vocab_size", 301, "300"),
        ("mask_token_id", 200, "300"),
        ("vocab_padding_multiple", 64, "128"),
        ("tie_embeddings", True, "false"),
        ("qkv_bias", True, "false"),
        ("qk_norm", True, "false"),
        ("rotary_base", 5e5, "10000.0"),
        ("norm_epsilon", 1e-6, "1e-05"),
    ],
)
def test_another_model_is_refused_by_field_with_both_values(tree, source, field, value, saved):
    path = write_checkpoint(source)
    message = refusal(ConfigError, tree, run=beginning_with(path), model={field: value})
    assert f"model.{field}={json.dumps(value)}" in message
    assert f"run.initial_weights={path}" in message
    assert f"model.{field}={saved}" in message


def test_all_differences_are_told_at_once(tree, source):
    path = write_checkpoint(source)
    model = {"num_layers": 4, "qk_norm": True}
    assert refusal(ConfigError, tree, run=beginning_with(path), model=model) == (
        f"model.num_layers=4 and model.qk_norm=true cannot begin with run.initial_weights={path}, "
        "which has 2 and false: set model.num_layers=2 and model.qk_norm=false, or choose other "
        "weights."
    )


def test_what_does_not_belong_to_the_function_may_differ(tree, source):
    path = write_checkpoint(source, objective={"kind": "ar"}, optimizer={"lr": 1e-3})
    plan = plan_of(
        tree,
        run=beginning_with(path) | {"seed": 9},
        # The same values, said in words.
        model={
            "hidden_dropout": 0.1,
            "init_std": 0.02,
            "num_query_groups": 4,
            "head_dim": 4,
            "mask_token_id": 300,
        },
        objective={"attention_annealing_steps": 2},
    )
    assert plan.initial_weights == path


def test_how_many_rows_of_the_vocabulary_are_predicted_may_differ(tree, source):
    path = write_checkpoint(source)
    fewer = {"vocab_size": 260, "padded_vocab_size": 300}
    assert plan_of(tree, run=beginning_with(path), model=fewer).initial_weights == path
    again = write_checkpoint(source, step=7, model=fewer)
    for model in ({}, fewer, {"vocab_size": 280, "padded_vocab_size": 300}):
        assert plan_of(tree, run=beginning_with(again), model=model).initial_weights == again


def test_another_number_of_rows_is_refused_by_what_can_be_set(tree, source):
    path = write_checkpoint(source, model={"vocab_size": 260, "padded_vocab_size": 280})
    message = refusal(ConfigError, tree, run=beginning_with(path), model={"vocab_size": 260})
    assert "model.padded_vocab_size=260 and model.mask_token_id=260 cannot begin" in message
    assert "set model.padded_vocab_size=280 and model.mask_token_id=280, or" in message
    message = refusal(ConfigError, tree, run=beginning_with(path))
    assert "set model.padded_vocab_size=280 and model.mask_token_id=280 and" in message
    assert "model.vocab_size=260, or choose" in message
    fixed = {"vocab_size": 260, "padded_vocab_size": 280}
    assert plan_of(tree, run=beginning_with(path), model=fixed).initial_weights == path


def test_a_path_that_is_not_there_is_refused(tree, tmp_path):
    nowhere = tmp_path / "nowhere"
    message = refusal(CheckpointError, tree, run=beginning_with(nowhere))
    assert f"run.initial_weights={nowhere} does not exist" in message


def test_a_folder_without_checkpoints_is_refused(tree, tmp_path):
    message = refusal(CheckpointError, tree, run=beginning_with(tmp_path))
    assert f"{tmp_path} holds no checkpoint" in message


def test_a_hugging_face_model_is_sent_to_the_converter(tree, tmp_path):
    model = tmp_path / "qwen"
    model.mkdir()
    (model / "config.json").write_text("{}")
    message = refusal(ConfigError, tree, run=beginning_with(model))
    assert f"run.initial_weights={model} is a Hugging Face model" in message
    assert "mdm convert from-hf" in message


def test_a_damaged_checkpoint_is_refused_before_anything_starts(tree, source):
    path = write_checkpoint(source)
    (Path(path) / "weights-tp0-pp0-dp0.safetensors").write_bytes(b"short")
    message = refusal(CheckpointError, tree, run=beginning_with(path))
    assert "weights-tp0-pp0-dp0.safetensors has 5 bytes" in message
