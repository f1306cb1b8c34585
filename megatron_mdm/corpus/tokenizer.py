"""Tokenizers, as the data path loads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from megatron_mdm.core.errors import DataError, first_line
from megatron_mdm.corpus.tokenizer_formats import find_foreign, open_foreign
from megatron_mdm.corpus.tokenizer_settings import read_eos_token

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, eq=False)
class TokenizerHandle:
    """A tokenizer as the data path uses it. Make it with `load_tokenizer`.

    Attributes:
        name: The name or path as it was given.
        backend: The tokenizer, without truncation and padding; in text it finds no special token.
        vocab_size: The largest token id plus one, added tokens included.
        eod_token: The token that ends a document.
        eod_token_id: Its id.
        special_tokens: The special tokens and their ids.
        sha256: The hash of the tokenizer's canonical serialisation, in hexadecimal.
    """

    name: str
    backend: Tokenizer
    vocab_size: int
    eod_token: str
    eod_token_id: int
    special_tokens: dict[str, int]
    sha256: str

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes texts, adding no special tokens.

        Args:
            texts: The texts. A special token written out in one is ordinary text.

        Returns:
            The token ids of each text.
        """
        return encode_texts(self.backend, texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes token ids, special tokens included.

        Args:
            ids: Token ids in [0, vocab_size).

        Returns:
            The text.
        """
        return str(self.backend.decode(list(ids), skip_special_tokens=False))


def encode_texts(backend: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Encodes texts with a prepared backend, adding no special tokens.

    Args:
        backend: The tokenizer, as `prepare_backend` leaves it.
        texts: The texts.

    Returns:
        The token ids of each text.
    """
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def prepare_backend(backend: Tokenizer) -> Tokenizer:
    """Makes a tokenizer encode whole documents and take special tokens in text as text.

    Args:
        backend: The tokenizer. It is changed.

    Returns:
        The same tokenizer.
    """
    backend.no_truncation()
    backend.no_padding()
    # Not part of the serialisation: whoever loads the tokenizer again has to set it again.
    backend.encode_special_tokens = True
    return backend


def load_tokenizer(name_or_path: str, eod_token: str | None = None) -> TokenizerHandle:
    """Loads a tokenizer.

    Args:
        name_or_path: A folder that holds tokenizer.json, such a file itself, a file or folder of
            another library that can be converted, or a Hugging Face name.
        eod_token: The token that ends a document; None for the tokenizer's end-of-sequence
            token, or `<|endoftext|>` where it names none.

    Returns:
        The tokenizer.

    Raises:
        DataError: There is no such tokenizer, it is damaged, not a fast one, or gives other ids
            than the library that it is converted from, it has no end-of-document token, or
            ordinary text could produce that token.
    """
    path = Path(name_or_path).expanduser()
    file = find_tokenizer(path)
    if file is not None:
        backend, eos_token = open_tokenizer(file)
    elif path.is_dir():
        raise DataError(
            f"{path / 'tokenizer.json'} does not exist: give a folder that holds tokenizer.json, "
            "or make one with mdm tokenizer train."
        )
    elif path.suffix == ".json" or name_or_path[:1] in "./~" or name_or_path.count("/") > 1:
        raise DataError(
            f"{name_or_path} does not exist: give a folder that holds tokenizer.json, such a "
            "file, or a Hugging Face name."
        )
    else:
        backend, eos_token = _load_from_hub(name_or_path)
    return _make_handle(name_or_path, prepare_backend(backend), eod_token or eos_token)


def find_tokenizer(path: Path) -> Path | None:
    """Finds the file of a tokenizer.

    Args:
        path: A file or a folder.

    Returns:
        The file; in a folder its tokenizer.json, or one of another library; None if there is none.
    """
    if not path.is_dir():
        return path if path.is_file() else None
    file = path / "tokenizer.json"
    return file if file.is_file() else find_foreign(path)


def open_tokenizer(file: Path) -> tuple[Tokenizer, str | None]:
    """Reads a tokenizer.json, or converts a file of another library and compares the ids.

    Args:
        file: The file.

    Returns:
        The tokenizer; its end-of-sequence token, None if none is named.

    Raises:
        DataError: The file is damaged, or cannot be converted.
    """
    return read_tokenizer(file) if find_foreign(file) is None else open_foreign(file)


def read_tokenizer(path: Path) -> tuple[Tokenizer, str | None]:
    """Reads a tokenizer without running or loading anything else.

    Args:
        path: The tokenizer.json; the tokenizer_config.json beside it is read if it is there.

    Returns:
        The tokenizer as it is; its end-of-sequence token, None if none is named.

    Raises:
        DataError: A file is damaged.
    """
    try:
        backend = Tokenizer.from_file(str(path))
    # The library raises plain Exception for a file that it cannot parse.
    except Exception as error:
        raise DataError(
            f"{path} is not a tokenizer.json ({first_line(error)}): copy it again or make one "
            "with mdm tokenizer train."
        ) from error
    return backend, read_eos_token(path.parent)


def hash_tokenizer(backend: Tokenizer) -> str:
    """Hashes all that decides how a tokenizer encodes whole documents.

    Args:
        backend: The tokenizer. It loses its truncation and padding, which do not count.

    Returns:
        The hash of its canonical serialisation, in hexadecimal.
    """
    told = json.loads(prepare_backend(backend).to_str())
    serialised = json.dumps(told, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(serialised.encode("utf-8")).hexdigest()


def read_end_and_size(path: Path) -> tuple[int | None, int]:
    """Reads what an export has to know of a tokenizer, without running or loading anything else.

    Args:
        path: The tokenizer.json; the tokenizer_config.json beside it is read if it is there.

    Returns:
        The id of the end-of-sequence token, None if none is named; the largest token id plus one.

    Raises:
        DataError: A file is damaged.
    """
    backend, eos_token = read_tokenizer(path)
    size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    return None if eos_token is None else backend.token_to_id(eos_token), size


def _load_from_hub(name: str) -> tuple[Tokenizer, str | None]:
    try:
        from transformers import AutoTokenizer

        # Code that comes with a tokenizer is never run.
        loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    # Network, cache, repository and format errors have classes of several libraries.
    except Exception as error:
        # Without a network AutoTokenizer wants the model's configuration in the cache as well.
        cached = _find_in_hub_cache(name)
        if cached is not None:
            return read_tokenizer(cached)
        if "trust_remote_code" in str(error):
            raise DataError(
                f"{name} is read by code that comes with it, which is never run: choose another, "
                "or save it where you trust that code with transformers' save_pretrained and give "
                "that folder."
            ) from error
        raise DataError(
            f"{name} is neither a file or folder here nor a Hugging Face tokenizer that could be "
            f"loaded ({first_line(error)}): check the name and the network, or give a folder "
            "that holds tokenizer.json."
        ) from error
    if not getattr(loaded, "is_fast", False):
        raise DataError(
            f"{name} has no fast tokenizer: choose one that transformers can load as a fast "
            "tokenizer."
        )
    # The copy keeps a later change of the loaded object out of the handle.
    return Tokenizer.from_str(loaded.backend_tokenizer.to_str()), loaded.eos_token


def _find_in_hub_cache(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError:
        return None
    return Path(path) if isinstance(path, str) else None


def _make_handle(name: str, backend: Tokenizer, eod_token: str | None) -> TokenizerHandle:
    token = eod_token or END_OF_TEXT
    eod_token_id = backend.token_to_id(token)
    if eod_token_id is None:
        if eod_token is None:
            raise DataError(
                f"{name} names no end-of-sequence token to end documents with: choose one of its "
                "tokens with --eod-token."
            )
        raise DataError(
            f"{name} has no token {token!r} to end documents with: choose one of its tokens with "
            "--eod-token."
        )
    added = backend.get_added_tokens_decoder()
    special_tokens = {
        entry.content: token_id for token_id, entry in sorted(added.items()) if entry.special
    }
    _check_end(
        name, backend, token, eod_token_id, is_special=eod_token_id in special_tokens.values()
    )
    return TokenizerHandle(
        name=name,
        backend=backend,
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        eod_token=token,
        eod_token_id=eod_token_id,
        special_tokens=special_tokens,
        sha256=hash_tokenizer(backend),
    )


def _check_end(
    name: str, backend: Tokenizer, token: str, eod_token_id: int, *, is_special: bool
) -> None:
    """Refuses an end-of-document token that ordinary text can produce."""
    # Vocabularies write the space as one of these characters.
    spelled = token.replace("\u2581", " ").replace("\u0120", " ")
    texts = [token, f"a {token} b", f"a{token}b", spelled, f"a{spelled} b", "a \ufdd0\U0010fffe b"]
    if any(eod_token_id in ids for ids in encode_texts(backend, texts)):
        raise DataError(
            f"{name} encodes some text as the end-of-document token {token!r} (id {eod_token_id}): "
            "choose a special token that text cannot produce with --eod-token."
        )
    if not is_special:
        raise DataError(
            f"{name} has {token!r} (id {eod_token_id}) as an ordinary token, which text can "
            "produce: choose a special token to end documents with --eod-token."
        )
