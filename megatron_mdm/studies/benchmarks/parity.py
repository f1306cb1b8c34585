"""Short runs on a device beside the same runs on a CPU, whose losses were written down before.

A reference is a run of five steps on a CPU in float32. A case repeats one with another dtype, ZeRO
stage, recomputation or kernels on the device that is tested, through the same way as any training.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import yaml

from megatron_mdm.config import parse_config
from megatron_mdm.config.objective import OBJECTIVES
from megatron_mdm.core.errors import CheckpointError, ConfigError, DataError
from megatron_mdm.core.files import read_json, write_json_whole
from megatron_mdm.data.manifest import Manifest, manifest_path
from megatron_mdm.data.writer import ShardWriter
from megatron_mdm.reporting.metrics import METRICS_FILE_NAME, NLL, read_metrics
from megatron_mdm.studies.benchmarks.settings import ParitySettings
from megatron_mdm.studies.steps import REPO
from megatron_mdm.training.launch import train as train_run

Device = Literal["cpu", "cuda"]
Tree = dict[str, Any]

_LOSS, _NORM = "train/loss_nats_per_token", "train/grad_norm"
_SHARDS, _REFERENCES, _CPU_RUN = "shards/texts", "references.json", "run_of_a_cpu"
_VOCAB_SIZE, _SEQ_LENGTH, _NUM_TEXTS, _MEAN_TEXT = 512, 256, 160, 120
_END = 0
# Groups of cases besides those of objectives.
_ENGINE, _RESUME = "engine", "resume"
_NUM_STEPS, _SAVED_STEP = 5, 3
# What a reference of each objective is made with, besides whole windows.
_VARIANTS: dict[str, Tree] = {
    "whole": {},
    "documents": {"data": {"attention": "document"}},
    "cut_lengths": {"objective": {"stochastic_length_ratio": 0.5}},
}
_BASE: Tree = {
    "model": {
        "num_layers": 2,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 192,
        "vocab_size": _VOCAB_SIZE,
        "qk_norm": True,
    },
    "data": {"seq_length": _SEQ_LENGTH},
    "batch": {"micro_batch_size": 2, "global_batch_size": 4},
    "optimizer": {"lr": 1e-3, "min_lr": 1e-4},
    "schedule": {"steps": _NUM_STEPS, "warmup_steps": 1},
    "validation": {"num_samples": 8, "noise_seed": 3},
    "checkpoint": {"every_steps": _SAVED_STEP, "keep_last": 2, "background": False},
    "reporting": {"log_every_steps": 1, "peak_tflops": 1.0},
}
# Shares of what the CPU found. Layouts on CPUs differ by 5e-8 (losses) and 4e-6 (norms) in float32,
# and in bf16 by 4e-4 and 1.2e-2 from each other; a device sums in another order, and bf16 rounds
# what the reference does not.
TOLERANCES: dict[str, dict[str, float]] = {
    "fp32": {"losses": 1e-4, "grad_norms": 1e-3, "held_out": 1e-4},
    "bf16": {"losses": 1e-2, "grad_norms": 5e-2, "held_out": 1e-2},
}


class Case(NamedTuple):
    """A run on the device.

    Attributes:
        group: The objective, or `engine`.
        name: What is special about it.
        reference: The run on a CPU that it repeats.
        dtype: `fp32` or `bf16`.
        changes: Sections and fields that differ from the reference's.
    """

    group: str
    name: str
    reference: str
    dtype: str
    changes: Tree


class Outcome(NamedTuple):
    """What a run came to.

    Attributes:
        losses: Of each step that was taken, in nats per token.
        grad_norms: Likewise, before clipping.
        held_out: Loss after the last step, alone in its list.
    """

    losses: list[float]
    grad_norms: list[float]
    held_out: list[float]


def list_references() -> dict[str, Tree]:
    """Runs on a CPU: every objective of the package, in each variant that it has the field for."""
    found = {}
    for kind in OBJECTIVES.names:
        fields = OBJECTIVES.find(kind, "objective.kind").model_fields
        for name, sections in _VARIANTS.items():
            if set(sections.get("objective", {})) <= set(fields):
                found[f"{kind}_{name}"] = merge(sections, {"objective": {"kind": kind}})
    return found


def list_cases(*, tiny: bool) -> list[Case]:
    """Runs on the device: every reference in both dtypes, then what an engine can do besides."""
    references = list_references()
    first, *_ = references
    cases = [
        Case(tree["objective"]["kind"], f"{reference}_{dtype}", reference, dtype, {})
        for reference, tree in references.items()
        for dtype in TOLERANCES
        if dtype == "fp32" or not tiny or reference == first
    ]
    documents = f"{OBJECTIVES.names[0]}_documents"
    special: list[tuple[str, str, Tree]] = [
        ("zero_0", "fp32", {"parallel": {"zero_stage": 0}}),
        ("zero_2", "bf16", {"parallel": {"zero_stage": 2}}),
        ("zero_3", "bf16", {"parallel": {"zero_stage": 3}}),
        ("overlap", "bf16", {"parallel": {"overlap_gradient_reduction": True}}),
        *(
            (f"recompute_{kind}", dtype, {"parallel": {"recompute": kind}})
            for kind in ("selective", "full")
            for dtype in TOLERANCES
        ),
        *(("compile_off", dtype, {"run": {"compile": "off"}}) for dtype in TOLERANCES),
        ("capacity", "bf16", {"batch": {"prediction_capacity": 128}}),
    ]
    chosen = special[1:2] if tiny else special
    return cases + [
        Case(_ENGINE, f"{name}_{dtype}", documents, dtype, tree) for name, dtype, tree in chosen
    ]


def list_groups() -> list[str]:
    """What can be compared alone."""
    return [*OBJECTIVES.names, _ENGINE, _RESUME]


def write_references(folder: Path) -> None:
    """Trains every reference on this machine's CPU and writes down what has to travel.

    Args:
        folder: Gets shards, losses, and a run that stands in its middle.

    Raises:
        MdmError: A run failed.
    """
    write_shards(folder / _SHARDS)
    found = {}
    for name, tree in list_references().items():
        run = folder / "scratch" / name
        found[name] = train(_configure(folder, run, tree, device="cpu", dtype="fp32"))._asdict()
    middle = folder / "scratch" / next(iter(found))
    _copy_middle(middle, folder / _CPU_RUN)
    shutil.rmtree(folder / "scratch")
    write_json_whole(folder / _REFERENCES, found)


def measure_parity(folder: Path, settings: ParitySettings) -> dict[str, Any]:
    """Trains every case, then goes on from checkpoints of a CPU on the device and the other way.

    Args:
        folder: An empty folder to work in.
        settings: What is compared.

    Returns:
        Of each case losses and gradient norms, how far they are from the reference's at most, as a
        share, and whether that is within the tolerances of its dtype; or the error that ended it.
        `num_failed`.

    Raises:
        ConfigError: A group is unknown.
        DataError: The references are damaged or not there.
    """
    for group in settings.groups:
        if group not in list_groups():
            raise ConfigError(
                f"--groups={group} is unknown: use some of {', '.join(list_groups())}."
            )
    first = next(iter(list_references()))
    references = {
        name: Outcome(**entry)
        for name, entry in read_json(
            settings.pack / _REFERENCES, "make it with tools/gpu_proof.py pack."
        ).items()
    }
    unknown = sorted(list_references().keys() - references.keys())
    if unknown:
        raise DataError(
            f"{settings.pack / _REFERENCES} knows no {unknown[0]} and so is of another version: "
            "make it anew with tools/gpu_proof.py pack."
        )
    groups = settings.groups or list_groups()
    results = {
        case.name: judge(
            case.dtype, references[case.reference], partial(_run, folder, settings, case)
        )
        for case in list_cases(tiny=settings.tiny)
        if case.group in groups
    }
    whole = references[first]
    last_steps = whole._replace(
        losses=whole.losses[_SAVED_STEP:], grad_norms=whole.grad_norms[_SAVED_STEP:]
    )
    for resume in (_resume_here, _resume_on_cpu) if _RESUME in groups else ():
        name = resume.__name__.removeprefix("_")
        results[name] = judge("fp32", last_steps, partial(resume, folder, settings))
    failed = [name for name, found in results.items() if not found["is_close"]]
    return {"tolerances": TOLERANCES, "num_failed": len(failed), "cases": results}


def write_shards(prefix: Path) -> None:
    """Writes texts of random tokens, the same on any machine.

    Args:
        prefix: Of the shards.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    # Some tokens are far more frequent than others, so there is something to learn.
    texts = [
        np.append(np.minimum(generator.geometric(0.02, length), _VOCAB_SIZE - 1), _END)
        for length in generator.geometric(1 / _MEAN_TEXT, _NUM_TEXTS)
    ]
    with ShardWriter(prefix, np.uint16) as writer:
        for tokens in texts:
            writer.add_document(tokens)
        writer.finish()
    Manifest(
        tokenizer="none",
        tokenizer_sha256="0" * 64,
        vocab_size=_VOCAB_SIZE,
        eod_token_id=_END,
        special_tokens={},
        num_documents=_NUM_TEXTS,
        num_tokens=sum(map(len, texts)),
        max_token_id=_VOCAB_SIZE - 1,
        dtype="uint16",
        source_files=[],
    ).write(manifest_path(prefix))


