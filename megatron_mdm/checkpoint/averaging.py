"""Averages of saved checkpoints: one checkpoint of weights alone out of several of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from megatron_mdm.checkpoint.discovery import verify_checkpoint
from megatron_mdm.checkpoint.manifest import RAW, CheckpointManifest, SavedAverage, read_saved_model
from megatron_mdm.checkpoint.rank_files import MAX_FILE_BYTES
from megatron_mdm.checkpoint.storage import CheckpointReader
from megatron_mdm.checkpoint.weights import write_weights_checkpoint
from megatron_mdm.config import parse_config
from megatron_mdm.config.continuation import list_computed_fields
from megatron_mdm.core.errors import CheckpointError

# How long a run is and how it is judged may differ among the checkpoints of one.
_MAY_DIFFER = ("schedule", "validation")


def average_checkpoints(
    paths: Sequence[Path],
    output: Path,
    *,
    weights: str = RAW,
    overwrite: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Writes the mean of the weights of checkpoints as a checkpoint of weights alone.

    Sums are made in float64 and rounded once. Memory holds the tensor that is being averaged.

    Args:
        paths: Folders of checkpoints of one run, in any order.
        output: A `checkpoints` folder of its own.
        weights: `raw`, or the name of an average that each of them holds.
        overwrite: Replace what an earlier call left there.
        max_file_bytes: A tensor file holds at most so many bytes, or one larger tensor.

    Returns:
        The checkpoint. It knows the tokenizer of the run, and what it is the mean of.

    Raises:
        CheckpointError: One is damaged or has no such average, they are not of one run, or the
            output is taken or cannot be written.
    """
    manifests = {path: verify_checkpoint(path) for path in paths}
    ordered = sorted(manifests, key=lambda path: manifests[path].step)
    _check_one_run(manifests, ordered)
    mean = _Mean([CheckpointReader(path, weights) for path in ordered])
    last = manifests[ordered[-1]]
    saved = read_saved_model(last)
    steps = tuple(manifests[path].step for path in ordered)
    average_of = SavedAverage(run=str(last.config["run"]["dir"]), steps=steps, weights=weights)
    return write_weights_checkpoint(
        mean,
        {name: tuple(shape) for name, shape in last.parameters.items()},
        output,
        model=saved.model,
        kind=saved.kind,
        seq_length=saved.seq_length,
        versions=last.versions,
        origin={
            "config": last.config,
            "data_fingerprint": last.data_fingerprint,
            "tokenizer": last.tokenizer,
            "chat_template": last.chat_template,
            "average_of": average_of,
        },
        overwrite=overwrite,
        max_file_bytes=max_file_bytes,
    )


class _Mean:
    """The mean of the weights of checkpoints, a `WeightSource`."""

    def __init__(self, readers: Sequence[CheckpointReader]) -> None:
        self._readers = readers

    def list_names(self) -> list[str]:
        return self._readers[0].list_names()

    def load(self, name: str) -> Tensor:
        total = self._readers[0].load(name).double()
        for reader in self._readers[1:]:
            total += reader.load(name)
        return (total / len(self._readers)).float()


def _check_one_run(manifests: dict[Path, CheckpointManifest], ordered: Sequence[Path]) -> None:
    """Refuses checkpoints whose mean would mean nothing."""
    first = ordered[0]
    for path in ordered:
        if manifests[path].kind == "weights":
            raise CheckpointError(
                f"{path} holds weights alone, which say nothing of their run: average checkpoints "
                "that a run has saved."
            )
    ours = list_computed_fields(parse_config(manifests[first].config), but=_MAY_DIFFER)
    for path in ordered[1:]:
        theirs = list_computed_fields(parse_config(manifests[path].config), but=_MAY_DIFFER)
        for field in {**ours, **theirs}:
            if ours.get(field) != theirs.get(field):
                raise CheckpointError(
                    f"{path} is of another run than {first} ({field}="
                    f"{json.dumps(theirs.get(field))} where that has "
                    f"{json.dumps(ours.get(field))}): average checkpoints of one run."
                )
        if manifests[path].data_fingerprint != manifests[first].data_fingerprint:
            raise CheckpointError(
                f"{path} is of another run than {first}, which was trained on other data: average "
                "checkpoints of one run."
            )
    steps = [manifests[path].step for path in ordered]
    for step, path in zip(steps[1:], ordered[1:], strict=True):
        if steps.count(step) > 1:
            raise CheckpointError(
                f"{path} is of step {step:,}, and so is another of the checkpoints: name each "
                "step once."
            )
