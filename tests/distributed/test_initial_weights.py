"""Initial weights are a function of (seed, name): no layout changes them."""

from __future__ import annotations

import math
from collections.abc import Callable

import cases
import numpy as np
import pytest
from layouts import LAYOUTS
from weight_pieces import assemble
from worlds import World

from megatron_mdm.model.parameters import list_parameter_names

GetWorld = Callable[[int], World]

# With biases and norms of heads, which the untied model is without.
_TIED = {"model.tie_embeddings": True, "model.qkv_bias": True, "model.qk_norm": True}
_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_QKV = "decoder.layers.{}.self_attention.linear_qkv.weight"


def _gathered(world_of: GetWorld, size: int, overrides: cases.Overrides, **options: bool):
    ranks = world_of(size).run(cases.initial_pieces, overrides=overrides, **options)
    pieces = [piece for rank in ranks for piece in rank]
    return assemble(pieces), pieces


def _assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.fixture(scope="module")
def by_definition(world_of: GetWorld) -> Callable[[bool], dict[str, np.ndarray]]:
    """`draw_initial_weight` of every parameter of the tiny model."""
    known: dict[bool, dict[str, np.ndarray]] = {}

    def get(tied: bool) -> dict[str, np.ndarray]:
        if tied not in known:
            overrides = _TIED if tied else {}
            wholes, _ = _gathered(world_of, 1, overrides)
            world, names = world_of(1), list(wholes)
            known[tied] = world.run(cases.initial_weights, overrides=overrides, names=names)[0]
        return known[tied]

    return get


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("dp2-zero3", _TIED), ("tp2-sp-zero1", {}), ("pp2x2-zero1", {}), ("tp2-pp2-zero1", _TIED)],
    ids=["dp2-zero3-tied", "tp2-sp-zero1", "pp2x2-zero1", "tp2-pp2-zero1-tied"],
)
def test_every_rank_can_gather_the_whole_weights_of_a_run(
    world_of: GetWorld, name: str, overrides: cases.Overrides
) -> None:
    size, parallel = LAYOUTS[name]
    ranks = world_of(size).run(cases.trained_weights, overrides=parallel | overrides)
    wholes = assemble([piece for _, pieces in ranks for piece in pieces])
    model = cases.config_of(overrides).model
    for gathered, _ in ranks:
        assert list(gathered) == list_parameter_names(model)
        _assert_equal(gathered, wholes)


@pytest.mark.parametrize("overrides", [{}, _TIED], ids=["untied", "tied"])
def test_the_model_has_the_parameters_of_the_table(
    world_of: GetWorld, overrides: cases.Overrides
) -> None:
    wholes, _ = _gathered(world_of, 1, overrides)
    assert sorted(wholes) == sorted(list_parameter_names(cases.config_of(overrides).model))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "name",
    [
        "tp2-zero1",
        "tp2-sp-zero1",
        "pp2-zero1",
        "dp2-zero3",
        "pp4-zero1",
        "tp2-sp-pp2-zero2",
        "tp2-dp2-zero3",
    ],
)
def test_shards_are_cuts_of_the_same_whole_weights(
    world_of: GetWorld,
    by_definition: Callable[[bool], dict[str, np.ndarray]],
    name: str,
    tied: bool,
) -> None:
    size, parallel = LAYOUTS[name]
    overrides = parallel | (_TIED if tied else {})
    wholes, pieces = _gathered(world_of, size, overrides)
    _assert_equal(wholes, by_definition(tied))
    num_stages = parallel["parallel.pipeline_model_parallel_size"]
    # Assembling has compared the last stage's copy with the first stage's weight.
    assert any(piece.is_copy for piece in pieces) == (tied and num_stages > 1)
    assert (_HEAD in wholes) != tied


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "name", ["tp2-zero0", "pp2-zero1", "dp2-zero2", "dp2-zero3", "tp2-dp2-zero3"]
)
def test_an_engine_does_not_change_initial_weights(
    world_of: GetWorld,
    by_definition: Callable[[bool], dict[str, np.ndarray]],
    name: str,
    tied: bool,
) -> None:
    size, parallel = LAYOUTS[name]
    overrides = parallel | (_TIED if tied else {})
    _assert_equal(_gathered(world_of, size, overrides, with_engine=True)[0], by_definition(tied))