def train(tree: Tree) -> Outcome:
    """Trains a run in this process, in the way of the training scripts.

    Args:
        tree: Its configuration.

    Returns:
        What it came to.

    Raises:
        MdmError: It cannot be trained.
    """
    # What one run compiled does not count against the next one's limits.
    torch.compiler.reset()
    # Many short runs whose outcome alone is of interest.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        train_run(parse_config(tree))
    return read_outcome(Path(tree["run"]["dir"]))


def read_outcome(run: Path) -> Outcome:
    """Reads what a run came to.

    Args:
        run: Its folder.

    Raises:
        DataError: Its metrics are damaged or lack the last loss.
    """
    records = read_metrics(run / METRICS_FILE_NAME)
    held_out = [record[NLL] for record in records if NLL in record]
    if not held_out:
        raise DataError(f"{run / METRICS_FILE_NAME} has no held-out loss: the run did not end.")
    steps = [record for record in records if _LOSS in record]
    return Outcome(
        [record[_LOSS] for record in steps], [record[_NORM] for record in steps], held_out[-1:]
    )


def _run(folder: Path, settings: ParitySettings, case: Case) -> Outcome:
    tree = merge(list_references()[case.reference], case.changes)
    place = folder / case.name
    return train(_configure(settings.pack, place, tree, device=settings.device, dtype=case.dtype))


