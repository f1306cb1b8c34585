"""What a proof measures, stage by stage, on a GPU or, tiny, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from megatron_mdm.config import expand_preset
from megatron_mdm.config.objective import OBJECTIVES
from megatron_mdm.core.files import write_text_whole
from megatron_mdm.data.manifest import Manifest, manifest_path
from megatron_mdm.model.memory import estimate_memory
from megatron_mdm.studies.benchmarks.harness import bare_config
from megatron_mdm.studies.proof.running import Ask, Report, Stage
from megatron_mdm.studies.steps import REPO

Device = Literal["cuda", "cpu"]
Words = tuple[str, ...]

_RECIPES = REPO / "configs/crossover"
# Of the model that the proof is about, and of the demo's instead of it.
_PRESET = "smdm-1028M"
_SEQ_LENGTH, _VOCAB_SIZE = 2048, 32000
_TINY = ("--preset", "demo", "--seq-length", 64, "--vocab-size", 256)
# The share of a GPU's memory that a setting may be estimated to need.
_FILLED = 0.92
_SEARCH_STEPS, _STEPS = 12, 40
_BASELINES = ("plain", "transformers", "plain_compiled", "transformers_compiled")


class Setting(NamedTuple):
    """How the model is trained.

    Attributes:
        micro_batch_size: Sequences of a micro batch.
        recompute: What the backward pass recomputes.
        compile: Elementwise parts through torch.compile: `auto` or `off`.
    """

    micro_batch_size: int
    recompute: str = "none"
    compile: str = "auto"

    @property
    def overrides(self) -> Words:
        """Fields of a run."""
        return (f"parallel.recompute={self.recompute}", f"run.compile={self.compile}")


# From the most likely to the least: a search that runs out of time has seen the best ones.
_SETTINGS = (
    Setting(16),
    Setting(32, "selective"),
    Setting(32),
    Setting(8),
    Setting(64, "full"),
)
# Of the estimator: a range of sizes, and each thing that it models.
_MEMORY_SETTINGS: tuple[tuple[str, int, Words], ...] = (
    ("smdm-1028M", 4, ()),
    ("smdm-1028M", 16, ("parallel.recompute=selective",)),
    ("smdm-1028M", 16, ("parallel.recompute=full",)),
    ("smdm-1028M", 8, ("objective.kind=ar",)),
    ("smdm-170M", 16, ("parallel.zero_stage=3",)),
    ("dc-425M", 8, ()),
)


@dataclass(frozen=True)
class Proof:
    """What the stages share.

    Attributes:
        device: Where all is measured.
        tiny: The smallest sizes that run every path.
        pack: Folder of what `pack` made.
        out: Folder of the proof.
        read: Reads the report of an earlier stage's first command, and what it chose.
    """

    device: Device
    tiny: bool
    pack: Path
    out: Path
    read: Callable[[str], tuple[Report | None, dict[str, Any]]]

    def list_stages(self) -> list[Stage]:
        """All stages, in order; `crossover` is for a call of its own."""
        return [
            Stage("environment", 1.5, self.measure_environment),
            Stage("parity", 4, self.measure_parity),
            Stage("train", 9, self.measure_training),
            Stage("profile", 2, self.profile),
            Stage("head", 1, self.measure_head),
            Stage("attention", 2, self.measure_attention),
            Stage("memory", 4, self.measure_memory),
            Stage("sample", 3, self.measure_sampling),
            Stage("score", 2, self.measure_scoring),
            Stage("loader", 1.5, self.measure_loader),
            Stage("checkpoint", 3, self.measure_checkpoints),
            Stage("crossover", 20, self.compare_objectives),
        ]

    def measure_environment(self, ask: Ask) -> None:
        """The machine and its ceilings."""
        ask("environment", "--device", self.device)

    def measure_parity(self, ask: Ask) -> None:
        """Losses beside those of a CPU."""
        words = ("parity", "--pack", self.pack, "--device", self.device)
        if self.tiny:
            ask(*words, "--tiny")
            return
        # Apart, so that what fails or takes too long costs its group alone.
        for group in (*OBJECTIVES.names, "resume", "engine"):
            ask(*words, "--groups", group)

    def measure_training(self, ask: Ask) -> None:
        """The fastest setting, then that beside the baselines, and other models."""
        speeds = {}
        for setting in self._settings():
            speed = self._speed(ask, setting, _SEARCH_STEPS)
            if speed is not None:
                speeds[setting] = speed
        if not speeds:
            return
        best = max(speeds, key=lambda setting: speeds[setting])
        if not self.tiny:
            uncompiled = best._replace(compile="off")
            speed = self._speed(ask, uncompiled, _SEARCH_STEPS)
            if speed is not None and speed > speeds[best]:
                best = uncompiled
        ask.choose(best=best._asdict())
        self._speed(ask, best, _STEPS)
        for name in _BASELINES[: 2 if self.tiny else None]:
            self._measure_baseline(ask, name, best.micro_batch_size)
        self._speed(ask, best, _STEPS, "objective.kind=ar")
        dropout = () if self.tiny else ("--preset", "dc-425M", "--vocab-size", 50257)
        self._train(ask, 16, ("model.hidden_dropout=0.1", "model.attention_dropout=0.1"), *dropout)

    def _measure_baseline(self, ask: Ask, name: str, micro_batch_size: int) -> None:
        """The largest micro batch that fits: more memory is needed than ours takes."""
        while micro_batch_size:
            found = self._train(ask, micro_batch_size, (), "--cases", name, steps=_STEPS)
            if found is not None:
                return
            micro_batch_size //= 2

    def _settings(self) -> list[Setting]:
        if self.tiny:
            return [Setting(2, "selective")]
        environment, _ = self.read("environment")
        memory_bytes = _memory_bytes(environment)
        return [one for one in _SETTINGS if _estimate(one) <= _FILLED * memory_bytes]

    def _speed(self, ask: Ask, setting: Setting, steps: int, *overrides: str) -> float | None:
        report = self._train(
            ask, setting.micro_batch_size, (*setting.overrides, *overrides), steps=steps
        )
        if report is None:
            return None
        return float(report["results"]["ours"]["tokens_per_second"]["median"])

    def _train(
        self,
        ask: Ask,
        micro_batch_size: int,
        overrides: Sequence[str],
        *words: object,
        steps: int = _SEARCH_STEPS,
    ) -> Report | None:
        cases = () if "--cases" in words else ("--cases", "ours")
        given = ("--overrides", *overrides) if overrides else ()
        return ask(
            *("train", "--device", self.device, *self._sizes()),
            *("--micro-batch-size", micro_batch_size, "--steps", 1 if self.tiny else steps),
            *("--repeats", 1 if steps == _SEARCH_STEPS or self.tiny else 3),
            *(*cases, *words, *given),
        )

    def profile(self, ask: Ask) -> None:
        """Where the time of the best setting goes."""
        _, chosen = self.read("train")
        best = Setting(**chosen["best"]) if "best" in chosen else Setting(2 if self.tiny else 8)
        steps = ("--steps", 1, "--warm-up-steps", 1) if self.tiny else ("--steps", 3)
        ask(
            *("profile", "--device", self.device, *self._sizes()),
            *("--micro-batch-size", best.micro_batch_size, *steps),
            *("--overrides", *best.overrides),
        )

    def measure_head(self, ask: Ask) -> None:
        """The output layer and its loss."""
        sizes = (64, 512, 256) if self.tiny else (1792, _VOCAB_SIZE, 16 * _SEQ_LENGTH)
        names = ("--hidden-size", "--vocab-size", "--num-tokens")
        options = [word for pair in zip(names, sizes, strict=True) for word in pair]
        ask("head", "--device", self.device, *options, *self._repeats())

    def measure_attention(self, ask: Ask) -> None:
        """Kernels of attention, also within documents."""
        sizes: tuple[object, ...] = ("--seq-length", 256, "--cases", "full", "documents")
        if not self.tiny:
            heads = ("--num-heads", 14, "--head-width", 128)
            sizes = ("--seq-length", _SEQ_LENGTH, "--micro-batch-size", 8, *heads)
        ask("attention", "--device", self.device, *sizes, *self._repeats())

    def measure_memory(self, ask: Ask) -> None:
        """Peak memory beside the estimate."""
        if self.tiny:
            self._train(ask, 2, ())
            return
        for preset, micro_batch_size, overrides in _MEMORY_SETTINGS:
            self._train(ask, micro_batch_size, overrides, "--preset", preset, steps=2)

    def measure_sampling(self, ask: Ask) -> None:
        """Generation beside the public way, one sequence and many at once."""
        preset = () if self.tiny else ("--preset", _PRESET)
        for batch_size in (2,) if self.tiny else (1, 32):
            sizes = ("--num-tokens", 32, "--num-steps", 8) if self.tiny else ()
            ask(
                *("sample", "--device", self.device, *preset),
                *("--batch-size", batch_size, *sizes, "--repeats", 1),
            )

    def measure_scoring(self, ask: Ask) -> None:
        """Likelihoods beside one request at a time."""
        sizes: tuple[object, ...] = ("--preset", _PRESET, "--num-questions", 1, "--draws", 32)
        if self.tiny:
            sizes = ("--num-questions", 1, "--draws", 4, "--tasks", "openbookqa")
        ask("score", "--device", self.device, *sizes, "--repeats", 1)

    def measure_loader(self, ask: Ask) -> None:
        """How many tokens per second the loader can feed."""
        size = ("--megabytes", 1) if self.tiny else ()
        ask("data", "--part", "feed", *size, *self._repeats())

    def measure_checkpoints(self, ask: Ask) -> None:
        """How long training stands still for a checkpoint."""
        preset = ("--preset", "demo") if self.tiny else ("--preset", _PRESET)
        ask("checkpoint", "--device", self.device, *preset, "--repeats", 1)

    def compare_objectives(self, ask: Ask) -> None:
        """AR against masked diffusion on little text, of which many epochs are seen."""
        shards = self.pack / ("shards/texts" if self.tiny else "crossover/train")
        held_out = self.pack / ("shards/texts" if self.tiny else "crossover/valid")
        sweep = write_crossover_sweep(
            self.out / "crossover", shards, held_out, device=self.device, tiny=self.tiny
        )
        if ask("tools/sweep.py", "run", sweep) is not None:
            options = ("--report-only", "--best-size", "--out", sweep.parent)
            ask("tools/crossover.py", sweep, *options)

    def _sizes(self) -> tuple[object, ...]:
        if self.tiny:
            return _TINY
        return ("--preset", _PRESET, "--seq-length", _SEQ_LENGTH, "--vocab-size", _VOCAB_SIZE)

    def _repeats(self) -> tuple[object, ...]:
        return ("--repeats", 1 if self.tiny else 3)


def write_crossover_sweep(
    folder: Path, shards: Path, held_out: Path, *, device: Device, tiny: bool
) -> Path:
    """Writes the recipe of configs/crossover/gpu_5M.yaml for other shards.

    Args:
        folder: Gets two YAML files, and the runs.
        shards: To train on; their manifest names the vocabulary.
        held_out: To judge on.
        device: Where to train.
        tiny: The smallest sizes.

    Returns:
        The file of the sweep.

    Raises:
        DataError: The shards have no manifest.
    """
    base = yaml.safe_load((_RECIPES / "gpu_base.yaml").read_text("utf-8"))
    sweep = yaml.safe_load((_RECIPES / "gpu_5M.yaml").read_text("utf-8"))
    base["run"]["device"] = device
    base["data"] |= {"train": [{"path": str(shards)}], "valid": [{"path": str(held_out)}]}
    del base["data"]["tokenizer"]
    manifest = Manifest.read(manifest_path(shards))
    base["model"]["vocab_size"] = manifest.vocab_size
    field = "data.train.0.max_unique_tokens"
    sweep["set"][field] = min(sweep["set"][field], manifest.num_tokens)
    if tiny:
        base["model"] |= {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
        base["model"]["ffn_hidden_size"] = 32
        base["data"]["seq_length"] = 64
        base["validation"] = {"num_samples": 8}
        for fields in sweep["axes"]["objective"].values():
            fields |= {"schedule.epochs": 2, "validation.every_epochs": 1}
    sweep |= {"base": str(folder / "base.yaml"), "dir": str(folder / "runs")}
    for name, tree in (("base", base), ("sweep", sweep)):
        folder.mkdir(parents=True, exist_ok=True)
        write_text_whole(folder / f"{name}.yaml", yaml.safe_dump(tree))
    return folder / "sweep.yaml"


def _estimate(setting: Setting) -> int:
    config = bare_config(
        {**expand_preset(_PRESET), "vocab_size": _VOCAB_SIZE},
        seq_length=_SEQ_LENGTH,
        micro_batch_size=setting.micro_batch_size,
        parallel={"zero_stage": 1, "recompute": setting.recompute},
    )
    return estimate_memory(config, world_size=1, dtype="bf16").total_bytes


def _memory_bytes(environment: Report | None) -> float:
    if environment is None:
        return 0.0
    return float(environment["results"]["device"].get("memory_bytes", 0))
