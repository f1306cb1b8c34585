"""Byte-level BPE vocabularies as tiktoken takes them, where both libraries must agree.

Both merge the adjacent pair that was learned first, leftmost on ties. Hugging Face `tokenizers`
looks a pair of symbols up among the merges; tiktoken looks the joined bytes up among the tokens.
`translate` accepts a tokenizer only if the two lookups find the same pairs.

They do for a token P under either of two conditions. (a) P's own bytes, encoded alone, become P.
As long as no merge crosses the ends of an occurrence of P, its inside goes through the same states
as P alone, so that two symbols that join to P can only be the pair that makes P alone. (b) Every
way to cut P into two tokens is listed as a merge. Under either one, at most one pair that joins to
P is ever met, so the order of the other merges of P cannot matter as long as no merge of another
token lies between.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from tokenizers import Tokenizer, models

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_NUM_BYTES = 256


class Untranslatable(Exception):
    """The tokenizer does something that tiktoken does not, as the message says."""


class TiktokenVocabulary(NamedTuple):
    """What makes tiktoken encode as a tokenizer does.

    Attributes:
        pattern: The regular expression that cuts a text into pieces.
        ranks: The rank of each token's bytes: the 256 bytes, then the merges in their order.
        token_ids: The tokenizer's id of each rank.
        normalize_nfc: Whether the text is brought into Unicode's NFC first.
    """

    pattern: str
    ranks: dict[bytes, int]
    token_ids: list[int]
    normalize_nfc: bool


def translate(serialised: str) -> TiktokenVocabulary:
    """Translates a tokenizer for tiktoken.

    Args:
        serialised: The tokenizer, by `Tokenizer.to_str`.

    Returns:
        Its pattern and ranks. Whether the two libraries' regular expressions read the pattern
        alike is not known here.

    Raises:
        Untranslatable: tiktoken could give other tokens.
    """
    content = json.loads(serialised)
    for token in content["added_tokens"]:
        if not token["special"]:
            raise Untranslatable(f"the added token {token['content']!r} is not a special one")
    normalizer = content["normalizer"]
    if normalizer is not None and normalizer != {"type": "NFC"}:
        raise Untranslatable(f"its normalizer is {normalizer['type']}")
    model = content["model"]
    _check_model(model)
    ranks, token_ids = _rank_tokens(model)
    _check_reachable(model, ranks, token_ids)
    if model["ignore_merges"]:
        special = {token["content"] for token in content["added_tokens"]}
        _check_whole_pieces(model["vocab"], set(token_ids), special)
    pattern = _read_pattern(content["pre_tokenizer"])
    return TiktokenVocabulary(pattern, ranks, token_ids, normalizer is not None)


def _check_model(model: dict[str, Any]) -> None:
    if model.get("type") != "BPE":
        raise Untranslatable(f"its model is {model.get('type')}, not BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model[option]:
            raise Untranslatable(f"its model has {option}={model[option]!r}")


def _read_pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    steps = [pre_tokenizer] if pre_tokenizer else []
    if pre_tokenizer and pre_tokenizer["type"] == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    kinds = [step["type"] for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise Untranslatable(f"its pre-tokenizer is {' and '.join(kinds) or 'none'}")
    last = steps[-1]
    if last["add_prefix_space"]:
        raise Untranslatable("its pre-tokenizer adds a space in front")
    if len(steps) == 1:
        if not last["use_regex"]:
            raise Untranslatable("its pre-tokenizer does not split the text")
        return GPT2_PATTERN
    split = steps[0]
    if split["behavior"] != "Isolated" or split["invert"] or "Regex" not in split["pattern"]:
        raise Untranslatable("its pre-tokenizer splits otherwise than at matches of an expression")
    if last["use_regex"]:
        raise Untranslatable("its pre-tokenizer splits the text twice")
    return str(split["pattern"]["Regex"])


def list_byte_characters() -> list[str]:
    """Lists the characters that stand for the bytes in a byte-level vocabulary.

    Returns:
        For each byte in order the character: itself where it is printable in Latin-1, otherwise
        one of those from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(_NUM_BYTES)]


def _rank_tokens(model: dict[str, Any]) -> tuple[dict[bytes, int], list[int]]:
    """Ranks the bytes, then the products of merges in the order of the merges."""
    vocabulary: dict[str, int] = model["vocab"]
    characters = list_byte_characters()
    missing = [byte for byte, character in enumerate(characters) if character not in vocabulary]
    if missing:
        raise Untranslatable(f"its vocabulary lacks the byte {missing[0]}")
    byte_of = {character: byte for byte, character in enumerate(characters)}
    ranks = {bytes([byte]): byte for byte in range(_NUM_BYTES)}
    token_ids = [vocabulary[character] for character in characters]
    last_product = ""
    for left, right in model["merges"]:
        product = left + right
        # Vocabularies converted from tiktoken list every way to make a token, in a row.
        if product == last_product:
            continue
        last_product = product
        if not byte_of.keys() >= set(product):
            raise Untranslatable(f"its token {product!r} is not made of bytes")
        content = bytes(byte_of[character] for character in product)
        if content in ranks:
            raise Untranslatable(f"its token {product!r} is made by merges far apart")
        ranks[content] = len(ranks)
        token_ids.append(vocabulary[product])
    return ranks, token_ids


def _check_reachable(model: dict[str, Any], ranks: dict[bytes, int], token_ids: list[int]) -> None:
    """Checks condition (a) or (b) of the module's text for every token."""
    # Without a pre-tokenizer the text is one piece of the characters that stand for bytes.
    tokenizer = Tokenizer(models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]]))
    characters = list_byte_characters()
    names = ["".join(characters[byte] for byte in content) for content in ranks]
    known = set(names)
    merges = {tuple(pair) for pair in model["merges"]} if model["ignore_merges"] else set()
    for name, token_id, encoding in zip(
        names, token_ids, tokenizer.encode_batch_fast(names), strict=True
    ):
        if encoding.ids == [token_id]:
            continue
        if not model["ignore_merges"]:
            raise Untranslatable(f"its merges do not lead to its token {name!r}")
        for cut in range(1, len(name)):
            pair = (name[:cut], name[cut:])
            if pair not in merges and known.issuperset(pair):
                raise Untranslatable(f"its token {name!r} lacks the merge of {pair[0]!r}")


def _check_whole_pieces(vocabulary: dict[str, int], ranked: set[int], special: set[str]) -> None:
    """Checks that a piece that is looked up whole finds only tokens with a rank."""
    for name, token_id in vocabulary.items():
        if token_id not in ranked and name not in special:
            raise Untranslatable(f"no merge makes its token {name!r}")
