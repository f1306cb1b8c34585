"""Options of the command line that say how to score, shared by all tools that do."""

from __future__ import annotations

import argparse

import torch

from megatron_mdm.evaluation.requests import ScoringSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "exported": None}


def add_scoring_options(parser: argparse.ArgumentParser, draws: int = 128) -> None:
    """Adds the options that `scoring_settings` and `DTYPES` read.

    Args:
        parser: Of a tool.
        draws: Default number of random masks.
    """
    group = parser.add_argument_group("how masked diffusion is scored")
    add = group.add_argument
    add(
        "--estimator",
        choices=("fixed_count", "monte_carlo", "chain_rule"),
        default="fixed_count",
        help="random masks of exactly l tokens, or of each with probability p; or left to right",
    )
    add("--draws", type=int, default=draws, help="random masks a request (%(default)s)")
    add(
        "--target-standard-error",
        type=float,
        metavar="NATS",
        help="draw again, as many each time, until the error of every request is no more",
    )
    add("--max-draws", type=int, default=4096, help="most random masks of one (%(default)s)")
    add(
        "--guidance-scale",
        type=float,
        default=0.0,
        metavar="W",
        help="classifier-free guidance against the masked context (%(default)s: none)",
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
    return ScoringSettings(
        estimator=arguments.estimator,
        draws=arguments.draws,
        target_standard_error=arguments.target_standard_error,
        max_draws=max(arguments.max_draws, arguments.draws),
        guidance_scale=arguments.guidance_scale,
        seed=arguments.seed,
        max_tokens=arguments.max_tokens,
    )
