"""Law files: a fitted law in JSON, with what it was fitted to and the laws of its bootstrap."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_mdm.config import CONVENTIONS, ModelSize, ParameterConvention
from megatron_mdm.core.errors import DataError
from megatron_mdm.core.files import write_text_whole
from megatron_mdm.studies.laws.forms import FORMS, Law
from megatron_mdm.studies.laws.runs import Runs

FORMAT_VERSION = 1
_LOSS_UNIT = "nats per token"
# What files said before there were two conventions: all tables of this project counted so.
_FORMER_NAME = "non_embedding"


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
        bootstrap: Laws of the same form, one a resample.
        source: In words, where the law comes from.
    """

    law: Law
    parameters: ParameterConvention | None = None
    objective: Literal["mdm", "ar"] | None = None
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
    ) -> dict[str, torch.Tensor]:
        """One run as `Law.loss` takes it.

        Args:
            size: N, counted both ways.
            num_tokens: D.
            unique_tokens: U.

        Returns:
            float64 [1] each, by name, with N in the law's convention.

        Raises:
            DataError: The law does not say which N it takes.
        """
        numbers = {
            "num_parameters": size.counted(self.convention),
            "num_tokens": num_tokens,
            "unique_tokens": unique_tokens,
        }
        return {name: torch.tensor([value], dtype=torch.float64) for name, value in numbers.items()}


class _Stored(BaseModel):
    """The file as it stands. An infinite reuse is null."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format_version: int
    form: str
    objective: Literal["mdm", "ar"] | None
    constants: dict[str, float | None]
    fitted: list[str]
    huber_objective: float | None
    num_runs: int
    ranges: dict[str, list[float]]
    bootstrap: list[dict[str, float | None]]
    loss_unit: str
    parameters: str | None
    vocab_size: int | None = None
    source: str


def ranges_of(runs: Runs) -> dict[str, tuple[float, float]]:
    """What runs span: the `ranges` of a law file."""
    values = {
        "num_parameters": runs.num_parameters,
        "num_tokens": runs.num_tokens,
        "unique_tokens": runs.unique_tokens,
        "epochs": runs.epochs,
    }
    return {name: (float(one.min()), float(one.max())) for name, one in values.items()}


def write_law(path: Path, content: LawFile) -> None:
    """Writes a law file whole.

    Args:
        path: The file to create or replace. Its folder has to exist.
        content: What it shall hold.
    """
    stored = _Stored(
        format_version=FORMAT_VERSION,
        form=content.law.form,
        objective=content.objective,
        constants=_constants_of(content.law),
        fitted=list(content.fitted),
        huber_objective=content.huber_objective,
        num_runs=content.num_runs,
        ranges={name: list(ends) for name, ends in content.ranges.items()},
        bootstrap=[_constants_of(law) for law in content.bootstrap],
        loss_unit=_LOSS_UNIT,
        parameters=content.parameters,
        vocab_size=content.vocab_size,
        source=content.source,
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
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        stored = _Stored.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{path}: {place or 'the file'} is not valid ({first['msg']}): write it with "
            "tools/fit_scaling_law.py."
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a law file: {error}.") from error
    for name, found, wanted in (
        ("format_version", stored.format_version, FORMAT_VERSION),
        ("loss_unit", stored.loss_unit, _LOSS_UNIT),
    ):
        if found != wanted:
            raise DataError(f"{path}: {name} is {found}, but only {wanted} can be read: fit again.")
    parameters = _convention_of(path, stored.parameters)
    if stored.form not in FORMS:
        raise DataError(f"{path}: the form {stored.form} is not known: use {', '.join(FORMS)}.")
    for name, ends in stored.ranges.items():
        if len(ends) != 2 or not 0 < ends[0] <= ends[1] < math.inf:
            raise DataError(f"{path}: ranges.{name} is {ends}: give a lowest and a highest value.")
    return LawFile(
        law=_law_of(path, "constants", stored.form, stored.constants),
        parameters=parameters,
        objective=stored.objective,
        vocab_size=stored.vocab_size,
        fitted=tuple(stored.fitted),
        huber_objective=stored.huber_objective,
        num_runs=stored.num_runs,
        ranges={name: (ends[0], ends[1]) for name, ends in stored.ranges.items()},
        bootstrap=tuple(
            _law_of(path, f"bootstrap.{index}", stored.form, constants)
            for index, constants in enumerate(stored.bootstrap)
        ),
        source=stored.source,
    )


def _convention_of(path: Path, name: str | None) -> ParameterConvention | None:
    for convention in CONVENTIONS:
        if name == convention:
            return convention
    if name == _FORMER_NAME:
        return "without_embeddings"
    if name is None:
        return None
    raise DataError(
        f"{path}: parameters is {name}, but only {' and '.join(CONVENTIONS)} can be read: fit "
        "again with --parameters."
    )


def _constants_of(law: Law) -> dict[str, float | None]:
    return {
        name: value if math.isfinite(value) else None
        for name, value in zip(law.names(), law.values(), strict=True)
    }


def _law_of(path: Path, place: str, form: str, constants: Mapping[str, float | None]) -> Law:
    """Makes a law of the constants in a file, all of which must be there and in their ranges."""
    kind = FORMS[form]
    if set(constants) != set(kind.names()):
        raise DataError(
            f"{path}: {place} has {', '.join(sorted(constants))}, but the form {form} has "
            f"{', '.join(kind.names())}."
        )
    values = []
    for name in kind.names():
        value = constants[name]
        if value is None and name in kind.reuse_names and name not in kind.fraction_names:
            value = math.inf
        elif name in kind.fraction_names:
            if value is None or not 0 <= value <= 1:
                raise DataError(f"{path}: {place}.{name} is {value}: give a number from 0 to 1.")
        elif value is None or not 0 < value < math.inf:
            raise DataError(f"{path}: {place}.{name} is {value}: give a number above 0.")
        values.append(value)
    return kind.from_values(values)
