"""What lies beside a tokenizer and says how a model uses it: special tokens, a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.files import read_json


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
    config = read_settings(folder / "tokenizer_config.json")
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


def read_settings(path: Path) -> dict[str, Any]:
    """Reads a JSON file of settings.

    Args:
        path: The file.

    Returns:
        Its fields; none if there is no such file, or it holds something else than an object.

    Raises:
        DataError: The file is not JSON.
    """
    config = read_json(path, "copy it again.") if path.is_file() else None
    return config if isinstance(config, dict) else {}
