from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_models import LLADA_CONFIG, Llada, Smdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.config import ModelConfig
from megatron_mdm.core.errors import ConversionError
from megatron_mdm.hf.formats.tables import FORMATS
from megatron_mdm.hf.formats.translation import (
    from_format,
    list_external_shapes,
    make_new_row,
    to_format,
)
from megatron_mdm.model.parameters import find_parameter_shape, list_parameter_names

EMBEDDING = "embedding.word_embeddings.weight"


@st.composite
def cases(draw) -> tuple[str, SavedModel]:
    """A format and an architecture that it can hold."""
    format_name = draw(st.sampled_from(sorted(FORMATS)))
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 3))
    is_square = format_name in ("smdm", "llada", "gidd")
    if format_name == "gidd":
        per_group = 1
    vocab = draw(st.integers(2, 9))
    is_causal = draw(st.booleans()) if format_name not in ("llada", "gidd") else False
    inside = draw(st.integers(0, vocab - 1))
    mask = {"llada": inside, "gidd": inside, "hf": draw(st.integers(0, vocab))}
    own = {
        "qkv_bias": format_name == "qwen2"
        or (format_name in ("hf", "llada") and draw(st.booleans())),
        "qk_norm": format_name == "qwen3"
        or (format_name == "hf" and draw(st.sampled_from([False, True, "width"])))
        or (format_name == "gidd" and draw(st.sampled_from([False, "width"]))),
        "tie_embeddings": draw(st.booleans()) and format_name not in ("smdm", "gidd"),
    }
    if format_name == "hf":
        own |= {"time_embedding": draw(st.booleans())}
    if format_name in ("hf", "gidd"):
        own |= {"attention_sink": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
        own |= {"attention_soft_cap": 30.0 if format_name == "gidd" else None}
        own |= {"mlp": "relu2" if format_name == "gidd" or draw(st.booleans()) else "swiglu"}
    model = ModelConfig(
        num_layers=draw(st.integers(1, 2)),
        hidden_size=groups * per_group * head_dim if is_square else draw(st.integers(1, 8)),
        num_attention_heads=groups * per_group,
        num_query_groups=groups,
        head_dim=head_dim,
        ffn_hidden_size=draw(st.integers(1, 9)),
        vocab_size=vocab,
        mask_token_id=mask.get(format_name, vocab),
        vocab_padding_multiple=draw(st.integers(1, 5)),
        **own,
    )
    return format_name, SavedModel(model, "ar" if is_causal else "mdm", 8)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_round_trips_restore_every_bit_in_both_directions(case):
    format_name, saved = case
    generator = torch.Generator().manual_seed(0)
    seen: set[str] = set()
    for name in list_parameter_names(saved.model):
        shapes = list_external_shapes(format_name, name, saved)
        external = {e: torch.randn(s, generator=generator) for e, s in shapes}
        assert not seen & set(external)
        seen |= set(external)
        training = from_format(format_name, name, reader(external), saved)
        assert training.shape == find_parameter_shape(name, saved.model)
        again = dict(to_format(format_name, name, training, saved))
        assert list(again) == list(external)
        assert all(torch.equal(again[e], external[e]) for e in external)
        # Each number of the source stands in the result once, and nothing but padding and the
        # row of a new mask token besides.
        given_rows = sum(e.shape[0] for e in external.values())
        rest = training.flatten(1) if training.dim() > 1 else training[:, None]
        added = rest[given_rows:].clone()
        if name == EMBEDDING and saved.model.mask_id >= given_rows:
            added[saved.model.mask_id - given_rows] = 0
        assert not added.any()
        assert torch.equal(training, from_format(format_name, name, reader(again), saved))


def reader(tensors):
    """Reads rows of tensors by name, and never beyond them."""

    def read(name, first, last):
        assert 0 <= first <= last <= tensors[name].shape[0]
        return tensors[name][first:last]

    return read


def small(*, is_causal: bool = False, **changes) -> SavedModel:
    fields = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 4,
        "ffn_hidden_size": 12,
        "vocab_size": 11,
        "mask_token_id": 11,
        "vocab_padding_multiple": 16,
    }
    return SavedModel(ModelConfig(**(fields | changes)), "ar" if is_causal else "mdm", 32)


def shapes_of(format_name: str, saved: SavedModel) -> dict[str, tuple[int, ...]]:
    names = list_parameter_names(saved.model)
    return dict(pair for name in names for pair in list_external_shapes(format_name, name, saved))


def transformers_state(config_class, model_class, tied: bool) -> dict:
    config = config_class(
        vocab_size=11,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        intermediate_size=12,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        state = model_class(config).state_dict()
    if tied:
        del state["lm_head.weight"]
    return state


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("format_name", "config_class", "model_class"),
    [
        ("llama", LlamaConfig, LlamaForCausalLM),
        ("qwen2", Qwen2Config, Qwen2ForCausalLM),
        ("qwen3", Qwen3Config, Qwen3ForCausalLM),
    ],
)
def test_names_and_shapes_are_those_of_transformers(format_name, config_class, model_class, tied):
    saved = small(
        tie_embeddings=tied, qkv_bias=format_name == "qwen2", qk_norm=format_name == "qwen3"
    )
    expected = {
        n: tuple(t.shape) for n, t in transformers_state(config_class, model_class, tied).items()
    }
    found = [
        pair
        for n in list_parameter_names(saved.model)
        for pair in list_external_shapes(format_name, n, saved)
    ]
    assert dict(found) == expected


