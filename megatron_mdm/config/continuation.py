"""What makes two configurations the same run, whatever machines it goes on with."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from megatron_mdm.config.schema import Config

# Sections that change how a run is computed and kept, but not its results, to rounding.
_MAY_DIFFER = frozenset(("parallel", "checkpoint", "faults", "reporting", "hooks"))
# Paths may change, since the fingerprint identifies the data; of a preset its fields are compared.
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


def list_computed_fields(config: Config, *, but: Collection[str] = ()) -> dict[str, Any]:
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
    kept = {name: one for name, one in tree.items() if name not in _MAY_DIFFER and name not in but}
    return {name: one for name, one in _flatten(kept) if name not in _MAY_DIFFER_FIELDS}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
