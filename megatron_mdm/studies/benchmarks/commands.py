"""What `tools/benchmark.py` does: runs the benchmark whose settings it is given."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from megatron_mdm.core.quiet import quiet_engines, report_alone_on_stdout
from megatron_mdm.studies.benchmarks.harness import make_report
from megatron_mdm.studies.benchmarks.settings import (
    BENCHMARKS,
    AttentionSettings,
    CheckpointSettings,
    ConversionSettings,
    DataSettings,
    HeadSettings,
    SamplingSettings,
    ScoreSettings,
    TrainingSettings,
)


def run_benchmark(settings: Any) -> dict[str, Any] | None:
    """Measures, in a folder that is removed afterwards.

    Args:
        settings: Of one of `BENCHMARKS`, and so of which.

    Returns:
        The report; None on a rank that does not lead.

    Raises:
        MdmError: A setting cannot be measured.
    """
    name = next(name for name, kind in BENCHMARKS.items() if isinstance(settings, kind))
    with report_alone_on_stdout(), tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        # The ranks that save checkpoints are processes on CPUs, whatever the machine.
        use_cpu = name == "checkpoint" or getattr(settings, "device", None) == "cpu"
        quiet_engines(use_cpu=use_cpu)
        results = _measure(settings, Path(folder))
    if results is None:
        return None
    return make_report(name, settings, results)


def _measure(settings: Any, folder: Path) -> dict[str, Any] | None:
    """Imports what one benchmark needs: none waits for the libraries of the others."""
    match settings:
        case DataSettings():
            return _measure_data(settings, folder)
        case CheckpointSettings():
            from megatron_mdm.studies.benchmarks.checkpoints import measure_checkpoints

            return measure_checkpoints(folder, settings)
        case ConversionSettings():
            from megatron_mdm.studies.benchmarks.conversion import measure_conversion

            return measure_conversion(folder, settings)
        case SamplingSettings():
            from megatron_mdm.studies.benchmarks.sampling import measure_sampling

            return measure_sampling(settings)
        case ScoreSettings():
            from megatron_mdm.studies.benchmarks.scoring import measure_scoring

            return measure_scoring(settings)
        case TrainingSettings():
            from megatron_mdm.studies.benchmarks.training import measure_training

            return measure_training(settings)
        case HeadSettings():
            from megatron_mdm.studies.benchmarks.head import measure_head

            return measure_head(settings)
        case AttentionSettings():
            from megatron_mdm.studies.benchmarks.attention import measure_attention

            return measure_attention(settings)
    raise TypeError(f"{settings!r} is of no benchmark")


def _measure_data(settings: DataSettings, folder: Path) -> dict[str, Any]:
    from megatron_mdm.studies.benchmarks.data_loading import measure_loader
    from megatron_mdm.studies.benchmarks.data_preprocessing import (
        measure_growth,
        measure_preprocessing,
    )
    from megatron_mdm.studies.benchmarks.token_corpora import measure_token_corpora

    parts = {
        "preprocess": measure_preprocessing,
        "growth": measure_growth,
        "tokens": measure_token_corpora,
        "loader": measure_loader,
    }
    results = {}
    for part, measure in parts.items():
        if settings.part in (part, "all"):
            with tempfile.TemporaryDirectory(dir=folder) as own:
                results[part] = measure(Path(own), settings)
    return results
