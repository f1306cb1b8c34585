"""The command line of tools/tradeoff.py."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.diffusion.decoding import ORDERS
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.models import TextModel
from megatron_mdm.inference.options import DTYPES
from megatron_mdm.inference.perplexity import choose_requests, open_domain, parse_domain
from megatron_mdm.inference.requests import Request, ScoringSettings
from megatron_mdm.inference.scoring import Scorer
from megatron_mdm.inference.text_quality import (
    TextLosses,
    check_judge,
    in_tokens_of,
    judge_texts,
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

_LISTS = {
    "steps": (int, "of masked diffusion"),
    "guidance": (float, "scales w of unsupervised guidance, 0 for none"),
    "temperature": (float, "of masked diffusion, above 0"),
    "ar_temperature": (float, "of the autoregressive model, above 0"),
    "top_p": (float, "of the autoregressive model; 1: all tokens"),
    "batch_sizes": (int, "texts at once where speed is measured"),
}
_NUMBERS = {
    "num_prompts": "texts of each way",
    "prompt_tokens": "tokens that are given",
    "new_tokens": "tokens that are written",
    "repeats": "rounds of timings",
    "seed": "of prompts and samples",
}
_FIELDS = {
    "guidance": "guidance_scales",
    "temperature": "temperatures",
    "ar_temperature": "ar_temperatures",
    "order": "orders",
}


def add_command_line(parser: argparse.ArgumentParser) -> None:
    """Adds the options.

    Args:
        parser: An empty parser.
    """
    defaults = TradeoffOptions()
    add = parser.add_argument
    for name, told in (
        ("mdm", "exported masked-diffusion model"),
        ("ar", "exported autoregressive model with the same tokenizer"),
        ("judge", "exported autoregressive model that scores the texts, in float32"),
    ):
        add(f"--{name}", type=Path, required=True, metavar="DIR", help=told)
    add("--data", required=True, metavar="PREFIX", help="held-out shards that prompts come from")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the report")
    for name, (kind, told) in _LISTS.items():
        default = getattr(defaults, _FIELDS.get(name, name))
        shown = " ".join(f"{value:g}" for value in default)
        _add(add, name, type=kind, nargs="+", default=default, help=f"{told} ({shown})")
    _add(
        add,
        "order",
        nargs="+",
        choices=ORDERS,
        default=defaults.orders,
        metavar="ORDER",
        help=f"in which masks are revealed: {', '.join(ORDERS)} ({' '.join(defaults.orders)})",
    )
    for name, told in _NUMBERS.items():
        _add(add, name, type=int, default=getattr(defaults, name), help=f"{told} (%(default)s)")
    add("--block-length", type=int, metavar="N", help="masked diffusion fills blocks of N tokens")
    add("--cache", action="store_true", help="masked diffusion keeps keys and values in a block")
    add(
        "--dtype",
        choices=tuple(DTYPES),
        default="exported",
        help="of the two models that write (%(default)s)",
    )


def _add(add: Any, name: str, **options: Any) -> None:
    add("--" + name.replace("_", "-"), **options)


def options_from(arguments: argparse.Namespace) -> TradeoffOptions:
    """The options that a command line asks for.

    Args:
        arguments: Of `add_command_line`.

    Returns:
        The options.

    Raises:
        ConfigError: One is out of its range.
    """
    given = {_FIELDS.get(name, name): value for name, value in vars(arguments).items()}
    chosen: dict[str, Any] = {
        option.name: tuple(given[option.name])
        if isinstance(given[option.name], list)
        else given[option.name]
        for option in fields(TradeoffOptions)
    }
    return TradeoffOptions(**chosen)


def run(arguments: argparse.Namespace) -> None:
    """Measures, writes the report, and says in short what came out.

    Args:
        arguments: Of `add_command_line`.

    Raises:
        MdmError: Something does not fit, in one sentence.
    """
    options = options_from(arguments)
    _check_folder(arguments.out)
    dtype = DTYPES[arguments.dtype]
    models: dict[str, TextModel] = {
        "mdm": _load(arguments.mdm, "--mdm", False, options, dtype),
        "ar": _load(arguments.ar, "--ar", True, options, dtype),
    }
    if _spelling(models["mdm"]) != _spelling(models["ar"]):
        raise ConfigError(
            f"--ar={arguments.ar} has another tokenizer than --mdm={arguments.mdm}, so tokens a "
            "second of the two do not compare: give models with the same one."
        )
    judge = Judge(arguments.judge, models["mdm"], options)
    texts = _held_out(arguments, models["mdm"], options)
    # First what is cheap: a text that the judge cannot take shows before the long part.
    real = describe(texts, judge(texts))
    measured = _write_all(models, judge, [text.context for text in texts], options)
    time_ways(models, measured, [text.context for text in texts], options)
    findings = Findings(
        options=options,
        real=real,
        measured=measured,
        folders={name: str(getattr(arguments, name)) for name in ("mdm", "ar", "judge", "data")},
        judge_retokenizes=judge.retokenizes,
        dtype=arguments.dtype,
    )
    paths = write_tradeoff(arguments.out, findings)
    for line in summary(findings):
        sys.stdout.write(line + "\n")
    sys.stdout.write(f"wrote {', '.join(map(str, paths))}\n")


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
            texts = in_tokens_of(model.tokenizer, model.facts, texts, self._writer.tokenizer)
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


def _held_out(
    arguments: argparse.Namespace, model: TextModel, options: TradeoffOptions
) -> list[Request]:
    total, cut = options.prompt_tokens + options.new_tokens, options.prompt_tokens
    windows = open_domain(parse_domain(arguments.data), model.facts, total, arguments.mdm)
    if windows.num_windows < options.num_prompts:
        raise ConfigError(
            f"--data={arguments.data} has {windows.num_windows} windows of {total} tokens, fewer "
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
