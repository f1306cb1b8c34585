"""Weights in memory run as the export of them does."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import AutoModelForMaskedLM

from megatron_mdm.core.errors import ConversionError
from megatron_mdm.hf.in_memory import build_exported_model


def build(saved, source, dtype=torch.float32):
    weights = ((name, source.load(name)) for name in source.list_names())
    cpu = torch.device("cpu")
    return build_exported_model(saved, weights, eos_token_id=0, dtype=dtype, device=cpu)


@pytest.mark.parametrize("is_causal", [False, True], ids=["mdm", "ar"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_bit_is_that_of_the_export(export, tiny, is_causal, tied, dtype):
    saved = tiny(is_causal=is_causal, tie_embeddings=tied)
    folder, source, _ = export(saved)
    loaded = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
    made = build(saved, source, dtype)
    assert not made.training
    assert made.config.to_dict().keys() <= loaded.config.to_dict().keys()
    expected = dict(loaded.eval().named_parameters())
    for name, found in made.named_parameters():
        assert torch.equal(found, expected.pop(name)), name
    assert not expected
    tokens_BS = torch.arange(12).reshape(2, 6) % 10
    with torch.no_grad():
        assert torch.equal(made(tokens_BS).logits, loaded(tokens_BS).logits)


def test_the_weights_are_copies_and_no_code_is_written(tiny, random_source):
    saved = tiny()
    source = random_source(saved)
    made = build(saved, source)
    before = made.model.embed_tokens.weight.clone()
    for tensor in source.tensors.values():
        tensor.zero_()
    assert torch.equal(made.model.embed_tokens.weight, before)
    assert "/megatron_mdm/hf/" in sys.modules[type(made).__module__].__file__


def test_a_tensor_of_another_shape_is_refused(tiny, random_source):
    saved = tiny()
    other = saved._replace(model=saved.model.model_copy(update={"ffn_hidden_size": 44}))
    with pytest.raises(ConversionError, match="shape"):
        build(saved, random_source(other))
