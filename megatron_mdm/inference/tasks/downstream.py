"""Tasks on the weights under training: a hook that evaluates them as `mdm evaluate` would.

Each rank takes a copy of the whole model, and the first deals the requests out to all.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import logging
import os
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from tqdm import tqdm

from megatron_mdm.checkpoint.manifest import RAW, SavedModel
from megatron_mdm.checkpoint.whole_weights import gather_weights
from megatron_mdm.core.errors import ConfigError, DataError, MdmError, first_line
from megatron_mdm.corpus.tokenizer import load_tokenizer
from megatron_mdm.corpus.tokenizer_record import find_recorded_tokenizer
from megatron_mdm.diffusion.samplers import StepCallback
from megatron_mdm.hf.in_memory import build_exported_model, build_model_without_weights
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.models import SamplingBatch
from megatron_mdm.inference.options import DTYPES, ScoringOptions
from megatron_mdm.inference.passes import Judgement, Passes
from megatron_mdm.inference.requests import ScoringSettings
from megatron_mdm.inference.tasks.command import choose_recipes
from megatron_mdm.inference.tasks.evaluation import (
    Entry,
    LoadedTasks,
    evaluate_task,
    find_tasks,
)
from megatron_mdm.inference.tasks.harness import HarnessModel, HarnessWorker
from megatron_mdm.inference.tasks.recipe import TaskSettings
from megatron_mdm.inference.texts import wrap_tokenizer
from megatron_mdm.reporting import task_curves
from megatron_mdm.reporting.task_curves import TASKS
from megatron_mdm.training.epochs import Epochs, parse_fraction
from megatron_mdm.training.hooks import Hook, TrainingRun

if TYPE_CHECKING:
    from megatron_mdm.config import Config
    from megatron_mdm.inference.downstream import DownstreamConfig
    from megatron_mdm.training.plan import RunPlan

_OPTION = re.compile(r"--([a-z][a-z-]*)")


class _Vocabulary(NamedTuple):
    """The tokenizer of the data, as ranks can send it.

    Attributes:
        content: Its tokenizer.json.
        eod_token: The token that ends a document.
        eod_token_id: Its id.
    """

    content: str
    eod_token: str
    eod_token_id: int

    def wrap(self) -> Any:
        """The tokenizer that models are asked with."""
        return wrap_tokenizer(Tokenizer.from_str(self.content), self.eod_token)


class Downstream(Hook):
    """Evaluates tasks when they are due, and logs each metric with its standard error.

    Args:
        section: What, when and how.
        config: The run.

    Raises:
        ConfigError: The recipe cannot be read, or its settings do not fit each other.
    """

    name = "downstream"

    def __init__(self, section: DownstreamConfig, config: Config) -> None:
        self._section = section
        if section.weights != RAW:
            _check_average(section, config)
            self.name = f"downstream_{section.weights}"
        self._saved = SavedModel(
            config.model,
            config.objective.runs_as,
            config.data.seq_length,
            config.objective.find_noise(config.model.num_text_tokens),
        )
        scoring = ScoringOptions(estimator=section.estimator, draws=section.draws)
        base = TaskSettings(
            ScoringSettings(seed=section.seed, max_tokens=section.max_tokens),
            batch_size=section.batch_size,
        )
        with _tell_of_fields():
            self._recipes = choose_recipes(
                None if section.recipe is None else Path(section.recipe),
                None if section.tasks is None else ",".join(section.tasks),
                scoring,
                section.num_fewshot,
            )
            self._settings = {
                name: recipe.build_settings(base) for name, recipe in self._recipes.items()
            }
        # Of the first rank, which reads tasks and tokenizer.
        self._manager: LoadedTasks | None = None
        self._vocabulary: _Vocabulary | None = None

    def check_plan(self, plan: RunPlan) -> None:
        """Finds the tokenizer, loads the tasks, and tries each with a model that guesses.

        Raises:
            ConfigError: The model cannot be run outside of training, nothing names the tokenizer,
                or a task is not there or not whole.
            DataError: The tokenizer is gone, or another one.
        """
        # Raises where only its own objective knows how the model attends.
        _ = self._saved.is_causal
        if os.environ.get("RANK", "0") != "0":
            return
        record = plan.data.tokenizer
        if record is None:
            raise ConfigError(
                "hooks.kind=downstream needs the tokenizer that made the data, and neither the "
                "shards nor data.tokenizer name one: set data.tokenizer."
            )
        handle = load_tokenizer(find_recorded_tokenizer(record), record.eod_token)
        content = handle.backend.to_str()
        self._vocabulary = _Vocabulary(content, handle.eod_token, handle.eod_token_id)
        folder = self._section.include_path
        with _tell_of_fields():
            self._manager = find_tasks(
                list(self._recipes), None if folder is None else Path(folder)
            )
            with _keep_process(torch.device("cpu")):
                self._try_tasks(self._manager, self._vocabulary)

    def after_step(self, run: TrainingRun) -> None:
        """Evaluates if it is due.

        Raises:
            DataError: On every rank: the evaluation at the end of the run could not be made.
        """
        if not self._is_due(run):
            return
        with run.paused(), _keep_process(run.mesh.device):
            found = self._evaluate(run)
        if isinstance(found, str):
            failure = f"the tasks at step {run.step} were left out: {found}"
            if run.is_last_step:
                raise DataError(failure)
            run.say(failure)
            return
        run.log(found)
        run.say(_format_line(run.step, found))

    def _try_tasks(self, manager: LoadedTasks, vocabulary: _Vocabulary) -> None:
        """Evaluates the first document of each task with a model that guesses."""
        model = build_model_without_weights(self._saved, vocabulary.eod_token_id)
        worker = HarnessWorker(_Guesser.hold(model, vocabulary.wrap(), "the model"))
        guesser = HarnessModel.from_worker(worker, worker.make_pool())
        for name, recipe in self._recipes.items():
            try:
                evaluate_task(guesser, name, recipe, self._settings[name], manager, limit=1)
            except MdmError:
                raise
            # The harness and the task's own code raise many things.
            except Exception as error:
                raise ConfigError(
                    f"the task {name} cannot be evaluated ({type(error).__name__}: "
                    f"{first_line(error)}): mend its YAML file or its data, or leave it out."
                ) from error

    def _is_due(self, run: TrainingRun) -> bool:
        every = self._section.every_epochs
        if every is None or run.is_last_step:
            return run.is_due(self._section.every_steps)
        epochs = Epochs(run.plan.data.train.num_windows, run.config.batch.global_batch_size)
        return epochs.ends_with(run.step, parse_fraction(every))

    def _evaluate(self, run: TrainingRun) -> dict[str, float] | str:
        """Evaluates on all ranks; returns the metrics, or why there are none, on every rank."""
        with contextlib.ExitStack() as stack:
            if self._section.weights != RAW:
                state = run.list_weight_states().get(self._section.weights)
                if state is None or not state.is_average:
                    return f"there is no average {self._section.weights} of the weights yet"
                stack.enter_context(run.engine.states.exchange(state.pieces))
            model = self._copy_model(run)
        worker = HarnessWorker(model)
        pool = worker.make_pool()
        box: list[Any] = [None]

        def work() -> None:
            try:
                box[0] = self._run_tasks(HarnessModel.from_worker(worker, pool))
            except MdmError as error:
                box[0] = str(error)
            # Whatever a task of somebody else's raises need not end the run.
            except Exception as error:
                box[0] = f"{type(error).__name__}: {first_line(error)}"

        pool.run_on_driver(work)
        dist.broadcast_object_list(box, src=0)
        found: dict[str, float] | str = box[0]
        return found

    def _copy_model(self, run: TrainingRun) -> ExportedModel:
        run.mark("gathering weights for tasks")
        box: list[Any] = [self._vocabulary]
        dist.broadcast_object_list(box, src=0)
        vocabulary: _Vocabulary = box[0]
        engine, device = run.engine, run.mesh.device
        model = build_exported_model(
            self._saved,
            gather_weights(self._saved.model, engine.shards, engine.states, run.mesh),
            eos_token_id=vocabulary.eod_token_id,
            dtype=DTYPES[self._section.dtype] or torch.float32,
            device=device,
        )
        held = _WatchedModel.hold(model, vocabulary.wrap(), f"the model at step {run.step}")
        held.run = run
        return held

    def _run_tasks(self, model: HarnessModel) -> dict[str, float]:
        assert self._manager is not None
        found: dict[str, float] = {}
        group = TASKS if self._section.weights == RAW else f"{TASKS}_{self._section.weights}"
        for name, recipe in self._recipes.items():
            entry = evaluate_task(
                model,
                name,
                recipe,
                self._settings[name],
                self._manager,
                limit=self._section.limit,
            )
            found |= list_task_metrics(name, entry, group)
        return found


class _WatchedModel(ExportedModel):
    """Tells the watchdog of every pass."""

    run: TrainingRun

    def judge(self, passes: Passes) -> Judgement:
        self.run.mark("evaluating tasks")
        return super().judge(passes)

    def complete(self, batch: SamplingBatch, callback: StepCallback | None = None) -> torch.Tensor:
        self.run.mark("evaluating tasks")
        return super().complete(batch, callback)


class _Guesser(ExportedModel):
    """A model without weights, which answers anyway."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def judge(self, passes: Passes) -> Judgement:
        return Judgement.make_blank(len(passes.targets_N))

    def complete(self, batch: SamplingBatch, callback: StepCallback | None = None) -> torch.Tensor:
        if self.facts.is_causal:
            new_BN = batch.tokens_BS.new_zeros(len(batch.tokens_BS), batch.decoding.max_new_tokens)
            return torch.cat([batch.tokens_BS, new_BN], dim=1)
        return batch.tokens_BS.masked_fill(batch.tokens_BS == self.facts.mask_token_id, 0)


