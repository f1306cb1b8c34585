"""The YAML file of a sweep, and its axes: which fields change together, under which names.

An axis is a list of points; a point sets one or more fields of the configuration and has a label.
The sweep is the product of its axes, and a run is called by the labels of its points.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from megatron_mdm.config.loading import explain_problems, parse_yaml
from megatron_mdm.config.section import PositiveFloat, PositiveInt, Section
from megatron_mdm.core.errors import ConfigError

# A label is a part of a folder's name; "_" stands between labels, and may stand inside of one.
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_Section = TypeVar("_Section", bound=Section)
_UNIQUE_TOKENS_FIELD = "data.train.0.max_unique_tokens"


class IsoflopGrid(Section):
    """Sizes at equal compute: every size is trained for every budget."""

    budgets: Annotated[list[PositiveFloat], Field(min_length=1)] = Field(
        description="FLOPs of a run, counted as schedule.flops."
    )
    sizes: Any = Field(description="Sizes of the model, written as an axis of several fields.")


class RepetitionGrid(Section):
    """Amounts of unique data, each seen for several epochs or at several budgets of compute."""

    unique_tokens: Annotated[list[PositiveInt], Field(min_length=1)] = Field(
        description="Tokens of the one training source that are used."
    )
    epochs: Annotated[list[PositiveFloat], Field(min_length=1)] | None = Field(
        default=None, description="Passes over them."
    )
    flops: Annotated[list[PositiveFloat], Field(min_length=1)] | None = Field(
        default=None, description="FLOPs of a run, counted as schedule.flops, instead of epochs."
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.flops is None):
            found = "neither is" if self.epochs is None else "both are"
            raise ValueError(
                f"repetition needs either epochs or flops, but {found} set: keep one of them."
            )
        return self


class SweepFile(Section):
    """A sweep as it is written. Paths are relative to the working directory, as in every config."""

    base: str = Field(description="YAML config that every run starts from.")
    dir: str = Field(description="Folder of the sweep; each run has a folder of its name in it.")
    set: dict[str, Any] = Field(default={}, description="Fields that all runs share.")
    axes: dict[str, Any] = Field(default={}, description="What varies; the runs are the product.")
    isoflop: IsoflopGrid | None = Field(default=None, description="Budgets times sizes.")
    repetition: RepetitionGrid | None = Field(
        default=None, description="Unique tokens times epochs, or times budgets."
    )


@dataclass(frozen=True)
class Point:
    """A value of an axis.

    Attributes:
        label: Its part of a run's name.
        fields: Dotted names of fields, and their values.
    """

    label: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """What varies together.

    Attributes:
        name: As in the file, for messages.
        points: At least one, of different labels and fields.
    """

    name: str
    points: tuple[Point, ...]

    @property
    def fields(self) -> list[str]:
        """Fields that its points set, in order of their first use."""
        return list(dict.fromkeys(field for point in self.points for field in point.fields))


def read_sweep_file(path: Path) -> SweepFile:
    """Reads and checks the file of a sweep; the runs themselves are not looked at.

    Args:
        path: The YAML file.

    Returns:
        Its content.

    Raises:
        ConfigError: It cannot be read, or a key or value is not valid.
    """
    return read_section_file(path, SweepFile, "sweep", "base, dir and axes")


def read_section_file(path: Path, section: type[_Section], what: str, needs: str) -> _Section:
    """Reads and checks a YAML file that is one section.

    Args:
        path: The file.
        section: Its class.
        what: What such a file describes.
        needs: What it has to hold at least.

    Returns:
        Its content.

    Raises:
        ConfigError: It cannot be read, or a key or value is not valid.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}): give the YAML file of a {what}."
        ) from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no {what}: it needs at least {needs}.")
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        told = explain_problems(error, is_run=False).splitlines()
        raise ConfigError("\n".join(f"{path}: {line}" for line in told)) from None


def axes_of(file: SweepFile) -> list[Axis]:
    """Reads the axes of a sweep: those of `isoflop` and `repetition`, then its own.

    Args:
        file: The sweep's file.

    Returns:
        At least one axis; no two of them set the same field.

    Raises:
        ConfigError: An axis is empty, repeats itself, is not written as one, or sets a field that
            another one or `set` sets.
    """
    axes: list[Axis] = []
    if file.isoflop is not None:
        axes.append(_number_axis("isoflop.budgets", "schedule.flops", file.isoflop.budgets))
        axes.append(_group_axis("isoflop.sizes", file.isoflop.sizes))
    if file.repetition is not None:
        grid = file.repetition
        axes.append(
            _number_axis("repetition.unique_tokens", _UNIQUE_TOKENS_FIELD, grid.unique_tokens)
        )
        for length, values in (("epochs", grid.epochs), ("flops", grid.flops)):
            if values is not None:
                axes.append(_number_axis(f"repetition.{length}", f"schedule.{length}", values))
    axes += [
        _field_axis(f"axes.{name}", name, value)
        if "." in name
        else _group_axis(f"axes.{name}", value)
        for name, value in file.axes.items()
    ]
    if not axes:
        raise ConfigError(
            "The sweep has no axes, so that there is nothing to vary: add axes, isoflop or "
            "repetition."
        )
    _check_fields("set", list(file.set))
    _check_conflicts([("set", list(file.set)), *((axis.name, axis.fields) for axis in axes)])
    return axes


