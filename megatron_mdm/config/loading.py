"""From a YAML file and dotted overrides to a checked `Config`, and back to YAML."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megatron_mdm.config.presets import preset_names
from megatron_mdm.config.schema import Config
from megatron_mdm.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Safe loading, with 1e19 read as a number and a repeated key refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) != len(node.value):
            keys = [self.construct_object(key) for key, _ in node.value]
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise yaml.YAMLError(f"the key {repeated!r} stands twice: remove one")
        return mapping


_FLOAT = r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789"))


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies dotted overrides and checks everything.

    Args:
        path: YAML file with the sections of `Config`.
        overrides: `section.key=value` strings; values are read as YAML.

    Returns:
        The checked, frozen configuration.

    Raises:
        ConfigError: The file cannot be read, or a key or value is not valid.
    """
    try:
        tree = _parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): give --config a YAML file.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML ({_one_line(error)}): correct it.") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no sections: it needs at least run, model and data.")
    for override in overrides:
        _apply_override(tree, override)
    return config_from_dict(tree)


def config_from_dict(tree: dict[str, Any]) -> Config:
    """Checks a tree of sections and fields.

    Args:
        tree: Sections, each a mapping of fields to values.

    Returns:
        The configuration.

    Raises:
        ConfigError: A key is unknown, or a value is missing or not valid.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def dump_config(config: Config) -> str:
    """Writes a configuration as YAML that `load_config` reads back to an equal one.

    Args:
        config: Any configuration.

    Returns:
        YAML text with every field, defaults included.
    """
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _parse_yaml(text: str) -> Any:
    # SafeLoader underneath: no YAML tag can run code.
    return yaml.load(text, Loader=_Loader)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts) or len(parts) < 2:
        raise ConfigError(
            f"The argument {override!r} is not an override: write section.key=value, "
            "for example optimizer.lr=1e-4."
        )
    try:
        value = _parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}={text} is not valid YAML ({_one_line(error)}).") from None
    node: Any = tree
    for part in parts[:-1]:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            raise ConfigError(f"{key} does not lead to a field: there is nothing below {part}.")
    if isinstance(node, list) and parts[-1].isdigit() and int(parts[-1]) < len(node):
        node[int(parts[-1])] = value
    elif isinstance(node, dict):
        node[parts[-1]] = value
        _drop_other_lengths(tree, parts, value)
    else:
        raise ConfigError(f"{key} does not lead to a field: check its spelling.")


def _drop_other_lengths(tree: dict[str, Any], parts: list[str], value: Any) -> None:
    # On the command line a length replaces the file's: schedule.steps=10 shortens any recipe.
    lengths = ("steps", "tokens", "epochs", "flops")
    if parts[0] == "schedule" and parts[1] in lengths and value is not None:
        for other in set(lengths) - {parts[1]}:
            tree["schedule"].pop(other, None)


def _explain(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    location = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return _unknown_key(first["loc"])
    if first["type"] == "missing":
        return f"{location} is missing: set it in the YAML file or as {location}=VALUE."
    if first["type"] == "value_error":
        return _own_sentence(str(first["msg"]).removeprefix("Value error, "))
    message = re.sub(r"^(Input|List|Value) ", "", str(first["msg"]))
    return f"{location}={_shown(first['input'])} is not valid: it {message}."


def _own_sentence(message: str) -> str:
    if message.startswith("preset:"):
        name = message.removeprefix("preset:")
        near = difflib.get_close_matches(name, preset_names(), n=3, cutoff=0.0)
        return f"model.preset={name} does not exist: the nearest are {', '.join(near)}."
    return message


def _unknown_key(location: tuple[int | str, ...]) -> str:
    section: Any = Config
    for part in location[:-1]:
        section = _section_below(section, part)
    valid = list(section.model_fields)
    prefix = ".".join(str(part) for part in location)
    near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]}?" if near else f"valid keys are {', '.join(valid)}."
    return f"{prefix} is not a known key: {remedy}"


def _section_below(section: Any, part: int | str) -> Any:
    annotation = section.model_fields[part].annotation if isinstance(part, str) else section
    for candidate in _flatten(annotation):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return section


def _flatten(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin in (list, typing.Union, types.UnionType, typing.Annotated):
        return [leaf for part in typing.get_args(annotation) for leaf in _flatten(part)]
    return [annotation]


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