@pytest.mark.parametrize("is_causal", [False, True])
def test_names_and_shapes_are_those_of_smdm(is_causal):
    saved = small(num_query_groups=4, is_causal=is_causal)
    model = Smdm(layers=2, heads=4, width=16, ffn=12, vocab=11, is_causal=is_causal)
    expected = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    found = [
        pair
        for n in list_parameter_names(saved.model)
        for pair in list_external_shapes("smdm", n, saved)
    ]
    assert dict(found) == expected


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"qkv_bias": True}], ids=str)
def test_names_and_shapes_are_those_of_llada(changes):
    saved = small(mask_token_id=9, **changes)
    config = LLADA_CONFIG | {
        "d_model": 16,
        "n_kv_heads": 2,
        "mlp_hidden_size": 12,
        "vocab_size": 11,
        "embedding_size": None,
        "weight_tying": saved.model.tie_embeddings,
        "include_qkv_bias": saved.model.qkv_bias,
    }
    expected = {n: tuple(t.shape) for n, t in Llada(config).state_dict().items()}
    found = [
        pair
        for n in list_parameter_names(saved.model)
        for pair in list_external_shapes("llada", n, saved)
    ]
    assert dict(found) == expected


def test_a_new_row_has_the_direction_of_the_mean_and_the_norm_of_a_row():
    rows = np.random.default_rng(0).normal(0.3, 2.0, (1000, 24))
    rows[:100] *= 50
    mean = rows.mean(axis=0)
    expected = mean * np.sqrt((rows**2).sum(axis=1).mean()) / np.sqrt((mean**2).sum())
    tensor = torch.tensor(rows)
    np.testing.assert_allclose(make_new_row([tensor]), expected, rtol=1e-12)
    np.testing.assert_allclose(make_new_row(tensor.split(7)), expected, rtol=1e-12)


def test_a_new_row_of_zeros_is_zero():
    assert not make_new_row([torch.zeros(5, 3)]).any()


@pytest.mark.parametrize(
    ("format_name", "changes", "field"),
    [
        ("nemo", {}, "'nemo' does not exist"),
        ("llama", {"qkv_bias": True}, "qkv_bias=True"),
        ("llama", {"qk_norm": True}, "qk_norm=True"),
        ("qwen2", {}, "qkv_bias=False"),
        ("qwen3", {}, "qk_norm=False"),
        ("smdm", {"tie_embeddings": True}, "tie_embeddings=True"),
        ("smdm", {"padded_vocab_size": 12}, "padded_vocab_size=12"),
        ("smdm", {"mask_token_id": 3}, "mask_token_id=3 inside"),
        ("smdm", {"head_dim": 8}, "head_dim=8"),
        ("smdm", {"qkv_bias": True}, "qkv_bias=True"),
        ("llada", {}, "mask_token_id=11 outside"),
        ("llada", {"mask_token_id": 3, "is_causal": True}, "autoregressive"),
        ("llada", {"mask_token_id": 3, "qk_norm": True}, "qk_norm=True"),
        ("llama", {"mlp": "relu2"}, "mlp=relu2"),
        ("qwen3", {"qk_norm": "width"}, "qk_norm=width"),
        ("llada", {"mask_token_id": 3, "attention_sink": True}, "attention_sink=True"),
        ("llama", {"time_embedding": True}, "time_embedding=True"),
        ("gidd", {"mask_token_id": 3}, "mlp=swiglu"),
        ("gidd", {"mask_token_id": 3, "mlp": "relu2"}, "attention_soft_cap=None"),
        ("gidd", {"mlp": "relu2", "attention_soft_cap": 30.0}, "num_query_groups=2"),
    ],
)
def test_a_model_that_the_format_cannot_hold_is_refused(format_name, changes, field):
    with pytest.raises(ConversionError, match=field):
        list_external_shapes(format_name, EMBEDDING, small(**changes))


def test_the_mask_row_of_an_autoregressive_smdm_model_is_dropped_and_made_anew():
    saved = small(num_query_groups=4, is_causal=True)
    tensor = torch.randn(16, 16)
    ((_, external),) = to_format("smdm", EMBEDDING, tensor, saved)
    assert torch.equal(external, tensor[:11])
    again = from_format("smdm", EMBEDDING, lambda _, start, stop: external[start:stop], saved)
    torch.testing.assert_close(again[11].double(), make_new_row([external]))
    ((_, kept),) = to_format("smdm", EMBEDDING, tensor, saved._replace(kind="mdm"))
    assert torch.equal(kept, tensor[:12])
