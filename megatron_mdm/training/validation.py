"""Held-out loss on fixed windows and fixed noise: the same number for every layout."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mdm.config import Config
from megatron_mdm.core.errors import DataError
from megatron_mdm.data.choice import choose_windows
from megatron_mdm.data.loader import Batch
from megatron_mdm.data.windows import Windows
from megatron_mdm.diffusion.likelihood import NoiseBank
from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.diffusion.samples import LossKind, Objective, Sample, TextWindow
from megatron_mdm.distributed.mesh import Mesh
from megatron_mdm.reporting.judged_windows import JudgedWindows
from megatron_mdm.training.data_plan import DataContent
from megatron_mdm.training.epochs import Epochs, parse_fraction
from megatron_mdm.training.hooks import Hook, TrainingRun
from megatron_mdm.training.judging import PartEnded, judge_averages, list_loss_metrics
from megatron_mdm.training.signals import StopRequests

Split = Literal["valid", "train"]
Report = Callable[[DataError | None], object]

# Each split has a choice of windows of its own, should the two ever be one set of shards.
_CHOICE_DOMAINS: dict[Split, int] = {"valid": 0x7A11D, "train": 0x72A14}
# By default judging training windows takes so much of a run's time at most, and fewer than these
# would say nothing. A training step costs three forward passes; MDM has two losses, and AR judges
# the same windows.
_TRAIN_SHARE, _LEAST_TRAIN_WINDOWS, _STEP_PASSES, _NUM_LOSSES = 0.02, 16, 3, 2


class Evaluator(Protocol):
    """What holds the weights that are judged, such as `training.engine.Engine`."""

    mesh: Mesh

    def evaluate(self, batch: Batch) -> Tensor | None:
        """Weighted losses of each sequence of a micro batch; None before the last stage."""
        ...


class Validator:
    """Judges some windows: the negative log-likelihood of each.

    There is no dropout. Where an objective has several losses, each draw of a window is judged by
    each of them.

    Args:
        config: The run.
        windows: The windows to choose from.
        content: Their fingerprint, which only some ranks have read.
        split: Whose windows they are.
        number: How many; None: as `validation` says.
        judge: Objective that judges them; None: that of the run's own loss.
    """

    def __init__(
        self,
        config: Config,
        windows: Windows,
        content: str,
        split: Split = "valid",
        number: int | None = None,
        judge: Objective | None = None,
    ) -> None:
        settings = config.validation
        self._windows = windows
        self._micro_batch = config.batch.micro_batch_size
        self._objective = judge or next(iter(build_objective(config).judges.values()))
        self._attention = self._objective.attention
        if number is None:
            number = settings.num_samples if split == "valid" else settings.num_train_samples or 0
        # Windows from all over the shards, the same ones every time.
        key = (settings.noise_seed, _CHOICE_DOMAINS[split])
        self._chosen = choose_windows(windows, number, key)
        self.num_samples = len(self._chosen.window_N)
        told = content.encode() + self._chosen.window_N.astype("<i8").tobytes()
        self._identity = hashlib.sha256(told).hexdigest()
        self._seed = settings.noise_seed
        self._draws = settings.draws_per_sample if self._objective.has_noise else 1
        self._bank = NoiseBank(self.num_samples, self._draws, self._seed)
        self._kinds = self._objective.loss_kinds

    def __call__(
        self, engine: Evaluator, report: Report = lambda failure: None
    ) -> tuple[JudgedWindows, int]:
        """Judges the windows on all ranks.

        Args:
            engine: The engine whose weights are judged.
            report: Called before each micro batch, and once before, with what kept this rank from
                reading the next one. What it raises ends the estimate; it has to raise on all ranks
                in the same call, at the latest in the one after a failure was reported.

        Returns:
            Losses of the windows, and how many tokens are predicted in them, a draw counted once;
            the same on every rank.

        Raises:
            DataError: This rank cannot read a window and `report` raised nothing.
        """
        mesh = engine.mesh
        size = self.num_samples * self._draws
        # Losses of every form, draw by draw; then the predicted tokens of each window.
        # On the device, so that the host can read on while it computes.
        num_values = len(self._kinds) * size + 1
        values = torch.zeros(num_values, dtype=torch.float64, device=mesh.device)
        for slots, batch in self._read_batches(mesh, report):
            losses_B = engine.evaluate(batch.samples)
            if losses_B is not None and mesh.reports_loss and slots:
                values[slots[0] : slots[-1] + 1] = losses_B[: len(slots)]
                values[-1] += batch.num_predicted
        dist.all_reduce(values)
        *losses, num_predicted = values.cpu().numpy()
        losses_KN = np.reshape(losses, (len(self._kinds), -1, self._draws)).mean(axis=2)
        judged = JudgedWindows(
            step=0,
            windows=self._identity,
            document_N=self._chosen.document_N,
            noise_seed=self._seed if self._objective.has_noise else None,
            draws_per_sample=self._draws,
            nll_N=losses_KN[0],
            nll_given_first_N=losses_KN[-1],
        )
        return judged, round(num_predicted)

    def read_chosen(self) -> Iterator[TextWindow]:
        """Reads the windows that are judged, one after the other; a DataError where it cannot."""
        return map(self._windows.read_window, self._chosen.window_N.tolist())

    def _read_batches(self, mesh: Mesh, report: Report) -> Iterator[tuple[list[int], _Micro]]:
        """Reads one batch ahead, so that all ranks hear of a failure before one lacks a batch."""
        calls = list(self._divide_slots(mesh.dp.rank, mesh.dp.size))
        following = self._read(calls[0])
        report(following if isinstance(following, DataError) else None)
        for number, slots in enumerate(calls):
            batch = following
            if number + 1 < len(calls) and not isinstance(batch, DataError):
                following = self._read(calls[number + 1])
            report(following if isinstance(following, DataError) else None)
            if isinstance(batch, DataError):
                raise batch
            yield slots, batch

    def _read(self, slots: list[int]) -> _Micro | DataError:
        # A shorter batch is filled up: pipeline stages expect one shape.
        filled = (slots + [0] * self._micro_batch)[: self._micro_batch]
        try:
            windows = [self._read_window(slot) for slot in filled]
        except DataError as error:
            return error
        samples = [self._sample(*place) for place in zip(filled, windows, strict=True)]
        # Each window is counted where its first draw is.
        num_predicted = sum(
            self._objective.count_predictions(window)
            for slot, window in zip(slots, windows, strict=False)
            if slot < self.num_samples * self._draws and slot % self._draws == 0
        )
        return _Micro(Batch.stack(samples), num_predicted)

    def _divide_slots(self, rank: int, size: int) -> Iterator[list[int]]:
        total = len(self._kinds) * self.num_samples * self._draws
        # Every replica makes the same number of calls: ZeRO-3 gathers weights in each.
        calls = -(-total // (self._micro_batch * size))
        for call in range(calls):
            start = (call * size + rank) * self._micro_batch
            yield list(range(start, min(start + self._micro_batch, total)))

    def _locate(self, slot: int) -> tuple[LossKind, int, int]:
        """Loss, window and draw."""
        kind, rest = divmod(slot, self.num_samples * self._draws)
        return self._kinds[kind], *divmod(rest, self._draws)

    def _read_window(self, slot: int) -> TextWindow:
        return self._windows.read_window(int(self._chosen.window_N[self._locate(slot)[1]]))

    def _sample(self, slot: int, window: TextWindow) -> Sample:
        kind, sample, draw = self._locate(slot)
        found = self._objective.held_out_sample(window, kind, self._bank.draw(sample, draw))
        return found._replace(attention=self._attention)


class _Micro(NamedTuple):
    """A micro batch, and the predicted tokens of those windows whose first draw it holds."""

    samples: Batch
    num_predicted: int


class Validation:
    """What a validation measures: the held-out loss, that of training windows, and their gap.

    Args:
        config: The run.
        train: Training windows, of which `count_train_samples` are judged.
        valid: Held-out windows, if there are any.
        content: Fingerprints of both.
        num_steps: Steps of the run.

    Attributes:
        further: Held-out windows as the last call judged them by losses beside the run's own.
    """

    def __init__(
        self,
        config: Config,
        train: Windows,
        valid: Windows | None,
        content: DataContent,
        num_steps: int = 0,
    ) -> None:
        self._noise_seed = config.validation.noise_seed
        self.further: list[JudgedWindows] = []
        # By the name of what judges; the first gives the run's own loss.
        self._judges: dict[Split, dict[str, Validator]] = {}
        objectives = build_objective(config).judges
        if valid is not None:
            self._judges["valid"] = {
                name: Validator(config, valid, content.valid, judge=one)
                for name, one in objectives.items()
            }
        number = 0
        if valid is not None or config.validation.num_train_samples is not None:
            number = count_train_samples(config, train.num_windows, num_steps)
        if number:
            self._judges["train"] = {
                name: Validator(config, train, content.train, "train", number, one)
                for name, one in objectives.items()
            }

    @property
    def is_empty(self) -> bool:
        """Is there nothing to measure?"""
        return not self._judges

    def read_held_out(self) -> Iterator[TextWindow]:
        """Reads the held-out windows that are judged; none without held-out shards."""
        return self._get_own("valid").read_chosen() if "valid" in self._judges else iter(())

    def judge_held_out(self, engine: Evaluator, report: Report) -> JudgedWindows:
        """Judges the held-out windows alone, of which there have to be some, as a call does."""
        return self._get_own("valid")(engine, report)[0]

    def _get_own(self, split: Split) -> Validator:
        return next(iter(self._judges[split].values()))

    def __call__(
        self, engine: Evaluator, report: Report = lambda failure: None
    ) -> tuple[dict[str, float | int], JudgedWindows | None]:
        """Measures on all ranks.

        Args:
            engine: The engine whose weights are judged.
            report: As `Validator` calls it.

        Returns:
            Metrics by name, and the held-out windows if there are any; the same on every rank.

        Raises:
            DataError: This rank cannot read a window and `report` raised nothing.
        """
        found: dict[str, float | int] = {"valid/noise_seed": self._noise_seed}
        own: dict[Split, JudgedWindows] = {}
        self.further = []
        for split, judges in self._judges.items():
            for name, judge in judges.items():
                judged, num_predicted = judge(engine, report)
                if split not in own:
                    own[split] = judged
                    found |= {"valid/num_tokens": num_predicted} if split == "valid" else {}
                    found |= list_loss_metrics(split, judged)
                elif split == "valid":
                    self.further.append(replace(judged, judge=name))
                if len(judges) > 1:
                    found |= list_loss_metrics(split, judged, f"as_{name}_")
        if len(own) > 1:
            found |= _compute_gap(own["valid"], own["train"])
        return found, own.get("valid")


def count_train_samples(config: Config, num_windows: int, num_steps: int) -> int:
    """Counts the training windows that a validation judges.

    Args:
        config: The run.
        num_windows: Windows of a pass over its data.
        num_steps: Its steps.

    Returns:
        `validation.num_train_samples`, or what takes little time, the same for every objective.
    """
    settings, batch = config.validation, config.batch.global_batch_size
    if settings.num_train_samples is not None:
        return settings.num_train_samples
    between = settings.every_steps or num_steps
    if settings.every_epochs is not None:
        between = int(settings.every_epochs * num_windows / batch)
    trained = min(between, num_steps) * batch * _STEP_PASSES
    number = int(_TRAIN_SHARE * trained / (settings.draws_per_sample * _NUM_LOSSES))
    return min(number, settings.num_samples) if number >= _LEAST_TRAIN_WINDOWS else 0


class Validating(Hook):
    """Validates when it is due. A signal ends a validation early, and so does unreadable data.

    Args:
        validation: What is measured.
        epochs: The run's epochs.
        stops: Hears signals, and tells all ranks of one that cannot read. None: nobody listens, and
            a rank that cannot read ends the run.
    """

    name = "validation"

    def __init__(self, validation: Validation, epochs: Epochs, stops: StopRequests | None) -> None:
        self._validation = validation
        self._epochs = epochs
        self._stops = stops

    def after_step(self, run: TrainingRun) -> None:
        """Validates if it is due.

        Raises:
            DataError: On every rank: the last validation could not be made.
        """
        if self._validation.is_empty or not self._is_due(run):
            return
        with run.paused():
            self._validate(run)

    def _is_due(self, run: TrainingRun) -> bool:
        settings = run.config.validation
        if settings.every_epochs is None or run.is_last_step:
            return run.is_due(settings.every_steps)
        return self._epochs.ends_with(run.step, parse_fraction(settings.every_epochs))

    def _validate(self, run: TrainingRun) -> None:
        stops = self._stops

        def report(failure: DataError | None) -> None:
            run.mark("validating")
            if stops is None:
                return
            found = stops.poll_in_part(failure is not None)
            if found:
                stopped_by = None if found is True else found
                raise PartEnded(stopped_by, None if failure is None else str(failure))

        try:
            found, judged = self._validation(run.engine, report)
            run.judged_further = self._validation.further
            if judged is not None:
                found |= judge_averages(
                    run, lambda: self._validation.judge_held_out(run.engine, report), judged
                )
        except PartEnded as ended:
            run.stopped_by = ended.stopped_by
            if ended.stopped_by is None and stops is not None:
                self._go_on_without(run, stops.gather_reason(ended.reason))
            return
        record = {**run.measure_progress(), **found}
        for hook in run.hooks:
            hook.after_validation(run, record, judged)

    @staticmethod
    def _go_on_without(run: TrainingRun, reason: str) -> None:
        failure = f"validation at step {run.step} was left out: {reason}"
        run.say(failure)
        if run.is_last_step:
            raise DataError(failure)


def _compute_gap(held_out: JudgedWindows, training: JudgedWindows) -> dict[str, float]:
    """The held-out loss less that of training windows."""
    both = [judged.mean("nll") for judged in (held_out, training)]
    found = {"valid/gap_nats_per_token": both[0].mean - both[1].mean}
    # Windows of both are independent. Where they share noise the errors are a little less.
    errors = {
        "valid/gap_standard_error": math.hypot(*(loss.standard_error for loss in both)),
        "valid/gap_clustered_error": math.hypot(*(loss.clustered_error for loss in both)),
    }
    return found | {name: error for name, error in errors.items() if math.isfinite(error)}
