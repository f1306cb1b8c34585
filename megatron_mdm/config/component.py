"""Sections that stand beside the code of what they configure, chosen by their field `kind`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import GetCoreSchemaHandler, SerializerFunctionWrapHandler, model_serializer
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from megatron_mdm.config.section import Section
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.registry import Registry


class Component(Section):
    """A section whose class is the one that its kind names.

    Attributes:
        ignored: Fields of other kinds that it accepts and ignores.
    """

    kind: str

    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _say_kind(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Also where defaults are left out: the kind says which class reads the section back.
        return {"kind": self.kind, **handler(self)}


_Base = TypeVar("_Base", bound=Component)


_Built = TypeVar("_Built")


def build_component(section: Any, field: str, base: type[_Built], *arguments: Any) -> _Built:
    """Has a section build its component, and checks that it is one.

    Args:
        section: With a method `build`.
        field: Its dotted name, for errors.
        base: What components of this sort derive from.
        *arguments: Of `build`.

    Returns:
        The component.

    Raises:
        ConfigError: `build` takes other arguments, or returns something else.
    """
    name, place = f"{field}.kind={section.kind}", f"{base.__module__}.{base.__qualname__}"
    try:
        inspect.signature(section.build).bind(*arguments)
    except TypeError as error:
        raise ConfigError(
            f"{name} cannot be built ({error}): let its build take what the other sections of "
            f"{field} take."
        ) from None
    built = section.build(*arguments)
    if not isinstance(built, base):
        raise ConfigError(
            f"{name} builds a {type(built).__name__}: let its build return what derives from "
            f"{place}."
        )
    return built


@dataclass(frozen=True)
class ChosenFrom(Generic[_Base]):
    """Says of a field, in `Annotated`, that its class is chosen from a registry by `kind`.

    Attributes:
        registry: Of classes that derive from `Component`.
        field: Dotted name of the field.
        default: The kind where none is given; None: one has to be.
    """

    registry: Registry[_Base]
    field: str
    default: str | None = None

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """The section is read by the class that its kind names."""
        del source, handler
        return core_schema.no_info_plain_validator_function(self._read_field)

    def _read_field(self, value: Any) -> _Base:
        try:
            return self.read(value)
        except ConfigError as error:
            # Among what else is wrong.
            raise ValueError(str(error)) from None

    def read(self, value: Any) -> _Base:
        """Reads the fields of a component.

        Args:
            value: Fields by name, or a section that was read already.

        Returns:
            A section of the class that its kind names.

        Raises:
            ConfigError: There is no such kind.
        """
        if isinstance(value, self.registry.base):
            return value
        if not isinstance(value, Mapping):
            raise PydanticCustomError("model_type", "should be a section")
        kind = value.get("kind", self.default)
        section = self.registry.find(kind, f"{self.field}.kind")
        fields = {name: one for name, one in value.items() if name not in section.ignored}
        self._refuse_fields_of_others(kind, section, fields)
        return section.model_validate({**fields, "kind": kind})

    def _refuse_fields_of_others(
        self, kind: str, section: type[Component], fields: Mapping[str, Any]
    ) -> None:
        for name in fields:
            if name in section.model_fields:
                continue
            for other in self.registry.names:
                place = f"{self.field}.kind"
                if name in self.registry.find(other, place).model_fields:
                    raise ConfigError(
                        f"{self.field}.{name} belongs to {place}={other}, and "
                        f"{place} is {kind}: leave it out, or set {place}={other}."
                    )

    def read_default(self) -> _Base:
        """The section where the file has none."""
        return self.read({})
