"""The run that a plan leads to: its corpus, its configuration, and its cost on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from megatron_mdm.config import Config, expand_preset, parse_config
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.data.manifest import manifest_path
from megatron_mdm.data.shards import shard_paths
from megatron_mdm.data.store import open_tokens
from megatron_mdm.model.accounting import count_steps
from megatron_mdm.studies.costs.clusters import Cluster
from megatron_mdm.studies.costs.layouts import best_layouts
from megatron_mdm.studies.sweeps.plan_options import Budget, Option

# The published recipes (arXiv 2507.15857): batches of 256 windows of 2,048 tokens, AdamW with a
# cosine from 2e-4 to 2e-5 after 1% of warm-up.
_SEQ_LENGTH = 2048
_BATCH = 256
# Fewer steps than this are no training run with such batches.
_FEWEST_STEPS = 1000
_VALIDATIONS = 20
_TRAIN, _VALID = "data/train", "data/valid"


class Corpus(NamedTuple):
    """Shards to train on, as far as they are there.

    Attributes:
        train_prefix: Where they are, or will be.
        valid_prefix: Held-out shards; None: there are none.
        vocab_size: V by their manifest; None where it is not known.
        num_tokens: How many tokens they hold; None where they are not there.
        warnings: What is missing.
    """

    train_prefix: str
    valid_prefix: str | None
    vocab_size: int | None
    num_tokens: int | None
    warnings: tuple[str, ...]


def find_corpus(train: str | None, valid: str | None) -> Corpus:
    """Looks at the shards that a plan is made for.

    Args:
        train: Prefix of the shards to train on; None: `data/train`.
        valid: Prefix of the held-out shards; None: `TRAIN-valid`, or `valid` beside `train`.

    Returns:
        The corpus. Shards may still be made, so those that are absent are a warning.

    Raises:
        DataError: Shards are there and damaged.
    """
    prefix = train or _TRAIN
    if not _exists(prefix):
        told = (f"There are no shards at {prefix} yet: the vocabulary is that of the preset.",)
        return Corpus(prefix, valid or _VALID, None, None, told if train is not None else ())
    shards = open_tokens(prefix)
    warnings = []
    if shards.manifest is None:
        warnings.append(
            f"{prefix} has no manifest that says its vocabulary: that of the preset is taken, and "
            "model.vocab_size has to be set if it is another."
        )
    held_out = valid or _beside(prefix)
    if held_out is None:
        warnings.append(
            f"No held-out shards lie beside {prefix}, so overfitting will not be seen: hold some "
            "out with mdm prepare --valid-fraction, or name them with --valid."
        )
    vocab_size = shards.manifest.vocab_size if shards.manifest is not None else None
    return Corpus(prefix, held_out, vocab_size, shards.num_tokens, tuple(warnings))


def _beside(prefix: str) -> str | None:
    """The names that this project's own tools give to what they hold out."""
    candidates = [f"{prefix}-valid"]
    if Path(prefix).name == "train":
        candidates.append(str(Path(prefix).with_name("valid")))
    return next((candidate for candidate in candidates if _exists(candidate)), None)


def _exists(prefix: str) -> bool:
    path = Path(prefix)
    return manifest_path(path).exists() or any(one.exists() for one in shard_paths(path))


class Cost(NamedTuple):
    """What a run takes on a cluster. Predicted, not measured.

    Attributes:
        num_gpus: GPUs.
        steps: Optimizer steps.
        step_seconds: Seconds per step.
        gpu_hours: All GPUs together.
        layout: The layout, such as `TP 2, PP 1, ZeRO 1, micro batch 8`.
    """

    num_gpus: int
    steps: int
    step_seconds: float
    gpu_hours: float
    layout: str


def make_run_config(option: Option, budget: Budget, corpus: Corpus) -> Config:
    """The configuration of an option.

    Args:
        option: What to run.
        budget: Gives U, of which no more is read, which N the FLOPs count, and the vocabulary.
        corpus: Shards to train on, and held-out ones.

    Returns:
        A whole configuration, checked.

    Raises:
        ConfigError: The corpus or the budget is too small for one step.
    """
    if budget.unique_tokens < _SEQ_LENGTH:
        raise ConfigError(
            f"--unique-tokens={budget.unique_tokens:g} is less than one window of {_SEQ_LENGTH} "
            "tokens: give more, or write the configuration by hand."
        )
    objective = {"kind": option.objective, "process": {"masking": "fixed_count"}}
    model: dict[str, Any] = {"preset": option.preset}
    if budget.vocab_size != expand_preset(option.preset)["vocab_size"]:
        model["vocab_size"] = budget.vocab_size
    tree: dict[str, Any] = {
        "run": {"dir": f"runs/{option.preset}-{option.objective}"},
        "model": model,
        "objective": objective,
        "data": {
            "train": [
                {"path": corpus.train_prefix, "max_unique_tokens": int(budget.unique_tokens)}
            ],
            "valid": [{"path": corpus.valid_prefix}] if corpus.valid_prefix is not None else [],
            "seq_length": _SEQ_LENGTH,
        },
        "batch": {"micro_batch_size": 1, "global_batch_size": _BATCH},
        "schedule": {
            "flops": float(option.training_flops),
            "flops_parameters": budget.parameters,
        },
    }
    config = parse_config(tree)
    steps = count_steps(config, num_windows=1)
    every = max(1, steps // _VALIDATIONS)
    tree["validation"] = {"every_steps": every, "num_samples": 1024, "num_train_samples": 256}
    tree["checkpoint"] = {"every_steps": every, "keep_last": 2}
    tree["reporting"] = {"log_every_steps": 10}
    return parse_config(tree)


def choose_layout(config: Config, cluster: Cluster, num_gpus: int) -> tuple[Config, Cost]:
    """Lays a run out on a cluster.

    Args:
        config: The run.
        cluster: The machine.
        num_gpus: GPUs.

    Returns:
        The run with the layout that is predicted to be fastest, and its cost.

    Raises:
        ConfigError: No layout fits.
    """
    best = best_layouts(config, cluster, world_size=num_gpus, dtype="bf16", num_best=1)[0]
    steps = count_steps(best.config, num_windows=1)
    parallel = best.config.parallel
    layout = (
        f"TP {parallel.tensor_model_parallel_size}, PP {parallel.pipeline_model_parallel_size}, "
        f"ZeRO {parallel.zero_stage}, micro batch {best.config.batch.micro_batch_size}"
    )
    seconds = best.time.step_seconds
    return best.config, Cost(num_gpus, steps, seconds, steps * seconds * num_gpus / 3600, layout)


def find_run_warnings(config: Config) -> list[str]:
    """What the recipe does not suit.

    Args:
        config: The run.

    Returns:
        Sentences.
    """
    steps = count_steps(config, num_windows=1)
    if steps >= _FEWEST_STEPS:
        return []
    return [
        f"The run has only {steps} steps of {config.batch.global_batch_size} windows: lower "
        "batch.global_batch_size, and raise optimizer.lr by a sweep."
    ]
