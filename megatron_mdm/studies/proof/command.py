"""The commands of `tools/gpu_proof.py` that measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_mdm.core.errors import ConfigError, MdmError
from megatron_mdm.core.options import check_at_least
from megatron_mdm.core.quiet import quiet_engines
from megatron_mdm.studies.benchmarks.commands import report_alone_on_stdout
from megatron_mdm.studies.benchmarks.devices import choose_device
from megatron_mdm.studies.machine import describe_machine
from megatron_mdm.studies.proof.packing import Content, check_pack, copy_shards, pack
from megatron_mdm.studies.proof.running import Report, read_record, run_stages
from megatron_mdm.studies.proof.stages import Proof


@dataclass(frozen=True, kw_only=True)
class ProofSettings:
    """What is measured, where, and how long it may take.

    Attributes:
        out: Folder that gets a JSON file of each stage; what is there is not measured again.
        pack: Folder that the command pack made, with losses of a CPU.
        stages: Some of the stages; all but crossover where not given. What failed in them is tried
            again.
        minutes: For all of them; call again to go on.
        device: Where to measure.
        tiny: The smallest sizes that run every path, for machines without a GPU.

    Raises:
        ConfigError: A number is out of range.
    """

    out: Path
    pack: Path
    stages: tuple[str, ...] = ()
    minutes: float = 25
    device: Literal["cuda", "cpu"] = "cuda"
    tiny: bool = False

    def __post_init__(self) -> None:
        check_at_least(self, minutes=0.1)


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """What has to travel to a machine with a GPU.

    Attributes:
        out: The folder to make; a pack that stands there is replaced.
        installed: What the other machine has, as `pip list --format=freeze` prints it there; names
            without versions are taken to fit. Without it: torch and what torch needs.
        python_version: Of the other machine, which is an x86-64 Linux.
        no_wheels: For a machine that has all packages.
        train: Prefix of shards on which the stage crossover trains.
        valid: Prefix of shards on which it judges.

    Raises:
        ConfigError: Only one of the two shards is given.
    """

    out: Path
    installed: Path | None = None
    python_version: str = "3.12"
    no_wheels: bool = False
    train: Path | None = None
    valid: Path | None = None

    def __post_init__(self) -> None:
        if (self.train is None) != (self.valid is None):
            raise ConfigError(
                f"--train={self.train} and --valid={self.valid}: the crossover needs both: give "
                "the other one too, or leave both out."
            )


def pack_proof(settings: PackSettings) -> str:
    """Packs wheels, losses of this machine's CPU, and shards.

    Args:
        settings: For which machine, and what.

    Returns:
        The command line that starts the proof there.

    Raises:
        MdmError: Something cannot be packed; nothing is left behind.
    """
    contents: list[Content] = [_pack_references]
    for name, prefix in (("train", settings.train), ("valid", settings.valid)):
        if prefix is not None:
            contents.append(copy_shards(f"crossover/{name}", prefix))
    return pack(
        settings.out,
        settings.installed,
        settings.python_version,
        contents,
        wheels=not settings.no_wheels,
    )


def _pack_references(folder: Path) -> dict[str, Any]:
    # What DeepSpeed reads when it is imported.
    quiet_engines(use_cpu=True)
    from megatron_mdm.studies.benchmarks.parity import write_references

    with report_alone_on_stdout():
        write_references(folder)
    return {"references": describe_machine()}


def run_proof(settings: ProofSettings, say: Callable[[str], None]) -> None:
    """Measures what is not there yet.

    Args:
        settings: What, where and how long.
        say: Shows a line.

    Raises:
        ConfigError: A setting is not valid, or there is no GPU where one is asked for.
        MdmError: Something is missing at the end.
    """
    _check_device(settings)

    def read(stage: str) -> tuple[Report | None, dict[str, Any]]:
        record = read_record(settings.out, stage)
        return next((one.report for one in record.commands), None), record.chosen

    # Named from other working folders, and by processes in others.
    proof = Proof(
        settings.device, settings.tiny, settings.pack.resolve(), settings.out.resolve(), read
    )
    stages = {stage.name: stage for stage in proof.list_stages()}
    for name in settings.stages:
        if name not in stages:
            raise ConfigError(f"--stages={name} is unknown: use some of {', '.join(stages)}.")
    check_pack(settings.pack)
    usual = [name for name in stages if name != "crossover"]
    chosen = [stages[name] for name in settings.stages or usual]
    again = bool(settings.stages)
    if not run_stages(chosen, settings.out, settings.minutes, say=say, again=again):
        raise MdmError(
            f"{settings.out} lacks what failed or was not reached: call again to go on, and with "
            "--stages to try again what failed."
        )
    say(f"all is measured: tools/gpu_proof.py report {settings.out}")


def _check_device(settings: ProofSettings) -> None:
    if settings.device == "cpu" and not settings.tiny:
        raise ConfigError(
            "--device=cpu is far too slow for the sizes of a GPU: add --tiny, which runs every "
            "path with the smallest ones."
        )
    choose_device(settings.device)
