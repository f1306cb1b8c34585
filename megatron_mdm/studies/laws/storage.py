"""Law files: a fitted law in JSON, with what it was fitted to and the laws of its bootstrap."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_mdm.config import CONVENTIONS, ModelSize, ParameterConvention
from megatron_mdm.config.objective import ObjectiveKind
from megatron_mdm.core.errors import DataError
from megatron_mdm.core.files import write_text_whole
from megatron_mdm.studies.laws.forms import FORMS, Law
from megatron_mdm.studies.laws.runs import Runs


@dataclass(frozen=True)
class LawFile:
    """A law and where it comes from.

    Attributes:
        law: The law.
        parameters: Which N it was fitted to and takes; None where the table did not say.
        objective: `mdm` or `ar`; None where it is not known.
        vocab_size: Tokens of the vocabulary that its losses count by; None where not known.
        fitted: Constants that were fitted; the others were held.
        huber_objective: Sum of Huber losses of the fit; None for a law that was not fitted here.
        num_runs: How many runs were fitted.
        ranges: Lowest and highest `num_parameters`, `num_tokens`, `unique_tokens` and `epochs` of
            these runs: beyond them the law extrapolates.
        bootstrap: Laws of the same form, one per resample.
        source: In words, where the law comes from.
    """

    law: Law
    parameters: ParameterConvention | None = None
    objective: ObjectiveKind | None = None
    vocab_size: int | None = None
    fitted: tuple[str, ...] = ()
    huber_objective: float | None = None
    num_runs: int = 0
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    bootstrap: tuple[Law, ...] = ()
    source: str = ""

    @property
    def convention(self) -> ParameterConvention:
        """Which N it takes.

        Raises:
            DataError: The law does not say; fed the other N it would be wrong by whole nats.
        """
        if self.parameters is None:
            raise DataError(
                f"The law {self.source or 'given'} does not say whether its parameters were "
                "counted with or without embeddings (parameters is null): fit it again with "
                f"--parameters {' or '.join(CONVENTIONS)}."
            )
        return self.parameters

    def expected_loss(self, *, size: ModelSize, num_tokens: float, unique_tokens: float) -> float:
        """What the law expects of one run.

        Args:
            size: N, counted both ways; the law takes its own.
            num_tokens: D.
            unique_tokens: U.

        Returns:
            Nats per token.

        Raises:
            DataError: The law does not say which N it takes.
        """
        return float(self.law.loss(**self.arguments(size, num_tokens, unique_tokens)))

    def arguments(
        self, size: ModelSize, num_tokens: float, unique_tokens: float
    ) -> dict[str, float]:
        """One run as `Law.loss` takes it.

        Args:
            size: N, counted both ways.
            num_tokens: D.
            unique_tokens: U.

        Returns:
            Numbers by name, with N in the law's convention.

        Raises:
            DataError: The law does not say which N it takes.
        """
        return {
            "num_parameters": size.count_in(self.convention),
            "num_tokens": num_tokens,
            "unique_tokens": unique_tokens,
        }


class _Stored(BaseModel):
    """The file as it stands. An infinite reuse is null."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format_version: Literal[1]
    form: str
    objective: ObjectiveKind | None
    constants: dict[str, float | None]
    fitted: tuple[str, ...]
    huber_objective: float | None
    num_runs: int
    ranges: dict[str, tuple[float, float]]
    bootstrap: tuple[dict[str, float | None], ...]
    loss_unit: Literal["nats per token"]
    parameters: ParameterConvention | None
    vocab_size: int | None = None
    source: str


# What a file holds as it is.
_SAME = [one.name for one in fields(LawFile) if one.name not in ("law", "bootstrap")]


def find_ranges(runs: Runs) -> dict[str, tuple[float, float]]:
    """What runs span: the `ranges` of a law file."""
    names = ("num_parameters", "num_tokens", "unique_tokens", "epochs")
    values = {name: getattr(runs, name) for name in names}
    return {name: (float(one.min()), float(one.max())) for name, one in values.items()}


def write_law(path: Path, content: LawFile) -> None:
    """Writes a law file whole.

    Args:
        path: The file to create or replace. Its folder has to exist.
        content: What it shall hold.
    """
    stored = _Stored(
        format_version=1,
        form=content.law.form,
        constants=_constants_of(content.law),
        bootstrap=tuple(_constants_of(law) for law in content.bootstrap),
        loss_unit="nats per token",
        **{name: getattr(content, name) for name in _SAME},
    )
    write_text_whole(path, json.dumps(stored.model_dump(), indent=1) + "\n")


def read_law(path: Path) -> LawFile:
    """Reads a law file.

    Args:
        path: A file of `write_law`.

    Returns:
        What it holds.

    Raises:
        DataError: It cannot be read, is of another version or unit, or holds no valid law.
        ConfigError: Its form is not known.
    """
    try:
        stored = _Stored.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        value = f"{place} is {first['input']}" if place else "it is no law file"
        raise DataError(f"{path}: {value} ({first['msg']}): write it with mdm fit.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read as a law file: {error}.") from error
    form = FORMS.find(stored.form, f"{path}: form")
    for name, (low, high) in stored.ranges.items():
        if not 0 < low <= high < math.inf:
            raise DataError(
                f"{path}: ranges.{name} is {low} to {high}: give a lowest and a highest value."
            )
    return LawFile(
        law=_law_of(path, "constants", form, stored.constants),
        bootstrap=tuple(
            _law_of(path, f"bootstrap.{index}", form, constants)
            for index, constants in enumerate(stored.bootstrap)
        ),
        **{name: getattr(stored, name) for name in _SAME},
    )


def _constants_of(law: Law) -> dict[str, float | None]:
    return {
        name: value if math.isfinite(value) else None
        for name, value in zip(law.names(), law.values(), strict=True)
    }


def _law_of(path: Path, place: str, form: type[Law], constants: Mapping[str, float | None]) -> Law:
    """Makes a law of the constants in a file, all of which must be there and in their ranges."""
    if set(constants) != set(form.names()):
        raise DataError(
            f"{path}: {place} has {', '.join(sorted(constants))}, but the form {form.form} has "
            f"{', '.join(form.names())}."
        )
    values = []
    for name, about in form.constants().items():
        value = constants[name]
        if value is None and about.default == math.inf:
            value = math.inf
        if value is None or not about.may_be(value):
            rule = "from 0 to 1" if about.is_fraction else "above 0"
            raise DataError(f"{path}: {place}.{name} is {value}: give a number {rule}.")
        values.append(value)
    return form.from_values(values)
