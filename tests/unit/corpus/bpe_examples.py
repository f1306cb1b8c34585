from __future__ import annotations

import json

from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_mdm.corpus.tiktoken_bpe import GPT2_PATTERN, list_byte_characters

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


def change(tokenizer, path, value):
    content = json.loads(tokenizer.to_str())
    *parents, key = path
    place = content
    for parent in parents:
        place = place[parent]
    place[key] = value
    return json.dumps(content)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SPLIT = {
    "type": "Split",
    "pattern": {"Regex": GPT2_PATTERN},
    "behavior": "Isolated",
    "invert": False,
}


def in_sequence(split):
    return {"type": "Sequence", "pretokenizers": [split, {**BYTE_LEVEL, "use_regex": False}]}


def bare_bpe(products, merges, **options):
    characters = list_byte_characters()
    vocabulary = {name: i for i, name in enumerate([*characters, *products])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, **options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return tokenizer


def reference_ids(tokenizer, text):
    """What `tokenizers` gives for one text, without any of the project's code."""
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids
