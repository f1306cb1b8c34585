"""The commands of `tools/gpu_proof.py` that measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_mdm.core.errors import ConfigError, MdmError
from megatron_mdm.core.options import check_at_least
from megatron_mdm.studies.benchmarks.devices import choose_device
from megatron_mdm.studies.proof.running import Report, read_record, run_stages
from megatron_mdm.studies.proof.stages import Proof


@dataclass(frozen=True, kw_only=True)
class ProofSettings:
    """What is measured, where, and how long it may take.

    Attributes:
        out: Folder that gets a JSON file of each stage; what is there is not measured again.
        pack: Folder that `pack` made, with losses of a CPU.
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
