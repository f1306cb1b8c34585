"""What files of ranks and of merges do not say: how text is cut, and what is special.

The expressions are written as both tiktoken and Hugging Face `tokenizers` read them; the tests hold
them against those that tiktoken itself has.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_mdm.corpus.tiktoken_bpe import GPT2_PATTERN

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K_PATTERN = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDS}"
)
_O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    rf"{_CONTRACTIONS}?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    rf"{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}"
)


class KnownRanks(NamedTuple):
    """A published file of ranks.

    Attributes:
        name: What it is called.
        pattern: The expression that cuts text.
        eos_token: The token that ends a text.
        special_tokens: The special tokens and their ids.
    """

    name: str
    pattern: str
    eos_token: str
    special_tokens: dict[str, int]


_END = "<|endoftext|>"
_LLAMA3 = (
    *("<|begin_of_text|>", "<|end_of_text|>"),
    *("<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"),
    *(f"<|reserved_special_token_{number}|>" for number in range(2, 246)),
)

# By the SHA-256 of the file.
KNOWN_RANKS = {
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": KnownRanks(
        "r50k_base", GPT2_PATTERN, _END, {_END: 50256}
    ),
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069": KnownRanks(
        "p50k_base", GPT2_PATTERN, _END, {_END: 50256}
    ),
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": KnownRanks(
        "cl100k_base",
        _CL100K_PATTERN,
        _END,
        {
            _END: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": KnownRanks(
        "o200k_base", _O200K_PATTERN, _END, {_END: 199999, "<|endofprompt|>": 200018}
    ),
    "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55": KnownRanks(
        "Llama 3",
        _CL100K_PATTERN,
        "<|end_of_text|>",
        {token: i for i, token in enumerate(_LLAMA3, start=128_000)},
    ),
}

# By the class of transformers.
KNOWN_CLASSES = {
    "GPT2Tokenizer": GPT2_PATTERN,
    "Qwen2Tokenizer": _CL100K_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"),
}

# By the SHA-256 of merges.txt: the class to use where the folder names none.
KNOWN_MERGES = {
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5": "GPT2Tokenizer",
}
