"""Options of the command line that say how to score, shared by all tools that do."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from megatron_mdm.inference.evaluation.requests import ScoringSettings

_DEFAULTS = ScoringSettings()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "exported": None}


def add_scoring_options(parser: argparse.ArgumentParser, draws: int = 128) -> None:
    """Adds the options that `scoring_settings` and `DTYPES` read.

    Args:
        parser: Of a tool.
        draws: Default number of random masks.
    """
    # What is not given stays None, so that a recipe can tell it from what is.
    parser.set_defaults(default_draws=draws)
    group = parser.add_argument_group("how masked diffusion is scored")
    add = group.add_argument
    add(
        "--estimator",
        choices=("fixed_count", "monte_carlo", "chain_rule"),
        help="random masks of exactly l tokens, or of each with probability p; or left to right "
        f"({_DEFAULTS.estimator})",
    )
    add("--draws", type=int, help=f"random masks a request ({draws})")
    add(
        "--target-standard-error",
        type=float,
        metavar="NATS",
        help="draw again, as many each time, until the error of every request is no more",
    )
    add("--max-draws", type=int, help=f"most random masks of one ({_DEFAULTS.max_draws})")
    add(
        "--guidance-scale",
        type=float,
        metavar="W",
        help="classifier-free guidance against the masked context "
        f"({_DEFAULTS.guidance_scale}: none)",
    )
    add("--seed", type=int, default=0, help="of the masks (%(default)s)")
    add(
        "--max-tokens",
        type=int,
        help="most tokens of a forward pass; does not change results (default: by device)",
    )
    add(
        "--dtype",
        choices=tuple(DTYPES),
        default="float32",
        help="of the weights; the softmax is always float32 (%(default)s)",
    )


def scoring_settings(arguments: argparse.Namespace) -> ScoringSettings:
    """The settings that a command line asks for.

    Args:
        arguments: Of a parser with `add_scoring_options`.

    Returns:
        The settings.

    Raises:
        ConfigError: One is out of its range.
    """
    given = {"draws": arguments.default_draws, **given_scoring(arguments)}
    given.setdefault("max_draws", max(_DEFAULTS.max_draws, given["draws"]))
    return ScoringSettings(seed=arguments.seed, max_tokens=arguments.max_tokens, **given)


def given_scoring(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that a recipe states too and that the command line gives.

    Args:
        arguments: Of a parser with `add_scoring_options`.

    Returns:
        Values by the names of `ScoringSettings`.
    """
    names = ("estimator", "draws", "target_standard_error", "max_draws", "guidance_scale")
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}
