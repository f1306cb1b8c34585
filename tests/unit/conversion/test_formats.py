from __future__ import annotations

from dataclasses import replace

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

from megatron_mdm.core.errors import ConversionError
from megatron_mdm.hf.formats.architecture import Architecture
from megatron_mdm.hf.formats.tables import FORMATS
from megatron_mdm.hf.formats.translation import (
    FORMAT_NAMES,
    external_shapes,
    from_format,
    new_row,
    rows_from_format,
    to_format,
    training_names,
    training_shape,
)

EMBEDDING = "embedding.word_embeddings.weight"


@st.composite
def cases(draw) -> tuple[str, Architecture]:
    """A format and an architecture that it can hold."""
    format_name = draw(st.sampled_from(FORMAT_NAMES))
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 3))
    is_square = format_name in ("smdm", "llada")
    vocab = draw(st.integers(2, 9))
    is_causal = draw(st.booleans()) if format_name != "llada" else False
    mask = {"llada": draw(st.integers(0, vocab - 1)), "hf": draw(st.integers(0, vocab))}
    return format_name, Architecture(
        num_layers=draw(st.integers(1, 2)),
        hidden_size=groups * per_group * head_dim if is_square else draw(st.integers(1, 8)),
        num_attention_heads=groups * per_group,
        num_query_groups=groups,
        head_dim=head_dim,
        ffn_hidden_size=draw(st.integers(1, 9)),
        vocab_size=vocab,
        mask_token_id=mask.get(format_name, vocab),
        tied=draw(st.booleans()) and format_name != "smdm",
        is_causal=is_causal,
        max_position_embeddings=8,
        rms_norm_eps=1e-5,
        rotary_base=10000.0,
        embedding_rows=vocab + 1 + draw(st.integers(0, 4)),
        head_rows=vocab + draw(st.integers(0, 4)),
        qkv_bias=format_name == "qwen2" or (format_name in ("hf", "llada") and draw(st.booleans())),
        qk_norm=format_name == "qwen3" or (format_name == "hf" and draw(st.booleans())),
    )


@settings(max_examples=150, deadline=None)
@given(cases())
def test_round_trips_restore_every_bit_in_both_directions(case):
    format_name, arch = case
    generator = torch.Generator().manual_seed(0)
    seen: set[str] = set()
    for name in training_names(arch):
        shapes = external_shapes(format_name, name, arch)
        external = {e: torch.randn(s, generator=generator) for e, s in shapes}
        assert not seen & set(external)
        seen |= set(external)
        training = from_format(format_name, name, external.__getitem__, arch)
        assert training.shape == training_shape(name, arch)
        again = dict(to_format(format_name, name, training, arch))
        assert list(again) == list(external)
        assert all(torch.equal(again[e], external[e]) for e in external)
        # Each number of the source stands in the result once, and nothing but padding and the
        # row of a new mask token besides.
        given_rows = sum(e.shape[0] for e in external.values())
        rest = training.flatten(1) if training.dim() > 1 else training[:, None]
        added = rest[given_rows:].clone()
        if name == EMBEDDING and arch.mask_token_id >= given_rows:
            added[arch.mask_token_id - given_rows] = 0
        assert not added.any()
        assert torch.equal(training, from_format(format_name, name, again.__getitem__, arch))


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_rows_are_those_of_the_whole_and_nothing_else_is_read(case, data):
    format_name, arch = case
    name = data.draw(st.sampled_from(training_names(arch)))
    generator = torch.Generator().manual_seed(1)
    shapes = external_shapes(format_name, name, arch)
    external = {e: torch.randn(s, generator=generator) for e, s in shapes}
    num_rows = training_shape(name, arch)[0]
    start = data.draw(st.integers(0, num_rows))
    stop = data.draw(st.integers(start, num_rows))
    num_read = 0

    def read(external_name, first, last):
        nonlocal num_read
        assert 0 <= first <= last <= external[external_name].shape[0]
        num_read += last - first
        return external[external_name][first:last]

    rows = rows_from_format(format_name, name, read, arch, start, stop)
    whole = from_format(format_name, name, external.__getitem__, arch)
    assert torch.equal(rows, whole[start:stop])
    new_mask = name == EMBEDDING and start <= arch.mask_token_id < stop
    assert num_read <= stop - start or new_mask


