"""The command line of tools/perplexity.py."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.files import write_json_whole
from megatron_mdm.inference.evaluation.options import DTYPES, add_scoring_options, scoring_settings
from megatron_mdm.inference.evaluation.perplexity import (
    ChosenRequests,
    Domain,
    DomainLoss,
    choose_requests,
    domain_loss,
    open_domain,
    parse_domain,
)
from megatron_mdm.inference.evaluation.perplexity_tables import loss_table, shift_table
from megatron_mdm.inference.evaluation.rank_pool import RankPool, launched_ranks
from megatron_mdm.inference.evaluation.scoring import Scorer
from megatron_mdm.inference.evaluation.scoring_model import ExportedScoringModel
from megatron_mdm.inference.generation.output import check_writable


def add_command_line(parser: argparse.ArgumentParser) -> None:
    """Adds the options.

    Args:
        parser: An empty parser.
    """
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        action="append",
        required=True,
        metavar="DIR",
        help="exported model; repeatable: all are compared with the first",
    )
    add(
        "--data",
        type=parse_domain,
        action="append",
        required=True,
        metavar="[NAME=]PREFIX",
        help="shards to be judged on, a domain or a slice of time; repeatable",
    )
    add(
        "--shift-from",
        metavar="NAME",
        help="show also how losses change from these shards to the others, such as over time",
    )
    add("--seq-length", type=int, metavar="S", help="tokens a window (most that all models take)")
    add("--num-windows", type=int, default=256, help="windows a shard set (%(default)s)")
    add("--out", type=Path, metavar="FILE", help="write everything as JSON")
    add_scoring_options(parser, draws=8)


def run(arguments: argparse.Namespace) -> None:
    """Judges models, and prints a table.

    Args:
        arguments: Of `add_command_line`.

    Raises:
        MdmError: Something does not fit, in one sentence.
    """
    settings = scoring_settings(arguments)
    if arguments.out is not None:
        check_writable(arguments.out, "--out")
    names = [domain.name for domain in arguments.data]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ConfigError(
            f"--data names {min(repeated)} twice: give each a name of its own, as NAME=PREFIX."
        )
    if arguments.shift_from is not None and arguments.shift_from not in names:
        raise ConfigError(
            f"--shift-from={arguments.shift_from} is none of the shards of --data: use one of "
            f"{', '.join(names)}."
        )
    found: dict[str, list[DomainLoss]] = {}
    with launched_ranks():
        seq_length = arguments.seq_length or min(map(_most_tokens, arguments.model))
        for folder in arguments.model:
            model = ExportedScoringModel(folder, DTYPES[arguments.dtype])
            requests = _requests(arguments, folder, model, seq_length)
            pool = RankPool({"score": Scorer(model, settings).score})

            def work(
                folder: Path = folder,
                pool: RankPool = pool,
                requests: Sequence[tuple[str, ChosenRequests]] = requests,
            ) -> None:
                found[str(folder)] = [
                    domain_loss(name, chosen, lambda items: pool.map("score", items))
                    for name, chosen in requests
                ]

            pool.lead(work)
    if found:
        _deliver(found, arguments, asdict(settings) | {"seq_length": seq_length})


def _most_tokens(folder: Path) -> int:
    try:
        return int(json.loads((folder / "config.json").read_text())["max_position_embeddings"])
    except (OSError, ValueError, KeyError):
        raise ConfigError(
            f"--model={folder} has no config.json of an exported model: export a checkpoint with "
            "tools/convert_checkpoint.py."
        ) from None


def _requests(
    arguments: argparse.Namespace, folder: Path, model: ExportedScoringModel, seq_length: int
) -> list[tuple[str, ChosenRequests]]:
    domains: list[Domain] = arguments.data
    return [
        (
            domain.name,
            choose_requests(
                open_domain(domain, model.facts, seq_length, folder),
                arguments.num_windows,
                arguments.seed,
            ),
        )
        for domain in domains
    ]


def _deliver(
    found: dict[str, list[DomainLoss]], arguments: argparse.Namespace, settings: dict[str, Any]
) -> None:
    sys.stdout.write(loss_table(found))
    sys.stdout.write(
        "\nLoss in nats per token, with its standard error over windows and noise, and in brackets "
        "over documents, where\nthere are several; perplexity with its 95% interval, of masked "
        "diffusion an upper bound; differences window by window.\n"
    )
    if arguments.shift_from is not None:
        sys.stdout.write(f"\nSince {arguments.shift_from}:\n\n")
        sys.stdout.write(shift_table(found, arguments.shift_from))
        sys.stdout.write(
            "\nNats per token more than there; windows of two slices are independent.\n"
        )
    if arguments.out is not None:
        models = list(found)
        tree = {"settings": settings, "models": {name: _tree(found[name]) for name in models}}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_json_whole(arguments.out, tree)


def _tree(losses: Sequence[DomainLoss]) -> dict[str, Any]:
    return {
        loss.domain: {
            "nats_per_token": loss.estimate.mean,
            "standard_error": loss.estimate.standard_error,
            "clustered_error": loss.estimate.clustered_error,
            "perplexity": loss.perplexity,
            "perplexity_interval": loss.perplexity_interval,
            "num_tokens": loss.num_tokens,
            "nats_per_token_of_windows": loss.losses_N.tolist(),
            "documents_of_windows": loss.document_N.tolist(),
        }
        for loss in losses
    }
