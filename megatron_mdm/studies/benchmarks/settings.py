"""What can be measured, and with which sizes: the options of `mdm benchmark`.

Apart from what measures, so that the command line is read before anything large is imported.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

from megatron_mdm.core.options import NO_OPTION, check_at_least

# Of the model of configs/demo_corpus.yaml.
DEMO_SIZES = {
    "num_layers": 4,
    "hidden_size": 192,
    "num_attention_heads": 6,
    "ffn_hidden_size": 768,
    "vocab_size": 4096,
    "tie_embeddings": True,
}
Device = Literal["auto", "cpu", "cuda"]
DataPart = Literal["preprocess", "growth", "tokens", "loader", "feed", "order"]
TrainingCase = Literal[
    "ours", "model_alone", "plain", "transformers", "plain_compiled", "transformers_compiled"
]
AttentionCase = Literal["full", "full_explicit", "causal", "documents", "documents_dense"]
Task = Literal[
    "arc_easy", "openbookqa", "social_iqa", "piqa", "hellaswag", "boolq", "lambada_openai"
]


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """What all benchmarks share: which function measures, and what their numbers have to be.

    Attributes:
        measure: `module:function` of this package.
        uses_folder: Is the function given an empty folder before the settings?
        least: The least value of a field, where it is not the 1 of whole numbers.

    Raises:
        ConfigError: A number is less.
    """

    measure: ClassVar[str]
    uses_folder: ClassVar[bool] = False
    least: ClassVar[Mapping[str, float]] = {}

    def __post_init__(self) -> None:
        check_at_least(self, **self.least)


@dataclass(frozen=True, kw_only=True)
class DataSettings(BenchmarkSettings):
    """Preprocessing and the loader: rates, and how they grow.

    Attributes:
        part: What to measure.
        workers: Processes that encode.
        megabytes: Millions of bytes of text, or of tokens.
        repeats: Runs of each case, in turn.
        root: Python sources to make documents of.
        device: Which the batches of `feed` are for.
    """

    measure = "data_loading:measure_data"
    uses_folder = True
    least: ClassVar = {"megabytes": 0.1}

    part: DataPart | Literal["all"] = "all"
    workers: int = 2
    megabytes: float = 30
    repeats: int = 3
    root: Path = Path(sysconfig.get_paths()["stdlib"])
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings(BenchmarkSettings):
    """Saving, checking and loading: how long training stands still, and rates.

    Attributes:
        preset: Sizes of the one model to save, from a single process; without it three small ones.
        device: Where the model is. On a CPU two processes save as well as one.
        repeats: Runs of each case.
    """

    measure = "checkpoints:measure_checkpoints"
    uses_folder = True

    preset: str | None = None
    device: Device = "cpu"
    repeats: int = 3


@dataclass(frozen=True, kw_only=True)
class ConversionSettings(BenchmarkSettings):
    """Import and export of a model: memory and rates.

    Attributes:
        preset: Sizes of the model, of the family smdm.
        repeats: Runs of each case, in turn.
    """

    measure = "conversion:measure_conversion"
    uses_folder = True

    preset: str = "smdm-170M"
    repeats: int = 1


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(BenchmarkSettings):
    """Generation, beside a sampler as the papers' code has it: tokens per second.

    Attributes:
        model: Exported masked-diffusion model; without one, random weights.
        preset: Sizes of a model with random weights, or `demo`.
        num_tokens: New tokens of each sequence.
        num_steps: Steps of each sequence.
        block_length: New tokens of a block, where there are blocks.
        batch_size: Sequences at once.
        temperature: 0 takes the best token.
        repeats: Runs of each case, in turn.
        device: Where to generate.
    """

    measure = "sampling:measure_sampling"

    model: Path | None = None
    preset: str = "demo"
    num_tokens: int = 256
    num_steps: int = 128
    block_length: int = 32
    batch_size: int = 4
    temperature: float = 0.0
    repeats: int = 3
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(BenchmarkSettings):
    """Likelihoods, beside one request at a time as in the papers' code: requests per second.

    Attributes:
        model: Exported model; without one, random weights for both objectives.
        preset: Sizes of models with random weights, or `demo`.
        num_questions: Questions of each task.
        draws: Random masks per request.
        guidance_scale: Of the cases with guidance.
        repeats: Runs of each case, in turn.
        tasks: Shapes of requests.
        device: Where to score.
        num_processes: As torchrun started them; no option.
    """

    measure = "scoring:measure_scoring"
    least: ClassVar = {"draws": 2}

    model: Path | None = None
    preset: str = "demo"
    num_questions: int = 4
    draws: int = 128
    guidance_scale: float = 0.6
    repeats: int = 3
    tasks: tuple[Task, ...] = get_args(Task)
    device: Device = "auto"
    num_processes: Annotated[int, NO_OPTION] = field(
        default_factory=lambda: int(os.environ.get("WORLD_SIZE", "1"))
    )


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(BenchmarkSettings):
    """Training, beside a plain model and transformers' Llama: tokens per second.

    Attributes:
        preset: Sizes of the model, or `demo`.
        seq_length: Tokens of a window, S.
        vocab_size: Real tokens, V.
        micro_batch_size: Sequences of a micro batch, which is all of a step.
        steps: Steps of one measurement.
        repeats: Measurements of each case.
        device: Where to train.
        overrides: `section.key=value`, as for a run, over what the benchmark trains. Where they
            change what is learned, with our cases alone.
        cases: What to measure; the others are compared with the first. Those that torch.compile
            compiles as a whole need a C++ compiler on a CPU.
    """

    measure = "training:measure_training"

    preset: str = "smdm-19M"
    seq_length: int = 512
    vocab_size: int = 32000
    micro_batch_size: int = 4
    steps: int = 3
    repeats: int = 5
    device: Device = "auto"
    overrides: tuple[str, ...] = ()
    cases: tuple[TrainingCase, ...] = ("ours", "model_alone", "plain", "transformers")


@dataclass(frozen=True, kw_only=True)
class HeadSettings(BenchmarkSettings):
    """Output layer and loss, beside one that holds all logits: time, peak memory.

    Attributes:
        hidden_size: Width of the hidden states, H.
        vocab_size: Real tokens, V.
        num_tokens: Positions of a micro batch; every other one is masked.
        repeats: Runs of each case, in turn.
        device: Where to compute.
    """

    measure = "head:measure_head"
    least: ClassVar = {"vocab_size": 2, "num_tokens": 2}

    hidden_size: int = 384
    vocab_size: int = 50257
    num_tokens: int = 4096
    repeats: int = 3
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class AttentionSettings(BenchmarkSettings):
    """Attention of one layer, beside all scores and a dense mask: time, peak memory.

    Attributes:
        seq_length: Tokens of a window, S.
        micro_batch_size: Windows at once, B.
        num_heads: Heads of queries, N.
        query_groups: Heads of keys and values, G; as many as of queries where not given.
        head_width: Width of a head, D.
        document_length: Mean tokens of a document, whose end is drawn token by token.
        repeats: Runs of each case, in turn.
        device: Where to compute.
        cases: What to measure.
    """

    measure = "attention:measure_attention"

    seq_length: int = 2048
    micro_batch_size: int = 1
    num_heads: int = 6
    query_groups: int | None = None
    head_width: int = 64
    document_length: int = 256
    repeats: int = 3
    device: Device = "auto"
    cases: tuple[AttentionCase, ...] = get_args(AttentionCase)


@dataclass(frozen=True, kw_only=True)
class EnvironmentSettings(BenchmarkSettings):
    """This machine: its GPU, what is installed for it, and its ceilings.

    Attributes:
        device: What to describe.
    """

    measure = "environment:measure_environment"
    uses_folder = True

    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class ParitySettings(BenchmarkSettings):
    """Losses of short runs on a device, beside those of a CPU that were written down before.

    Attributes:
        pack: Folder that `tools/gpu_proof.py pack` made.
        device: What is tested.
        tiny: A few cases of each kind alone.
        groups: Objectives, engine or resume alone; all where not given.
    """

    measure = "parity:measure_parity"
    uses_folder = True

    pack: Path
    device: Literal["cpu", "cuda"] = "cuda"
    tiny: bool = False
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ProfileSettings(TrainingSettings):
    """Where the time of our training steps goes: kernels, operators, gaps.

    Attributes:
        warm_up_steps: Steps before those that are profiled, which pay for memory and compilation.
    """

    measure = "profiling:profile_training"

    steps: int = 3
    warm_up_steps: int = 5
    cases: Annotated[tuple[TrainingCase, ...], NO_OPTION] = ("ours",)


BENCHMARKS: dict[str, type[BenchmarkSettings]] = {
    "environment": EnvironmentSettings,
    "parity": ParitySettings,
    "profile": ProfileSettings,
    "data": DataSettings,
    "checkpoint": CheckpointSettings,
    "convert": ConversionSettings,
    "sample": SamplingSettings,
    "score": ScoreSettings,
    "train": TrainingSettings,
    "head": HeadSettings,
    "attention": AttentionSettings,
}
