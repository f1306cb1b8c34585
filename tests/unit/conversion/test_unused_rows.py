"""Models whose vocabularies have more rows than their tokenizers have tokens, as Qwen2.5's have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from foreign_folders import edit, save_autoregressive, save_llada
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForMaskedLM

from megatron_mdm.core.errors import ConversionError
from megatron_mdm.hf.conversion.importing import (
    format_training_command,
    import_to_checkpoint,
    import_to_export,
)
from megatron_mdm.hf.formats.exported_config import list_exported_sizes
from megatron_mdm.hf.formats.foreign import open_foreign
from megatron_mdm.hf.from_run import export_run

TOKENS, ROWS = 16, 21


def save_tokenizer(folder: Path, size: int = TOKENS) -> None:
    words = {f"w{index}": index for index in range(size)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def qwen(tmp_path, request) -> Path:
    folder = tmp_path / "qwen"
    model = save_autoregressive(folder, "qwen2", tie_word_embeddings=request.param)
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_the_tokenizer_says_how_many_rows_are_tokens(qwen):
    source = open_foreign("qwen2", qwen)
    assert (source.saved.model.vocab_size, source.saved.model.vocabulary_rows) == (TOKENS, ROWS)
    # Neither a token nor a row that the source has.
    assert source.saved.model.mask_id == ROWS
    command = format_training_command(Path("w"), source)
    assert f" model.vocab_size={TOKENS} model.padded_vocab_size={ROWS} " in f"{command} "
    assert "mask_token_id" not in command
    (qwen / "tokenizer.json").unlink()
    whole = open_foreign("qwen2", qwen)
    assert (whole.saved.model.vocab_size, whole.saved.model.padded_vocab_size) == (ROWS, None)


def test_all_rows_are_predicted_when_that_is_asked_for(qwen):
    source = open_foreign("qwen2", qwen, vocab_size=ROWS)
    assert (source.saved.model.vocab_size, source.saved.model.padded_vocab_size) == (ROWS, None)
    between = open_foreign("qwen2", qwen, vocab_size=TOKENS + 1)
    assert (between.saved.model.vocab_size, between.saved.model.vocabulary_rows) == (
        TOKENS + 1,
        ROWS,
    )


@pytest.mark.parametrize("asked", [TOKENS - 1, ROWS + 1])
def test_a_vocabulary_beside_the_tokens_and_rows_is_refused(qwen, asked):
    with pytest.raises(
        ConversionError, match=rf"--vocab-size={asked} is not in \[{TOKENS}, {ROWS}"
    ):
        open_foreign("qwen2", qwen, vocab_size=asked)


def test_a_tokenizer_with_more_tokens_than_rows_is_refused_and_the_remedy_works(qwen):
    save_tokenizer(qwen, ROWS + 2)
    with pytest.raises(ConversionError, match=rf"has {ROWS + 2} tokens, more than the {ROWS} rows"):
        open_foreign("qwen2", qwen)
    assert open_foreign("qwen2", qwen, vocab_size=ROWS).saved.model.vocab_size == ROWS


@pytest.mark.parametrize("keep_causal", [False, True])
def test_every_row_comes_back_to_the_bit(tmp_path, qwen, keep_causal):
    source = open_foreign("qwen2", qwen, keep_causal=keep_causal)
    weights = import_to_checkpoint(source, tmp_path / "weights", tensor_parallel_size=2)
    path = export_run(weights, tmp_path / "export", dtype=torch.bfloat16).path
    stored, found = (load_file(folder / "model.safetensors") for folder in (qwen, path))
    assert found.keys() == stored.keys()
    name = "model.embed_tokens.weight"
    assert len(found[name]) == ROWS + 1
    for key, tensor in stored.items():
        kept = found[key][:ROWS] if key == name else found[key]
        assert kept.dtype == tensor.dtype
        assert torch.equal(bits(kept), bits(tensor)), key
    # And from the export to a checkpoint and back, the mask's row too.
    back = open_foreign("hf", path)
    assert list_exported_sizes(back.saved) == list_exported_sizes(source.saved)
    weights = import_to_checkpoint(back, tmp_path / "again")
    again = load_file(
        export_run(weights, tmp_path / "twice", dtype=torch.bfloat16).path / "model.safetensors"
    )
    assert all(torch.equal(bits(again[key]), bits(tensor)) for key, tensor in found.items())


@torch.no_grad()
def test_the_model_is_that_whose_vocabulary_lacks_those_rows(tmp_path, qwen):
    is_tied = open_foreign("qwen2", qwen).saved.model.tie_embeddings
    kept = tmp_path / "kept"
    source = save_autoregressive(kept, "qwen2", tie_word_embeddings=is_tied)
    source.resize_token_embeddings(TOKENS)
    source.save_pretrained(tmp_path / "cut")
    save_tokenizer(kept)
    tokens = torch.randint(TOKENS, (3, 20), generator=torch.Generator().manual_seed(0))
    hidden = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    logits, losses = [], []
    for folder in (kept, tmp_path / "cut"):
        foreign = open_foreign("qwen2", folder)
        path = import_to_export(foreign, tmp_path / f"{folder.name}-export").path
        model = AutoModelForMaskedLM.from_pretrained(path, trust_remote_code=True).eval()
        inputs = tokens.masked_fill(hidden, model.config.mask_token_id)
        out = model(inputs, labels=tokens.masked_fill(~hidden, -100))
        logits.append(out.logits)
        losses.append(out.loss)
    assert logits[0].shape[-1] == TOKENS
    assert torch.equal(logits[0], logits[1])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("mask_token_id", [11, 27])
def test_a_llada_model_masks_with_its_own_row_wherever_that_stands(tmp_path, mask_token_id):
    folder = tmp_path / "llada"
    save_llada(folder, mask_token_id=mask_token_id)
    save_tokenizer(folder)
    edit(folder, mask_token_id=mask_token_id)
    source = open_foreign("llada", folder)
    assert (source.saved.model.vocab_size, source.saved.model.vocabulary_rows) == (TOKENS, 30)
    assert source.saved.model.mask_id == mask_token_id
    path = import_to_export(source, tmp_path / "export").path
    stored = load_file(folder / "model.safetensors")
    found = load_file(path / "model.safetensors")
    for ours, theirs in (
        ("model.embed_tokens.weight", "model.transformer.wte.weight"),
        ("lm_head.weight", "model.transformer.ff_out.weight"),
    ):
        assert torch.equal(found[ours], stored[theirs])


def test_formats_without_such_rows_say_so(tmp_path, export, tiny):
    folder = export(tiny())[0]
    with pytest.raises(
        ConversionError, match="vocab_size=19 belongs to the formats llada, llama, qwen2"
    ):
        open_foreign("hf", folder, vocab_size=19)
