"""The base of all sections of the configuration, and the kinds of numbers in them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Self, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from megatron_mdm.core.files import read_path

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _expand_home(value: str) -> str:
    # A shell leaves ~ as it is behind a "=", and YAML always.
    return str(read_path(value)) if value.startswith("~") else value


FilePath = Annotated[str, Field(min_length=1), AfterValidator(_expand_home)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: frozen, and no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_unknown_keys(cls, fields: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        valid = list(cls.model_fields)
        unknown = [key for key in fields if key not in valid] if isinstance(fields, Mapping) else []
        if not unknown:
            return handler(fields)
        near = {key: difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5) for key in unknown}
        problems = [_describe_unknown(key, near[key], valid) for key in unknown]
        try:
            handler({key: value for key, value in fields.items() if key in valid})
        except ValidationError as error:
            problems += [
                _repeat_problem(one)
                for one in error.errors(include_url=False)
                # A misspelt key is one mistake.
                if one["type"] != "missing" or [one["loc"][-1]] not in near.values()
            ]
        raise ValidationError.from_exception_data(cls.__name__, problems)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        has_truth = annotation is bool or any(one is value for one in get_args(annotation))
        if isinstance(value, bool) and not has_truth:
            # YAML means the same by on and true, and a choice may have the word.
            if (word := "on" if value else "off") in get_args(annotation):
                return word
            # Python counts true as 1, so `seed: yes` would silently become a seed.
            raise PydanticCustomError("not_bool", "should not be true or false")
        if isinstance(value, str):
            _refuse_text(value, annotation)
        return value


def _describe_unknown(key: Any, near: Sequence[str], valid: Sequence[str]) -> InitErrorDetails:
    remedy = f"did you mean {near[0]}?" if near else f"valid keys are {', '.join(valid)}."
    found = {"key": str(key), "remedy": remedy}
    kind = PydanticCustomError("unknown_key", "{key} is not a known key: {remedy}", found)
    return InitErrorDetails(type=kind, loc=(), input=key)


def _repeat_problem(problem: ErrorDetails) -> InitErrorDetails:
    """A problem as it can be raised again, with the same kind, words and place."""
    words = problem["msg"].replace("{", "{{").replace("}", "}}")
    kind = PydanticCustomError(problem["type"], words, problem.get("ctx"))
    return InitErrorDetails(type=kind, loc=problem["loc"], input=problem["input"])


# What pydantic takes for true or false.
_TRUTHS = frozenset(("0", "off", "f", "false", "n", "no", "1", "on", "t", "true", "y", "yes"))


def _refuse_text(value: str, annotation: Any) -> None:
    """Refuses text where a number or a truth value is due, which pydantic would read as one."""
    kinds = {kind for kind in _list_kinds(annotation) if kind is not type(None)}
    if kinds == {bool} and value.lower() in _TRUTHS:
        raise PydanticCustomError("text_for_bool", "should be true or false, without quotes")
    if not kinds or not kinds <= {int, float}:
        return
    try:
        float(value)
    except ValueError:
        return
    what = "whole number" if kinds == {int} else "number"
    raise PydanticCustomError("text_for_number", f"should be a {what}, without quotes")


def _list_kinds(annotation: Any) -> set[Any]:
    """The types that a field may have, without constraints on their values."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _list_kinds(arguments[0])
    if get_origin(annotation) in (Union, UnionType):
        return set[Any]().union(*map(_list_kinds, arguments))
    return {annotation}
