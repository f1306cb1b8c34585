"""The manifest of a checkpoint: what it holds, in JSON with a digest of itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_mdm.config import ModelConfig
from megatron_mdm.config.objective import CHOSEN_OBJECTIVE, RunWay, RunWays, check_way
from megatron_mdm.core.errors import CheckpointError, find_remedy
from megatron_mdm.corpus.tokenizer_record import TokenizerRecord
from megatron_mdm.diffusion.attention_rules import FULL_ATTENTION, CausalAttention, FullAttention
from megatron_mdm.diffusion.interpolating import describe_process
from megatron_mdm.diffusion.interpolation import Interpolation
from megatron_mdm.diffusion.mixed_objective import describe_ways
from megatron_mdm.model.parameters import find_parameter

FORMAT_VERSION = 6
MANIFEST = "manifest.json"
# What is stored of every parameter, besides the optimizer's states: the float32 weight.
WEIGHT = "weight"
# What a user calls the weights that are trained, beside averages of them.
RAW = "raw"
# The digest of the manifest's own content, in the same JSON object.
_OWN_DIGEST = "manifest_sha256"


class FileRecord(BaseModel):
    """What a tensor file has to be.

    Attributes:
        num_bytes: Size.
        sha256: Digest of the content, in hexadecimal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bytes: int
    sha256: str


class SavedLayout(BaseModel):
    """The division of ranks that wrote a checkpoint.

    Attributes:
        world_size: Ranks in all.
        tensor_parallel_size: Ranks per layer: how many parts a split tensor has.
        pipeline_parallel_size: Pipeline stages.
        data_parallel_size: Replicas.
        zero_stage: ZeRO stage, 0 to 3.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    world_size: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    zero_stage: int = 0


class SavedOptimizer(BaseModel):
    """What an optimizer keeps.

    Attributes:
        states: Names of what is stored of parameters, in their shapes.
        by_role: Those of a role of which not all are stored; not written where there is none.
        numbers: What it keeps once for all parameters, such as a count of steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    states: tuple[str, ...] = ()
    by_role: dict[str, tuple[str, ...]] = {}
    numbers: dict[str, float] = {}


class SavedHookState(BaseModel):
    """Tensors that a hook keeps, in the shapes of the weights.

    Attributes:
        is_average: Are they an average of the weights, which the model can run with?
        about: What they are, in a few words.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    is_average: bool = False
    about: str = ""


class SavedAverage(BaseModel):
    """Checkpoints of a run that were averaged.

    Attributes:
        run: Folder of the run.
        steps: Optimizer steps of each, ascending.
        weights: Which weights of theirs: `raw`, or the name of an average.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    steps: tuple[int, ...]
    weights: str = RAW

    def describe(self) -> str:
        """What the weights are, in words."""
        kind = "weights" if self.weights == RAW else f"averages {self.weights!r}"
        steps = ", ".join(f"{step:,}" for step in self.steps)
        return f"the mean of the {kind} of {self.run} after steps {steps}"


class SavedEnvironment(BaseModel):
    """Threads and processors of a run's ranks, on which the last digits of sums depend.

    Attributes:
        threads: CPU threads of a process: the counts that occur, ascending.
        processors: Kinds of CPU, or of GPU, that occur, in alphabetical order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: list[int]
    processors: list[str]


class SavedOrder(BaseModel):
    """Where a run's sample order begins that had another mixture or length before.

    Attributes:
        sample: Samples before it.
        visits: Visits of each training source before it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample: int
    visits: tuple[int, ...]


