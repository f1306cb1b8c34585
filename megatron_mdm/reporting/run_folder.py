"""What a run left in its folder, and the pages that are made of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_mdm.core.errors import DataError
from megatron_mdm.core.files import write_text_whole
from megatron_mdm.reporting.metrics import METRICS_FILE_NAME, read_metrics


@dataclass(frozen=True)
class RunFolder:
    """The files of a run; what is missing is empty.

    Attributes:
        name: Name of the folder.
        records: Records of `metrics.jsonl`, in order.
        config: `config.yaml`.
        run_info: `run_info.json`.
        ledger: `ledger.json`.
    """

    name: str
    records: list[dict[str, Any]]
    config: dict[str, Any]
    run_info: dict[str, Any]
    ledger: dict[str, Any]

    @property
    def is_ar(self) -> bool:
        """Is its loss a negative log-likelihood, and no upper bound on one?"""
        objective = self.config.get("objective")
        return isinstance(objective, dict) and objective.get("kind") == "ar"


def read_run(run_dir: Path) -> RunFolder:
    """Reads the folder of a run, also while the run goes on.

    Args:
        run_dir: The folder.

    Returns:
        Its files.

    Raises:
        DataError: The folder is missing, or a file is damaged.
    """
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} is not a directory: give the directory of a run.")
    metrics_path = run_dir / METRICS_FILE_NAME
    return RunFolder(
        name=run_dir.resolve().name,
        records=read_metrics(metrics_path) if metrics_path.exists() else [],
        config=_read_mapping(run_dir / "config.yaml"),
        run_info=_read_mapping(run_dir / "run_info.json"),
        ledger=_read_mapping(run_dir / "ledger.json"),
    )


def write_page(template: str, output: Path, **content: Any) -> Path:
    """Writes a page that needs nothing but itself.

    Args:
        template: Name of a template of this package.
        output: Page to write; its folder is made when absent.
        **content: What the template names; text is escaped.

    Returns:
        The path of the page.
    """
    environment = Environment(
        loader=PackageLoader("megatron_mdm.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template(template).render(**content)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text_whole(output, html)
    return output


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
