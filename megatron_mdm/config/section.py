"""The base of all sections of the configuration, and the kinds of numbers in them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

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

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, fields: Any) -> Any:
        valid = list(cls.model_fields)
        unknown = [key for key in fields if key not in valid] if isinstance(fields, Mapping) else []
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), valid, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else f"valid keys are {', '.join(valid)}."
            found = {"key": str(unknown[0]), "remedy": remedy}
            raise PydanticCustomError("unknown_key", "{key} is not a known key: {remedy}", found)
        return fields

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool:
            # YAML means the same by on and true, and a choice may have the word.
            if (word := "on" if value else "off") in get_args(annotation):
                return word
            # Python counts true as 1, so `seed: yes` would silently become a seed.
            raise PydanticCustomError("not_bool", "should not be true or false")
        if isinstance(value, str):
            _refuse_text(value, annotation)
        return value


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