class CheckpointManifest(BaseModel):
    """What a checkpoint holds.

    Attributes:
        format_version: Version of this layout of files.
        kind: `training`: weights and optimizer states of a run. `weights`: weights alone, at step
            0, of which `config` says the model, `objective.kind` and `data.seq_length`.
        step: Optimizer steps taken.
        consumed_samples: Samples trained on.
        layout: Division of ranks that wrote it.
        config: The run's resolved configuration.
        versions: Versions of the libraries that wrote it.
        environment: Threads and processors that computed it; None: not recorded, or weights alone.
        data_fingerprint: Content of the training data; the sample order refers to it.
        order_start: Where that order begins; None, and not written: at the first sample.
        tokenizer: What made the training data; None: not recorded, or weights alone.
        chat_template: Jinja template that told conversations; None: not recorded, or none.
        skipped_steps: Steps among those taken whose update was left out.
        optimizer: What the optimizer keeps; empty: weights alone.
        state: State of each hook of the training loop, by the hook's name.
        hook_states: Tensors that hooks keep of every parameter, by name; not written if none do.
        average_of: Of weights alone, the checkpoints whose mean they are; None, and not written:
            they are none.
        parameters: Global shape of every parameter.
        files: Size and digest of every tensor file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    kind: Literal["training", "weights"] = "training"
    step: int
    consumed_samples: int
    layout: SavedLayout = SavedLayout()
    config: dict[str, Any]
    versions: dict[str, str]
    environment: SavedEnvironment | None = None
    data_fingerprint: str
    order_start: SavedOrder | None = None
    tokenizer: TokenizerRecord | None = None
    chat_template: str | None = None
    skipped_steps: int = 0
    optimizer: SavedOptimizer = SavedOptimizer()
    state: dict[str, dict[str, Any]] = {}
    hook_states: dict[str, SavedHookState] = {}
    average_of: SavedAverage | None = None
    parameters: dict[str, list[int]] = {}
    files: dict[str, FileRecord] = {}

    @property
    def stored_kinds(self) -> tuple[str, ...]:
        """What is stored of parameters."""
        return (WEIGHT, *self.optimizer.states, *map(name_hook_kind, self.hook_states))

    @property
    def averages(self) -> dict[str, str]:
        """Averages of the weights by name, and what each one is."""
        return {name: state.about for name, state in self.hook_states.items() if state.is_average}

    def list_kinds(self, name: str) -> tuple[str, ...]:
        """What is stored of a parameter; a KeyError where no model here has it."""
        states = self.optimizer.by_role.get(find_parameter(name).role, self.optimizer.states)
        return (WEIGHT, *states, *map(name_hook_kind, self.hook_states))


class SavedModel(NamedTuple):
    """The model that a checkpoint holds.

    Attributes:
        model: Its sizes.
        kind: Masked diffusion, or autoregressive; None: no export and no sampler can run it.
        seq_length: Tokens per sequence in training.
        noise: Where it is not masks alone.
        run_ways: What else it learned, and where it predicts; None: what `kind` says alone.
    """

    model: ModelConfig
    kind: Literal["mdm", "ar"] | None
    seq_length: int
    noise: Interpolation | None = None
    run_ways: RunWays | None = None

    @property
    def is_causal(self) -> bool:
        """Does attention see no later position?

        Raises:
            CheckpointError: Only its own objective knows how it attends.
        """
        if self.kind is None:
            raise CheckpointError(
                "The model was trained with an objective or a forward process that exports and "
                "generation cannot run: let runs_as of its section say mdm or ar if it runs as "
                "one, or go on with training and validation alone."
            )
        return self.kind == "ar"

    @property
    def attention(self) -> FullAttention:
        """Which tokens see which, where the model is run as `kind` says.

        Raises:
            CheckpointError: As `is_causal`.
        """
        return CausalAttention() if self.is_causal else FULL_ATTENTION

    def to_tree(self) -> dict[str, Any]:
        """The `config` of a manifest of weights: the same keys as a run's."""
        process = {} if self.noise is None else {"process": describe_process(self.noise)}
        objective = {"kind": "ar" if self.is_causal else "mdm", **process}
        return {
            "model": self.model.model_dump(mode="json"),
            "objective": objective if self.run_ways is None else describe_ways(self.run_ways),
            "data": {"seq_length": self.seq_length},
        }

    @property
    def is_shifted(self) -> bool:
        """As it runs, does the hidden state before a mask predict the token there?"""
        return self.kind == "mdm" and self.run_ways is not None and self.run_ways.is_shifted

    @property
    def ways(self) -> tuple[RunWay, ...]:
        """All that it learned, the usual one first; a CheckpointError as of `is_causal`."""
        return ("ar" if self.is_causal else "mdm",) if self.run_ways is None else self.run_ways.ways

    def run_as(self, way: RunWay | None, name: str) -> SavedModel:
        """The model as it runs in a way of its own; errors as of `check_way` and `is_causal`."""
        return self._replace(kind="mdm" if check_way(way, self.ways, name) == "mdm" else "ar")


