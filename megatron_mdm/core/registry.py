"""Components by name, as the configuration picks them.

A component of the package has a short name in the table of its kind. One that lives elsewhere is
named `package.module:Class`, and needs no edit inside the package.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from megatron_mdm.core.errors import ConfigError

_Base = TypeVar("_Base")
_PLACE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class Registry(Generic[_Base]):
    """The classes of one kind of component, loaded when they are asked for.

    Args:
        what: The kind in words, with its article, as in "an objective".
        base: What every class derives from.
        places: `module:Class` by short name.

    Attributes:
        base: What every class derives from.
    """

    def __init__(self, what: str, base: type[_Base], places: Mapping[str, str]) -> None:
        self._what = what
        self.base = base
        self._places = dict(places)

    @property
    def names(self) -> list[str]:
        """Short names, in the order of the table."""
        return list(self._places)

    def find(self, name: Any, field: str) -> type[_Base]:
        """Loads a component's class.

        Args:
            name: A short name, or `package.module:Class`.
            field: Dotted field of the configuration that names it, for errors.

        Returns:
            The class.

        Raises:
            ConfigError: There is no such name, its module cannot be imported, or it is something
                else.
        """
        if not isinstance(name, str) or not (name in self._places or _PLACE.fullmatch(name)):
            raise ConfigError(self._explain_unknown(name, field))
        place = self._places.get(name, name)
        module_name, _, class_name = place.partition(":")
        try:
            found = getattr(importlib.import_module(module_name), class_name, None)
        # Whatever a module of the user's raises while it is imported.
        except Exception as error:
            raise ConfigError(
                f"{field}={name} cannot be imported ({type(error).__name__}: {error}): check the "
                "name, and that PYTHONPATH leads to the module."
            ) from error
        if not (isinstance(found, type) and issubclass(found, self.base)):
            raise ConfigError(
                f"{field}={name} is not {self._what}: name a class of {module_name} that derives "
                f"from {self.base.__module__}.{self.base.__qualname__}."
            )
        return found

    def _explain_unknown(self, name: Any, field: str) -> str:
        if not self._places:
            return f"{field}={name} is not {self._what}: name one as package.module:Class."
        near = difflib.get_close_matches(str(name), self._places, n=1, cutoff=0.4)
        guess = f"did you mean {near[0]}? There are" if near else "there are"
        return (
            f"{field}={name} is not a known name: {guess} {', '.join(self._places)}, and any "
            "package.module:Class."
        )
