"""How an exported model generates unless told otherwise; a JSON file beside the model's weights.

The file travels with every export and imports nothing but its neighbours there.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from .decoding import Decoding

GENERATION_CONFIG_FILE = "mdm_generation_config.json"
"""Name in an export. transformers gives another meaning to generation_config.json."""


@dataclass(frozen=True)
class MdmGenerationConfig(Decoding):
    """Every option of `generate` and `infill`: those of `Decoding`, and what follows.

    Attributes:
        max_new_tokens: Tokens that `generate` adds, at least 1.
        seed: Sequence i draws from a stream of (seed, i), whatever the batch size.
        use_cache: Keep keys and values between the passes of a block, an approximation for masked
            diffusion (see `caching_mdm.MdmDenoiser`). A causal model always keeps them, exactly.
        cache_refresh_steps: With `use_cache`, compute all columns at every so many steps of a
            block, at least 1, which is exact; None: only at its first step.
        stop_at_end: Where `end_token_id` is None, let `generate` without a suffix take the model's
            `eos_token_id` for it. `infill`, and `generate` with a suffix, end early only if
            `end_token_id` is given.

    Raises:
        ValueError: An option has the wrong type, is out of its range or has no effect.
    """

    max_new_tokens: int = 64
    seed: int = 0
    use_cache: bool = False
    cache_refresh_steps: int | None = None
    stop_at_end: bool = True

    def __post_init__(self) -> None:
        """Checks every option."""
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, hint):
                wanted = str(getattr(hint, "__name__", hint)).replace("NoneType", "None")
                raise ValueError(f"{name}={value!r} has the wrong type: it must be {wanted}.")
        super().__post_init__()
        for name in ("max_new_tokens", "cache_refresh_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 or more.")
        if self.cache_refresh_steps is not None and not self.use_cache:
            raise ValueError(
                f"cache_refresh_steps={self.cache_refresh_steps} has no effect without a cache: "
                "set use_cache=True or leave it out."
            )
        if self.end_token_id is not None and not self.stop_at_end:
            raise ValueError(
                f"end_token_id={self.end_token_id} contradicts stop_at_end=False: keep one."
            )

    def updated(self, changes: Mapping[str, Any]) -> MdmGenerationConfig:
        """Replaces options.

        Args:
            changes: New values by name; a list stands for a tuple.

        Returns:
            A new, checked configuration.

        Raises:
            ValueError: A name is unknown or a value is wrong.
        """
        names = [field.name for field in fields(self)]
        for name in changes:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                remedy = f"did you mean {near[0]}?" if near else f"use one of {', '.join(names)}."
                raise ValueError(f"{name} is no option of generation: {remedy}")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in changes.items()
        }
        return replace(self, **values)

    def decoding(self) -> Decoding:
        """Returns the options that the samplers take."""
        return Decoding(**{field.name: getattr(self, field.name) for field in fields(Decoding)})

    def to_dict(self) -> dict[str, Any]:
        """Returns every option as JSON values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> MdmGenerationConfig:
        """Reads options by name; what is left out keeps its default. Raises as `updated` does."""
        return cls().updated(options)

    def save(self, folder: Path) -> None:
        """Writes `mdm_generation_config.json` into a folder."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (folder / GENERATION_CONFIG_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> MdmGenerationConfig:
        """Reads a file that `save` wrote or a person did.

        Args:
            path: The file.

        Returns:
            The options.

        Raises:
            ValueError: The file holds no JSON object of options.
        """
        try:
            options = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(options, dict):
                raise ValueError("it is no JSON object.")
            return cls.from_dict(options)
        except ValueError as error:
            raise ValueError(f"{path} holds no options of generation: {error}") from error


def _fits(value: object, hint: Any) -> bool:
    """Tells whether a value is of a type; an int passes for a float, a bool for no number."""
    if isinstance(hint, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)
