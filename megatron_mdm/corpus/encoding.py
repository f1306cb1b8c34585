"""Encoding batches of documents, with tiktoken where it gives the same tokens much faster."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from tiktoken import Encoding
from tokenizers import Tokenizer, normalizers

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.probes import make_adversarial_texts, spell_vocabulary
from megatron_mdm.corpus.tiktoken_bpe import TiktokenVocabulary, Untranslatable, translate
from megatron_mdm.corpus.tokenizer import encode_texts, prepare_backend

BackendName = Literal["tiktoken", "tokenizers"]

_PROBE_CHARACTERS = 300_000
_SAMPLED_SHARE = 0.01
_SAMPLED_CHARACTERS = 64
# tiktoken's regular expressions backtrack over white space and overflow their stack at about half
# a million characters of it. Texts are searched for such a run in blocks of this many characters:
# a run of twice the length fills at least one block.
_SPACE_BLOCK_CHARACTERS = 50_000
# tiktoken searches for special tokens even where none is allowed, and would find one of an empty
# set everywhere.
_UNUSED_SPECIAL_TOKEN = "\0unused\0"


class EncodingMismatch(Exception):
    """Both backends encoded the same text and differ: encode everything with `tokenizers`."""


class BackendChoice(NamedTuple):
    """The library that encodes a corpus.

    Attributes:
        backend: The library.
        reason: Why it is not tiktoken: "" if it is.
        vocabulary: The tokenizer translated for tiktoken, which takes seconds where it has 100,000
            tokens; None if it is not tiktoken.
    """

    backend: BackendName
    reason: str
    vocabulary: TiktokenVocabulary | None


class EncodingSettings(NamedTuple):
    """How records become documents of tokens: plain values, as a worker process receives them.

    Attributes:
        serialised: The tokenizer, by `Tokenizer.to_str`.
        dtype: The numpy name of the integer type of a token; every id has to fit.
        eod_token_id: The end-of-document id.
        append_eod: Whether every document that has tokens ends with it.
        prepend_eod: Whether it stands before each of them instead.
        valid_fraction: The share of documents to hold out, None for no division.
        skip_bad_records: Whether a chunk with bad records is read without them; otherwise it is
            not read.
    """

    serialised: str
    dtype: str
    eod_token_id: int
    append_eod: bool
    valid_fraction: float | None = None
    skip_bad_records: bool = False
    prepend_eod: bool = False


class EncodedBatch(NamedTuple):
    """The tokens of a batch of documents.

    Attributes:
        tokens: All tokens in a row, of the shards' type, shape [sum of lengths].
        lengths: The tokens of each document, int32, shape [documents]; 0 where there are none.
    """

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]


class BatchEncoder(ABC):
    """Encodes batches of documents on one core.

    Args:
        settings: What to encode with.

    Attributes:
        name: The library that encodes.
        tokenizer: The tokenizer.
    """

    name: ClassVar[BackendName]

    def __init__(self, settings: EncodingSettings) -> None:
        self.tokenizer = prepare_backend(Tokenizer.from_str(settings.serialised))
        self._settings = settings
        self._end = np.array([settings.eod_token_id], dtype=settings.dtype)

    def encode_batch(self, texts: Sequence[str]) -> EncodedBatch:
        """Encodes documents, each that has tokens with its end-of-document token, if any.

        Args:
            texts: The documents.

        Returns:
            Their tokens.

        Raises:
            DataError: A document holds the end-of-document token inside.
            EncodingMismatch: tiktoken and `tokenizers` disagree.
        """
        documents = self._encode_documents(texts)
        lengths = np.fromiter(map(len, documents), np.int32, len(documents))
        if self._settings.append_eod or self._settings.prepend_eod:
            lengths[lengths > 0] += 1
            step = -1 if self._settings.prepend_eod else 1
            marked = [(ids, self._end)[::step] for ids in documents if len(ids)]
            documents = [part for parts in marked for part in parts]
        batch = EncodedBatch(np.concatenate([self._end[:0], *documents]), lengths)
        _check_ends(batch, texts, self._settings)
        return batch

    @abstractmethod
    def _encode_documents(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """Encodes each document alone, into the shards' type."""

    def _encode_by_tokenizers(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        return [np.array(ids, self._end.dtype) for ids in encode_texts(self.tokenizer, texts)]


class TokenizersEncoder(BatchEncoder):
    """Encodes with Hugging Face `tokenizers`.

    Whether it stays on one core is up to the environment's `TOKENIZERS_PARALLELISM`.
    """

    name = "tokenizers"

    def _encode_documents(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        return self._encode_by_tokenizers(texts)


class TiktokenEncoder(BatchEncoder):
    """Encodes with tiktoken, and a sample of each batch with `tokenizers` to compare.

    Args:
        settings: What to encode with.
        vocabulary: What `translate` made of the tokenizer; None to translate it here.

    Raises:
        Untranslatable: tiktoken could give other tokens.
    """

    name = "tiktoken"

    def __init__(
        self, settings: EncodingSettings, vocabulary: TiktokenVocabulary | None = None
    ) -> None:
        vocabulary = vocabulary or translate(settings.serialised)
        try:
            self._encoding = Encoding(
                "corpus",
                pat_str=vocabulary.pattern,
                mergeable_ranks=vocabulary.ranks,
                special_tokens={_UNUSED_SPECIAL_TOKEN: len(vocabulary.ranks)},
            )
        except ValueError as error:
            raise Untranslatable("tiktoken cannot read its regular expression") from error
        super().__init__(settings)
        self._normalizer = normalizers.NFC() if vocabulary.normalize_nfc else None
        self._token_ids = np.array(vocabulary.token_ids, dtype=settings.dtype)

    def _encode_documents(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        self.compare([_sample(texts)])
        return [self._encode(text) for text in texts]

    def compare(self, texts: Sequence[str]) -> None:
        """Encodes texts with both libraries.

        Args:
            texts: The texts.

        Raises:
            EncodingMismatch: The tokens differ.
        """
        for text, expected in zip(texts, self._encode_by_tokenizers(texts), strict=True):
            if not np.array_equal(self._encode(text), expected):
                raise EncodingMismatch(
                    f"tiktoken and tokenizers encode the text that starts with {text[:40]!r} "
                    "differently"
                )

    def _encode(self, text: str) -> npt.NDArray[Any]:
        if not _holds_long_space(text):
            if self._normalizer and not text.isascii():
                # Not by `unicodedata`, whose version of Unicode may be another one.
                text = self._normalizer.normalize_str(text)
            # The regular expression gives up on a run that is too long for it.
            with suppress(ValueError):
                ranks = self._encoding.encode_to_numpy(text, disallowed_special=())
                return self._token_ids[ranks]
        return self._encode_by_tokenizers([text])[0]


def make_encoder(
    settings: EncodingSettings, backend: BackendName, vocabulary: TiktokenVocabulary | None = None
) -> BatchEncoder:
    """Makes an encoder.

    Args:
        settings: What to encode with.
        backend: The library that encodes, as `choose_backend` found it.
        vocabulary: As `choose_backend` found it; None to translate the tokenizer here.

    Returns:
        The encoder.

    Raises:
        Untranslatable: `backend` is "tiktoken" and it could give other tokens.
    """
    if backend == "tokenizers":
        return TokenizersEncoder(settings)
    return TiktokenEncoder(settings, vocabulary)


def choose_backend(serialised: str, probe_texts: Sequence[str]) -> BackendChoice:
    """Chooses the library that encodes a corpus: tiktoken where it gives the same tokens.

    Args:
        serialised: The tokenizer, by `Tokenizer.to_str`.
        probe_texts: The first documents; the first 300,000 characters of them are encoded by both.

    Returns:
        The library, and what was found out on the way.
    """
    try:
        vocabulary = translate(serialised)
        encoder = TiktokenEncoder(
            EncodingSettings(serialised, "int64", 0, append_eod=False), vocabulary
        )
        encoder.compare(_take_first_characters(probe_texts))
        encoder.compare(make_adversarial_texts(spell_vocabulary(encoder.tokenizer)))
    except (Untranslatable, EncodingMismatch) as reason:
        return BackendChoice("tokenizers", str(reason), None)
    return BackendChoice("tiktoken", "", vocabulary)


def _holds_long_space(text: str) -> bool:
    """Tells whether a run of white space fills a block; every run of two blocks' length does."""
    # A regular expression for long runs would start again at each space of shorter ones.
    return any(
        text[start : start + _SPACE_BLOCK_CHARACTERS].isspace()
        for start in range(0, len(text) - _SPACE_BLOCK_CHARACTERS + 1, _SPACE_BLOCK_CHARACTERS)
    )


def _take_first_characters(texts: Sequence[str]) -> list[str]:
    taken = []
    remaining = _PROBE_CHARACTERS
    for text in texts:
        if remaining <= 0:
            break
        taken.append(text[:remaining])
        remaining -= len(text)
    return taken


def _sample(texts: Sequence[str]) -> str:
    """Cuts about 1 % out of a batch, at a place that depends on nothing but the batch."""
    if not texts:
        return ""
    length = max(_SAMPLED_CHARACTERS, int(sum(map(len, texts)) * _SAMPLED_SHARE))
    number = zlib.crc32(texts[0][:4096].encode("utf-8", "replace"), len(texts))
    text = texts[number % len(texts)]
    start = number % max(1, len(text) - length + 1)
    return text[start : start + length]


def _check_ends(batch: EncodedBatch, texts: Sequence[str], settings: EncodingSettings) -> None:
    """Raises DataError if the end-of-document token stands anywhere but where it was put."""
    found = np.flatnonzero(batch.tokens == settings.eod_token_id)
    stops = batch.lengths.cumsum(dtype=np.int64)
    expected = stops[batch.lengths > 0] - 1 if settings.append_eod else stops[:0]
    if settings.prepend_eod:
        expected = (stops - batch.lengths)[batch.lengths > 0]
    if len(found) == len(expected):
        return
    inside = np.setdiff1d(found, expected)[0]
    text = texts[int(np.searchsorted(stops, inside, side="right"))]
    raise DataError(
        f"the document that starts with {text[:40]!r} encodes to the end-of-document id "
        f"{settings.eod_token_id} inside it: choose another --eod-token."
    )
