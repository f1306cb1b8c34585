"""A sweep: the product of its axes, as checked configurations with names."""

from __future__ import annotations

import fnmatch
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mdm.config import Config, load_config
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.studies.sweeps.sweep_file import Axis, SweepFile, axes_of, read_sweep_file

# File systems allow 255 bytes, and temporary names are longer than the name.
_LONGEST_NAME = 200


@dataclass(frozen=True)
class SweepRun:
    """A run of a sweep.

    Attributes:
        name: Name of its folder; unique in the sweep.
        config: What it computes, `run.dir` included.
    """

    name: str
    config: Config

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.dir)


@dataclass(frozen=True)
class Sweep:
    """Runs that belong together.

    Attributes:
        path: The file.
        dir: Folder of all runs.
        fields: Dotted names of the fields that the axes set.
        runs: In the order of the product, the last axis fastest.
    """

    path: Path
    dir: Path
    fields: tuple[str, ...]
    runs: tuple[SweepRun, ...]

    def select(self, patterns: Sequence[str]) -> list[SweepRun]:
        """Chooses runs by name.

        Args:
            patterns: Names, or patterns with *, ? and [...]; none: all runs.

        Returns:
            The runs that match at least one, in the sweep's order.

        Raises:
            ConfigError: A pattern matches no run.
        """
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(run.name, pattern) for run in self.runs):
                raise ConfigError(
                    f"--only={pattern} matches none of the {len(self.runs)} runs of {self.path}: "
                    f"their names look like {self.runs[0].name}."
                )
        return [
            run
            for run in self.runs
            if not patterns or any(fnmatch.fnmatchcase(run.name, one) for one in patterns)
        ]


def load_sweep(path: Path) -> Sweep:
    """Reads a sweep and checks the configuration of every run.

    Args:
        path: The YAML file.

    Returns:
        The sweep.

    Raises:
        ConfigError: The file, an axis or the configuration of a run is not valid, or two runs are
            the same.
    """
    file = read_sweep_file(path)
    try:
        axes = axes_of(file)
        points = expand(axes)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not Path(file.base).is_file():
        raise ConfigError(
            f"{path}: base={file.base} does not exist: give a YAML config, relative to the working "
            "directory."
        )
    runs = [_load_run(path, file, name, fields) for name, fields in points]
    _check_different(path, runs)
    swept = tuple(dict.fromkeys(field for axis in axes for field in axis.fields))
    return Sweep(path, Path(file.dir), swept, tuple(runs))


def expand(axes: Sequence[Axis]) -> list[tuple[str, dict[str, Any]]]:
    """Forms the product of axes.

    Args:
        axes: At least one; no two set the same field.

    Returns:
        Name and fields of each run, the last axis fastest; names are unique.

    Raises:
        ConfigError: A name is too long, or two runs would have the same one.
    """
    runs: list[tuple[str, dict[str, Any]]] = []
    seen: set[str] = set()
    for points in itertools.product(*(axis.points for axis in axes)):
        name = "_".join(point.label for point in points)
        if len(name) > _LONGEST_NAME:
            raise ConfigError(
                f"The run {name[:50]}... would have a name of {len(name)} characters, more than "
                f"{_LONGEST_NAME}: give the points shorter names."
            )
        # Some file systems do not tell a from A.
        if name.casefold() in seen:
            raise ConfigError(
                f"Two runs would have the name {name}: give the points of the axes names that do "
                "not run into each other."
            )
        seen.add(name.casefold())
        fields = {field: value for point in points for field, value in point.fields.items()}
        runs.append((name, fields))
    return runs


def field_of(config: Config, field: str) -> Any:
    """Looks a field up.

    Args:
        config: A configuration.
        field: Its dotted name; whole numbers are places in a list.

    Returns:
        What stands there, as JSON can hold it; None where a list is shorter.
    """
    node: Any = config.model_dump(mode="json")
    for part in field.split("."):
        if isinstance(node, list):
            node = node[int(part)] if part.isdigit() and int(part) < len(node) else None
        else:
            node = node.get(part) if isinstance(node, dict) else None
    return node


def _load_run(path: Path, file: SweepFile, name: str, fields: dict[str, Any]) -> SweepRun:
    everything = {**file.set, **fields, "run.dir": str(Path(file.dir) / name)}
    try:
        config = load_config(Path(file.base), [*_overrides(everything.items())])
        _check_runnable(file, config)
    except ConfigError as error:
        raise ConfigError(f"{path}, run {name}: {error}") from None
    return SweepRun(name, config)


def _overrides(fields: Iterable[tuple[str, Any]]) -> Iterable[str]:
    # JSON is YAML, and says which text is text.
    return (f"{field}={json.dumps(value, ensure_ascii=False)}" for field, value in fields)


def _check_runnable(file: SweepFile, config: Config) -> None:
    if config.checkpoint.resume != "auto":
        raise ConfigError(
            f"checkpoint.resume={config.checkpoint.resume} does not let a sweep start runs and go "
            "on with them by the same command: use checkpoint.resume=auto."
        )
    if file.repetition is not None and len(config.data.train) != 1:
        raise ConfigError(
            f"data.train has {len(config.data.train)} sources, but repetition limits the unique "
            "tokens of one: use a single source, or axes of data.train.0.max_unique_tokens and so "
            "on."
        )


def _check_different(path: Path, runs: Sequence[SweepRun]) -> None:
    seen: dict[str, str] = {}
    for run in runs:
        tree = run.config.model_dump(mode="json")
        tree["run"].pop("dir")
        # Of a preset only what it fills in counts: a base that states all sizes overrides it.
        tree["model"].pop("preset")
        text = json.dumps(tree, sort_keys=True)
        if text in seen:
            raise ConfigError(
                f"{path}: the runs {seen[text]} and {run.name} are the same run: remove one of "
                "their points, or what overrides the difference."
            )
        seen[text] = run.name
