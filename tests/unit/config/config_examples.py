"""A configuration that is right, changes to it, and the sentences that wrong ones get."""

from __future__ import annotations

import copy
import re

import pytest

from megatron_mdm.config import parse_config
from megatron_mdm.core.errors import ConfigError

TREE = {
    "run": {"dir": "runs/x"},
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_hidden_size": 128,
        "vocab_size": 100,
    },
    "data": {"train": [{"path": "a"}, {"path": "b"}], "seq_length": 32},
    "batch": {"global_batch_size": 8},
    "schedule": {"steps": 5},
}


def tree_with(**changes):
    """Keys are section__field or section."""
    tree = copy.deepcopy(TREE)
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            tree.setdefault(section, {})[field] = value
        else:
            tree[section] = value
    return tree


def message_of(tree) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    return str(caught.value)


def assert_sentence(message: str) -> None:
    assert "\n" not in message
    assert message.endswith((".", "?"))
    assert not re.search(
        r"https?:|pydantic|Input|Value error|validation|dictionary|yaml\.", message
    )
