"""The hooks of a run, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_mdm.checkpoint.hook_states import load_hook_state
from megatron_mdm.checkpoint.manifest import CheckpointManifest
from megatron_mdm.checkpoint.storage import CheckpointReader, name_checkpoint
from megatron_mdm.config import Config
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.distributed.mesh import Mesh
from megatron_mdm.reporting.metrics import MetricsLogger
from megatron_mdm.training.baselines import CompareWithCounting
from megatron_mdm.training.epochs import EpochLoss, Epochs
from megatron_mdm.training.guard import StepGuard
from megatron_mdm.training.hooks import Hook, TrainingRun, read_state
from megatron_mdm.training.logs import Log
from megatron_mdm.training.recount import Predictions
from megatron_mdm.training.saving import Checkpoints, StopOnRequest
from megatron_mdm.training.signals import StopRequests
from megatron_mdm.training.throughput import Throughput
from megatron_mdm.training.validation import Validating, Validation

if TYPE_CHECKING:
    from megatron_mdm.training.plan import RunPlan

_BUILT_IN: tuple[type[Hook], ...] = (
    Predictions,
    EpochLoss,
    Throughput,
    Log,
    CompareWithCounting,
    StepGuard,
    Checkpoints,
    Validating,
    StopOnRequest,
)


def list_hooks(
    plan: RunPlan, mesh: Mesh, logger: MetricsLogger | None, stops: StopRequests
) -> list[Hook]:
    """Makes the hooks of a run. Every rank calls it.

    They call their collectives in this order, the same on every rank. Hooks that count and measure
    stand before the log, and those that may end the run before the one that saves it.
    """
    data = plan.data
    epochs = Epochs(data.train.num_windows, plan.config.batch.global_batch_size)
    content = data.read_content()
    validation = Validation(plan.config, data.train, data.valid, content, plan.num_steps)
    checkpoints = Checkpoints(plan, mesh)
    return [
        Predictions(plan, mesh),
        EpochLoss(epochs, plan.first_step, mesh.device),
        Throughput(plan.config, plan.device, plan.dtype, mesh.world_size, data.head_share),
        *plan.hooks,
        Log(plan, logger),
        CompareWithCounting(plan, validation),
        StepGuard(plan.config.faults),
        checkpoints,
        Validating(validation, epochs, stops),
        StopOnRequest(stops, checkpoints),
    ]


def build_own_hooks(config: Config) -> tuple[Hook, ...]:
    """Makes the hooks that the configuration adds.

    Returns:
        In the order of the section `hooks`.

    Raises:
        ConfigError: One cannot take part.
    """
    hooks: list[Hook] = []
    taken = {kind.name for kind in _BUILT_IN}
    states: set[str] = set()
    for number, section in enumerate(config.hooks):
        field = f"hooks.{number}.kind={section.kind}"
        hook = section.build(config)
        if not isinstance(hook, Hook):
            raise ConfigError(
                f"{field} builds a {type(hook).__name__}, which is no hook: let its build return "
                "what derives from megatron_mdm.training.hooks:Hook."
            )
        if hook.name in taken:
            raise ConfigError(
                f"{field} has the name {hook.name!r} of another hook of the run, and a checkpoint "
                "keeps states by name: give it another name."
            )
        read_state(hook, field)
        for state in section.list_weight_states():
            if state in states:
                raise ConfigError(
                    f"{field} keeps {state!r} of every weight, and so does a hook before it: give "
                    "it another name."
                )
            states.add(state)
        taken.add(hook.name)
        hooks.append(hook)
    return tuple(hooks)


def begin_hooks(run: TrainingRun) -> list[str]:
    """Lets the hooks begin, with the state that the run's checkpoint kept of them.

    Returns:
        Remarks, as `load_states`.

    Raises:
        CheckpointError: The checkpoint lacks what a hook keeps of the weights.
    """
    for hook in run.hooks:
        hook.begin(run)
    plan, engine = run.plan, run.engine
    if plan.saved is None or plan.resume_from is None:
        return []
    remarks = load_states(run.hooks, plan.saved)
    kept = run.list_weight_states()
    if kept:
        reader = CheckpointReader(plan.resume_from)
        for name, state in kept.items():
            load_hook_state(reader, engine.shards, engine.states, name, state)
    return remarks


def load_states(hooks: Sequence[Hook], saved: CheckpointManifest) -> list[str]:
    """Gives hooks the state that a checkpoint kept of them.

    Returns:
        Remarks on hooks that have a state and find none, and begin anew.
    """
    remarks = []
    for hook in hooks:
        if hook.name in saved.state:
            hook.load_state_dict(saved.state[hook.name])
        elif hook.state_dict():
            name = name_checkpoint(saved.step)
            remarks.append(f"{name} has no state of the hook {hook.name}: it begins anew")
    return remarks
