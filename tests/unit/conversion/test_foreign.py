from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from foreign_folders import (
    CLASSES,
    SIZES,
    save_autoregressive,
    save_llada,
    save_smdm,
    smdm_of,
)
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from megatron_mdm.checkpoint.manifest import SavedModel
from megatron_mdm.config import expand_preset, list_presets
from megatron_mdm.core.errors import ConversionError
from megatron_mdm.hf.export import export_to_hf
from megatron_mdm.hf.formats.config_fields import Source
from megatron_mdm.hf.formats.foreign import ForeignModel, open_foreign
from megatron_mdm.hf.formats.foreign_configs import describe_smdm
from megatron_mdm.hf.formats.translation import list_external_shapes, make_new_row, to_format


def export_logits(source: ForeignModel, folder: Path, tokens: torch.Tensor, **changes):
    export_to_hf(
        source,
        source.saved,
        folder,
        tokenizer_dir=None,
        eos_token_id=source.eos_token_id,
        metadata={},
    )
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, **changes)
    return model.eval()(tokens).logits


def tokens_below(limit: int, seq_length: int = 12) -> torch.Tensor:
    return torch.randint(limit, (2, seq_length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("format_name", list(CLASSES))
@torch.no_grad()
def test_an_autoregressive_model_computes_what_transformers_does(tmp_path, format_name, tied):
    model = save_autoregressive(
        tmp_path / "ar", format_name, shard_size="8KB", tie_word_embeddings=tied
    )
    assert (tmp_path / "ar" / "model.safetensors.index.json").exists()
    tokens = tokens_below(SIZES["vocab_size"])
    expected = model(tokens).logits
    kept = open_foreign(format_name, tmp_path / "ar", keep_causal=True)
    assert (kept.saved.kind, kept.saved.seq_length, kept.eos_token_id) == ("ar", 32, 2)
    logits = export_logits(kept, tmp_path / "kept", tokens)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    started = open_foreign(format_name, tmp_path / "ar")
    assert started.saved.kind == "mdm"
    assert not started.saved.is_causal
    # The start of a masked-diffusion model is the same model but for what it may see.
    logits = export_logits(started, tmp_path / "started", tokens, is_causal=True)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("format_name", list(CLASSES))
def test_every_tensor_goes_back_to_the_bit(tmp_path, format_name):
    save_autoregressive(tmp_path, format_name, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    source = open_foreign(format_name, tmp_path)
    back = [
        pair
        for name in source.list_names()
        for pair in to_format(format_name, name, source.load(name), source.saved)
    ]
    assert dict(back).keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in back)


@pytest.mark.parametrize("is_causal", [False, True])
@torch.no_grad()
def test_an_smdm_model_computes_what_a_plain_one_does(tmp_path, is_causal):
    path = tmp_path / "published.safetensors"
    model = save_smdm(path, is_causal=is_causal)
    source = open_foreign("smdm", path)
    assert source.saved.kind == ("ar" if is_causal else "mdm")
    assert (
        source.saved.seq_length,
        source.saved.model.norm_epsilon,
        source.saved.model.rotary_base,
    ) == (
        2048,
        1e-5,
        10000.0,
    )
    tokens = tokens_below(50 if is_causal else 51)
    logits = export_logits(source, tmp_path / "export", tokens)
    torch.testing.assert_close(logits, model(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 2, "include_qkv_bias": True},
        {"weight_tying": True, "mlp_hidden_size": 40, "rms_norm_eps": 1e-3},
        {"vocab_size": 28, "embedding_size": 32},
    ],
    ids=str,
)
@torch.no_grad()
def test_a_llada_model_computes_what_a_plain_one_does(tmp_path, changes):
    model = save_llada(tmp_path / "llada", **changes)
    source = open_foreign("llada", tmp_path / "llada")
    assert (source.saved.kind, source.saved.model.mask_id, source.eos_token_id) == ("mdm", 27, 3)
    tokens = tokens_below(changes.get("vocab_size", 30))
    tokens[:, ::4] = 27
    # Rows of the embedding beyond its vocabulary stand for no token.
    expected = model(tokens)[..., : changes.get("vocab_size")]
    expected[..., 27] = -torch.inf
    logits = export_logits(source, tmp_path / "export", tokens)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask_token_id", [19, 4])
def test_our_own_export_comes_back_to_the_bit(tiny, export, mask_token_id):
    folder, written, _ = export(tiny(mask_token_id=mask_token_id, qkv_bias=True, qk_norm=True))
    source = open_foreign("hf", folder, vocab_padding_multiple=32)
    assert source.saved == tiny(mask_token_id=mask_token_id, qkv_bias=True, qk_norm=True)
    assert source.tokenizer_dir == folder
    for name in source.list_names():
        expected = written.tensors[name].clone()
        if "embedding" in name or "output_layer" in name:
            expected[20 if "embedding" in name and mask_token_id == 19 else 19 :] = 0
        assert torch.equal(source.load(name), expected)


def test_sizes_of_the_run_are_those_of_the_architecture(tmp_path):
    save_autoregressive(tmp_path, "qwen3", tie_word_embeddings=True)
    source = open_foreign("qwen3", tmp_path, vocab_padding_multiple=8)
    assert (source.saved.model.embedding_rows, source.saved.model.head_rows) == (24, 24)
    assert source.saved.model.mask_id == 21
    assert (source.saved.model.head_dim, source.saved.model.qk_norm) == (10, True)
    embedding = source.load("embedding.word_embeddings.weight")
    assert embedding.shape == (24, 24)
    torch.testing.assert_close(embedding[21].double(), make_new_row([embedding[:21]]))
    assert not embedding[22:].any()


def family() -> list[str]:
    return [name for name in list_presets() if name.startswith("smdm-")]


def described(shapes: dict[str, tuple[int, ...]], preset: str | None) -> SavedModel:
    """A model of the family by the headers of its file."""
    files = SimpleNamespace(list_shapes=lambda: shapes, folder=Path())
    return describe_smdm(Source("smdm", Path("x"), files, preset=preset)).saved


@pytest.mark.parametrize("is_causal", [False, True])
def test_every_published_smdm_model_is_known_by_its_shapes_alone(is_causal):
    for preset in family():
        fields = expand_preset(preset)
        with torch.device("meta"):
            model = smdm_of(preset, is_causal=is_causal, vocab=32000)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found = described(shapes, None)
        assert found.kind == ("ar" if is_causal else "mdm")
        given = {name: getattr(found.model, name) for name in fields if "init" not in name}
        assert given == {name: fields[name] for name in given}


def smdm_shapes(**changes) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = smdm_of("smdm-6M", is_causal=False, vocab=50, **changes)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_an_unpublished_smdm_size_asks_for_its_preset():
    shapes = smdm_shapes(num_layers=5)
    with pytest.raises(ConversionError, match=r"5 layers of width 256.*give --preset"):
        described(shapes, None)
    with pytest.raises(ConversionError, match="num_layers=5 where the preset says 6"):
        described(shapes, "smdm-6M")
    with pytest.raises(ConversionError, match="'smdm-7M' does not exist"):
        described(shapes, "smdm-7M")
    shapes = smdm_shapes(ffn_hidden_size=77)
    with pytest.raises(ConversionError, match="ffn_hidden_size=77"):
        described(shapes, None)


def sparse_model(path: Path, vocab: int) -> None:
    """A model of the family, all zeros, whose file takes no disk."""
    fields = expand_preset("smdm-6M")
    header, offset = {}, 0
    for name, shape in smdm_shapes().items():
        rows = vocab + (name == "transformer.wte.weight")
        shape = (rows, fields["hidden_size"]) if "wte" in name or "lm_head" in name else shape
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + offset)


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def test_memory_holds_little_more_than_the_tensor_in_work(tmp_path):
    vocab = 80_000
    sparse_model(tmp_path / "x.safetensors", vocab)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    source = open_foreign("smdm", tmp_path / "x.safetensors")
    assert peak_bytes() - before < 20e6
    tensor = source.load("embedding.word_embeddings.weight")
    size = 4 * tensor.numel()
    assert size > 80e6
    # A second copy would make it twice the size. The pieces that are read, and what the allocator
    # keeps of them, take up to 40 MB, depending on what ran before in this process.
    assert peak_bytes() - before < 1.7 * size


def test_external_names_cover_the_whole_source(tmp_path):
    save_llada(tmp_path)
    source = open_foreign("llada", tmp_path)
    names = [
        name
        for training in source.list_names()
        for name, _ in list_external_shapes("llada", training, source.saved)
    ]
    stored = load_file(tmp_path / "model.safetensors")
    assert sorted(names) == sorted(stored)
    assert all(torch.equal(source.load_external(name), stored[name]) for name in names)