def name_hook_kind(state: str) -> str:
    """What tensor files call a state that a hook keeps of each parameter."""
    return f"hook.{state}"


def is_hook_kind(kind: str) -> bool:
    """Is it what `name_hook_kind` gives?"""
    return kind.startswith(name_hook_kind(""))


def find_weights_kind(manifest: CheckpointManifest, weights: str, path: Path) -> str:
    """Finds what tensor files call the weights that a user chooses.

    Args:
        manifest: The checkpoint's.
        weights: `raw`, or the name of an average.
        path: Its folder.

    Raises:
        CheckpointError: It holds no such average.
    """
    if weights == RAW:
        return WEIGHT
    if weights not in manifest.averages:
        held = " and ".join(manifest.averages)
        found = f"holds {held}" if held else "holds none"
        raise CheckpointError(
            f"{path} holds no average {weights!r} of the weights (it {found}): choose one that it "
            f"holds, or {RAW} for the weights that were trained."
        )
    return name_hook_kind(weights)


def format_manifest(manifest: CheckpointManifest) -> str:
    """Formats a manifest as it is written: JSON with a digest of itself.

    Returns:
        The content of `manifest.json`.
    """
    tree = manifest.model_dump(mode="json")
    for name in ("order_start", "hook_states", "average_of"):
        if not tree[name]:
            del tree[name]
    if not manifest.optimizer.by_role:
        del tree["optimizer"]["by_role"]
    return json.dumps(tree | {_OWN_DIGEST: _compute_digest(tree)}, indent=2) + "\n"


def read_manifest(path: Path) -> CheckpointManifest:
    """Reads and checks a manifest.

    Returns:
        What the checkpoint should hold; its files are not looked at.

    Raises:
        CheckpointError: It is missing, damaged, altered or of another version.
    """
    file = path / MANIFEST
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} is missing, so {path.name} is not a whole checkpoint: use another."
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}): {find_remedy(error)}, or use another "
            "checkpoint."
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}): use another checkpoint.") from None
    # First, since another version may have other fields.
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format_version={version}, but this version reads {FORMAT_VERSION}: use "
            "the version that wrote it."
        )
    digest = tree.pop(_OWN_DIGEST, None) if isinstance(tree, dict) else None
    try:
        manifest = CheckpointManifest.model_validate(tree)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"]) or "all of it"
        raise CheckpointError(
            f"{file} is damaged ({field}: {problem['msg']}): use another checkpoint."
        ) from None
    if digest != _compute_digest(tree):
        raise CheckpointError(
            f"{file} is damaged or was altered (its content has sha256 {_compute_digest(tree)} "
            f"where it says {digest}): use another checkpoint."
        )
    return manifest


def read_saved_model(manifest: CheckpointManifest) -> SavedModel:
    """Reads the model that a checkpoint's configuration describes.

    Returns:
        Sizes, objective and sequence length.

    Raises:
        ConfigError: Its objective lives elsewhere, and cannot be imported.
        CheckpointError: It describes none that this version knows.
    """
    tree = manifest.config
    try:
        objective, seq_length = CHOSEN_OBJECTIVE.read(tree["objective"]), tree["data"]["seq_length"]
        model = ModelConfig.model_validate(tree["model"])
        noise = objective.find_noise(model.num_text_tokens)
        return SavedModel(model, objective.runs_as, seq_length, noise, objective.run_ways)
    except KeyError as error:
        problem = f"{error} is missing"
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"model.{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    raise CheckpointError(
        f"The config in {MANIFEST} describes no model ({problem}): use the version that wrote it."
    )


def _compute_digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
