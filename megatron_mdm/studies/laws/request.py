"""What a command line asks of the fits, checked before anything is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_mdm.config.objective import ObjectiveKind
from megatron_mdm.config.parameters import ParameterConvention
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.options import FLATTENED, REPEATED
from megatron_mdm.core.statistics import Interval
from megatron_mdm.studies.laws.comparison import HeldOut
from megatron_mdm.studies.laws.forms import FORMS, Law


@FLATTENED
@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """What to fit and what to write.

    Attributes:
        form: chinchilla, data_constrained, geometric, overfitting, data_constrained_overfitting or
            package.module:Class; without it only what is asked for below.
        fit: NAME,NAME: constants to fit; by default all that are not held.
        hold: NAME=VALUE: a constant that keeps a value.
        tie_exponents: Fit alpha = beta.
        bootstrap: Resamples of the runs, for intervals.
        seed: Of the bootstrap.
        profile: NAME or NAME=LOW:HIGH: a constant to profile, and where.
        best_epochs: N,U: a size and unique tokens whose best number of epochs is profiled.
        compare: FORM,FORM: compare forms by runs that they were not fitted to.
        held_out: Of a comparison: the largest fifth of the runs by compute, or the runs of each N
            and U in turn.
        curves: Read the best numbers of epochs off curves of held-out loss.
        folders: Holds the runs' folders, by name: their validations are the curves. Without it the
            runs of one N and U are one curve.
        isoflop: Fit parabolas through runs of equal 6 N D.
        objective: Take the runs of this objective; the law file says so.
        column: QUANTITY=NAME, such as loss=NAME: a column's other name.
        parameters: Which N the table holds, or which of a sweep's two columns to take.
        skip_failed: Leave out runs without a usable loss.
        out: Folder for law.json and plots.
        json: Print JSON.
    """

    form: str | None = None
    fit: str | None = None
    hold: Annotated[tuple[str, ...], REPEATED] = ()
    tie_exponents: bool = False
    bootstrap: int = 0
    seed: int = 0
    profile: Annotated[tuple[str, ...], REPEATED] = ()
    best_epochs: Annotated[tuple[str, ...], REPEATED] = ()
    compare: str | None = None
    held_out: HeldOut = "largest"
    curves: bool = False
    folders: Path | None = None
    isoflop: bool = False
    objective: ObjectiveKind | None = None
    column: Annotated[tuple[str, ...], REPEATED] = ()
    parameters: ParameterConvention | None = None
    skip_failed: bool = False
    out: Path | None = None
    json: bool = False


@dataclass(frozen=True)
class Request:
    """What is asked.

    Attributes:
        form: To fit; None: none.
        held: Constants that keep a value.
        profiles: Constants to profile, and where.
        places: N and U whose best number of epochs is profiled.
        compared: Forms to compare; none for no comparison.
    """

    form: type[Law] | None
    held: Mapping[str, float]
    profiles: Mapping[str, Interval | None]
    places: tuple[tuple[float, float], ...]
    compared: tuple[type[Law], ...]


def check_request(settings: FitSettings) -> Request:
    """Checks a command line.

    Args:
        settings: As it was given.

    Returns:
        What it asks for.

    Raises:
        ConfigError: An option is not valid, or does not go with another one.
    """
    if settings.out is not None and settings.out.exists() and not settings.out.is_dir():
        raise ConfigError(f"--out {settings.out} is a file: name a folder.")
    if not (settings.form or settings.compare or settings.curves or settings.isoflop):
        raise ConfigError(
            f"Nothing is asked for: give --form ({', '.join(FORMS.names)}), --compare FORM,FORM, "
            "--curves or --isoflop."
        )
    if settings.bootstrap < 0:
        raise ConfigError(f"--bootstrap {settings.bootstrap} is not valid: give 0 or more.")
    if settings.folders is not None and not settings.curves:
        raise ConfigError(f"--folders {settings.folders} is for curves: give --curves with it.")
    form = None if settings.form is None else FORMS.find(settings.form, "--form")
    request = Request(
        form,
        _read_held(settings),
        _read_profiles(settings.profile),
        _read_places(settings.best_epochs, form),
        _read_compared(settings.compare),
    )
    _check_constants(settings, request)
    return request


def _check_constants(settings: FitSettings, request: Request) -> None:
    form, held = request.form, request.held
    forms = [one for one in (form, *request.compared) if one is not None]
    for name in held if forms else ():
        if not any(name in one.names() for one in forms):
            _refuse_constant(name, forms[0])
    if form is None:
        return
    asked = settings.fit.split(",") if settings.fit is not None else []
    for name in (*asked, *request.profiles):
        if name not in form.names():
            _refuse_constant(name, form)
    for name in held.keys() & request.profiles.keys():
        raise ConfigError(f"--profile {name} needs a fit of it: leave out --hold {name}.")
    for name in form.names() if asked else ():
        if (name in asked) == (name in held):
            state = "both fitted and held" if name in held else "neither fitted nor held"
            raise ConfigError(f"{name} is {state}: name it in --fit, or give --hold {name}=X.")


def _refuse_constant(name: str, form: type[Law]) -> None:
    raise ConfigError(
        f"{name} is no constant of the form {form.form}: use {', '.join(form.names())}."
    )


def _read_held(settings: FitSettings) -> dict[str, float]:
    held = {}
    for name, text in read_pairs("--hold", settings.hold).items():
        try:
            held[name] = float(text)
        except ValueError:
            raise ConfigError(f"--hold {name}={text} is not valid: give a number.") from None
    return held


def _read_places(texts: Sequence[str], form: type[Law] | None) -> tuple[tuple[float, float], ...]:
    """Reads `N,U` arguments."""
    places = []
    for text in texts:
        if form is None or not form.penalty_names:
            raise ConfigError(
                f"--best-epochs {text} needs a form whose loss has a minimum in epochs: give "
                "--form overfitting or data_constrained_overfitting."
            )
        try:
            parameters, unique = map(float, text.split(","))
        except ValueError:
            parameters, unique = 0.0, 0.0
        if not (0 < parameters < math.inf and 0 < unique < math.inf):
            raise ConfigError(
                f"--best-epochs {text} is not valid: give N,U, such as 1e8,1e9, a size in "
                "parameters and unique tokens."
            )
        places.append((parameters, unique))
    return tuple(places)


def _read_compared(text: str | None) -> tuple[type[Law], ...]:
    """Reads `FORM,FORM`."""
    names = text.split(",") if text is not None else []
    if text is not None and len(set(names)) < max(len(names), 2):
        raise ConfigError(f"--compare {text} is not valid: give two or more different forms.")
    return tuple(FORMS.find(name, "--compare") for name in names)


def read_pairs(option: str, pairs: Sequence[str]) -> dict[str, str]:
    """Reads `NAME=VALUE` arguments."""
    named = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not (name and sign and value):
            raise ConfigError(f"{option} {pair} is not valid: give NAME=VALUE.")
        named[name] = value
    return named


def _read_profiles(profiles: Sequence[str]) -> dict[str, Interval | None]:
    """Reads `NAME` or `NAME=LOW:HIGH` arguments."""
    reaches: dict[str, Interval | None] = {}
    for text in profiles:
        name, sign, ends = text.partition("=")
        reaches[name] = None
        if sign:
            try:
                low, high = map(float, ends.split(":"))
            except ValueError:
                low, high = 1.0, 0.0
            if not 0 < low < high < math.inf:
                raise ConfigError(f"--profile {text} is not valid: give NAME=LOW:HIGH.")
            reaches[name] = Interval(low, high)
    return reaches
