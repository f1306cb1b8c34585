"""Tokenizers in other libraries' formats: converted by transformers, checked with the originals.

The classes of transformers that convert are named here, so that no code that lies beside a file is
run, whatever its configuration asks for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tiktoken import Encoding
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron_mdm.core.errors import DataError, first_line
from megatron_mdm.corpus.known_ranks import KNOWN_CLASSES, KNOWN_MERGES, KNOWN_RANKS
from megatron_mdm.corpus.probes import make_adversarial_texts, spell_vocabulary
from megatron_mdm.corpus.tiktoken_bpe import Untranslatable, translate
from megatron_mdm.corpus.tokenizer import encode_texts, prepare_backend
from megatron_mdm.corpus.tokenizer_formats import MERGES_NAME, VOCABULARY_NAME, TokenizerFormat
from megatron_mdm.corpus.tokenizer_settings import read_eos_token, read_settings

_LOG = logging.getLogger(__name__)
# These classes use the ids of the file as they are; others move them or add some.
_SENTENCEPIECE_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
_MODEL_CLASSES = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer"}
# What SentencePiece does to white space at the ends and in rows, and to the mark of a space.
_SPACED = (
    *(" ", "   ", " a", "a ", "  a  ", "a  b   c", "\ta\t", "\n a \n\n b", "a\u00a0b\u3000c"),
    *("\u2581", "a\u2581b", "\u2581 a", " \u2581a\u2581 ", "\uff21\uff42\uff11 \ufb01"),
)
_OTHER = "give a folder that holds tokenizer.json."


class Conversion(NamedTuple):
    """A tokenizer that was converted.

    Attributes:
        backend: The tokenizer as `tokenizers` has it.
        eos_token: Its end-of-sequence token, None if none is named.
        library: What encodes with the original.
        encode: The ids that it gives for a text in which special tokens are text.
    """

    backend: Tokenizer
    eos_token: str | None
    library: str
    encode: Callable[[str], Sequence[int]]


class ConvertedFormat(TokenizerFormat):
    """A format whose files are converted, and compared with what the original library encodes."""

    def open(self, path: Path) -> tuple[Tokenizer, str | None]:
        """See `TokenizerFormat.open`."""
        try:
            conversion = self.convert(path)
        except DataError:
            raise
        # Parsers of three libraries, each with errors of its own.
        except Exception as error:
            raise DataError(
                f"{path} cannot be converted ({first_line(error)}): copy it again, or {_OTHER}"
            ) from error
        check_conversion(conversion, path)
        return conversion.backend, conversion.eos_token

    @abstractmethod
    def convert(self, path: Path) -> Conversion:
        """Converts a file. Whether it gives the original's ids is for `check_conversion` to say."""


def check_conversion(conversion: Conversion, path: Path) -> None:
    """Compares with the original library, over the whole vocabulary and on hard texts.

    Args:
        conversion: The conversion, whose backend is prepared to take special tokens as text.
        path: The original, for the message.

    Raises:
        DataError: Some text gets other ids.
    """
    backend = prepare_backend(conversion.backend)
    texts = [*_SPACED, *make_adversarial_texts(spell_vocabulary(backend))]
    for text, ids in zip(texts, encode_texts(backend, texts), strict=True):
        if ids != list(conversion.encode(text)):
            raise DataError(
                f"{path} gives {text[:40]!r} other ids after conversion than {conversion.library} "
                "does, so it cannot be used: take another tokenizer, or one that is published "
                "with a tokenizer.json."
            )
    _LOG.info("%s was converted; %d texts get the ids of %s", path, len(texts), conversion.library)


class SentencePieceFormat(ConvertedFormat):
    """SentencePiece's `.model`."""

    def convert(self, path: Path) -> Conversion:
        """See `ConvertedFormat.convert`."""
        # Checked here, since transformers would go on with a guess.
        if find_spec("sentencepiece") is None:
            raise DataError(
                f"{path} is read with sentencepiece, which is not installed: pip install "
                f"sentencepiece, or {_OTHER}"
            )
        from sentencepiece import SentencePieceProcessor
        from transformers.convert_slow_tokenizer import SentencePieceExtractor, SpmConverter

        original = SentencePieceProcessor(model_file=str(path))
        proto = SentencePieceExtractor(str(path)).proto
        is_unigram = proto.trainer_spec.model_type == 1
        vocabulary: Any = {piece.piece: i for i, piece in enumerate(proto.pieces)}
        if is_unigram:
            vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
        backend = SpmConverter.build_tokenizer_from_spm_proto(proto, vocabulary)
        controls = [original.id_to_piece(i) for i in range(len(original)) if original.is_control(i)]
        backend.add_special_tokens([AddedToken(token, normalized=False) for token in controls])
        _check_neighbours(path, backend, _SENTENCEPIECE_CLASSES)
        eos_id = original.eos_id()
        eos_token = read_eos_token(path.parent) or (
            original.id_to_piece(eos_id) if eos_id >= 0 else None
        )
        return Conversion(backend, eos_token, "sentencepiece", original.encode)


class TekkenFormat(ConvertedFormat):
    """Mistral's `tekken.json`."""

    def convert(self, path: Path) -> Conversion:
        """See `ConvertedFormat.convert`."""
        from transformers.integrations.mistral.tokenizer import MistralConverter

        try:
            converter = MistralConverter(str(path))
        except ImportError as error:
            raise DataError(
                f"{path} leaves its special tokens to mistral-common, which is not installed: pip "
                f"install mistral-common, or {_OTHER}"
            ) from error
        told = json.loads(path.read_bytes())
        # As mistral-common does: tiktoken gets these ranks, and special tokens come before them.
        num_special = len(converter.additional_special_tokens)
        num_ranks = told["config"]["default_vocab_size"] - num_special
        ranks = {
            base64.b64decode(token["token_bytes"]): rank
            for rank, token in enumerate(told["vocab"][:num_ranks])
        }
        original = Encoding(
            path.name, pat_str=told["config"]["pattern"], mergeable_ranks=ranks, special_tokens={}
        )

        def encode(text: str) -> list[int]:
            return [rank + num_special for rank in original.encode_ordinary(text)]

        return Conversion(converter.converted(), "</s>", "tiktoken", encode)


