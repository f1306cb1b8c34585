"""How the page shows a single token, whatever bytes it stands for."""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

from megatron_mdm.corpus.tiktoken_bpe import list_byte_characters

# Characters that are shown as they are although Python does not call them printable.
_SHOWN_AS_THEY_ARE = "\n\t"
# SentencePiece's sign for a space, and its tokens for single bytes.
_LOWER_BLOCK = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Piece(NamedTuple):
    r"""A token as text.

    Attributes:
        text: Its characters; escapes such as `\xe2` stand for bytes that are no whole character
            and for characters that nothing can be seen of.
        kind: special: a token that is no text; bytes: not all of it is whole characters; text: all
            else.
        raw: The bytes of the kind `bytes`, otherwise empty: with its neighbours' they may make
            whole characters.
    """

    text: str
    kind: Literal["text", "bytes", "special"]
    raw: bytes = b""


class PieceReader:
    """Shows the tokens of a tokenizer.

    Args:
        tokenizer: A fast tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special_ids = set(tokenizer.all_special_ids)
        decoder = tokenizer.backend_tokenizer.decoder
        is_byte_level = decoder is not None and b"ByteLevel" in decoder.__getstate__()
        self._byte_of = {
            character: byte
            for byte, character in enumerate(list_byte_characters())
            if is_byte_level
        }

    def read_piece(self, token_id: int) -> Piece:
        """Shows one token.

        Args:
            token_id: Its id; ids beyond the tokenizer's are shown by their number.

        Returns:
            What to show.
        """
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return Piece(f"<{token_id}>", "special")
        if token_id in self._special_ids:
            return Piece(str(token), "special")
        text = self._read_text(str(token))
        shown = "".join(
            character
            if character.isprintable() or character in _SHOWN_AS_THEY_ARE
            else _escape(character)
            for character in text
        )
        raw = text.encode("utf-8", "surrogateescape")
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError:
            return Piece(shown, "bytes", raw)
        return Piece(shown, "text")

    def _read_text(self, token: str) -> str:
        """Characters of a token; a byte that is part of none comes as a lone surrogate."""
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)]).decode("utf-8", "surrogateescape")
        if self._byte_of and all(character in self._byte_of for character in token):
            raw = bytes(self._byte_of[character] for character in token)
            return raw.decode("utf-8", "surrogateescape")
        return token.replace(_LOWER_BLOCK, " ")


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