def test_standard_deviations_are_the_configured_ones(world_of: GetWorld) -> None:
    names = [_EMBEDDING, _QKV.format(0), "decoder.layers.3.mlp.linear_fc1.weight"]
    outputs = [
        "decoder.layers.0.self_attention.linear_proj.weight",
        "decoder.layers.3.mlp.linear_fc2.weight",
    ]
    norm = "decoder.layers.1.input_layernorm.weight"
    bias = "decoder.layers.1.self_attention.linear_qkv.bias"

    def weights(overrides: cases.Overrides) -> dict[str, np.ndarray]:
        sizes = {"model.hidden_size": 320, "model.vocab_size": 399, "model.qkv_bias": True}
        overrides = {**sizes, "model.vocab_padding_multiple": 1, **overrides}
        wanted = [*names, *outputs, norm, bias]
        return world_of(1).run(cases.initial_weights, overrides=overrides, names=wanted)[0]

    default = weights({})
    configured = weights({"model.init_std": 0.02, "model.output_init_std": 0.005})
    for name in names:
        assert default[name].std() == pytest.approx(math.sqrt(2 / (5 * 320)), rel=0.01)
        assert configured[name].std() == pytest.approx(0.02, rel=0.01)
        assert abs(default[name].mean()) < 0.01 * default[name].std()
    for name in outputs:
        assert default[name].std() == pytest.approx(1 / (math.sqrt(320) * 4), rel=0.01)
        assert configured[name].std() == pytest.approx(0.005, rel=0.01)
    assert (default[norm] == 1.0).all()
    assert (default[bias] == 0.0).all()


@pytest.mark.parametrize(
    ("overrides", "embedding_rows", "head_rows"),
    [
        pytest.param({}, 62, 61, id="mask-row-after-the-vocabulary"),
        pytest.param({"model.mask_token_id": 7}, 61, 61, id="mask-within-the-vocabulary"),
        pytest.param(_TIED, 62, None, id="tied"),
    ],
)
def test_padding_rows_are_zero(
    world_of: GetWorld, overrides: cases.Overrides, embedding_rows: int, head_rows: int | None
) -> None:
    overrides = {"model.vocab_padding_multiple": 16, **overrides}
    wholes, _ = _gathered(world_of, 1, overrides)
    for name, rows in ((_EMBEDDING, embedding_rows), (_HEAD, head_rows)):
        if rows is not None:
            assert wholes[name].shape[0] == 64
            assert (wholes[name][rows:] == 0.0).all()
            assert (wholes[name][:rows].std(axis=1) > 0.0).all()


@pytest.mark.parametrize("mask_token_id", [None, 61, 66])
def test_rows_that_no_token_uses_are_zero_and_that_of_the_mask_is_not(
    world_of: GetWorld, mask_token_id: int | None
) -> None:
    overrides = {"model.padded_vocab_size": 75, "model.mask_token_id": mask_token_id}
    wholes, _ = _gathered(world_of, 1, overrides)
    assert wholes[_EMBEDDING].shape[0] == wholes[_HEAD].shape[0] == 80
    mask_id = 75 if mask_token_id is None else mask_token_id
    drawn = set(np.flatnonzero(wholes[_EMBEDDING].any(axis=1)))
    assert drawn == {*range(61), mask_id}
    assert set(np.flatnonzero(wholes[_HEAD].any(axis=1))) == set(range(61))


def test_names_and_seeds_have_weights_of_their_own(world_of: GetWorld) -> None:
    names = [_QKV.format(0), _QKV.format(1), _EMBEDDING]
    first, second = (
        world_of(1).run(cases.initial_weights, overrides={"run.seed": seed}, names=names)[0]
        for seed in (1, 2)
    )
    # As many numbers of each as its 61 tokens have.
    drawn = [values[:61].ravel() for weights in (first, second) for values in weights.values()]
    correlations = np.corrcoef(np.stack(drawn))[np.triu_indices(6, 1)]
    assert np.abs(correlations).max() < 0.1


def test_rows_drawn_alone_are_those_of_the_whole(world_of: GetWorld) -> None:
    sizes = {"model.vocab_size": 299, "model.vocab_padding_multiple": 1}
    arguments = {"overrides": sizes, "names": [_EMBEDDING]}
    whole = world_of(1).run(cases.initial_weights, **arguments)[0][_EMBEDDING]
    for rows in (range(50, 130), range(64, 128), range(299, 300)):
        part = world_of(1).run(cases.initial_weights, rows=rows, **arguments)[0]
        np.testing.assert_array_equal(part[_EMBEDDING], whole[rows.start : rows.stop])
