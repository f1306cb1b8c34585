"""Command-line options of generation and scoring, made from `Decoding` and `ScoringSettings`.

An option that a command line leaves out is None, so that a model's own defaults or a recipe decide.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, make_dataclass
from typing import Annotated, Any, Literal, get_args, get_type_hints

import docstring_parser
import torch
from cyclopts import Parameter

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.options import FLATTENED
from megatron_mdm.diffusion.decoding import Decoding
from megatron_mdm.inference.requests import ScoringSettings

DtypeName = Literal["float32", "bfloat16", "exported"]
DTYPES: dict[str, torch.dtype | None] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "exported": None,
}
EndOfText = Literal["stop", "keep", "forbid"]

# Fields of the settings by what the command line calls them.
DECODING_OPTIONS = {
    "max_new_tokens": "length",
    "num_steps": "steps",
    "order": "order",
    "temperature": "temperature",
    "top_k": "top-k",
    "top_p": "top-p",
    "threshold": "threshold",
    "remasking": "remasking",
    "block_length": "block-length",
    "guidance_scale": "guidance-scale",
    "correction_steps": "correction-steps",
    "use_cache": "cache",
    "cache_refresh_steps": "cache-refresh-steps",
    "seed": "seed",
}
SCORING_OPTIONS = {
    "estimator": "estimator",
    "draws": "draws",
    "target_standard_error": "target-standard-error",
    "max_draws": "max-draws",
    "guidance_scale": "guidance-scale",
}


def make_optional_fields(settings: type, names: Mapping[str, str]) -> dict[str, Any]:
    """Makes optional options of some fields of settings, with their help.

    Args:
        settings: A dataclass that documents its attributes.
        names: What the command line calls each field.

    Returns:
        A type for each name of a field.
    """
    hints = get_type_hints(settings)
    documented = docstring_parser.parse(settings.__doc__ or "").params
    told = {one.arg_name: " ".join((one.description or "").split()) for one in documented}

    def describe_option(name: str) -> Parameter:
        is_flag = bool in (hints[name], *get_args(hints[name]))
        return Parameter(
            name=f"--{names[name]}",
            negative=f"--no-{names[name]}" if is_flag else (),
            # The first sentence.
            help=told[name].split(". ")[0].rstrip(".") + ".",
        )

    return {name: Annotated[hints[name] | None, describe_option(name)] for name in names}


def _make_options(settings: type, names: Mapping[str, str]) -> Any:
    types = make_optional_fields(settings, names)
    rows = [(name, kind, None) for name, kind in types.items()]
    return make_dataclass(f"Optional{settings.__name__}", rows, frozen=True, kw_only=True)


def list_given_options(options: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Lists the fields that were given, by name."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


_DecodingOptions: Any = _make_options(Decoding, DECODING_OPTIONS)
_ScoringOptions: Any = _make_options(ScoringSettings, SCORING_OPTIONS)


@FLATTENED
@dataclass(frozen=True, kw_only=True)
class GenerationOptions(_DecodingOptions):
    """What is generated, and how: options of `Decoding`, and what follows.

    Attributes:
        num_samples: Samples per prompt.
        batch_size: Most samples of a forward pass; results do not depend on it, to rounding.
        end_of_text: stop: nothing follows the token that ends a text; keep: it is a token like any
            other; forbid: it is never chosen. None: stop where there is no suffix, else keep.
        guidance_prompt: What guidance compares with, in the prompt's place; None: mask tokens.
    """

    num_samples: int = 1
    batch_size: int = 8
    end_of_text: EndOfText | None = None
    guidance_prompt: str | None = None

    def __post_init__(self) -> None:
        """Checks what `Decoding` does not check."""
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')}={getattr(self, name)} must be 1 or more."
                )

    def build_decoding(self, default: Decoding) -> Decoding:
        """Builds all options of generation.

        Args:
            default: Those of the model, where none is given.

        Returns:
            The options, checked against each other.

        Raises:
            ConfigError: One is out of its range, or has no effect.
        """
        try:
            decoding = default.override(list_given_options(self, DECODING_OPTIONS))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if self.guidance_prompt is not None and decoding.guidance_scale == 0.0:
            raise ConfigError("--guidance-prompt has no effect: set --guidance-scale as well.")
        return decoding

    def list_shown(self, decoding: Decoding) -> dict[str, Any]:
        """Lists the options that a reader of the results should know.

        Args:
            decoding: The options of a sample.

        Returns:
            Names and JSON values: length, order, temperature, seed and whatever is not a default.
        """
        told: dict[str, Any] = {"length": decoding.max_new_tokens}
        if decoding.order is not None:
            told["order"] = decoding.order
        told["temperature"] = decoding.temperature
        hidden = ("max_new_tokens", "stop_at_end", "seed")
        for option in fields(Decoding):
            value = getattr(decoding, option.name)
            if option.name not in hidden and value != option.default:
                told[option.name] = value
        for name in ("end_of_text", "guidance_prompt"):
            if getattr(self, name) is not None:
                told[name] = getattr(self, name)
        return told | {"seed": decoding.seed}


AS_THE_MODEL = GenerationOptions()


def make_generation_options(decoding: Mapping[str, Any], **others: Any) -> GenerationOptions:
    """Makes options from code.

    Args:
        decoding: Options of `Decoding` by name.
        **others: What `GenerationOptions` has beside them.

    Returns:
        The options.

    Raises:
        ConfigError: A name is unknown.
    """
    for name in decoding:
        if name not in DECODING_OPTIONS:
            near = difflib.get_close_matches(name, DECODING_OPTIONS, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"use {', '.join(DECODING_OPTIONS)}."
            raise ConfigError(f"decoding.{name} is no option of generation: {remedy}")
    return GenerationOptions(**decoding, **others)


@FLATTENED
@dataclass(frozen=True, kw_only=True)
class ScoringOptions(_ScoringOptions):
    """How masked diffusion is scored: options of `ScoringSettings`, and what follows.

    Attributes:
        seed: Of the masks.
        max_tokens: Most tokens of a forward pass; does not change results. None: by device.
        dtype: Of the weights; the softmax is always float32.
    """

    seed: int = 0
    max_tokens: int | None = None
    dtype: DtypeName = "float32"

    def build_settings(self, draws: int | None = None) -> ScoringSettings:
        """Builds the settings.

        Args:
            draws: Random masks of a request where none are given; None: those of `ScoringSettings`.

        Returns:
            The settings, with as many draws at most as there are in a round.

        Raises:
            ConfigError: One is out of its range.
        """
        given = list_given_options(self, SCORING_OPTIONS)
        if draws is not None:
            given.setdefault("draws", draws)
        if "draws" in given:
            given.setdefault("max_draws", max(ScoringSettings.max_draws, given["draws"]))
        return ScoringSettings(seed=self.seed, max_tokens=self.max_tokens, **given)


DEFAULT_SCORING = ScoringOptions()
