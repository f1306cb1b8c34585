"""Sections that stand beside the code of what they configure, chosen by their field `kind`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, SerializerFunctionWrapHandler, model_serializer
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from megatron_mdm.config.section import Section
from megatron_mdm.core.registry import Registry


class Component(Section):
    """A section whose class is the one that its kind names."""

    kind: str

    @model_serializer(mode="wrap")
    def _say_kind(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Also where defaults are left out: without it the section would be one of another class.
        return {"kind": self.kind, **handler(self)}


@dataclass(frozen=True)
class ChosenFrom:
    """Says of a field, in `Annotated`, that its class is chosen from a registry by `kind`.

    Attributes:
        registry: Of classes that derive from `Component`.
        field: Dotted name of the field.
        default: The kind where none is given.
    """

    registry: Registry[Any]
    field: str
    default: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """The section is read by the class that its kind names."""
        del source, handler
        return core_schema.no_info_plain_validator_function(self.read)

    def read(self, value: Any) -> Component:
        """Reads the fields of a component.

        Args:
            value: Fields by name, or a section that was read already.

        Returns:
            A section of the class that its kind names.

        Raises:
            ConfigError: There is no such kind.
        """
        if isinstance(value, Component):
            return value
        if not isinstance(value, Mapping):
            raise PydanticCustomError("model_type", "should be a section")
        kind = value.get("kind", self.default)
        section: type[Component] = self.registry.find(kind, f"{self.field}.kind")
        return section.model_validate({**value, "kind": kind})

    def default_section(self) -> Component:
        """The section where the file has none."""
        return self.read({})