class RanksFormat(ConvertedFormat):
    """Files of ranks of tiktoken that are published."""

    def convert(self, path: Path) -> Conversion:
        """See `ConvertedFormat.convert`."""
        from transformers.convert_slow_tokenizer import TikTokenConverter

        content = path.read_bytes()
        known = KNOWN_RANKS.get(hashlib.sha256(content).hexdigest())
        if known is None:
            raise DataError(
                f"{path} holds ranks of tiktoken, which do not say how text is cut, and is none of "
                f"{', '.join(sorted({one.name for one in KNOWN_RANKS.values()}))}: convert it once "
                "with transformers' TikTokenConverter(FILE, pattern=..., "
                "extra_special_tokens=[...]).converted().save('tokenizer.json')."
            )
        ranks = {
            base64.b64decode(token): int(rank)
            for token, rank in map(bytes.split, content.splitlines())
        }

        class Converter(TikTokenConverter):
            @staticmethod
            def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
                # tiktoken's own function may take what another file of this name left in /tmp.
                return ranks

        special = known.special_tokens
        vocabulary, merges = Converter(str(path)).extract_vocab_merges_from_model(str(path))
        backend = Tokenizer(models.BPE(vocabulary | special, merges, ignore_merges=True))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(known.pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
        original = Encoding(
            known.name, pat_str=known.pattern, mergeable_ranks=ranks, special_tokens=special
        )
        return Conversion(backend, known.eos_token, "tiktoken", original.encode_ordinary)


class MergesFormat(ConvertedFormat):
    """`vocab.json` and `merges.txt`, as GPT-2 has them."""

    def convert(self, path: Path) -> Conversion:
        """See `ConvertedFormat.convert`."""
        import transformers

        folder = path.parent
        for name in (VOCABULARY_NAME, MERGES_NAME):
            if not (folder / name).is_file():
                raise DataError(
                    f"{folder / name} does not exist, and {VOCABULARY_NAME} and {MERGES_NAME} "
                    f"belong together: copy it, or {_OTHER}"
                )
        digest = hashlib.sha256((folder / MERGES_NAME).read_bytes()).hexdigest()
        kind = _read_class(folder) or KNOWN_MERGES.get(digest)
        if kind is None:
            raise DataError(
                f"{folder} does not say how its {VOCABULARY_NAME} and {MERGES_NAME} cut text: "
                'write {"tokenizer_class": "GPT2Tokenizer"} into its tokenizer_config.json if '
                f"they are GPT-2's or made alike, or {_OTHER}"
            )
        if kind not in KNOWN_CLASSES:
            raise DataError(f"{folder} is of the class {kind}: {_suggest_conversion(folder)}")
        loaded = getattr(transformers, kind).from_pretrained(str(folder), local_files_only=True)
        # A copy that knows nothing of transformers.
        backend = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
        try:
            translated = translate(backend.to_str())
        except Untranslatable as reason:
            raise DataError(
                f"{folder} cannot be compared with tiktoken ({reason}): {_OTHER}"
            ) from None
        original = Encoding(
            kind, pat_str=KNOWN_CLASSES[kind], mergeable_ranks=translated.ranks, special_tokens={}
        )
        nfc = normalizers.NFC() if kind == "Qwen2Tokenizer" else None

        def encode(text: str) -> list[int]:
            text = nfc.normalize_str(text) if nfc else text
            return [translated.token_ids[rank] for rank in original.encode_ordinary(text)]

        return Conversion(backend, loaded.eos_token, "tiktoken", encode)


def _check_neighbours(path: Path, backend: Tokenizer, classes: Sequence[str]) -> None:
    """Refuses a file whose folder says that the model's ids are not the file's alone."""
    kind = _read_class(path.parent)
    if kind is not None and kind not in classes:
        raise DataError(
            f"{path} lies beside a configuration of the class {kind}, which may count otherwise: "
            f"{_suggest_conversion(path.parent)}"
        )
    told = read_settings(path.with_name("tokenizer_config.json")).get("added_tokens_decoder") or {}
    added = {int(i): token["content"] for i, token in told.items()}
    more = read_settings(path.with_name("added_tokens.json"))
    for i, token in [*added.items(), *((i, token) for token, i in more.items())]:
        if backend.id_to_token(i) != token:
            raise DataError(
                f"{path} lies beside a configuration that adds the token {token!r} (id {i}): "
                f"{_suggest_conversion(path.parent)}"
            )


def _read_class(folder: Path) -> str | None:
    """The class of transformers that a folder names for its tokenizer."""
    kind = read_settings(folder / "tokenizer_config.json").get("tokenizer_class")
    if not isinstance(kind, str):
        model = read_settings(folder / "config.json")
        kind = model.get("tokenizer_class") or _MODEL_CLASSES.get(str(model.get("model_type")))
    return kind.removesuffix("Fast") if isinstance(kind, str) else None


def _suggest_conversion(folder: Path) -> str:
    return (
        f"convert it once with transformers, AutoTokenizer.from_pretrained('{folder}')"
        ".save_pretrained('NEW'), and give the folder NEW."
    )
