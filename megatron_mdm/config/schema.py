"""The run's configuration: typed, frozen, every field with its unit, no unknown keys."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from megatron_mdm.config.data import DataConfig
from megatron_mdm.config.finetuning import FinetuningConfig
from megatron_mdm.config.hook import CHOSEN_HOOK, HookConfig
from megatron_mdm.config.model import ModelConfig
from megatron_mdm.config.objective import CHOSEN_OBJECTIVE, ObjectiveConfig, refuse_with_responses
from megatron_mdm.config.optimizer import CHOSEN_OPTIMIZER, OptimizerConfig
from megatron_mdm.config.presets import find_convention
from megatron_mdm.config.schedule import CHOSEN_SCHEDULE, ScheduleConfig
from megatron_mdm.config.section import (
    FilePath,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from megatron_mdm.core.errors import ConfigError, join_problems, note_problem


class RunConfig(Section):
    """Where the run lives and what makes it reproducible."""

    dir: FilePath = Field(description="Folder of the run: config, metrics, checkpoints, report.")
    seed: NonNegativeInt = Field(
        default=0, description="Seeds initial weights, sample order, noise and dropout."
    )
    initial_weights: str | None = Field(
        default=None,
        description="Checkpoint whose weights the run begins with: a run's, or one that "
        "mdm convert wrote; none: drawn from the seed.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: CUDA when a GPU is visible, otherwise CPU."
    )
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="Dtype of forward and backward; auto: bf16 on CUDA, fp32 on CPU. "
        "The optimizer always keeps fp32 master weights.",
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Norms, rotary embeddings and activations through torch.compile, a kernel "
        "each; auto: on CUDA. On a CPU it needs a C++ compiler, and up to a minute at the start.",
    )
    num_threads: PositiveInt | None = Field(
        default=None,
        description="CPU threads of each process; none: the cores that it may use, shared among "
        "the ranks of its machine. Sums of other numbers of threads can differ in the last digit.",
    )


class BatchConfig(Section):
    """Batch sizes in samples (windows)."""

    micro_batch_size: PositiveInt = Field(
        default=1, description="Samples per forward pass and rank."
    )
    global_batch_size: PositiveInt = Field(description="Samples per optimizer step.")
    prediction_capacity: PositiveInt | None = Field(
        default=None,
        description="The output layer's positions of a micro batch are padded to a multiple of so "
        "many, so that shapes repeat; none: exactly those that count.",
    )


class ParallelConfig(Section):
    """How the model and the optimizer are laid out over ranks."""

    tensor_model_parallel_size: PositiveInt = Field(default=1, description="Ranks per layer.")
    pipeline_model_parallel_size: PositiveInt = Field(default=1, description="Pipeline stages.")
    sequence_parallel: bool = Field(
        default=False, description="Split norms and residuals along the sequence over TP ranks."
    )
    virtual_pipeline_model_parallel_size: PositiveInt = Field(
        default=1,
        description="Parts of the model that each pipeline stage holds, interleaved; more than 1 "
        "shortens the pipeline's idle time.",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1, description="DeepSpeed ZeRO: 1 shards optimizer, 2 gradients, 3 weights."
    )
    overlap_gradient_reduction: bool = Field(
        default=False,
        description="ZeRO 1 and 2 without pipeline stages: reduce gradients while the backward "
        "pass goes on. DeepSpeed has had races there (its issues 5545 and 8061): compare the first "
        "steps with a run without.",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="What the backward pass recomputes instead of keeping. selective: outputs of "
        "norms and activations, which cost next to nothing; full: everything but the input of "
        "each layer, for a third more time.",
    )


class ValidationConfig(Section):
    """Held-out loss with a fixed bank of noise.

    At most one of every_steps and every_epochs.
    """

    every_steps: PositiveInt | None = Field(
        default=None, description="Validate every so many steps, and at the end; none: at the end."
    )
    every_epochs: PositiveFloat | None = Field(
        default=None,
        description="Validate every so many passes over all training windows, and at the end; "
        "may be a fraction.",
    )
    num_samples: PositiveInt = Field(default=256, description="Windows of the held-out shards.")
    num_train_samples: NonNegativeInt | None = Field(
        default=None,
        description="Windows of the training data that are judged in the same way, so that the gap "
        "to the held-out loss is known; none: as many as num_samples, or fewer, so that they take "
        "2% of the run's time at most; 0: not any, as where 2% are less than 16 windows, or "
        "nothing is held out.",
    )
    draws_per_sample: PositiveInt = Field(default=1, description="Noise draws per window.")
    noise_seed: NonNegativeInt = Field(
        default=0, description="Seed of the noise bank and the choice of windows."
    )

    @model_validator(mode="after")
    def _check_interval(self) -> Self:
        if self.every_steps is not None and self.every_epochs is not None:
            raise ValueError(
                f"validation.every_steps={self.every_steps} and "
                f"validation.every_epochs={self.every_epochs} are both set: keep one."
            )
        return self


class CheckpointConfig(Section):
    """Saving and resuming."""

    every_steps: PositiveInt | None = Field(
        default=None, description="Save every so many steps, and at the end; none: at the end."
    )
    resume: Literal["auto", "never", "required"] = Field(
        default="auto",
        description="auto: go on from the latest checkpoint in run.dir if there is one.",
    )
    keep_last: PositiveInt | None = Field(
        default=None, description="Whole checkpoints to keep, the newest; none: all."
    )
    keep_every_steps: PositiveInt | None = Field(
        default=None, description="Keep also those of every so many steps."
    )
    background: bool = Field(
        default=False, description="Write while training goes on, from a copy in CPU memory."
    )
    on_write_error: Literal["stop", "continue"] = Field(
        default="stop",
        description="When a checkpoint cannot be written: end the run, or warn and train on.",
    )
    on_damage: Literal["previous", "refuse"] = Field(
        default="previous",
        description="When the latest checkpoint is damaged: go on from the one before, or refuse.",
    )


class FaultsConfig(Section):
    """What a run does about bad numbers and silent ranks."""

    max_skipped_steps: PositiveInt = Field(
        default=10,
        description="Steps with a loss or gradient that is not finite are skipped; after so many "
        "in a row the run stops and saves nothing.",
    )
    loss_spike_factor: Annotated[float, Field(gt=1)] | None = Field(
        default=None,
        description="Skip also a step whose loss is so many times its moving average; none: off.",
    )
    hang_timeout_seconds: PositiveFloat | None = Field(
        default=1800.0,
        description="End the run when a rank makes no progress for so long; none: wait for ever.",
    )


class ReportingConfig(Section):
    """Console, JSONL (always), W&B and TensorBoard."""

    log_every_steps: PositiveInt = Field(default=1, description="Log every so many steps.")
    wandb: Literal["off", "offline", "online", "required"] = Field(
        default="off",
        description="W&B mode. Where the server cannot be reached, online goes on offline and "
        "required ends the run.",
    )
    wandb_project: str = Field(default="megatron_mdm", description="W&B project.")
    tensorboard: bool = Field(default=False, description="Write TensorBoard events.")
    peak_tflops: PositiveFloat | None = Field(
        default=None,
        description="Peak of one rank's device in TFLOP/s; default: known GPUs by name, "
        "otherwise a matmul measured at the start.",
    )


class Config(Section):
    """A whole run."""

    run: RunConfig
    model: ModelConfig
    objective: Annotated[ObjectiveConfig, CHOSEN_OBJECTIVE] = Field(
        default_factory=CHOSEN_OBJECTIVE.read_default
    )
    finetuning: FinetuningConfig = FinetuningConfig()
    data: DataConfig
    batch: BatchConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: Annotated[OptimizerConfig, CHOSEN_OPTIMIZER] = Field(
        default_factory=CHOSEN_OPTIMIZER.read_default
    )
    schedule: Annotated[ScheduleConfig, CHOSEN_SCHEDULE]
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    reporting: ReportingConfig = ReportingConfig()
    hooks: list[Annotated[HookConfig, CHOSEN_HOOK]] = Field(
        default=[], description="What else takes part in the run, in this order."
    )

    @model_validator(mode="before")
    @classmethod
    def _say_which_flops(cls, sections: Any) -> Any:
        """Writes the family's count of N beside a budget, so that every copy of it says so."""
        tree = sections if isinstance(sections, dict) else {}
        schedule, model = tree.get("schedule"), tree.get("model")
        if not (isinstance(schedule, dict) and isinstance(model, dict)):
            return sections
        if schedule.get("flops") is None or schedule.get("flops_parameters") is not None:
            return sections
        preset = model.get("preset")
        counted = find_convention(preset if isinstance(preset, str) else None)
        return {**tree, "schedule": {**schedule, "flops_parameters": counted}}

    @model_validator(mode="before")
    @classmethod
    def _complete_objective(cls, sections: Any) -> Any:
        tree = sections if isinstance(sections, dict) else {}
        batch = tree.get("batch")
        micro = batch.get("micro_batch_size", 1) if isinstance(batch, dict) else None
        try:
            objective = CHOSEN_OBJECTIVE.read(tree["objective"])
        except (KeyError, ConfigError, PydanticCustomError, ValidationError):
            # Said where the section is read.
            return sections
        if not isinstance(micro, int):
            return sections
        return {**tree, "objective": objective.complete(micro)}

    @model_validator(mode="after")
    def _check_across_sections(self) -> Self:
        problems: list[str] = []
        checks = [
            self._check_optimizer,
            self._check_length,
            self._check_weights,
            self._check_time_embedding,
        ]
        if self.finetuning.enabled:
            checks.append(self._check_finetuning)
        for check in checks:
            with note_problem(problems):
                check()
        with note_problem(problems):
            self.objective.check(self.data, self.finetuning)
        with note_problem(problems):
            batch = self.batch
            self.objective.check_batch(batch.micro_batch_size, batch.global_batch_size)
        if problems:
            raise ValueError(join_problems(problems))
        return self

    def _check_optimizer(self) -> None:
        if self.optimizer.needs_whole_parameters and self.parallel.zero_stage:
            raise ValueError(
                f"optimizer.kind={self.optimizer.kind} works on whole parameters, which "
                f"parallel.zero_stage={self.parallel.zero_stage} cuts into flat pieces: use "
                "parallel.zero_stage=0."
            )

    def _check_length(self) -> None:
        sources, schedule = self.data.train, self.schedule
        fields = ("steps", "tokens", "epochs", "flops")
        given = [name for name in fields if getattr(schedule, name)]
        all_stated = all(source.epochs for source in sources)
        if given and all_stated:
            raise ValueError(
                f"schedule.{given[0]}={getattr(schedule, given[0])} and the epochs that every "
                f"source of data.train states both fix the run's length: leave out "
                f"schedule.{given[0]}, or the epochs of one source."
            )
        if not given and not all_stated:
            raise ValueError(
                "schedule needs exactly one of steps, tokens, epochs and flops, but none is set: "
                "set one, or state epochs for every source of data.train."
            )

    def _check_weights(self) -> None:
        sources = self.data.train
        weighted = [source for source in sources if source.weight]
        bare = [source for source in sources if not source.weight and not source.epochs]
        if weighted and bare:
            raise ValueError(
                f"data.train gives {weighted[0].path} a weight and {bare[0].path} neither a weight "
                "nor epochs: give each source one of them, or none a weight."
            )

    def _check_time_embedding(self) -> None:
        if not self.model.time_embedding:
            return
        noise = self.objective.find_noise(self.model.num_text_tokens)
        if noise is None or noise.at(0.5).uniform == 0:
            raise ValueError(
                "model.time_embedding=true tells the model how noisy a text is, and where the "
                "noise is masks alone, or there is none, its best predictor does not depend on "
                "that (arXiv 2406.03736): use objective.process.kind=hybrid or uniform, or leave "
                "model.time_embedding out."
            )

    def _check_finetuning(self) -> None:
        fields: dict[str, tuple[object, object]] = {
            "data.attention": (self.data.attention, "window"),
        }
        if not self.data.repeats_windows:
            fields["data.order"] = (self.data.order, "shuffle")
        for index, source in enumerate(self.data.train):
            limit = source.max_unique_tokens
            fields[f"data.train.{index}.max_unique_tokens"] = (limit, None)
        refuse_with_responses(self.objective.kind, fields)
