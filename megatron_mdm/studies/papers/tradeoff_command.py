"""The command line of mdm tradeoff."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.models import TextModel
from megatron_mdm.inference.options import DTYPES
from megatron_mdm.inference.perplexity import choose_requests, open_domain, parse_domain
from megatron_mdm.inference.requests import Request
from megatron_mdm.studies.papers.text_quality import Judge, describe_encoding
from megatron_mdm.studies.papers.tradeoff import (
    Measured,
    Quality,
    TradeoffOptions,
    measure_quality,
    time_ways,
    write_texts,
)
from megatron_mdm.studies.papers.tradeoff_findings import Findings, summarize_findings
from megatron_mdm.studies.papers.tradeoff_report import write_tradeoff

Dtype = Literal["exported", "float32", "bfloat16"]


def run_tradeoff(
    *,
    mdm: Path,
    ar: Path,
    judge: Path,
    data: str,
    out: Path,
    dtype: Dtype = "exported",
    options: TradeoffOptions | None = None,
) -> None:
    """Measures, writes the report, and says in short what came out.

    Args:
        mdm: Exported masked-diffusion model.
        ar: Exported autoregressive model with the same tokenizer.
        judge: Exported autoregressive model that scores the texts, in float32.
        data: Held-out shards that prompts come from.
        out: Folder of the report.
        dtype: Of the two models that write.
        options: What is tried.

    Raises:
        MdmError: Something does not fit, in one sentence.
    """
    options = options or TradeoffOptions()
    _check_folder(out)
    models: dict[str, TextModel] = {
        "mdm": _load_writer(mdm, "--mdm", False, options, DTYPES[dtype]),
        "ar": _load_writer(ar, "--ar", True, options, DTYPES[dtype]),
    }
    if describe_encoding(models["mdm"].tokenizer) != describe_encoding(models["ar"].tokenizer):
        raise ConfigError(
            f"--ar={ar} has another tokenizer than --mdm={mdm}, so tokens per second of the two do "
            "not compare: give models with the same one."
        )
    judging_model = _load(judge, "--judge")
    score = Judge(judging_model, models["mdm"].tokenizer, f"--judge={judge}")
    if not score.retokenizes:
        _check_length(judging_model, options)
    texts = _read_held_out(data, mdm, models["mdm"], options)
    # First what is cheap: a text that the judge cannot take shows before the long part.
    real = measure_quality(texts, score(texts))
    measured = _write_all(models, score, [text.context for text in texts], options)
    time_ways(models, measured, [text.context for text in texts], options)
    findings = Findings(
        options=options,
        real=real,
        measured=measured,
        folders={"mdm": str(mdm), "ar": str(ar), "judge": str(judge), "data": data},
        judge_retokenizes=score.retokenizes,
        dtype=dtype,
    )
    paths = write_tradeoff(out, findings)
    for line in (*summarize_findings(findings), f"wrote {', '.join(map(str, paths.values()))}"):
        sys.stdout.write(line + "\n")


def _write_all(
    models: dict[str, TextModel],
    judge: Judge,
    prompts: Sequence[tuple[int, ...]],
    options: TradeoffOptions,
) -> list[Measured]:
    measured = []
    for way in tqdm(options.ways, unit="way", desc="writing", leave=False, disable=None):
        model = models[way.objective]
        texts = write_texts(model, way, prompts, options)
        quality: Quality = measure_quality(texts, judge(texts))
        example = tuple(model.tokenizer.decode(list(part)) for part in texts[0])
        measured.append(Measured(way, quality, (example[0], example[1])))
    return measured


def _load(folder: Path, option: str, dtype: Any = None) -> ExportedModel:
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ConfigError(
                f"{option}={folder} has no {name}: give the folder of an exported model; "
                "mdm convert to-hf makes one."
            )
    return ExportedModel(folder, dtype)


def _load_writer(
    folder: Path, option: str, is_causal: bool, options: TradeoffOptions, dtype: Any
) -> ExportedModel:
    model = _load(folder, option, dtype)
    if model.facts.is_causal != is_causal:
        kinds = ("a masked-diffusion", "an autoregressive")
        raise ConfigError(
            f"{option}={folder} is {kinds[not is_causal]} model: give {kinds[is_causal]} one."
        )
    _check_length(model, options)
    return model


def _check_length(model: ExportedModel, options: TradeoffOptions) -> None:
    total = options.prompt_tokens + options.new_tokens
    if total > model.facts.max_length:
        raise ConfigError(
            f"--prompt-tokens={options.prompt_tokens} and --new-tokens={options.new_tokens} make "
            f"{total} tokens, and {model.facts.name} takes {model.facts.max_length}: lower them."
        )


def _read_held_out(
    data: str, folder: Path, model: TextModel, options: TradeoffOptions
) -> list[Request]:
    total, cut = options.prompt_tokens + options.new_tokens, options.prompt_tokens
    windows = open_domain(parse_domain(data), model.facts, total, folder)
    if windows.num_windows < options.num_prompts:
        raise ConfigError(
            f"--data={data} has {windows.num_windows} windows of {total} tokens, fewer "
            f"than --num-prompts={options.num_prompts}: ask for fewer."
        )
    chosen = choose_requests(windows, options.num_prompts, options.seed).requests
    windows_of_tokens = [(*window.context, *window.continuation) for window in chosen]
    return [Request(tokens[:cut], tokens[cut:]) for tokens in windows_of_tokens]


def _check_folder(folder: Path) -> None:
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(
            f"--out={folder} cannot be written, since {nearest} is no folder of yours: give "
            "another."
        )
