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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml

from megatron_mdm.config import parse_config
from megatron_mdm.core.command_line import own_command
from megatron_mdm.core.errors import CheckpointError, ConfigError, DataError
from megatron_mdm.core.files import read_json, write_json_whole
from megatron_mdm.reporting.metrics import METRICS_FILE_NAME, NLL, read_metrics
from megatron_mdm.studies.benchmarks.parity_cases import (
    BASE,
    RESUME,
    SAVED_STEP,
    TOLERANCES,
    Case,
    Tree,
    list_cases,
    list_groups,
    list_references,
    merge,
    write_shards,
)
from megatron_mdm.studies.benchmarks.settings import ParitySettings
from megatron_mdm.training.launch import train as train_run

Device = Literal["cpu", "cuda"]

_LOSS, _NORM = "train/loss_nats_per_token", "train/grad_norm"
_SHARDS, _REFERENCES, _CPU_RUN = "shards/texts", "references.json", "run_of_a_cpu"


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
        losses=whole.losses[SAVED_STEP:], grad_norms=whole.grad_norms[SAVED_STEP:]
    )
    for resume in (_resume_here, _resume_on_cpu) if RESUME in groups else ():
        name = resume.__name__.removeprefix("_")
        results[name] = judge("fp32", last_steps, partial(resume, folder, settings))
    failed = [name for name, found in results.items() if not found["is_close"]]
    return {"tolerances": TOLERANCES, "num_failed": len(failed), "cases": results}


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
    done = subprocess.run(
        own_command("train", "--config", file),
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CheckpointError(
            f"The run of {file} ended with status {done.returncode}: {done.stderr}"
        )
    return read_outcome(run)


def _copy_middle(run: Path, to: Path) -> None:
    name = f"checkpoints/step_{SAVED_STEP:08d}"
    shutil.copytree(run / name, to / name)


def _configure(
    pack: Path, run: Path, tree: Tree, *, device: Device, dtype: str, resumes: bool = False
) -> Tree:
    shards = [{"path": str(pack / _SHARDS)}]
    return merge(
        BASE,
        {
            "run": {"dir": str(run), "device": device, "dtype": dtype},
            "data": {"train": shards, "valid": shards},
            "checkpoint": {"resume": "required" if resumes else "auto"},
        },
        tree,
    )
