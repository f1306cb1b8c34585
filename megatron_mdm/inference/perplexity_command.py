"""What mdm perplexity does: models are judged on shards, and compared."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from megatron_mdm.config.objective import RunWay
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.files import write_json_whole
from megatron_mdm.core.options import REPEATED
from megatron_mdm.inference.ensemble import Ensemble
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.models import ScoringModel
from megatron_mdm.inference.options import DEFAULT_SCORING, DTYPES, ScoringOptions
from megatron_mdm.inference.output import check_writable
from megatron_mdm.inference.perplexity import (
    DomainLoss,
    choose_requests,
    judge_domain,
    open_domain,
    parse_domain,
)
from megatron_mdm.inference.perplexity_tables import format_loss_table, format_shift_table
from megatron_mdm.inference.rank_pool import RankPool, join_launched_ranks
from megatron_mdm.inference.scoring import Scorer

_DRAWS = 8


def run(
    *,
    model: Annotated[list[Path], REPEATED],
    data: Annotated[list[str], REPEATED],
    run_as: Annotated[list[RunWay] | None, REPEATED] = None,
    ensemble: bool = False,
    shift_from: str | None = None,
    seq_length: int | None = None,
    given_tokens: int = 1,
    num_windows: int = 256,
    out: Path | None = None,
    scoring: ScoringOptions = DEFAULT_SCORING,
) -> None:
    """Judges models, and prints a table.

    Args:
        model: Folder of an exported model; repeatable: all are compared with the first.
        data: [NAME=]PREFIX of shards to be judged on, a domain or a slice of time; repeatable.
        run_as: Of a mixture of objectives, the loss as ar, mdm or prefix; repeatable: one for all
            models, or one for each in their order.
        ensemble: Judge also the mean of all models' probabilities, and compare the models with it;
            they are all loaded at once.
        shift_from: Name of shards; show also how losses change from these to the others, such as
            over time.
        seq_length: Tokens of a window; default: the most that all models take.
        given_tokens: Tokens at the start of each window that are given and not scored; as prefix
            they see each other.
        num_windows: Windows of each shard set, at most.
        out: Write everything as JSON.
        scoring: How masked diffusion is scored, with 8 draws unless --draws is given.

    Raises:
        MdmError: Something does not fit, in one sentence.
    """
    settings, ways = scoring.build_settings(_DRAWS), _choose_ways(run_as, len(model))
    if out is not None:
        check_writable(out, "--out")
    domains = [parse_domain(text) for text in data]
    names = [domain.name for domain in domains]
    _check_names(names, shift_from)
    found: dict[str, list[DomainLoss]] = {}
    with join_launched_ranks():
        length = seq_length or min(map(_read_max_tokens, model))
        _check_given(given_tokens, length)

        def load(folder: Path, way: RunWay | None) -> ExportedModel:
            return ExportedModel(folder, DTYPES[scoring.dtype], way)

        def judge(name: str, judged: ScoringModel, folder: Path) -> None:
            chosen = [
                choose_requests(
                    open_domain(domain, judged.facts, length, folder),
                    num_windows,
                    scoring.seed,
                    given_tokens,
                )
                for domain in domains
            ]
            pool = RankPool({"score": Scorer(judged, settings).score})

            def work() -> None:
                found[name] = [
                    judge_domain(one, requests, lambda items: pool.map("score", items))
                    for one, requests in zip(names, chosen, strict=True)
                ]

            pool.run_on_driver(work)

        members: list[ExportedModel] = []
        if ensemble:
            mean = Ensemble(map(load, model, ways))
            members = mean.members
            judge(mean.facts.name, mean, model[0])
        for place, (folder, way) in enumerate(zip(model, ways, strict=True)):
            name = str(folder) if way is None else f"{folder} as {way}"
            judge(name, members[place] if members else load(folder, way), folder)
    if not found:
        # Another rank leads.
        return
    _print(found, shift_from)
    if out is not None:
        told = asdict(settings) | {"seq_length": length, "given_tokens": given_tokens}
        if ensemble:
            told["ensemble"] = [str(folder) for folder in model]
        write_json_whole(out, {"settings": told, "models": {m: _to_tree(found[m]) for m in found}})


def _check_names(names: Sequence[str], shift_from: str | None) -> None:
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ConfigError(
            f"--data names {min(repeated)} twice: give each a name of its own, as NAME=PREFIX."
        )
    if shift_from is not None and shift_from not in names:
        raise ConfigError(
            f"--shift-from={shift_from} is none of the shards of --data: use one of "
            f"{', '.join(names)}."
        )


def _check_given(given_tokens: int, length: int) -> None:
    if not 1 <= given_tokens < max(length, 2):
        raise ConfigError(
            f"--given-tokens={given_tokens} leaves nothing to score of windows of {length} tokens, "
            f"or nothing to start from: give 1 to {length - 1}."
        )


def _choose_ways(given: Sequence[RunWay] | None, num_models: int) -> Sequence[RunWay | None]:
    ways: Sequence[RunWay | None] = given or [None]
    if len(ways) == 1:
        return [*ways] * num_models
    if len(ways) != num_models:
        raise ConfigError(
            f"--run-as is given {len(ways)} times for {num_models} --model: give it once, or once "
            "for each of them."
        )
    return ways


def _read_max_tokens(folder: Path) -> int:
    try:
        return int(json.loads((folder / "config.json").read_text())["max_position_embeddings"])
    except (OSError, ValueError, KeyError):
        raise ConfigError(
            f"--model={folder} has no config.json of an exported model: export a checkpoint with "
            "mdm convert."
        ) from None


def _print(found: dict[str, list[DomainLoss]], shift_from: str | None) -> None:
    sys.stdout.write(format_loss_table(found))
    sys.stdout.write(
        "\nLoss in nats per token, with its standard error over windows and noise, and in brackets "
        "over documents, where\nthere are several; perplexity with its 95% interval, of masked "
        "diffusion an upper bound; differences window by window.\n"
    )
    if shift_from is not None:
        sys.stdout.write(f"\nSince {shift_from}:\n\n{format_shift_table(found, shift_from)}")
        sys.stdout.write(
            "\nNats per token more than there; windows of two slices are independent.\n"
        )


def _to_tree(losses: Sequence[DomainLoss]) -> dict[str, Any]:
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
