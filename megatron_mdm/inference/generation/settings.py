"""How to generate: the options of the command line, checked."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.diffusion.decoding import ORDERS, Decoding

EndOfText = Literal["stop", "keep", "forbid"]
_DECODING_OPTIONS = (
    "num_steps",
    "order",
    "temperature",
    "top_k",
    "top_p",
    "threshold",
    "remasking",
    "block_length",
    "guidance_scale",
)
END_OF_TEXT: tuple[EndOfText, ...] = ("stop", "keep", "forbid")


@dataclass(frozen=True)
class GenerationSettings:
    """How to generate.

    Attributes:
        decoding: Options of `Decoding` that were given, by name; the model's own decide the rest.
        length: New tokens of a request that does not say how many.
        num_samples: Samples a request.
        batch_size: Most samples in one forward pass. Results do not depend on it, to rounding.
        seed: With the numbers of request and sample it decides a sample's random numbers.
        end_of_text: stop: nothing follows the token that ends a text; keep: it is a token like any
            other; forbid: it is never chosen. None: stop where there is no suffix, else keep.
        guidance_prompt: What guidance compares with, in the prompt's place; None: mask tokens.
        cache: Reuse keys and values of tokens that did not change; None: as the model does.
        cache_refresh_steps: Compute them all again every so many steps; None: as the model does.
    """

    decoding: Mapping[str, Any] = field(default_factory=dict)
    length: int = 64
    num_samples: int = 1
    batch_size: int = 8
    seed: int = 0
    end_of_text: EndOfText | None = None
    guidance_prompt: str | None = None
    cache: bool | None = None
    cache_refresh_steps: int | None = None

    def __post_init__(self) -> None:
        """Checks what neither the sampler nor the model checks."""
        for name in ("length", "num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')}={getattr(self, name)} must be 1 or more."
                )

    def resolved(self, default: Decoding) -> Decoding:
        """The options of the sampler.

        Args:
            default: Those of the model, where none is given.

        Returns:
            All of them, checked against each other.

        Raises:
            ConfigError: One is out of its range, or has no effect.
        """
        try:
            decoding = replace(default, **self.decoding)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if self.guidance_prompt is not None and decoding.guidance_scale == 0.0:
            raise ConfigError("--guidance-prompt has no effect: set --guidance-scale as well.")
        return decoding

    def shown(self, decoding: Decoding, length: int) -> dict[str, Any]:
        """What a reader of the results should know of the settings.

        Args:
            decoding: The resolved options.
            length: New tokens.

        Returns:
            Names and JSON values: order, temperature, seed and whatever is not a default.
        """
        given = {
            option.name: getattr(decoding, option.name)
            for option in fields(Decoding)
            if option.name not in ("max_new_tokens", "seed", "stop_at_end", "use_cache")
            and getattr(decoding, option.name) != option.default
        }
        own = {
            name: getattr(self, name)
            for name in ("end_of_text", "guidance_prompt", "cache", "cache_refresh_steps")
            if getattr(self, name) is not None
        }
        always = {"order": decoding.order, "temperature": decoding.temperature}
        return {"length": length} | always | given | own | {"seed": self.seed}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `settings_from` reads.

    Args:
        parser: The parser of a command.
    """
    add = parser.add_argument_group("what is generated").add_argument
    add("--length", type=int, default=64, help="new tokens a sample (default %(default)s)")
    add("--num-samples", type=int, default=1, help="samples a prompt (default %(default)s)")
    add("--batch-size", type=int, default=8, help="samples a forward pass (default %(default)s)")
    add("--seed", type=int, default=0, help="decides random numbers (default %(default)s)")
    add(
        "--end-of-text",
        choices=END_OF_TEXT,
        help="stop: nothing follows it; keep: a token like others; forbid: never chosen (default: "
        "stop where there is no suffix, else keep)",
    )
    add = parser.add_argument_group("how it is decoded").add_argument
    add("--steps", type=int, dest="num_steps", metavar="N", help="most steps (default: one a mask)")
    add("--order", help=f"{', '.join(ORDERS)} (default: the model's, or confidence)")
    add("--temperature", type=float, help="0 takes the best token (default: the model's, or 0)")
    add("--top-k", type=int, metavar="K", help="sample from the K most probable tokens only")
    add("--top-p", type=float, metavar="P", help="... from the smallest set of probability P only")
    add("--threshold", type=float, metavar="P", help="reveal every token at least this sure")
    add(
        "--remasking",
        type=float,
        metavar="R",
        help="mask this share of the revealed tokens again before each further step",
    )
    add("--block-length", type=int, metavar="N", help="fill blocks of N masks from left to right")
    add("--guidance-scale", type=float, metavar="W", help="weight of guidance; 0 is none")
    add("--guidance-prompt", metavar="TEXT", help="compare with this prompt, not with a masked one")
    add(
        "--cache",
        action=argparse.BooleanOptionalAction,
        help="keep keys and values of tokens that did not change (default: as the model does)",
    )
    add("--cache-refresh-steps", type=int, metavar="N", help="compute them all every N steps")


def settings_from(arguments: argparse.Namespace) -> GenerationSettings:
    """Checks the options of `add_arguments`.

    Args:
        arguments: What the parser read.

    Returns:
        The settings.

    Raises:
        ConfigError: A value is out of its range, or has no effect.
    """
    given = {
        name: getattr(arguments, name)
        for name in _DECODING_OPTIONS
        if getattr(arguments, name) is not None
    }
    return GenerationSettings(
        decoding=given,
        length=arguments.length,
        num_samples=arguments.num_samples,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        end_of_text=arguments.end_of_text,
        guidance_prompt=arguments.guidance_prompt,
        cache=arguments.cache,
        cache_refresh_steps=arguments.cache_refresh_steps,
    )
