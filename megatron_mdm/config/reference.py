"""The configuration reference as Markdown, generated from the schema and the presets."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import annotated_types
from pydantic.fields import FieldInfo

from megatron_mdm.config.component import ChosenFrom, Component
from megatron_mdm.config.model import ModelConfig
from megatron_mdm.config.presets import expand_preset, list_presets
from megatron_mdm.config.schema import Config
from megatron_mdm.config.section import Section

_INTRODUCTION = """\
# Configuration

`tools/document_config.py` writes this page from the schema in `megatron_mdm/config/schema.py`.

A run is one YAML file with the sections below. On the command line `section.key=value` overrides
a field, for example `optimizer.lr=1e-4` or `data.train.0.path=data/c4`. An unknown key, a value of
the wrong type and sizes that do not divide are refused before anything starts. `--dry-run` prints
the resolved configuration with every default. Of `run`, `model`, `data`, `batch` and `schedule` the
file must give the fields that are marked as required; the other sections may be left out.
"""
_PRESETS_INTRODUCTION = """\
## Presets

`model.preset` fills the fields of `model` that are not given. With L layers, width d, attention
width a = heads x head width, inner width f of SwiGLU and vocabulary V, N without embeddings is
L (4 d a + 3 d f + 2 d) + d, the count of `smdm-*` (arXiv 2410.18514); N with embeddings is
L (4 d a + 3 d f + 6 d) + V d, 2 V d if untied, the count of `dc-*` (arXiv 2507.15857).
`schedule.flops` of a preset counts as its family does.
"""
_PRESET_COLUMNS = (
    "Preset",
    "Layers",
    "Heads",
    "Head width",
    "Hidden",
    "FFN",
    "Vocabulary",
    "Tied",
    "Dropout",
    "N with embeddings",
    "N without",
)
_TYPE_NAMES = {int: "whole number", float: "number", bool: "`true` or `false`", str: "text"}


def format_reference() -> str:
    """Describes every section, field and preset.

    Returns:
        Markdown, the content of `docs/configuration.md`.
    """
    parts = [_INTRODUCTION]
    for names, section in list_sections():
        rows = [_format_field(section, key) for key in section.model_fields]
        table = _format_table(("Field", "Type", "Default", "Meaning"), rows)
        parts.append(f"{format_heading(names, section)}\n\n{_summarize(section)}\n\n{table}")
    parts.append(f"{_PRESETS_INTRODUCTION}\n{_format_table(_PRESET_COLUMNS, _list_preset_rows())}")
    return "\n".join(parts)


def format_heading(names: list[str], section: type[Section]) -> str:
    """The heading of a section's table.

    Args:
        names: Dotted names under which it stands.
        section: Its class.

    Returns:
        A line of Markdown, which for a component says the kind.
    """
    level = "###" if "." in names[0] else "##"
    title = f"{level} {', '.join(f'`{name}`' for name in names)}"
    if issubclass(section, Component) and not section.model_fields["kind"].is_required():
        title += f" of kind `{section.model_fields['kind'].default}`"
    return title


def list_sections() -> Iterator[tuple[list[str], type[Section]]]:
    """Lists the sections in the order of the schema.

    Yields:
        The dotted names under which a section stands, and its class: of a component, one class of
        each kind. The entries of a list follow the section that holds them, as `data.train.0`, and
        so do components.
    """
    for name, field in Config.model_fields.items():
        yield from _walk_sections(name, field, set())


def _walk_sections(
    name: str, field: FieldInfo, seen: set[type[Section]]
) -> Iterator[tuple[list[str], type[Section]]]:
    for section in _list_classes(name, field):
        if section in seen:
            continue
        seen.add(section)
        yield [name], section
        entries: dict[type[Section], list[str]] = {}
        for key, inner in section.model_fields.items():
            for entry in typing.get_args(inner.annotation):
                if _is_section(entry):
                    entries.setdefault(entry, []).append(f"{name}.{key}.0")
        for entry, names in entries.items():
            yield names, entry
        for key, inner in section.model_fields.items():
            if _is_section(inner.annotation):
                yield from _walk_sections(f"{name}.{key}", inner, seen)


def _list_classes(name: str, field: FieldInfo) -> list[type[Section]]:
    metadata = field.metadata
    if typing.get_origin(field.annotation) is list:
        (entry,) = typing.get_args(field.annotation)
        metadata = list(typing.get_args(entry)[1:])
    chosen = next((one for one in metadata if isinstance(one, ChosenFrom)), None)
    if chosen is not None and not chosen.registry.names:
        return [chosen.registry.base]
    if chosen is None:
        return [typing.cast(type[Section], field.annotation)]
    return [chosen.registry.find(kind, f"{name}.kind") for kind in chosen.registry.names]


def _summarize(section: type[Section]) -> str:
    return " ".join((section.__doc__ or "").split())


def _format_field(section: type[Section], key: str) -> tuple[str, ...]:
    field = section.model_fields[key]
    shape = _describe_type(field.annotation, field.metadata)
    return f"`{key}`", shape, _describe_default(section, key), field.description or ""


def _describe_default(section: type[Section], key: str) -> str:
    field = section.model_fields[key]
    from_preset = section is ModelConfig and key in expand_preset(list_presets()[0])
    if field.is_required():
        return "required without a preset" if from_preset else "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Component):
        return f"of kind `{value.kind}`"
    text = "null" if value is None else str(value)
    return f"`{text.lower() if isinstance(value, bool) else text}`"


def _describe_type(annotation: Any, constraints: Iterable[Any]) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        inner = [*constraints, *_flatten(arguments[1:])]
        return _describe_type(arguments[0], inner)
    if origin in (typing.Union, types.UnionType):
        kinds = [kind for kind in arguments if kind is not type(None)]
        texts = [_describe_type(kind, constraints) for kind in kinds]
        return " or ".join([*texts, "`null`"] if type(None) in arguments else texts)
    if origin is Literal:
        words = {False: "false", True: "true"}
        return ", ".join(
            f"`{words.get(one, one) if isinstance(one, bool) else one}`" for one in arguments
        )
    if origin is list:
        least = max((c.min_length for c in constraints if _has(c, "min_length")), default=0)
        return f"list of {'sections' if _is_section(arguments[0]) else 'values'}" + (
            f", at least {least}" if least else ""
        )
    if _is_section(annotation):
        return "section"
    return (_TYPE_NAMES[annotation] + " " + _describe_range(list(constraints))).strip()


def _describe_range(constraints: list[Any]) -> str:
    bounds = {
        name: getattr(constraint, name)
        for constraint in constraints
        for name in ("gt", "ge", "lt", "le")
        if _has(constraint, name)
    }
    low = next((bounds[name] for name in ("gt", "ge") if name in bounds), None)
    high = next((bounds[name] for name in ("lt", "le") if name in bounds), None)
    if low is None or high is None:
        signs = {"gt": "above", "ge": "from", "lt": "below", "le": "up to"}
        return " ".join(f"{signs[name]} {bound}" for name, bound in bounds.items())
    return f"in {'(' if 'gt' in bounds else '['}{low}, {high}{')' if 'lt' in bounds else ']'}"


def _flatten(metadata: Iterable[Any]) -> Iterator[Any]:
    for entry in metadata:
        yield from entry.metadata if isinstance(entry, FieldInfo) else (entry,)


def _has(constraint: Any, name: str) -> bool:
    known = isinstance(constraint, annotated_types.BaseMetadata)
    return known and getattr(constraint, name, None) is not None


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _list_preset_rows() -> Iterator[tuple[str, ...]]:
    for name in list_presets():
        model = ModelConfig.model_validate({"preset": name})
        width = model.num_attention_heads * model.head_width
        matrices = 4 * model.hidden_size * width + 3 * model.hidden_size * model.ffn_hidden_size
        d, head_matrices = model.hidden_size, 1 if model.tie_embeddings else 2
        without = model.num_layers * (matrices + 2 * d) + d
        counted = model.num_layers * (matrices + 6 * d) + head_matrices * model.vocab_size * d
        yield (
            f"`{name}`",
            str(model.num_layers),
            str(model.num_attention_heads),
            str(model.head_width),
            str(model.hidden_size),
            str(model.ffn_hidden_size),
            str(model.vocab_size),
            "yes" if model.tie_embeddings else "no",
            str(model.hidden_dropout),
            f"{counted:,}",
            f"{without:,}",
        )


def _format_table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
