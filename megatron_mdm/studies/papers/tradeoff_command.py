"""The command line of tools/tradeoff.py."""

from __future__ import annotations

import json
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
from megatron_mdm.inference.requests import Request, ScoringSettings
from megatron_mdm.inference.scoring import Scorer
from megatron_mdm.inference.text_quality import (
    TextLosses,
    check_judge,
    judge_texts,
    retokenize,
)
from megatron_mdm.studies.papers.tradeoff import (
    Measured,
    Quality,
    TradeoffOptions,
    describe,
    time_ways,
    write_texts,
)
from megatron_mdm.studies.papers.tradeoff_findings import Findings, summary
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
        "mdm": _load(mdm, "--mdm", False, options, DTYPES[dtype]),
        "ar": _load(ar, "--ar", True, options, DTYPES[dtype]),
    }
    if _spelling(models["mdm"]) != _spelling(models["ar"]):
        raise ConfigError(
            f"--ar={ar} has another tokenizer than --mdm={mdm}, so tokens per second of the two do "
            "not compare: give models with the same one."
        )
    score = Judge(judge, models["mdm"], options)
    texts = _read_held_out(data, mdm, models["mdm"], options)
    # First what is cheap: a text that the judge cannot take shows before the long part.
    real = describe(texts, score(texts))
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
    for line in (*summary(findings), f"wrote {', '.join(map(str, paths.values()))}"):
        sys.stdout.write(line + "\n")


class Judge:
    """Says how likely texts are.

    Args:
        folder: Of an autoregressive export.
        writer: One of the models whose texts come.
        options: Tokens of a text.

    Raises:
        ConfigError: The folder holds no such model.
    """

    def __init__(self, folder: Path, writer: TextModel, options: TradeoffOptions) -> None:
        _check_export(folder, "--judge")
        self._model = ExportedModel(folder)
        check_judge(self._model.facts, f"--judge={folder}")
        self.retokenizes = _spelling(self._model) != _spelling(writer)
        if not self.retokenizes:
            _check_length(self._model, options)
        self._score = Scorer(self._model, ScoringSettings()).score
        self._writer = writer

    def __call__(self, texts: Sequence[Request]) -> TextLosses:
        """Judges texts in the writers' tokens."""
        if self.retokenizes:
            model = self._model
            texts = retokenize(model.tokenizer, model.facts, texts, self._writer.tokenizer)
        return judge_texts(texts, self._score)


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
        quality: Quality = describe(texts, judge(texts))
        example = tuple(model.tokenizer.decode(list(part)) for part in texts[0])
        measured.append(Measured(way, quality, (example[0], example[1])))
    return measured


def _load(
    folder: Path, option: str, is_causal: bool, options: TradeoffOptions, dtype: Any
) -> ExportedModel:
    _check_export(folder, option)
    model = ExportedModel(folder, dtype)
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


def _check_export(folder: Path, option: str) -> None:
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ConfigError(
                f"{option}={folder} has no {name}: give the folder of an exported model; "
                "tools/convert_checkpoint.py to-hf makes one."
            )


def _spelling(model: TextModel) -> dict[str, Any]:
    """All that decides how a tokenizer encodes."""
    told: dict[str, Any] = json.loads(model.tokenizer.backend_tokenizer.to_str())
    return {name: part for name, part in told.items() if name not in ("padding", "truncation")}


def _check_folder(folder: Path) -> None:
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(
            f"--out={folder} cannot be written, since {nearest} is no folder of yours: give "
            "another."
        )
