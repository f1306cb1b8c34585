"""From a YAML file and dotted overrides to a checked `Config`, and back to YAML."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_mdm.config.model import ModelConfig
from megatron_mdm.config.presets import expand_preset, list_presets
from megatron_mdm.config.schema import Config
from megatron_mdm.config.section import Section
from megatron_mdm.core.errors import ConfigError, join_problems

_Section = TypeVar("_Section", bound=Section)


class _Loader(yaml.SafeLoader):
    """Safe loading, with 1e19 read as a number and a repeated key refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # Before merge keys (<<) are spread out: to override a merged key is no repetition.
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        repeated = next((key for key in keys if keys.count(key) > 1), None)
        if repeated is not None:
            raise yaml.MarkedYAMLError(
                problem=f"the key {repeated!r} stands twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Safe dumping, with quotes around text that `_Loader` would read as a number."""


_MAX_CHARACTERS = 1 << 24
# Fields of `schedule` that say the same thing.
_RIVALS = ({"steps", "tokens", "epochs", "flops"}, {"warmup_steps", "warmup_fraction"})
_FLOAT = r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789")
    )


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
    tree = read_tree(path)
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree)


def read_tree(path: Path) -> dict[str, Any]:
    """Reads the sections of a YAML file without checking them.

    Args:
        path: The file.

    Returns:
        Sections by name.

    Raises:
        ConfigError: The file cannot be read, or holds no sections.
    """
    try:
        # A pipe may stand for a file; a device has no end.
        with path.open(encoding="utf-8") as stream:
            text = stream.read(_MAX_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): give --config a YAML file.") from None
    if len(text) > _MAX_CHARACTERS:
        raise ConfigError(
            f"{path} has more than {_MAX_CHARACTERS} characters, which no configuration needs: "
            "give --config a YAML file."
        )
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no sections: it needs at least run, model and data.")
    return tree


def parse_config(tree: dict[str, Any]) -> Config:
    """Checks a tree of sections and fields.

    Args:
        tree: Sections, each a mapping of fields to values.

    Returns:
        The configuration.

    Raises:
        ConfigError: A key is unknown, or a value is missing or not valid.
    """
    return parse_section(Config, tree)


def parse_section(base: type[_Section], fields: dict[str, Any], *place: str) -> _Section:
    """Checks one section alone.

    Args:
        base: Its class.
        fields: Fields by name.
        *place: Its name, for errors.

    Returns:
        The section.

    Raises:
        ConfigError: A key is unknown, or a value is missing or not valid.
    """
    try:
        return base.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(explain_problems(error, place)) from None


