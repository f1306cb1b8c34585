"""The first loss of a masked-diffusion model that starts from a trained autoregressive one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForMaskedLM, LlamaConfig, LlamaForCausalLM

from megatron_mdm.hf.export import export_to_hf
from megatron_mdm.hf.formats.foreign import open_foreign

VOCAB, LENGTH = 64, 64


def windows(count: int, seed: int) -> torch.Tensor:
    """A language of ln 16 nats per token, in which every token follows sixteen others."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (count, LENGTH), generator=generator)
    drawn = torch.randint(16, (count, LENGTH), generator=generator)
    for i in range(1, LENGTH):
        tokens[:, i] = (5 * tokens[:, i - 1] + drawn[:, i]) % VOCAB
    return tokens


def trained_model(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(150):
        tokens = windows(8, step)
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 3.3
    return model


def first_loss(model, share: float) -> torch.Tensor:
    """Nats a masked token, at a share of masked tokens."""
    tokens = windows(32, 1000)
    is_mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < share
    logits = model(tokens.masked_fill(is_mask, VOCAB)).logits
    return F.cross_entropy(logits[is_mask], tokens[is_mask])


def gradient_of_the_mask_row(model) -> float:
    model.zero_grad()
    first_loss(model, 0.5).backward()
    return model.get_input_embeddings().weight.grad[VOCAB].norm().item()


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_loss_and_gradient_are_sane(tmp_path, tied):
    trained_model(tied).save_pretrained(tmp_path / "ar")
    source = open_foreign("llama", tmp_path / "ar")
    export_to_hf(
        source, source.saved, tmp_path / "mdm", tokenizer_dir=None, eos_token_id=None, metadata={}
    )
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "mdm", trust_remote_code=True).eval()
    uniform = math.log(VOCAB)
    for share in (0.5, 0.75, 1.0):
        # A confident model is wrong with confidence where it sees masks: above ln V, but not far.
        assert 0.5 * uniform < first_loss(model, share).item() < 2 * uniform
    gradient = gradient_of_the_mask_row(model)
    # What the row is spared: the norm of a short one multiplies gradients, by 1/sqrt(epsilon)
    # for one of zeros.
    model.get_input_embeddings().weight.data[VOCAB].zero_()
    assert gradient_of_the_mask_row(model) > 10 * gradient