def small(**changes) -> Architecture:
    fields = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 4,
        "ffn_hidden_size": 12,
        "vocab_size": 11,
        "mask_token_id": 11,
        "tied": False,
        "is_causal": False,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "rotary_base": 10000.0,
        "embedding_rows": 16,
        "head_rows": 16,
    }
    return Architecture(**(fields | changes))


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
    arch = small(tied=tied, qkv_bias=format_name == "qwen2", qk_norm=format_name == "qwen3")
    expected = {
        n: tuple(t.shape) for n, t in transformers_state(config_class, model_class, tied).items()
    }
    found = [pair for n in training_names(arch) for pair in external_shapes(format_name, n, arch)]
    assert dict(found) == expected


@pytest.mark.parametrize("is_causal", [False, True])
def test_names_and_shapes_are_those_of_smdm(is_causal):
    arch = small(num_query_groups=4, is_causal=is_causal)
    model = Smdm(layers=2, heads=4, width=16, ffn=12, vocab=11, is_causal=is_causal)
    expected = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    found = [pair for n in training_names(arch) for pair in external_shapes("smdm", n, arch)]
    assert dict(found) == expected


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"qkv_bias": True}], ids=str)
def test_names_and_shapes_are_those_of_llada(changes):
    arch = small(mask_token_id=9, **changes)
    config = LLADA_CONFIG | {
        "d_model": 16,
        "n_kv_heads": 2,
        "mlp_hidden_size": 12,
        "vocab_size": 11,
        "embedding_size": None,
        "weight_tying": arch.tied,
        "include_qkv_bias": arch.qkv_bias,
    }
    expected = {n: tuple(t.shape) for n, t in Llada(config).state_dict().items()}
    found = [pair for n in training_names(arch) for pair in external_shapes("llada", n, arch)]
    assert dict(found) == expected


def test_every_format_places_each_parameter_at_most_once():
    for table in FORMATS.values():
        names = [row.training for row in table.rows]
        assert len(names) == len(set(names))


def test_a_new_row_has_the_direction_of_the_mean_and_the_norm_of_a_row():
    rows = np.random.default_rng(0).normal(0.3, 2.0, (1000, 24))
    rows[:100] *= 50
    mean = rows.mean(axis=0)
    expected = mean * np.sqrt((rows**2).sum(axis=1).mean()) / np.sqrt((mean**2).sum())
    tensor = torch.tensor(rows)
    np.testing.assert_allclose(new_row([tensor]), expected, rtol=1e-12)
    np.testing.assert_allclose(new_row(tensor.split(7)), expected, rtol=1e-12)


def test_a_new_row_of_zeros_is_zero():
    assert not new_row([torch.zeros(5, 3)]).any()


@pytest.mark.parametrize(
    ("format_name", "changes", "field"),
    [
        ("nemo", {}, "'nemo' does not exist"),
        ("llama", {"qkv_bias": True}, "qkv_bias=True"),
        ("llama", {"qk_norm": True}, "qk_norm=True"),
        ("qwen2", {}, "qkv_bias=False"),
        ("qwen3", {}, "qk_norm=False"),
        ("smdm", {"tied": True}, "tied=True"),
        ("smdm", {"padded_vocab_size": 12}, "padded_vocab_size=12"),
        ("smdm", {"mask_token_id": 3}, "mask_token_id=3 inside"),
        ("smdm", {"head_dim": 8}, "head_dim=8"),
        ("smdm", {"qkv_bias": True}, "qkv_bias=True"),
        ("llada", {}, "mask_token_id=11 outside"),
        ("llada", {"mask_token_id": 3, "is_causal": True}, "is_causal=True"),
        ("llada", {"mask_token_id": 3, "qk_norm": True}, "qk_norm=True"),
    ],
)
def test_a_model_that_the_format_cannot_hold_is_refused(format_name, changes, field):
    with pytest.raises(ConversionError, match=field):
        external_shapes(format_name, EMBEDDING, small(**changes))


def test_the_mask_row_of_an_autoregressive_smdm_model_is_dropped_and_made_anew():
    arch = small(num_query_groups=4, is_causal=True)
    tensor = torch.randn(16, 16)
    ((_, external),) = to_format("smdm", EMBEDDING, tensor, arch)
    assert torch.equal(external, tensor[:11])
    again = from_format("smdm", EMBEDDING, lambda _: external, arch)
    torch.testing.assert_close(again[11].double(), new_row([external]))
    ((_, kept),) = to_format("smdm", EMBEDDING, tensor, replace(arch, is_causal=False))
    assert torch.equal(kept, tensor[:12])
