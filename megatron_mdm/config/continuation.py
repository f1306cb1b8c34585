"""What makes two configurations the same run, whatever machines it goes on with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from megatron_mdm.config.loading import config_from_dict
from megatron_mdm.config.schema import Config

# They change how a run is computed and kept, but not what comes out, to rounding.
_MAY_DIFFER = frozenset(("parallel", "checkpoint", "faults", "reporting"))
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


def config_as_saved(tree: Mapping[str, Any]) -> Config:
    """A whole configuration that a run left behind, read as it was meant.

    Args:
        tree: All its fields, perhaps of an earlier version.

    Returns:
        The configuration; fields which did not exist then have their defaults. Budgets that do not
        say which N they count are of before, when all counted it without embeddings.

    Raises:
        ConfigError: It is not valid.
    """
    schedule = tree.get("schedule")
    if isinstance(schedule, dict) and schedule.get("flops") and "flops_parameters" not in schedule:
        tree = {**tree, "schedule": {**schedule, "flops_parameters": "without_embeddings"}}
    return config_from_dict(dict(tree))


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
