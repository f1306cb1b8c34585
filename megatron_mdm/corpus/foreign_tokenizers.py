"""Tokenizers in other libraries' formats: converted by transformers, checked with the originals.

SentencePiece's `.model`, Mistral's `tekken.json`, tiktoken's files of ranks, and `vocab.json` with
`merges.txt`. The classes of transformers that convert are named here, so that no code that lies
beside a file is run, whatever its configuration asks for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tiktoken import Encoding
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron_mdm.core.errors import DataError
from megatron_mdm.corpus.known_ranks import KNOWN_CLASSES, KNOWN_MERGES, KNOWN_RANKS
from megatron_mdm.corpus.probes import adversarial_texts
from megatron_mdm.corpus.tiktoken_bpe import Untranslatable, translate

_LOG = logging.getLogger(__name__)
_VOCABULARY, _MERGES = "vocab.json", "merges.txt"
# Files whose ids those of these classes are; others move them or add some.
_SENTENCEPIECE_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
_MODEL_CLASSES = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer"}
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
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


def find_foreign(path: Path) -> Path | None:
    """Finds the file of a tokenizer in another library's format.

    Args:
        path: A file; or a folder without tokenizer.json.

    Returns:
        The file, of `vocab.json` and `merges.txt` the first; None if there is none.

    Raises:
        DataError: A folder holds several, or one without the other.
    """
    if not path.is_dir():
        if path.suffix == ".json":
            return path if _is_tekken(path) or path.name == _VOCABULARY else None
        # Such as tokenizer.model.v3.
        is_foreign = ".model" in path.suffixes or path.suffix == ".tiktoken"
        return path if is_foreign or path.name == _MERGES else None
    files = [one for one in sorted(path.iterdir()) if one.is_file()]
    found = [one for one in files if one.name != _MERGES and find_foreign(one)]
    if len(found) > 1:
        raise DataError(
            f"{path} holds {found[0].name} and {found[1].name}: give the path of one of them."
        )
    return found[0] if found else None


def convert(path: Path) -> Conversion:
    """Converts a tokenizer.

    Args:
        path: A file of `find_foreign`.

    Returns:
        The tokenizer. Whether it gives the original's ids is for `check_conversion` to say.

    Raises:
        DataError: The file is damaged, says too little, or needs a library that is not there.
    """
    try:
        if path.name in (_VOCABULARY, _MERGES):
            return _from_merges(path.parent)
        if _is_tekken(path):
            return _from_tekken(path)
        with path.open("rb") as stream:
            is_ranks = _RANK_LINE.match(stream.readline(4096)) is not None
        return _from_ranks(path) if is_ranks else _from_sentencepiece(path)
    except DataError:
        raise
    # Parsers of three libraries, each with errors of its own.
    except Exception as error:
        lines = str(error).strip().splitlines()
        told = lines[0].rstrip(".:") if lines else type(error).__name__
        raise DataError(
            f"{path} cannot be converted ({told}): copy it again, or {_OTHER}"
        ) from error


def check_conversion(conversion: Conversion, path: Path) -> None:
    """Compares with the original library, over the whole vocabulary and on hard texts.

    Args:
        conversion: The conversion, its backend prepared to take special tokens as text.
        path: The original, for the message.

    Raises:
        DataError: Some text gets other ids.
    """
    backend = conversion.backend
    ids = sorted(backend.get_vocab(with_added_tokens=True).values())
    tokens = backend.decode_batch([[i] for i in ids], skip_special_tokens=False)
    texts = [*_SPACED, *adversarial_texts([text for text in tokens if "\ufffd" not in text])]
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    for text, encoding in zip(texts, encodings, strict=True):
        if encoding.ids != list(conversion.encode(text)):
            raise DataError(
                f"{path} gives {text[:40]!r} other ids after conversion than {conversion.library} "
                "does, so it cannot be used: take another tokenizer, or one that is published "
                "with a tokenizer.json."
            )
    _LOG.info("%s was converted; %d texts get the ids of %s", path, len(texts), conversion.library)


def read_eos_token(folder: Path) -> str | None:
    """Reads which token a tokenizer_config.json names as the end of a sequence.

    Args:
        folder: The folder that it lies in.

    Returns:
        The token, None if there is no such file or it names none.

    Raises:
        DataError: The file is not JSON.
    """
    return read_chat_settings(folder).get("eos_token")


def read_chat_settings(folder: Path) -> dict[str, str]:
    """Reads what a chat template needs from beside a tokenizer.

    Args:
        folder: The folder.

    Returns:
        The template as `chat_template`, and special tokens by name, as far as there are any.

    Raises:
        DataError: A file is not what its name says.
    """
    config = _read_config(folder / "tokenizer_config.json")
    names = ("chat_template", "bos_token", "eos_token", "unk_token", "pad_token")
    found = {name: config.get(name) for name in names}
    settings = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in found.items()
        if isinstance(value, str) or (isinstance(value, dict) and "content" in value)
    }
    template = folder / "chat_template.jinja"
    if template.is_file():
        try:
            settings["chat_template"] = template.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise DataError(f"{template} cannot be read ({error}): copy it again.") from error
    return settings


def _from_sentencepiece(path: Path) -> Conversion:
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


def _from_tekken(path: Path) -> Conversion:
    from transformers.integrations.mistral.tokenizer import MistralConverter

    try:
        converter = MistralConverter(str(path))
    except ImportError as error:
        raise DataError(
            f"{path} leaves its special tokens to mistral-common, which is not installed: pip "
            f"install mistral-common, or {_OTHER}"
        ) from error
    told = json.loads(path.read_bytes())
    # mistral-common gives tiktoken the same, and puts the special tokens in front.
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


def _from_ranks(path: Path) -> Conversion:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    content = path.read_bytes()
    known = KNOWN_RANKS.get(hashlib.sha256(content).hexdigest())
    if known is None:
        raise DataError(
            f"{path} holds ranks of tiktoken, which do not say how text is cut, and is none of "
            f"{', '.join(sorted({one.name for one in KNOWN_RANKS.values()}))}: convert it once "
            "with transformers' TikTokenConverter(FILE, pattern=..., extra_special_tokens=[...])"
            ".converted().save('tokenizer.json')."
        )
    ranks = {
        base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())
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


def _from_merges(folder: Path) -> Conversion:
    import transformers

    for name in (_VOCABULARY, _MERGES):
        if not (folder / name).is_file():
            raise DataError(
                f"{folder / name} does not exist, and {_VOCABULARY} and {_MERGES} belong "
                f"together: copy it, or {_OTHER}"
            )
    digest = hashlib.sha256((folder / _MERGES).read_bytes()).hexdigest()
    kind = _class_of(folder) or KNOWN_MERGES.get(digest)
    if kind is None:
        raise DataError(
            f"{folder} does not say how its {_VOCABULARY} and {_MERGES} cut text: write "
            '{"tokenizer_class": "GPT2Tokenizer"} into its tokenizer_config.json if they are '
            f"GPT-2's or made alike, or {_OTHER}"
        )
    if kind not in KNOWN_CLASSES:
        raise DataError(f"{folder} is of the class {kind}: {_way(folder)}")
    loaded = getattr(transformers, kind).from_pretrained(str(folder), local_files_only=True)
    # The copy is of this library alone.
    backend = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    try:
        translated = translate(backend.to_str())
    except Untranslatable as reason:
        raise DataError(f"{folder} cannot be compared with tiktoken ({reason}): {_OTHER}") from None
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
    kind = _class_of(path.parent)
    if kind is not None and kind not in classes:
        raise DataError(
            f"{path} lies beside a configuration of the class {kind}, which may count otherwise: "
            f"{_way(path.parent)}"
        )
    told = _read_config(path.with_name("tokenizer_config.json")).get("added_tokens_decoder") or {}
    added = {int(i): token["content"] for i, token in told.items()}
    more = _read_config(path.with_name("added_tokens.json"))
    for i, token in [*added.items(), *((i, token) for token, i in more.items())]:
        if backend.id_to_token(i) != token:
            raise DataError(
                f"{path} lies beside a configuration that adds the token {token!r} (id {i}): "
                f"{_way(path.parent)}"
            )


def _class_of(folder: Path) -> str | None:
    """The class of transformers that a folder names for its tokenizer."""
    kind = _read_config(folder / "tokenizer_config.json").get("tokenizer_class")
    if not isinstance(kind, str):
        model = _read_config(folder / "config.json")
        kind = model.get("tokenizer_class") or _MODEL_CLASSES.get(str(model.get("model_type")))
    return kind.removesuffix("Fast") if isinstance(kind, str) else None


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not valid JSON ({error}): copy it again.") from error
    return config if isinstance(config, dict) else {}


def _is_tekken(path: Path) -> bool:
    return path.suffix == ".json" and path.name.startswith("tekken")


def _way(folder: Path) -> str:
    return (
        f"convert it once with transformers, AutoTokenizer.from_pretrained('{folder}')"
        ".save_pretrained('NEW'), and give the folder NEW."
    )