def _field_axis(where: str, field: str, values: Any) -> Axis:
    _check_fields(where, [field])
    if not isinstance(values, list):
        raise ConfigError(
            f"{where} is not a list of values: write {field}: [VALUE, VALUE], or give the axis a "
            "name without a dot and its points names, as in size: {small: {model.num_layers: 2}}."
        )
    return _number_axis(where, field, values)


def _number_axis(where: str, field: str, values: Sequence[Any]) -> Axis:
    short = field.rpartition(".")[2]
    return _checked(
        where, [Point(f"{short}-{_text(where, value)}", {field: value}) for value in values]
    )


def _group_axis(where: str, value: Any) -> Axis:
    """Reads an axis of several fields: a list of groups of them, or names with such groups."""
    if isinstance(value, dict):
        pairs = [(_text(where, label), fields) for label, fields in value.items()]
    elif isinstance(value, list):
        pairs = [("", fields) for fields in value]
    else:
        raise ConfigError(
            f"{where} is not an axis: write a list of groups of fields, as in "
            "[{objective.kind: ar}, {objective.kind: mdm}], or names with such groups; an axis of "
            "one field is called by it, as in run.seed: [0, 1]."
        )
    points = []
    for label, fields in pairs:
        if not isinstance(fields, dict) or not fields:
            raise ConfigError(
                f"{where} has the point {label or _shown(fields)} without fields: write each point "
                "as fields and values, as in {model.num_layers: 2}."
            )
        fields = {str(field): value for field, value in fields.items()}
        _check_fields(where, list(fields))
        points.append(
            Point(label or "-".join(_text(where, value) for value in fields.values()), fields)
        )
    return _checked(where, points)


def _checked(where: str, points: list[Point]) -> Axis:
    if not points:
        raise ConfigError(f"{where} is empty: give it at least one point, or leave it out.")
    for number, point in enumerate(points):
        if not _LABEL.fullmatch(point.label):
            raise ConfigError(
                f"{where} has the point {point.label!r}, which cannot be part of a folder's name: "
                "use letters, digits, '.', '_', '+' and '-', and begin with a letter or digit; a "
                "point gets a name by writing the axis as NAME: {POINT: {FIELD: VALUE}}."
            )
        for other in points[:number]:
            if other.fields == point.fields:
                raise ConfigError(
                    f"{where} has the same point twice, {_shown(point.fields)}: leave one out."
                )
            if other.label.casefold() == point.label.casefold():
                raise ConfigError(
                    f"{where} has two points of the name {point.label}, {_shown(other.fields)} and "
                    f"{_shown(point.fields)}: give them names of their own, as in "
                    "{first: {...}, second: {...}}."
                )
    return Axis(where, tuple(points))


def _check_fields(where: str, fields: Sequence[str]) -> None:
    for field in fields:
        parts = field.split(".")
        if len(parts) < 2 or not all(parts):
            raise ConfigError(
                f"{where} sets {field}, which is not a field: write section.key, for example "
                "optimizer.lr."
            )
        if field == "run.dir":
            raise ConfigError(
                f"{where} sets run.dir, which follows from the sweep's dir and the run's name: "
                "leave it out."
            )


def _check_conflicts(setters: Sequence[tuple[str, list[str]]]) -> None:
    seen: list[tuple[str, str, tuple[str, ...]]] = []
    for where, fields in setters:
        for field in fields:
            parts = _place(field)
            for other_where, other, other_parts in seen:
                shared = min(len(parts), len(other_parts))
                if other_where != where and parts[:shared] == other_parts[:shared]:
                    raise ConfigError(
                        f"{other_where} sets {other} and {where} sets {field}, which is the same "
                        "place of the config: keep one of them."
                    )
        seen += [(where, field, _place(field)) for field in fields]


def _place(field: str) -> tuple[str, ...]:
    # A run has one length, however it is stated.
    if field in ("schedule.steps", "schedule.tokens", "schedule.epochs", "schedule.flops"):
        return ("schedule", "length")
    return tuple(field.split("."))


def _text(where: str, value: Any) -> str:
    """A value as a part of a name: 0.001, 1e19, true, ar."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        short = f"{value:g}"
        # 1e-05 and 1e+19 in the way that people write them.
        return re.sub(r"e\+?(-?)0*", r"e\1", short if float(short) == value else repr(value))
    if value is None or isinstance(value, bool | int):
        return json.dumps(value)
    raise ConfigError(
        f"{where} has the value {_shown(value)}, which makes no name for a run: give the point a "
        "name, as in NAME: {POINT: {FIELD: VALUE}}."
    )


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
