from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.options import run_command
from megatron_mdm.studies.benchmarks.parity_cases import list_groups, write_shards
from megatron_mdm.studies.benchmarks.settings import (
    BENCHMARKS,
    ParitySettings,
    TrainingSettings,
)
from megatron_mdm.studies.benchmarks.training import make_config
from megatron_mdm.studies.proof.command import ProofSettings, run_proof
from megatron_mdm.studies.proof.running import Ask, Command, StageRecord
from megatron_mdm.studies.proof.stages import Proof, write_crossover_sweep
from megatron_mdm.studies.sweeps.grid import load_sweep

GIB = 2**30


def play(stage: str, memory_bytes: float, answer: Any) -> tuple[list[list[str]], dict[str, Any]]:
    """Commands that a stage asks for on a GPU where each comes to what `answer` says of it."""
    record = StageRecord(stage)

    def run(words: list[str]) -> Command:
        report = answer(words)
        return Command(words, "failed" if report is None else "done", 1.0, report)

    def read(name: str) -> tuple[Any, dict[str, Any]]:
        environment = {"results": {"device": {"memory_bytes": memory_bytes}}}
        return (environment if name == "environment" else None), record.chosen

    proof = Proof("cuda", False, Path("pack"), Path("out"), read)
    stages = {one.name: one for one in proof.list_stages()}
    stages[stage].measure(Ask(record, run, lambda: None))
    return [one.words for one in record.commands], record.chosen


def value_of(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def report_of(rates: dict[tuple[str, str], float], words: list[str]) -> Any:
    """Tokens per second by micro batch and recomputation; None for what does not fit."""
    case = value_of(words, "--cases")
    recompute = next((word for word in words if word.startswith("parallel.recompute")), "=none")
    rate = rates.get((value_of(words, "--micro-batch-size"), recompute.partition("=")[2]))
    return rate and {"results": {case: {"tokens_per_second": {"median": rate}}}}


def test_the_fastest_setting_that_fits_is_measured_beside_baselines() -> None:
    rates = {("8", "none"): 50.0, ("16", "none"): 60.0, ("64", "full"): 70.0}
    asked, chosen = play("train", 80 * GIB, lambda words: report_of(rates, words))
    searched = [
        (value_of(words, "--micro-batch-size"), words[-2])
        for words in asked
        if value_of(words, "--steps") == "12" and words[-1] == "run.compile=auto"
    ]
    # The estimates of 32 sequences without recomputation are beyond 80 GiB: nothing is lost on it.
    assert ("32", "parallel.recompute=none") not in searched
    assert ("8", "parallel.recompute=none") in searched
    assert chosen["best"] == {"micro_batch_size": 64, "recompute": "full", "compile": "auto"}
    baselines = [words for words in asked if value_of(words, "--cases") != "ours"]
    assert list(dict.fromkeys(value_of(words, "--cases") for words in baselines)) == [
        "plain", "transformers", "plain_compiled", "transformers_compiled"
    ]  # fmt: skip
    assert {value_of(words, "--steps") for words in baselines} == {"40"}
    # With and without compilation, and once for AR.
    assert any(words[-1] == "run.compile=off" for words in asked)
    assert any(words[-1] == "objective.kind=ar" for words in asked)


def test_a_baseline_that_does_not_fit_gets_smaller_micro_batches() -> None:
    def answer(words: list[str]) -> Any:
        needs = int(value_of(words, "--micro-batch-size"))
        is_ours = value_of(words, "--cases") == "ours"
        return (
            report_of({(str(needs), "none"): 10.0 + needs}, words)
            if is_ours or needs <= 4
            else None
        )

    asked, _ = play("train", 80 * GIB, answer)
    sizes = [
        value_of(words, "--micro-batch-size")
        for words in asked
        if value_of(words, "--cases") == "plain"
    ]
    assert sizes == ["16", "8", "4"]


def test_every_memory_setting_fits_the_smallest_gpu_of_the_goal() -> None:
    asked, _ = play("memory", 80 * GIB, lambda words: {"results": {}})
    assert len(asked) == 6


def test_the_crossover_is_the_recipe_on_other_shards(tmp_path: Path) -> None:
    write_shards(tmp_path / "texts")
    file = write_crossover_sweep(
        tmp_path / "sweep", tmp_path / "texts", tmp_path / "texts", device="cpu", tiny=False
    )
    runs = {run.name: run.config for run in load_sweep(file).runs}
    assert runs.keys() == {"ar", "mdm"}
    for config in runs.values():
        assert config.model.vocab_size == 512
        assert config.data.tokenizer is None
        assert config.data.train[0].path == str(tmp_path / "texts")
    assert runs["mdm"].schedule.epochs == 240
    recipe = yaml.safe_load(Path("configs/crossover/gpu_base.yaml").read_text())
    assert runs["ar"].batch.global_batch_size == recipe["batch"]["global_batch_size"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "cpu"}, "--device=cpu is far too slow for the sizes of a GPU: add --tiny"),
        ({"stages": ("training",), "device": "cpu", "tiny": True}, "--stages=training is unknown"),
        ({"minutes": 0.0}, "--minutes=0 has to be at least 0.1"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        run_proof(ProofSettings(out=tmp_path, pack=tmp_path, **options), print)


GPU_STAGES = ("environment", "parity", "train", "profile", "head", "attention", "memory", "sample",
              "score", "loader", "checkpoint")  # fmt: skip


@pytest.mark.parametrize("stage", GPU_STAGES)
def test_the_benchmarks_take_every_command_of_a_gpu(stage: str) -> None:
    """The tiny sizes have other options: a wrong one would be found on the GPU alone."""

    def answer(words: list[str]) -> Any:
        if words[0] != "train":
            return {"results": {}}
        return {"results": {value_of(words, "--cases"): {"tokens_per_second": {"median": 1.0}}}}

    asked, _ = play(stage, 150 * GIB, answer)
    assert asked
    for words in asked:
        settings = run_command(BENCHMARKS, "", words)
        assert type(settings) is BENCHMARKS[words[0]]
        if isinstance(settings, TrainingSettings):
            assert settings.device == "cuda"
            # Its sizes and overrides are valid, wherever it runs.
            config = make_config(replace(settings, device="cpu"))
            assert config.batch.micro_batch_size == settings.micro_batch_size
        elif isinstance(settings, ParitySettings):
            assert set(settings.groups) <= set(list_groups())


def test_every_group_of_parity_is_asked_for() -> None:
    asked, _ = play("parity", 150 * GIB, lambda words: {"results": {}})
    assert sorted(value_of(words, "--groups") for words in asked) == sorted(list_groups())