def list_task_metrics(name: str, entry: Entry, group: str = TASKS) -> dict[str, float]:
    """Lists the figures of a task as a run logs them.

    Args:
        name: Of the task, or of a group of tasks, of which the mean is listed if it has one.
        entry: What `evaluate_task` found.
        group: Stands before every name.

    Returns:
        `GROUP/TASK/METRIC`, with `_standard_error`, over documents and masks, and `_noise`,
        that of masks alone, where there are such.
    """
    results: Mapping[str, Mapping[str, Any]] = entry["results"]
    found: dict[str, float] = {}
    for task in [name] if name in results else results:
        for label, value in results[task].items():
            metric, _, kind = label.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            title = f"{group}/{task}/{metric}{'' if kind == 'none' else f'_{kind}'}"
            found[title] = float(value)
            errors = {
                "standard_error": results[task].get(f"{metric}_stderr,{kind}"),
                "noise": entry["noise"].get(task, {}).get(metric),
            }
            for what, error in errors.items():
                if isinstance(error, int | float) and np.isfinite(error):
                    found[f"{title}_{what}"] = float(error)
    return found


def _format_line(step: int, found: Mapping[str, float]) -> str:
    parts = [f"tasks at step {step}"]
    for name in task_curves.list_task_metrics([found]):
        title = task_curves.title_task_metric(name)
        parts.append(f"{title} {task_curves.format_task_metric(found, name)}")
    return " | ".join(parts)