def dump_config(config: Config) -> str:
    """Writes a configuration as YAML that `load_config` reads back to an equal one.

    Args:
        config: Any configuration.

    Returns:
        YAML text with every field, defaults included.
    """
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def dump_recipe(config: Config) -> str:
    """Writes what a configuration says beyond defaults and its preset, as a person would.

    Args:
        config: Any configuration.

    Returns:
        YAML text that `load_config` reads back to an equal one.
    """
    tree = config.model_dump(mode="json", exclude_defaults=True)
    preset = tree["model"].get("preset")
    if preset is not None:
        given = expand_preset(preset)
        fields = config.model_dump(mode="json")["model"]
        # A field that departs from the preset has to be said even where it is the default.
        tree["model"] = {"preset": preset} | {
            name: value
            for name, value in fields.items()
            if value != given.get(name, ModelConfig.model_fields[name].default) and name != "preset"
        }
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def parse_yaml(text: str, origin: str) -> Any:
    """Reads YAML that can hold data alone.

    Args:
        text: The YAML.
        origin: What it is called in an error.

    Returns:
        Its content.

    Raises:
        ConfigError: It is not valid.
    """
    try:
        # SafeLoader underneath: no YAML tag can run code.
        return yaml.load(text, Loader=_Loader)
    # PyYAML lets a date such as 2024-13-45 and deep nesting through as errors of Python's own.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        sentence = f"{origin} is not valid YAML ({_describe_problem(error)}): correct it."
        raise ConfigError(" ".join(sentence.split())) from None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one field.

    Args:
        tree: Sections by name, which are changed.
        override: `section.key=value`, the value as YAML.

    Raises:
        ConfigError: It leads to no field, or its value is no YAML.
    """
    key, equals, text = override.partition("=")
    parts = key.split(".")
    is_list = len(parts) == 1 and text.lstrip().startswith("[")
    if not equals or not all(parts) or (len(parts) < 2 and not is_list):
        raise ConfigError(
            f"The argument {override!r} is not an override: write section.key=value, "
            "for example optimizer.lr=1e-4."
        )
    value = parse_yaml(text, f"{key}={text}")
    node: Any = tree
    for part, below in pairwise(parts):
        if isinstance(node, list) and part.isdigit() and int(part) <= len(node):
            if int(part) == len(node):
                node.append({})
            node = node[int(part)]
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = [] if below == "0" else {}
            node = node[part]
        else:
            raise ConfigError(f"{key} does not lead to a field: there is nothing below {part}.")
    if isinstance(node, list) and parts[-1].isdigit() and int(parts[-1]) < len(node):
        node[int(parts[-1])] = value
    elif isinstance(node, dict):
        node[parts[-1]] = value
        _drop_rivals(tree, parts, value)
    else:
        raise ConfigError(f"{key} does not lead to a field: check its spelling.")


def _drop_rivals(tree: dict[str, Any], parts: list[str], value: Any) -> None:
    # On the command line a length replaces the file's: schedule.steps=10 shortens any recipe. So
    # does a warm-up.
    section, *field = parts
    for rivals in _RIVALS:
        if section == "schedule" and len(field) == 1 and field[0] in rivals and value is not None:
            for other in rivals - set(field):
                tree["schedule"].pop(other, None)


def explain_problems(
    error: ValidationError, place: tuple[str, ...] = (), *, is_run: bool = True
) -> str:
    """Says all that is wrong with a tree of YAML, misspelt keys before all else.

    Args:
        error: What a section says of it.
        place: The section's own name; none for a whole tree.
        is_run: Is it the configuration of a run, with sections and overrides?

    Returns:
        A sentence a line: field, value, rule and remedy.
    """
    problems = error.errors(include_url=False)
    problems.sort(key=lambda problem: problem["type"] != "unknown_key")
    told = [_explain_problem(problem, place, is_run) for problem in problems]
    lines = [line for text in told for line in text.splitlines()]
    return join_problems([" ".join(line.split()) for line in lines])


def _explain_problem(first: ErrorDetails, place: tuple[str, ...], is_run: bool) -> str:
    parts = (*place, *first["loc"])
    location = ".".join(map(str, parts))
    kind, value = first["type"], _format_value(first["input"])
    if kind == "unknown_key":
        return f"{location}.{first['msg']}".removeprefix(".")
    if kind == "missing" and not is_run:
        return f"{location} is missing: add it to the YAML file."
    if kind == "missing" and len(first["loc"]) == 1:
        return f"The section {location} is missing: add it to the YAML file."
    if kind == "missing":
        return f"{location} is missing: set it in the YAML file or as {location}=VALUE."
    if kind == "value_error":
        return _complete_sentence(str(first["msg"]).removeprefix("Value error, "))
    if kind == "model_type":
        return f"{location}={value} is not a section: write fields below it, each as key: value."
    rule = _RULES.get(kind) or re.sub(r"^Input ", "", str(first["msg"]))
    return f"{location}={value} is not valid: it {rule}."


# Rules in the words of a YAML file, where pydantic speaks of Python's types.
_RULES = {
    **dict.fromkeys(
        ("int_type", "int_parsing", "int_from_float", "int_parsing_size"),
        "should be a whole number",
    ),
    **dict.fromkeys(("float_type", "float_parsing"), "should be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "should be true or false"),
    "string_type": "should be text, in quotes if it looks like a number",
    "list_type": "should be a list",
    "too_short": "should have at least one entry",
    "string_too_short": "should not be empty",
}


def _complete_sentence(message: str) -> str:
    if message.startswith("preset:"):
        name = message.removeprefix("preset:")
        near = ", ".join(_find_near_presets(name))
        return f"model.preset={name} does not exist: the nearest are {near}."
    return message


def _find_near_presets(name: str) -> list[str]:
    # By size, since smdm-717M is close to smdm-171M in letters only.
    family = [preset for preset in list_presets() if name.startswith(preset.partition("-")[0])]
    size = re.search(r"(\d+\.?\d*)([MB]?)", name)
    if size is None:
        return difflib.get_close_matches(name, list_presets(), n=3, cutoff=0.0)
    millions = float(size[1]) * (1000 if size[2] == "B" else 1)
    return sorted(
        family or list_presets(),
        key=lambda preset: abs(int(preset.partition("-")[2].removesuffix("M")) - millions),
    )[:3]


def _format_value(value: Any) -> str:
    text = (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    )
    return text if len(text) <= 60 else text[:57] + "..."


def _describe_problem(error: Exception) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(error)
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{where}{error.problem or error.context}"
