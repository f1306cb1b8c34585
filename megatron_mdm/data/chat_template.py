"""Which template told conversations to a model: the shards say it, and their runs remember it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_mdm.core.errors import DataError
from megatron_mdm.data.manifest import Manifest, manifest_path

# Of prompts and responses that were taken as they stand.
BARE_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def list_chat_templates(manifests: Iterable[Manifest | None]) -> list[str]:
    """Lists the templates of shards.

    Args:
        manifests: Of the shards.

    Returns:
        The Jinja templates that occur, each once; those of messages before that of bare prompts,
        which counts where shards are known to hold no messages.
    """
    recipes = [one.exchanges for one in manifests if one is not None and one.exchanges is not None]
    told = [one.chat_template for one in recipes if one.has_messages is not False]
    bare = [BARE_CHAT_TEMPLATE for one in recipes if one.has_messages is False]
    return list(dict.fromkeys([*told, *bare]))


def find_chat_template(recorded: str | None, config: Mapping[str, Any]) -> str | None:
    """Finds the template of a run.

    Args:
        recorded: What its checkpoint says; those of earlier versions say nothing.
        config: The run's configuration, as a tree.

    Returns:
        The template; None: the run learned no responses, or its shards are gone.
    """
    if recorded is not None or not config.get("finetuning", {}).get("enabled", False):
        return recorded
    manifests = []
    for source in config["data"]["train"]:
        with contextlib.suppress(DataError):
            manifests.append(Manifest.read(manifest_path(Path(source["path"]))))
    return next(iter(list_chat_templates(manifests)), None)
