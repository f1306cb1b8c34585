"""`mdm init` and `mdm branch`: runs that begin, on shards or at a checkpoint of another run."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from cyclopts import Parameter
from rich.console import Console
from rich.prompt import FloatPrompt, Prompt
from rich.table import Table

from megatron_mdm.config import Config, ModelConfig, list_presets, parse_config
from megatron_mdm.config.loading import parse_section, parse_yaml
from megatron_mdm.core.command_line import format_command, format_next_steps
from megatron_mdm.core.errors import ConfigError, DataError
from megatron_mdm.core.files import write_text_whole
from megatron_mdm.core.options import Count
from megatron_mdm.core.quiet import quiet_engines
from megatron_mdm.data.manifest import Manifest, manifest_path
from megatron_mdm.data.store import open_tokens
from megatron_mdm.model.accounting import count_parameters, run_flops_per_token
from megatron_mdm.reporting.console import format_count, format_duration
from megatron_mdm.studies.sweeps.planned_run import find_corpus

# For a first look, below the published presets: layers, width, heads, width of the MLP.
_SMALL = {"tiny": (4, 192, 6, 768), "small": (8, 384, 6, 1536)}
_OFFERED = (*_SMALL, "smdm-19M", "smdm-85M", "smdm-170M", "dc-425M", "smdm-1028M")
# A first guess of the learning rate for models of up to so many parameters.
_RATES = ((3e7, 1e-3), (1.5e8, 6e-4), (math.inf, 2e-4))
_LEAST_WINDOWS, _WANTED_STEPS, _TIMES_JUDGED = 500, 2000, 20
_MOST_TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}
_LONGEST = {"cpu": 256, "cuda": 2048}


@dataclass(frozen=True)
class _Shards:
    """What a run reads."""

    train: Path
    valid: str | None
    manifest: Manifest
    num_tokens: int
    tokenizer: str | None


@dataclass(frozen=True)
class _Length:
    """How long a run is: a field of `schedule`."""

    field: Literal["epochs", "tokens"]
    value: float


def init(
    *,
    train: Path,
    valid: str | None = None,
    out: Path = Path("run.yaml"),
    size: str | None = None,
    epochs: float | None = None,
    hours: float | None = None,
    objective: Literal["mdm", "ar"] = "mdm",
    run_dir: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a configuration with comments, whose dry run passes, and says what it leads to.

    Args:
        train: Shards to train on, path without extension.
        valid: Held-out shards; by default those that lie beside them.
        out: The YAML file to write.
        size: tiny (2.4M parameters and embeddings), small (19M), or a preset such as smdm-170M. A
            terminal is asked where this is not given.
        epochs: Length of the run, in passes over the shards.
        hours: Or in hours on this machine, roughly.
        objective: Masked diffusion, or autoregressive.
        run_dir: Folder of the run; by default runs/ and the name of the YAML file.
        overwrite: Replace a file that is there.
    """
    if out.exists() and not overwrite:
        raise ConfigError(f"--out={out} exists: replace it with --overwrite or name another file.")
    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out={out} has to end in .yaml or .yml.")
    if epochs is not None and hours is not None:
        raise ConfigError("--epochs and --hours both say how long the run is: give one of them.")
    for option, value in (("--epochs", epochs), ("--hours", hours)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{option}={value:g} has to be above 0.")
    shards = _open(train, valid)
    if size is not None:
        _check_size(size)
    quiet_engines()
    # The engines take seconds to import, and warn until they are quiet.
    from megatron_mdm.training.summary import measure_useful_flops, summarize

    folder = run_dir or Path("runs") / out.stem
    flops = measure_useful_flops()
    size = size or _ask_size(shards, flops)
    rough = _parse(_write_recipe(shards, size, _Length("epochs", 1.0), objective, folder, out))
    length = _choose_length(rough, flops, epochs, hours)
    text = _write_recipe(shards, size, length, objective, folder, out)
    said = summarize(_parse(text))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text_whole(out, text)
    print(f"wrote {out}\n\n{said}\n")
    steps = [
        ("train", ("train", "--config", out)),
        ("look at it", ("report", "--run", folder)),
        ("export it", ("convert", "to-hf", "--run", folder, "--output", folder / "hf")),
    ]
    print("\n".join(format_next_steps(steps)))


def branch(
    *overrides: str,
    source: Annotated[Path, Parameter(name="--from")],
    step: Count | None = None,
    out: Path,
) -> None:
    """Writes the new run's folder and says how to start it.

    Args:
        overrides: What the new run does otherwise, as section.key=value.
        source: Folder of the run to branch from.
        step: Step of its checkpoint; without it, the latest.
        out: Folder of the new run.
    """
    quiet_engines()
    from megatron_mdm.cli.branching import BranchSettings, branch_run, describe_branch

    settings = BranchSettings(source=source, step=step, out=out)
    print(describe_branch(branch_run(settings, overrides)))


def _open(train: Path, valid: str | None) -> _Shards:
    corpus = find_corpus(str(train), valid)
    if corpus.num_tokens is None:
        raise DataError(
            f"--train={train} has no shards: make them with mdm prepare and give the path without "
            ".bin."
        )
    manifest = open_tokens(train).manifest
    if manifest is None:
        raise DataError(
            f"{manifest_path(train)} is missing, and it says vocabulary and tokenizer: write the "
            "configuration by hand (docs/configuration.md), with model.vocab_size."
        )
    return _Shards(train, corpus.valid_prefix, manifest, corpus.num_tokens, corpus.tokenizer)


def _check_size(size: str) -> None:
    if size not in _SMALL and size not in list_presets():
        raise ConfigError(
            f"--size={size} is not known: give {', '.join(_SMALL)} or a preset, smdm-6M to "
            "smdm-2121M or dc-7M to dc-16183M."
        )


def _ask_size(shards: _Shards, flops: float) -> str:
    if not sys.stdin.isatty():
        raise ConfigError(
            f"--size is missing, and there is no terminal to ask: give one of {', '.join(_OFFERED)}"
            " or another preset."
        )
    table = Table("size", "parameters", "an epoch here, about", box=None)
    for name in _OFFERED:
        config = _parse(
            _write_recipe(shards, name, _Length("epochs", 1.0), "mdm", Path("x"), Path("x"))
        )
        seconds = shards.num_tokens * run_flops_per_token(config, 0.5) / flops
        count = count_parameters(config.model).total
        table.add_row(name, format_count(count), format_duration(seconds))
    console = Console()
    console.print(table)
    return Prompt.ask("How large", choices=list(_OFFERED), default="tiny", console=console)


def _choose_length(
    config: Config, flops: float, epochs: float | None, hours: float | None
) -> _Length:
    if epochs is None and hours is None:
        if not sys.stdin.isatty():
            raise ConfigError(
                "How long the run is, is missing, and there is no terminal to ask: give --epochs "
                "or --hours."
            )
        hours = FloatPrompt.ask("How many hours, about", default=0.25)
        if not 0 < hours < math.inf:
            raise ConfigError(f"{hours:g} hours are no length: give a number above 0.")
    if epochs is not None:
        return _Length("epochs", epochs)
    tokens = (hours or 0) * 3600 * flops / run_flops_per_token(config, 0.5)
    least = config.batch.global_batch_size * config.data.seq_length
    return _Length("tokens", max(least, float(f"{tokens:.2g}")))


def _parse(text: str) -> Config:
    return parse_config(parse_yaml(text, "the new configuration"))


def _write_recipe(
    shards: _Shards, size: str, length: _Length, objective: str, folder: Path, out: Path
) -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    manifest, tokens = shards.manifest, shards.num_tokens
    window = _LONGEST[device]
    while window > 32 and tokens / window < _LEAST_WINDOWS:
        window //= 2
    total = tokens * length.value if length.field == "epochs" else length.value
    batch = 2 ** max(2, min(8, round(math.log2(max(1.0, total / window / _WANTED_STEPS)))))
    micro = min(batch, max(1, _MOST_TOKENS_AT_ONCE[device] // window))
    steps = max(1, round(total / (batch * window)))
    every = max(1, steps // _TIMES_JUDGED)
    model, parameters = _describe_model(size, manifest.vocab_size)
    rate = next(rate for most, rate in _RATES if parameters <= most)
    tokenizer = "" if shards.tokenizer is None else f"  tokenizer: {shards.tokenizer}\n"
    held_out = "[]" if shards.valid is None else f"[{{path: {shards.valid}}}]"
    amount = f"{length.value:g}" if length.field == "epochs" else f"{int(length.value)}"
    comment = {"epochs": "passes over the shards", "tokens": "in all"}[length.field]
    return f"""\
# {tokens:,} tokens of {shards.train}. Every field: docs/configuration.md
#   {format_command("train", "--config", out, "--dry-run")}
run:
  dir: {folder}   # all that the run writes
  seed: 0
model:   # {format_count(parameters)} parameters
{model}
  vocab_size: {manifest.vocab_size}   # as the shards' manifest says
objective:
  kind: {objective}   # mdm: masked diffusion; ar: autoregressive, on the same text
  process: {{masking: fixed_count}}
data:
  train: [{{path: {shards.train}}}]
  valid: {held_out}   # text that is never learned
{tokenizer}  seq_length: {window}   # tokens of a window
batch:
  micro_batch_size: {micro}   # windows at once; lower it where memory is short
  global_batch_size: {batch}   # windows of a step
optimizer:
  lr: {rate:.1e}   # a first guess: compare some with configs/sweeps/learning_rates.yaml
  min_lr: {rate / 10:.1e}
schedule:
  {length.field}: {amount}   # {comment}
  warmup_fraction: 0.02
validation:
  every_steps: {max(20, every)}
  num_samples: 128
checkpoint:
  every_steps: {max(50, every)}
  keep_last: 2
reporting:
  log_every_steps: {max(1, min(10, every))}
"""


def _describe_model(size: str, vocab_size: int) -> tuple[str, int]:
    if size in _SMALL:
        layers, width, heads, wide = _SMALL[size]
        text = (
            f"  num_layers: {layers}\n  hidden_size: {width}\n  num_attention_heads: {heads}\n"
            f"  ffn_hidden_size: {wide}\n  tie_embeddings: true"
        )
    else:
        text = f"  preset: {size}"
    fields = parse_yaml(text, size)
    model = parse_section(ModelConfig, {**fields, "vocab_size": vocab_size}, "model")
    return text, count_parameters(model).total
