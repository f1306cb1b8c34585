"""Keys and values that are refused, each in one plain sentence."""

from __future__ import annotations

import typing
from types import UnionType
from typing import Any

import pytest
from config_examples import TREE, assert_sentence, message_of, tree_with
from pydantic import BaseModel

from megatron_mdm.config import Config


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
    "choice": (
        {"objective__kind": "gpt"},
        "objective.kind=gpt is not a known name",
    ),
    "number for text": ({"run__dir": 5}, "run.dir=5 is not valid: it should be text"),
    "text for truth": ({"model__tie_embeddings": "maybe"}, "it should be true or false."),
    "infinite": ({"optimizer__lr": float("inf")}, "optimizer.lr=inf is not valid"),
    "not a number": ({"optimizer__lr": float("nan")}, "optimizer.lr=nan is not valid"),
    "probability": ({"model__hidden_dropout": 1.0}, "it should be less than 1."),
    "always left out": ({"model__stochastic_depth": 1.0}, "it should be less than 1."),
    "reward": (
        {"objective": {"loss_head": {"z_loss": -1e-4}}},
        "objective.loss_head.z_loss=-0.0001 is not valid: it should be greater than or equal to 0.",
    ),
    "eps": (
        {"objective__process": {"eps": 0}},
        "eps=0 is not valid: it should be greater than 0.",
    ),
    "short window": ({"data__seq_length": 1}, "it should be greater than or equal to 2."),
    "key is a number": ({"model": TREE["model"] | {1: 2}}, "model.1 is not a known key"),
    "learning rates": ({"optimizer__lr": 1e-6}, "optimizer.min_lr=2e-05 is greater than"),
    "heads": ({"model__hidden_size": 66}, "does not divide model.hidden_size=66"),
    "odd head": ({"model__head_dim": 3}, "model.head_dim=3 is odd"),
    "groups": ({"model__num_query_groups": 3}, "does not divide model.num_attention_heads=4"),
    "annealing": (
        {"objective": {"kind": "ar", "attention_annealing_steps": 9}},
        "objective.attention_annealing_steps belongs to objective.kind=mdm, and",
    ),
    "dropped keys": (
        {"objective": {"key_dropout": True}},
        "objective.key_dropout belongs to objective.kind=ar, and objective.kind is mdm",
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
    "groups of part of a micro batch": (
        {
            "objective": {"kind": "mixture", "group_size": 3},
            "batch": {"micro_batch_size": 2, "global_batch_size": 12},
        },
        "objective.group_size=3 has to be a multiple of batch.micro_batch_size=2",
    ),
    "groups of part of a step": (
        {"objective": {"kind": "mixture", "group_size": 3}},
        "and to divide batch.global_batch_size=8: leave it out, which takes 1.",
    ),
    "mixed responses": (
        {"objective": {"kind": "mixture"}, "finetuning": {"enabled": True}},
        "objective.kind=mixture cannot learn responses alone",
    ),
    "mask": ({"model__mask_token_id": 101}, "use at most model.vocab_size=100"),
    "preset": ({"model__preset": "smdm\n-17M"}, "does not exist: the nearest are"),
}


@pytest.mark.parametrize(("changes", "told"), INVALID.values(), ids=INVALID)
def test_every_error_is_one_plain_sentence(changes, told):
    message = message_of(tree_with(**changes))
    assert told in message
    assert_sentence(message)


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


def numbers_below(section: type[BaseModel], place: tuple[str, ...] = ()) -> dict[str, set[Any]]:
    """The fields that hold numbers or truth values alone, and of which kinds."""
    found = {}
    for name, field in section.model_fields.items():
        kinds = leaves(field.annotation)
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                inner = (*place, name, "0") if "list" in str(field.annotation) else (*place, name)
                found |= numbers_below(kind, inner)
        if kinds - {type(None)} and kinds <= {int, float, bool, type(None)}:
            found[".".join((*place, name))] = kinds - {type(None)}
    return found


def leaves(annotation: Any) -> set[Any]:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        return leaves(arguments[0])
    if typing.get_origin(annotation) in (list, typing.Union, UnionType):
        return set().union(*map(leaves, arguments))
    return {annotation}


NUMBERS = numbers_below(Config)


def test_the_search_for_numbers_finds_them():
    assert NUMBERS["run.seed"] == {int}
    assert NUMBERS["run.num_threads"] == {int}
    assert NUMBERS["optimizer.lr"] == {float}
    assert NUMBERS["model.tie_embeddings"] == {bool}
    assert NUMBERS["data.train.0.max_epochs"] == {float}
    assert len(NUMBERS) > 60


@pytest.mark.parametrize("place", NUMBERS)
def test_text_is_no_number_and_no_truth_value(place):
    is_bool = NUMBERS[place] == {bool}
    for value in ("yes", "1") if is_bool else ("3", "1e-4", " 7 ", "1_0", "inf"):
        tree = tree_with()
        *parents, name = place.split(".")
        node: Any = tree
        for parent in parents:
            node = node[int(parent)] if parent.isdigit() else node.setdefault(parent, {})
        node[name] = value
        message = message_of(tree)
        rule = {bool: "true or false", int: "a whole number"}.get(*NUMBERS[place], "a number")
        assert message == f"{place}={value!r} is not valid: it should be {rule}, without quotes."


def test_all_that_is_wrong_is_said_at_once_a_sentence_a_line():
    tree = tree_with(
        model__hiden_size=64,
        model__num_layers=0,
        model__color="red",
        batch__micro_batch_size="many",
        optimizer__lr=-1.0,
        schedule__kind="cosin",
        objective__num_orders=2,
    )
    del tree["model"]["hidden_size"]
    lines = message_of(tree).splitlines()
    starts = [
        "model.hiden_size is not a known key: did you mean hidden_size?",
        "model.color is not a known key: ",
        "model.num_layers=0 is not valid: ",
        "objective.num_orders belongs to objective.kind=ar, ",
        "batch.micro_batch_size='many' is not valid: ",
        "optimizer.lr=-1.0 is not valid: ",
        "schedule.kind=cosin ",
    ]
    assert len(lines) == len(starts)
    for line in lines:
        assert_sentence(line)
        assert line.startswith(tuple(starts))


def test_checks_within_and_across_sections_are_all_made():
    tree = tree_with(
        model__num_attention_heads=3,
        model__padded_vocab_size=2,
    )
    lines = message_of(tree).splitlines()
    assert [line.partition("=")[0] for line in lines] == [
        "model.num_attention_heads",
        "model.padded_vocab_size",
    ]
    for order in ("shifted", "documents"):
        tree = tree_with(schedule__steps=None, finetuning={"enabled": True}, data__order=order)
        lines = message_of(tree).splitlines()
        assert lines[0].startswith("schedule needs exactly one of steps")
        assert lines[1].startswith(f"data.order={order} has no meaning")
