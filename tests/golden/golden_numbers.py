"""The numbers that are frozen: how they are made, kept in files and compared.

What is whole numbers, or sums and products of them that IEEE 754 rounds alike everywhere, is frozen
as a digest and compared exactly. The rest is frozen as numbers and compared to a tolerance.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import golden_adapter as adapter
import golden_runs as runs
import numpy as np
from numpy.typing import NDArray
from weight_pieces import assemble
from worlds import World

Tree = dict[str, Any]

FOLDER = Path(__file__).parent
# Another processor, and another layout, adds float32 numbers in another order. Five steps make at
# most 4e-6 of that in losses and norms, and what a redesign could do wrong moves them by far more.
TOLERANCE = 2e-5
# Gaps and errors of means are differences of losses, and may be as small as they like.
_DIFFERENCES, _TOLERANCE_OF_DIFFERENCES_NATS = ("_error", "/gap_"), 2e-5
# Runs of one task: under ZeRO-3 each leaves threads behind, and ranks with many make way for new
# ones between tasks.
_RUNS_A_TASK = 6
_TASK_SECONDS = 300.0


def digest(array: NDArray[Any]) -> str:
    """Names the content of an array, the same on any machine.

    Args:
        array: Of numbers or bools.

    Returns:
        Its type, its shape and the start of a SHA-256 of its little-endian bytes.
    """
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    content = hashlib.sha256(little.tobytes()).hexdigest()
    return f"{array.dtype.name}{list(array.shape)} {content[:32]}"


def batches_of(run: str, shards: Path) -> Tree:
    """What a run reads and masks.

    Args:
        run: Its name.
        shards: Folder of the corpora.

    Returns:
        The order of the whole run, and digests of whole global batches.

    Raises:
        AssertionError: Two replicas do not share the global batch out.
    """
    tree = runs.tree_of(run, shards)
    order, fingerprint, rates = adapter.order_of(tree)
    steps = range(runs.NUM_BATCH_STEPS)
    alone = adapter.micro_batches(tree, steps, 0, 1)
    replicas = [adapter.micro_batches(tree, steps, rank, 2) for rank in range(2)]
    for step in steps:
        # Micro batch k of replica r is block 2 k + r.
        taken = [
            micro for pair in zip(*(one[step] for one in replicas), strict=True) for micro in pair
        ]
        for number, (whole, part) in enumerate(zip(alone[step], taken, strict=True)):
            for name in whole:
                message = f"{run}: block {number} of step {step} of two replicas, {name}"
                np.testing.assert_array_equal(part[name], whole[name], err_msg=message)
    batches = [_joined(micros) for micros in alone]
    if run in runs.ROUNDED_WEIGHTS:
        batches = [_with_rounded_weights(batch) for batch in batches]
    return {
        "fingerprint": fingerprint,
        "learning_rates": rates,
        "order": {name: digest(array) for name, array in order.items()},
        "steps": [
            {
                name: digest(value) if isinstance(value, np.ndarray) else value
                for name, value in batch.items()
            }
            for batch in batches
        ],
    }


def _joined(micros: list[adapter.Arrays]) -> dict[str, Any]:
    """A global batch."""
    batch = {}
    for name in dict.fromkeys(name for micro in micros for name in micro):
        known = next(micro[name] for micro in micros if name in micro)
        # A micro batch whose windows are of one document each may leave their numbers out.
        arrays = [micro.get(name, np.zeros_like(known)) for micro in micros]
        batch[name] = np.concatenate(arrays)
    return batch


def _with_rounded_weights(batch: dict[str, Any]) -> dict[str, Any]:
    """Weights as numbers, one per sample, and exactly where they are not 0."""
    weights_BS = batch.pop("weights")
    batch["is_weighted"] = weights_BS != 0
    batch["weight_of_samples"] = weights_BS.max(axis=1).astype(float).tolist()
    # Each token of a sample weighs the same, so that nothing is lost.
    assert (np.where(batch["is_weighted"], weights_BS.max(axis=1)[:, None], 0) == weights_BS).all()
    return batch


def training_in(layout: str, shards: Path, world: Callable[[int], World]) -> tuple[Tree, Tree]:
    """Trains in a layout.

    Args:
        layout: Its name.
        shards: Folder of the corpora.
        world: The world of a size.

    Returns:
        For each run losses, gradient norms and validation; and for some the initial weights, put
        together from the parts of all ranks.
    """
    size, _ = runs.LAYOUTS[layout]
    names = runs.TRAINED[layout]
    training, weights = {}, {}
    for start in range(0, len(names), _RUNS_A_TASK):
        trees = {
            run: runs.tree_of(run, shards, layout) for run in names[start : start + _RUNS_A_TASK]
        }
        ranks = world(size).run(
            adapter.train_on_ranks,
            timeout_seconds=_TASK_SECONDS,
            trees=trees,
            with_weights=list(runs.INITIAL_WEIGHTS),
        )
        for run in trees:
            pieces = [piece for rank in ranks for piece in rank[run].pop("initial_weights", [])]
            if pieces:
                weights[run] = {name: _frozen(w) for name, w in assemble(pieces).items()}
            training[run] = ranks[0][run]
            for number, rank in enumerate(ranks):
                assert rank[run] == training[run], f"rank {number} tells other numbers of {run}"
    return training, weights


def _frozen(weight: NDArray[np.float32]) -> Tree:
    """An initial weight as a digest, and its outermost values as numbers.

    Normal numbers are products of whole numbers and constants, the same everywhere, but for those
    beyond 3.65 standard deviations: they come from a logarithm, whose last digit is the C
    library's.
    """
    is_outer = np.abs(weight) > 3.6 * weight.std(dtype=np.float64)
    if not weight.std():
        is_outer[:] = False
    return {
        "digest": digest(np.where(is_outer, np.float32(0), weight)),
        "outermost": weight[is_outer].astype(float).tolist(),
    }


def scores_of(name: str, exports: dict[str, Path]) -> list[list[Any]]:
    """Scores of requests by the fixed model.

    Args:
        name: Of the settings.
        exports: The model as `mdm` and as `ar`.
    """
    kind, settings = runs.SCORINGS[name]
    # A causal model predicts nothing without a context.
    asked = [one for one in runs.REQUESTS if kind == "mdm" or one[0]]
    return adapter.scores(exports[kind], asked, settings)


def perplexity_of(name: str, exports: dict[str, Path], shards: Path) -> Tree:
    """Losses of held-out windows by the fixed model.

    Args:
        name: Of the options.
        exports: The model as `mdm` and as `ar`.
        shards: Folder of the corpora.
    """
    kind, options = runs.PERPLEXITIES[name]
    return adapter.losses_of_windows(exports[kind], shards, options)


def tokens_of(name: str, exports: dict[str, Path]) -> list[list[int]]:
    """Tokens that the fixed model generates.

    Args:
        name: Of the options.
        exports: The model as `mdm` and as `ar`.
    """
    kind, options = runs.GENERATIONS[name]
    frozen = [
        word
        for name, value in runs.FROZEN_DEFAULTS[kind].items()
        for word in (f"--{name}", str(value))
    ]
    return adapter.generated(exports[kind], [*runs.GENERATION_OPTIONS, *frozen, *options])


def reveals_of(name: str, exports: dict[str, Path]) -> Tree:
    """How the fixed model comes to its tokens, one step after the other.

    Args:
        name: Of the options.
        exports: The model as `mdm` and as `ar`.
    """
    kind, options = runs.REVEALS[name]
    tokens, probabilities = adapter.reveals(
        exports[kind],
        runs.REVEAL_PROMPTS,
        runs.REVEAL_OPTIONS | runs.FROZEN_DEFAULTS[kind] | options,
    )
    return {
        "steps": [digest(one) for one in tokens],
        "tokens": tokens[-1].tolist(),
        "probabilities": probabilities,
    }


def read(name: str) -> Tree:
    """A golden file.

    Args:
        name: Without its ending.
    """
    tree: Tree = json.loads((FOLDER / f"{name}.json").read_text())
    return tree


def as_text(tree: Any, indent: str = "") -> str:
    """JSON with sorted keys and a line for each list of plain values.

    Args:
        tree: JSON values.
        indent: Of the lines after the first.
    """
    inner = indent + " "
    if isinstance(tree, dict) and tree:
        items = [f"{json.dumps(key)}: {as_text(tree[key], inner)}" for key in sorted(tree)]
        return "{\n" + ",\n".join(inner + item for item in items) + f"\n{indent}}}"
    if isinstance(tree, list) and any(isinstance(item, dict | list) for item in tree):
        items = [as_text(item, inner) for item in tree]
        return "[\n" + ",\n".join(inner + item for item in items) + f"\n{indent}]"
    return json.dumps(tree)


def differences(found: Any, frozen: Any, place: str = "") -> Iterator[str]:
    """Where numbers differ from the frozen ones.

    Args:
        found: JSON values.
        frozen: What they should be: floats to the tolerance, anything else exactly.
        place: Name of the whole.

    Yields:
        A sentence for each difference.
    """
    if isinstance(found, dict) and isinstance(frozen, dict):
        for key in sorted(found.keys() | frozen.keys()):
            here = f"{place} / {key}"
            if key not in frozen:
                yield f"{here}: is not in the golden file"
            elif key not in found:
                yield f"{here}: is not there any more"
            else:
                yield from differences(found[key], frozen[key], here)
    elif isinstance(found, list) and isinstance(frozen, list) and len(found) == len(frozen):
        for number, pair in enumerate(zip(found, frozen, strict=True)):
            yield from differences(*pair, f"{place} [{number}]")
    elif isinstance(found, float) and isinstance(frozen, float):
        is_difference = any(part in place for part in _DIFFERENCES)
        nats = _TOLERANCE_OF_DIFFERENCES_NATS if is_difference else 0.0
        if not math.isclose(found, frozen, rel_tol=TOLERANCE, abs_tol=nats):
            share = abs(found - frozen) / abs(frozen) if frozen else math.inf
            yield f"{place}: {found!r}, frozen {frozen!r}, off by {share:.1e} of it"
    elif type(found) is not type(frozen) or found != frozen:
        yield f"{place}: {found!r}, frozen {frozen!r}"


def assert_frozen(found: Any, frozen: Any, place: str) -> None:
    """Compares with a golden file.

    Args:
        found: JSON values.
        frozen: What they should be.
        place: What they are, for the message.

    Raises:
        AssertionError: They differ; it says where.
    """
    __tracebackhide__ = True
    # As they would be read: numpy's numbers and tuples become plain ones.
    lines = list(differences(json.loads(json.dumps(found)), frozen, place))
    more = [f"... and {len(lines) - 12} more"] if len(lines) > 12 else []
    head = f"{len(lines)} frozen numbers changed, which tests/golden/freeze.py is about:"
    assert not lines, "\n".join([head, *lines[:12], *more])