def _check_average(section: DownstreamConfig, config: Config) -> None:
    before = itertools.takewhile(lambda one: one is not section, config.hooks)
    names = [name for one in before for name in one.list_weight_states()]
    if section.weights not in names:
        there = ", ".join(names) or "none"
        raise ConfigError(
            f"hooks.kind=downstream.weights={section.weights} has to be an average of a hook that "
            f"stands before it, of which there are {there}: put such a hook above, or leave "
            "weights out."
        )


@contextlib.contextmanager
def _tell_of_fields() -> Iterator[None]:
    """Errors that name options of mdm evaluate name the fields instead."""
    try:
        yield
    except ConfigError as error:
        told = _OPTION.sub(lambda found: found[1].replace("-", "_"), str(error))
        if told.startswith("hooks.kind=downstream"):
            raise
        raise ConfigError(f"hooks.kind=downstream: {told}") from error


@contextlib.contextmanager
def _keep_process(device: torch.device) -> Iterator[None]:
    """Keeps what the harness changes or prints from the run: it seeds all generators."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    logger, made = logging.getLogger("lm_eval"), tqdm.__init__
    level = logger.level
    logger.setLevel(logging.ERROR)
    # Progress bars would stand between the run's lines, which do not go through sys.stdout.
    tqdm.__init__ = functools.partialmethod(made, disable=True)  # type: ignore[assignment]
    try:
        with torch.random.fork_rng(devices), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = made  # type: ignore[method-assign]
        logger.setLevel(level)
        random.setstate(python)
        np.random.set_state(numpy)
