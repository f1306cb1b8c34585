"""Small tokenizers in the formats of other libraries, and texts that tell implementations apart."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from megatron_mdm.corpus.tiktoken_bpe import translate
from megatron_mdm.corpus.tokenizer_training import train_byte_level_bpe

DOCUMENTS = [
    "def hello(name):\n    return 'Hello, ' + name  # says it's me\n",
    "naïve café déjà vu, Ærøskøbing; 12,345.67 and 1234567 don't fit\n\n",
    "日本語の文章です。 한국어 문장입니다. שלום עולם مرحبا 🙂👩\u200d👧🏽 🇫🇷",
] * 8
TEXTS = [
    *DOCUMENTS[:3],
    *(
        "",
        " ",
        "   ",
        "a",
        " a",
        "a ",
        "  a  b   c  ",
        "\t\ta\n \n b\r\n",
        "a\u00a0b\u3000c\u200bd",
    ),
    *("e\u0301 é \u212b Å ﬁ \uff11\uff12", "123 4567 ٣٤٥ Ⅷ ½", "🙂🙂 👍🏽 1️⃣", "語 語  한글"),
    *("<|endoftext|> a<|endoftext|>b", "<s>a</s> [INST] <unk> <0x41>", "it's IT'S don\u2019t"),
    *("x" * 300, " " * 300, "\n" * 50, "ab" * 100),
]


def ranks_of(num_tokens: int = 600) -> dict[bytes, int]:
    """Ranks as a file of tiktoken has them: the bytes, then what was merged."""
    return translate(train_byte_level_bpe(DOCUMENTS, num_tokens).to_str()).ranks


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    """Writes a file of tiktoken's."""
    path.write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    )
    return path


def write_tekken(path: Path, ranks: dict[bytes, int], pattern: str, **changes: Any) -> Path:
    """Writes a tekken.json: 20 special tokens of which 3 have names, and 7 ranks of filling."""
    named = ["<unk>", "<s>", "</s>"]
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in ranks.items()
    ]
    filling = {"token_bytes": base64.b64encode(b"filling").decode(), "token_str": "filling"}
    content = {
        "config": {
            "pattern": pattern,
            "num_vocab_tokens": len(ranks) + 7,
            "default_vocab_size": len(ranks) + 20,
            "default_num_special_tokens": 20,
            "version": "v7",
        },
        "vocab": vocabulary + [filling] * 7,
        "special_tokens": [
            {"rank": rank, "token_str": token, "is_control": True}
            for rank, token in enumerate(named)
        ],
    }
    path.write_text(json.dumps(content | changes))
    return path


def write_merges(folder: Path, kind: str | None = "GPT2Tokenizer", **config: Any) -> Path:
    """Writes vocab.json and merges.txt; the end of text has the id 0."""
    folder.mkdir(exist_ok=True)
    train_byte_level_bpe(DOCUMENTS, 600).model.save(str(folder))
    if kind is not None:
        config["tokenizer_class"] = kind
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
