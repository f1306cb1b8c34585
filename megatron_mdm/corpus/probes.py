"""Texts on which two implementations of a tokenizer would differ if they differ at all."""

from __future__ import annotations

import itertools
import random
import unicodedata
from collections.abc import Sequence

from tokenizers import Tokenizer

_SEED = 20_240_229
_LONG_RUN = 10_000
_MIX_LENGTH = 40
_SPACES = " \t\n\r\v\f\x1c\x1f\x85\u00a0\u1680\u2003\u200b\u2028\u2029\u202f\u3000\ufeff"
_CONTRACTIONS = ("s", "t", "re", "ve", "m", "ll", "d", "S", "T", "RE", "Ve", "M", "LL", "D", "x")
_PHRASES = (
    "",
    "1234567890 12,345.67 \u0663\u0664\u0665 \u096a\u096b \uff17\uff18\uff19",
    "\U0001d7d9\U0001d7da \u2177 \xbd \xb2 \u4e00\u4e8c",
    "\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f44d\U0001f3fd",
    "\U0001f3f3\ufe0f\u200d\U0001f308 1\ufe0f\u20e3",
    "\U0001f1eb\U0001f1f7\U0001f1ef\U0001f1f5 \u263a\ufe0e \u2764\ufe0f\u200d\U0001f525",
    "e\u0301 \u0041\u030a \u1e9b\u0323 \u0f71\u0f72\u0f74 q\u0307\u0323 \u0301x a\u0315\u0300",
    "각 \u1100\u1161\u11a8 가\u11a8 \u2126 \u212b \uf900 \U0002f800 \ufb1d",
    "שלום עולם, مرحبا بالعالم! \u202eabc\u202c \u2067x\u2069",
    "日本語の文章です。한국어 문장입니다. ภาษาไทยไม่มีช่องว่าง हिन्दी देवनागरी",
    "\x00\x01\x02\x07\x08\x1b[0m\x7f\x80\x9f\x00\x00 \x00a",
    "\u0130\u0131\u017fK \u01c5 ß \ufb03 ẞ \u0149 '\u017f '\u212a don'\u0301t",
    "\ufffe\uffff\U0001ffff\U0010ffff\ue000\U000f0000\ufffd",
    'snake_case camelCase __init__ a.b->c() {}[];:!=== // \\n """x""" $€£ +-*/^`~|',
)
# Every code point of the first blocks, where alphabets, digits, marks and spaces crowd, and a
# sample of the others.
_CODE_POINTS = (
    range(0x0, 0x3400),
    range(0x3400, 0xA000, 331),
    range(0xA000, 0xD800, 13),
    range(0xE000, 0xF900, 331),
    range(0xF900, 0x10000, 3),
    range(0x10000, 0x20000, 17),
    range(0x20000, 0x110000, 2039),
)


def spell_vocabulary(tokenizer: Tokenizer) -> list[str]:
    """Spells out a vocabulary.

    Args:
        tokenizer: The tokenizer.

    Returns:
        The text of every token that is valid UTF-8, the special ones among them.
    """
    token_ids = sorted(tokenizer.get_vocab(with_added_tokens=True).values())
    texts = tokenizer.decode_batch([[i] for i in token_ids], skip_special_tokens=False)
    return [text for text in texts if "\ufffd" not in text]


def make_adversarial_texts(tokens: Sequence[str]) -> list[str]:
    """Makes texts that strain the splitting and merging of a byte-level BPE tokenizer.

    Args:
        tokens: The texts of the vocabulary's tokens, special ones included.

    Returns:
        The texts, the same on every call.
    """
    generator = random.Random(_SEED)
    texts = [*_PHRASES, *tokens, *_mix_tokens(tokens, generator), *_spread_code_points()]
    for run in ("a", " ", "\n", "\t", "!", "0", "ab", "é", "語", "\u0301", "\u00a0", " \n", "\r\n"):
        repeated = run * (_LONG_RUN // len(run))
        texts += [repeated, f"x{repeated}x", f"{repeated} "]
    for contraction in _CONTRACTIONS:
        texts += [
            f"it'{contraction}",
            f" '{contraction}a 1'{contraction}",
            f"'{contraction}' \u2019",
        ]
    spaces = list(_SPACES)
    for length in range(1, 160):
        mixed = "".join(generator.choices(spaces, k=1 + length % 9))
        texts.append(f"{mixed}a{mixed}1{mixed}.{mixed}{mixed[::-1]}")
    for _ in range(100):
        texts.append("".join(_draw_character(generator) for _ in range(_MIX_LENGTH)))
        texts.append(generator.randbytes(2 * _MIX_LENGTH).decode("latin-1"))
    return texts


def _mix_tokens(tokens: Sequence[str], generator: random.Random) -> list[str]:
    """Joins random tokens, and the halves of random tokens, to texts."""
    if not tokens:
        return []
    mixes = ["".join(generator.choices(tokens, k=8)) for _ in range(1500)]
    halves = [token[: 1 + len(token) // 2] for token in generator.choices(tokens, k=500)]
    return mixes + ["".join(generator.choices(halves, k=12)) for _ in range(500)]


def _spread_code_points() -> list[str]:
    """Puts code points between letters, digits and spaces, a few to a text."""
    characters = [
        chr(code)
        for code in itertools.chain(*_CODE_POINTS)
        if unicodedata.category(chr(code)) != "Cs"
    ]
    contexts = [f"a{character}a {character}1" for character in characters]
    return ["".join(contexts[start : start + 64]) for start in range(0, len(contexts), 64)]


def _draw_character(generator: random.Random) -> str:
    code = generator.randrange(0x110000 - 0x800)
    return chr(code if code < 0xD800 else code + 0x800)
