"""What makes two configurations the same run, whatever machines it goes on with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from megatron_mdm.config.loading import config_from_dict
from megatron_mdm.config.schema import Config

# They change how a run is computed and kept, but not what comes out, to rounding.
_MAY_DIFFER = frozenset(("parallel", "checkpoint", "faults", "reporting", "hooks"))
# Places may move: what the data is, its fingerprint says. Of a preset what it fills in counts.
_MAY_DIFFER_FIELDS = frozenset(
    (
        "run.dir",
        "run.device",
        "run.num_threads",
        "run.initial_weights",
        "model.preset",
        "batch.micro_batch_size",
        "data.valid",
        "data.tokenizer",
        "data.reader_threads",
    )
)


def with_earlier_meaning(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration, with the values of fields that it was written before.

    A field that came later had its default before, except where it says how something is done that
    was done otherwise until then.

    Args:
        tree: Sections, as they were saved, perhaps by an earlier version.

    Returns:
        The same; where keys were dropped, at the rate of each sample; and where a budget does not
        say which N it counts, without embeddings.
    """
    meant = dict(tree)
    objective, schedule = tree.get("objective"), tree.get("schedule")
    if isinstance(objective, dict) and objective.get("key_dropout"):
        meant["objective"] = {"key_dropout_rate_per": "sample", **objective}
    if isinstance(schedule, dict) and schedule.get("flops"):
        meant["schedule"] = {"flops_parameters": "without_embeddings", **schedule}
    return meant


def config_as_saved(tree: Mapping[str, Any]) -> Config:
    """A whole configuration that a run left behind, read as it was meant.

    Args:
        tree: All its fields, perhaps of an earlier version.

    Returns:
        The configuration.

    Raises:
        ConfigError: It is not valid.
    """
    return config_from_dict(with_earlier_meaning(tree))


def computed_fields(config: Config, *, but: Collection[str] = ()) -> dict[str, Any]:
    """The fields that say what a run computes.

    Args:
        config: Any configuration.
        but: Further sections that do not count.

    Returns:
        Values, as JSON can hold them, by dotted name; sources without their paths.
    """
    tree = config.model_dump(mode="json")
    for source in tree["data"]["train"]:
        source.pop("path")
    return {
        name: value
        for section, fields in tree.items()
        if section not in _MAY_DIFFER and section not in but
        for field, value in fields.items()
        if (name := f"{section}.{field}") not in _MAY_DIFFER_FIELDS
    }