def judge(dtype: str, reference: Outcome, run: Callable[[], Outcome]) -> dict[str, Any]:
    """Compares a run with a reference.

    Args:
        dtype: Whose tolerances count.
        reference: Of a CPU.
        run: Trains.

    Returns:
        As `measure_parity` says of a case.
    """
    try:
        found = run()
    # Whatever a device's libraries raise: the other cases shall be tried.
    except Exception as error:
        return {"is_close": False, "error": f"{type(error).__name__}: {error}"[:2000]}
    if len(found.losses) != len(reference.losses):
        steps = f"{len(found.losses)} steps were trained, not {len(reference.losses)}"
        return {"is_close": False, "error": steps}
    deviations = {
        name: max(map(_deviation, values, getattr(reference, name)))
        for name, values in found._asdict().items()
    }
    limits = TOLERANCES[dtype]
    is_close = all(deviation <= limits[name] for name, deviation in deviations.items())
    return {"is_close": is_close, "deviations": deviations, **found._asdict()}


def _deviation(found: float, wanted: float) -> float:
    # What is not a number is far from any.
    share = abs(found - wanted) / abs(wanted)
    return share if math.isfinite(share) else math.inf


def _resume_here(folder: Path, settings: ParitySettings) -> Outcome:
    """Goes on, on the device, from the checkpoint of a CPU."""
    run = folder / "resume_here"
    shutil.copytree(settings.pack / _CPU_RUN, run)
    tree = next(iter(list_references().values()))
    return train(
        _configure(settings.pack, run, tree, device=settings.device, dtype="fp32", resumes=True)
    )


def _resume_on_cpu(folder: Path, settings: ParitySettings) -> Outcome:
    """Goes on, on this machine's CPU, from the checkpoint of the device, in a fresh process."""
    run = folder / "resume_on_cpu"
    first, tree = next(iter(list_references().items()))
    made = next(case for case in list_cases(tiny=True) if case.reference == first)
    if not (folder / made.name).exists():
        _run(folder, settings, made)
    _copy_middle(folder / made.name, run)
    config = _configure(settings.pack, run, tree, device="cpu", dtype="fp32", resumes=True)
    file = folder / "resume_on_cpu.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    script = REPO / "pretrain/pretrain_mdm.py"
    done = subprocess.run(
        [sys.executable, script, "--config", file],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CheckpointError(f"{script} ended with status {done.returncode}: {done.stderr}")
    return read_outcome(run)


def _copy_middle(run: Path, to: Path) -> None:
    name = f"checkpoints/step_{_SAVED_STEP:08d}"
    shutil.copytree(run / name, to / name)


def _configure(
    pack: Path, run: Path, tree: Tree, *, device: Device, dtype: str, resumes: bool = False
) -> Tree:
    shards = [{"path": str(pack / _SHARDS)}]
    return merge(
        _BASE,
        {
            "run": {"dir": str(run), "device": device, "dtype": dtype},
            "data": {"train": shards, "valid": shards},
            "checkpoint": {"resume": "required" if resumes else "auto"},
        },
        tree,
    )


def merge(*trees: Tree) -> Tree:
    """Sections of configurations, of whose fields the last word counts.

    Args:
        *trees: Sections and fields.

    Returns:
        A tree of its own.
    """
    merged: Tree = {}
    for tree in trees:
        for section, fields in tree.items():
            merged[section] = merged.get(section, {}) | fields
    return merged
