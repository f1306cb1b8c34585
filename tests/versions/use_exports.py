"""What a user of another version of transformers does with exports; run as a program there.

Arguments: the folder that holds the exports `mdm` and `ar`, and the file for what was found.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    pipeline,
)

TOKENS = torch.tensor([[3, 7, 0, 18, 2], [5, 5, 11, 4, 16]])
REAL = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
TRUST = {"trust_remote_code": True}


def use_masked_diffusion(folder: Path) -> dict[str, torch.Tensor]:
    """Logits, text, probabilities, a batch, gradients, and logits of a resized vocabulary."""
    model = AutoModelForMaskedLM.from_pretrained(folder, **TRUST).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **TRUST)
    masked = tokenizer("w3 <|mask|> w5", return_tensors="pt")
    assert masked.input_ids.tolist() == [[3, 19, 5]]
    assert tokenizer.mask_token_id == model.config.mask_token_id == 19
    with torch.no_grad():
        plain = model(TOKENS, output_hidden_states=True, output_attentions=True)
        found = {
            "logits": model(TOKENS, attention_mask=REAL).logits,
            "masked": model(**masked).logits,
            "hidden": plain.hidden_states[1],
            "attentions": plain.attentions[1],
            "generated": model.generate(TOKENS, max_new_tokens=6, temperature=0.0),
        }
    messages = [{"role": "user", "content": "w3 w4"}]
    told = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert told == tokenizer.encode("w5 w3 w4 w6")
    found["told"] = torch.tensor(told)
    best = pipeline("fill-mask", model=str(folder), **TRUST)("w3 <|mask|> w5")
    found["best"] = torch.tensor([one["score"] for one in best])
    texts = [tokenizer("w3 w4 w5"), tokenizer("w6 w7")]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.9)(texts)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 3)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        found[f"gradient {checkpointing}"] = model.model.embed_tokens.weight.grad.clone()
    tokenizer.add_tokens(["new"])
    model.eval().resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        resized = model(TOKENS, attention_mask=REAL).logits
    assert resized.shape[-1] == 21
    assert bool((resized[..., 19] == -torch.inf).all())
    found["resized"] = resized[..., :19]
    return found


def use_autoregressive(folder: Path) -> dict[str, torch.Tensor]:
    """Logits and text of both classes that load it."""
    causal = AutoModelForCausalLM.from_pretrained(folder, **TRUST).eval()
    masked = AutoModelForMaskedLM.from_pretrained(folder, **TRUST).eval()
    prompts = {"input_ids": TOKENS, "attention_mask": REAL, "max_new_tokens": 6}
    theirs = {"do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        return {
            "causal": causal(TOKENS).logits,
            "causal masked": masked(TOKENS).logits,
            "greedy": causal.generate(**prompts, **theirs),
            "greedy without a cache": causal.generate(**prompts, **theirs, use_cache=False),
            "greedy of ours": masked.generate(**prompts, temperature=0.0),
            "beams": causal.generate(**prompts, **theirs, num_beams=3),
        }


if __name__ == "__main__":
    exports = Path(sys.argv[1])
    found = use_masked_diffusion(exports / "mdm") | use_autoregressive(exports / "ar")
    torch.save({"version": transformers.__version__, "found": found}, sys.argv[2])
