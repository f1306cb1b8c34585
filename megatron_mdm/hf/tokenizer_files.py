"""The tokenizer of an export: the files of the training tokenizer, and a place for the mask token.

`tokenizer.json` is copied unchanged, so that the export has the tokenizer of the training data.
What transformers needs besides is written to `tokenizer_config.json`, in a form that every version
of it reads.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_mdm.core.errors import ConversionError
from megatron_mdm.core.files import read_json
from megatron_mdm.corpus.tokenizer import read_tokenizer
from megatron_mdm.corpus.tokenizer_settings import read_chat_settings

_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    "additional_special_tokens",
)
# The class that reads tokenizer.json alone, by the name that old and new versions know; and fields
# that name code or belong to other classes.
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
_DROPPED = ("auto_map", "backend", "is_local", "tokenizer_file", "name_or_path")
_MASK = "<|mask|>"


def check_tokenizer_folder(folder: Path) -> None:
    """Checks that there is a tokenizer which an export can take along.

    Args:
        folder: Its folder.

    Raises:
        ConversionError: There is none.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ConversionError(
            f"The tokenizer folder {folder} has no tokenizer.json: give the folder of a Hugging "
            "Face fast tokenizer."
        )


def write_tokenizer(
    source: Path,
    target: Path,
    *,
    mask_token_id: int,
    is_causal: bool,
    chat_template: str | None = None,
) -> str | None:
    """Writes a tokenizer in which the mask's id is taken, so that tokens added later get other ids.

    Nothing of the source is run.

    Args:
        source: Folder of a fast tokenizer.
        target: Folder of the export.
        mask_token_id: The model's. The tokenizer of a masked-diffusion model names it as its
            `mask_token`; for an autoregressive one the id is kept free alone.
        is_causal: The model is autoregressive.
        chat_template: Jinja template that told conversations; None: the source's own, if any.

    Returns:
        A sentence if no token of it can have the mask's id; else None.

    Raises:
        ConversionError: There is no tokenizer.
        DataError: A file is damaged.
    """
    check_tokenizer_folder(source)
    backend, _ = read_tokenizer(source / "tokenizer.json")
    config = _read_common_config(source)
    token, added = _name_tokens_up_to(backend, mask_token_id)
    if token is not None:
        # An export's own has a place for its model's mask.
        kept = {
            token_id: entry
            for token_id, entry in config.get("added_tokens_decoder", {}).items()
            if backend.id_to_token(int(token_id)) is not None
        }
        config["added_tokens_decoder"] = kept | added
    if token is not None and not is_causal:
        config["mask_token"] = token
        # Collators ask for a padding token. In training an autoregressive model, padding with the
        # end token would leave the ends of texts out of the loss, so there the user chooses.
        if config.get("pad_token") is None:
            config["pad_token"] = config.get("eos_token")
    # Versions before 4.51 read a template here alone, and all others here too.
    own_template = read_chat_settings(source).get("chat_template")
    if template := chat_template or own_template:
        config["chat_template"] = template
    shutil.copyfile(source / "tokenizer.json", target / "tokenizer.json")
    _write_config(target, config)
    if token is not None:
        return None
    return (
        f"the tokenizer {source} leaves ids out, so that none of its tokens can have the mask's id "
        f"{mask_token_id}: the export's tokenizer has no mask token."
    )


def replace_chat_template(folder: Path, template: str) -> None:
    """Names another chat template in the tokenizer of an export.

    Args:
        folder: The export.
        template: Jinja.

    Raises:
        DataError: Its configuration is damaged.
    """
    # It would go before that of the configuration.
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    _write_config(folder, _read_mapping(folder / _CONFIG) | {"chat_template": template})


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
    (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")


def _read_common_config(folder: Path) -> dict[str, Any]:
    """The tokenizer's own configuration, in words that all versions of transformers read."""
    config = _read_mapping(folder / _CONFIG)
    # Read by old versions only where the configuration lists no added tokens, as ours will.
    stated = _read_mapping(folder / "special_tokens_map.json")
    config = {name: stated[name] for name in _SPECIAL_TOKENS if name in stated} | config
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):
        # Version 5 writes a list, and those before it want names.
        del config["extra_special_tokens"]
        config["additional_special_tokens"] = extra
    for name in _DROPPED:
        config.pop(name, None)
    config["tokenizer_class"] = TOKENIZER_CLASS
    # What versions differ in where nothing is said.
    config.setdefault("clean_up_tokenization_spaces", False)
    config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    return config


def _name_tokens_up_to(backend: Tokenizer, mask_token_id: int) -> tuple[str | None, dict[str, Any]]:
    """Names the mask token, and a token for every id before it that the tokenizer lacks.

    An imported model may have more rows than its tokenizer has tokens, and transformers numbers
    added tokens one after the other.
    """
    vocabulary = backend.get_vocab(with_added_tokens=True)
    token = backend.id_to_token(mask_token_id)
    if token is not None:
        return token, {str(mask_token_id): _make_entry(token)}
    names = _make_unused_names(vocabulary)
    first = max(vocabulary.values()) + 1
    added = {str(i): _make_entry(next(names)) for i in range(first, mask_token_id)}
    mask = next(name for name in _vary_name(_MASK) if name not in vocabulary)
    added[str(mask_token_id)] = _make_entry(mask)
    tried = Tokenizer.from_str(backend.to_str())
    tried.add_special_tokens([entry["content"] for entry in added.values()])
    return (mask if tried.token_to_id(mask) == mask_token_id else None), added


def _make_unused_names(vocabulary: Container[str]) -> Iterator[str]:
    return (name for i in itertools.count() if (name := f"<|unused_{i}|>") not in vocabulary)


def _vary_name(name: str) -> Iterator[str]:
    yield name
    yield from (name.replace("mask", f"mask_{i}") for i in itertools.count(1))


def _make_entry(token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token, **flags, "special": True}


def _read_mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = read_json(path, "copy it again.")
    if not isinstance(content, dict):
        raise ConversionError(f"{path} is damaged (it holds no JSON object): copy it again.")
    return content
