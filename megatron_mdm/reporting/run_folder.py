"""The folder of a run: one description of its files, and one reader."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from megatron_mdm.config.objective import ObjectiveConfig, find_recorded_objective
from megatron_mdm.core.errors import DataError
from megatron_mdm.reporting.baselines import Baselines
from megatron_mdm.reporting.judged_windows import JudgedWindows, read_judged_windows
from megatron_mdm.reporting.metrics import (
    METRICS_FILE_NAME,
    NLL,
    find_best_validation,
    match_records,
    read_metrics,
)

UNIGRAM_NATS = "unigram_nats_per_token"
"""What an export's training_metadata.json calls it."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, also of one that goes on. Each file is read once, when it is asked for.

    What is missing is empty; a file that is damaged is a DataError.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.resolve().name

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """Records of `metrics.jsonl`, in order."""
        path = self.path / METRICS_FILE_NAME
        return read_metrics(path) if path.exists() else []

    @cached_property
    def matched(self) -> list[dict[str, Any]]:
        """Records with the losses by which AR and MDM are compared, see `match_records`."""
        return match_records(self.records)

    @property
    def validations(self) -> list[dict[str, Any]]:
        """Those of `matched` that hold a held-out loss."""
        return [record for record in self.matched if NLL in record]

    @property
    def last_validation(self) -> Mapping[str, Any]:
        """The last of them; empty before the first."""
        return find_last_with(self.matched, NLL) or {}

    @property
    def best_validation(self) -> Mapping[str, Any] | None:
        """The one of the least loss; None where no loss is finite."""
        return find_best_validation(self.matched)

    @property
    def step(self) -> int:
        """Optimizer step of the last record; 0 before the first."""
        return int(self.records[-1]["step"]) if self.records else 0

    @cached_property
    def windows(self) -> dict[int, JudgedWindows]:
        """What the windows of each validation cost, by step."""
        return read_judged_windows(self.path)

    @cached_property
    def baselines(self) -> Baselines | None:
        """What counting tokens gives on its held-out windows; None: not known."""
        return Baselines.read(self.path)

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.yaml`, as it was written."""
        return _read_mapping(self.path / "config.yaml")

    @cached_property
    def run_info(self) -> dict[str, Any]:
        """`run_info.json`."""
        return _read_mapping(self.path / "run_info.json")

    @cached_property
    def ledger(self) -> dict[str, Any]:
        """`ledger.json`, which every checkpoint brings up to date."""
        return _read_mapping(self.path / "ledger.json")

    @property
    def unigram_nats_per_token(self) -> float | None:
        """What counts of single tokens give on the held-out windows; None: not known."""
        return None if self.baselines is None else self.baselines.nll.unigram

    @cached_property
    def objective(self) -> ObjectiveConfig:
        """The objective of `config.yaml`."""
        return find_recorded_objective(self.config)

    @property
    def objective_kind(self) -> str:
        """Which objective `config.yaml` names: `ar`, `mdm` or `package.module:Class`."""
        section = self.config.get("objective")
        return str(section.get("kind", "mdm") if isinstance(section, dict) else "mdm")

    @property
    def objective_name(self) -> str:
        """For a column: AR, MDM, or the name of a class from elsewhere."""
        kind = self.objective_kind
        return kind.rpartition(":")[2] if ":" in kind else kind.upper()


def open_run(run_dir: Path) -> RunFolder:
    """The folder of a run that a user names.

    Raises:
        DataError: The folder is missing.
    """
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} is not a directory: give the directory of a run.")
    return RunFolder(run_dir)


def find_last_with(records: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    """Finds the last record with a metric; None without one."""
    return next((record for record in reversed(records) if name in record), None)


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Goes through nested mappings.

    Args:
        mapping: Names and values, some of them mappings.
        prefix: Stands before every name.

    Yields:
        Dotted names and the values that are no mappings, and empty ones.
    """
    for name, value in mapping.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def format_setting(value: Any) -> str:
    """Shows a setting as YAML would.

    Args:
        value: Its value.

    Returns:
        Text as it is, anything else as JSON.
    """
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def format_scientific(value: float) -> str:
    """Shows a large number by its power of ten.

    Args:
        value: Any finite number but 0.

    Returns:
        For example 1.23 times 10 to the 15th.
    """
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa} \u00d7 10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def _read_mapping(path: Path) -> dict[str, Any]:
    """Reads a JSON or YAML mapping; a missing file is an empty one."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(
            f"{path} cannot be read ({error}): it must be valid {path.suffix[1:].upper()}; "
            "write it again or move it away."
        ) from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path} holds {type(content).__name__} at its top: it must be a mapping of names to "
            "values; write it again or move it away."
        )
    return content
