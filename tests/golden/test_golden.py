"""No number changes: see `freeze.py` for what is frozen and when it may be frozen anew."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import golden_adapter as adapter
import golden_numbers as numbers
import golden_runs as runs
import numpy as np
import pytest
from golden_numbers import Tree, assert_frozen, differences
from worlds import World

_TRAINED = [(layout, run) for layout, names in runs.TRAINED.items() for run in names]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all corpora."""
    folder = tmp_path_factory.mktemp("golden")
    adapter.write_shards(folder)
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The fixed model, as masked diffusion and as AR."""
    folder = tmp_path_factory.mktemp("exports")
    return {kind: adapter.write_export(folder, kind) for kind in ("mdm", "ar")}


@pytest.fixture(scope="module")
def trained(
    shards: Path, world_of: Callable[[int], World]
) -> Callable[[str], tuple[dict[str, Any], dict[str, Any]]]:
    """Training and initial weights in a layout, made once."""
    return cache(lambda layout: numbers.training_in(layout, shards, world_of))


def _frozen(file: str, name: str) -> Tree:
    tree = numbers.read(file)
    assert name in tree, f"{file}.json knows no {name}: freeze it"
    found: Tree = tree[name]
    return found


def test_golden_files_hold_what_is_compared_and_no_more() -> None:
    assert numbers.read("batches").keys() == runs.RUNS.keys()
    assert numbers.read("training").keys() == set(runs.TRAINED["one-process"])
    assert numbers.read("initial_weights").keys() == set(runs.INITIAL_WEIGHTS)
    scores, tokens = numbers.read("scores"), numbers.read("tokens")
    assert scores["requests"].keys() == runs.SCORINGS.keys()
    assert scores["windows"].keys() == runs.PERPLEXITIES.keys()
    assert tokens["commands"].keys() == runs.GENERATIONS.keys()
    assert tokens["reveals"].keys() == runs.REVEALS.keys()


@pytest.mark.parametrize("run", runs.RUNS)
def test_batches_are_those_of_before(run: str, shards: Path) -> None:
    assert_frozen(numbers.batches_of(run, shards), _frozen("batches", run), f"batches / {run}")


@pytest.mark.parametrize(("layout", "run"), _TRAINED)
def test_training_is_that_of_before_in_every_layout(
    layout: str, run: str, trained: Callable[[str], tuple[Tree, Tree]]
) -> None:
    found = trained(layout)[0][run]
    assert_frozen(found, _frozen("training", run), f"training / {run} / {layout}")


@pytest.mark.parametrize("run", runs.INITIAL_WEIGHTS)
@pytest.mark.parametrize("layout", ["one-process", "tp2", "pp2-zero2"])
def test_initial_weights_are_those_of_before_in_every_layout(
    layout: str, run: str, trained: Callable[[str], tuple[Tree, Tree]]
) -> None:
    found = trained(layout)[1][run]
    assert_frozen(found, _frozen("initial_weights", run), f"initial weights / {run} / {layout}")


@pytest.mark.parametrize("name", runs.SCORINGS)
def test_scores_are_those_of_before(name: str, exports: dict[str, Path]) -> None:
    found = numbers.scores_of(name, exports)
    assert_frozen(found, _frozen("scores", "requests")[name], f"scores / {name}")


@pytest.mark.parametrize("name", runs.PERPLEXITIES)
def test_perplexities_are_those_of_before(
    name: str, exports: dict[str, Path], shards: Path
) -> None:
    found = numbers.perplexity_of(name, exports, shards)
    assert_frozen(found, _frozen("scores", "windows")[name], f"perplexity / {name}")


@pytest.mark.parametrize("name", runs.GENERATIONS)
def test_generated_tokens_are_those_of_before(name: str, exports: dict[str, Path]) -> None:
    found = numbers.tokens_of(name, exports)
    assert_frozen(found, _frozen("tokens", "commands")[name], f"tokens / {name}")


@pytest.mark.parametrize("name", runs.REVEALS)
def test_steps_of_generation_are_those_of_before(name: str, exports: dict[str, Path]) -> None:
    found = numbers.reveals_of(name, exports)
    assert_frozen(found, _frozen("tokens", "reveals")[name], f"reveals / {name}")


def test_a_changed_number_is_named_and_a_rounding_is_not() -> None:
    frozen: Tree = {
        "losses": [4.0, 3.0],
        "mask": "bool[2] 0a",
        "standard_error": 0.1,
        "greedy": None,
    }
    assert not list(differences(frozen | {"losses": [4.0 * (1 + 1e-6), 3.0]}, frozen))
    assert not list(differences(frozen | {"standard_error": 0.1 * (1 + 1e-4)}, frozen))
    assert list(differences(frozen | {"losses": [4.0, 3.0003]}, frozen, "training / ar / tp2")) == [
        "training / ar / tp2 / losses [1]: 3.0003, frozen 3.0, off by 1.0e-04 of it"
    ]
    changes: list[Tree] = [
        {"losses": [4.0]},
        {"losses": [float("nan"), 3.0]},
        {"mask": "bool[2] 0b"},
        {"mask": None},
        {"best": False},
        {"more": 1},
    ]
    for change in changes:
        assert len(list(differences(frozen | change, frozen))) == 1, change
    assert list(differences({}, {"mask": 1}, "x")) == ["x / mask: is not there any more"]


def test_a_digest_tells_type_shape_and_order_of_bytes_do_not_matter() -> None:
    array = np.arange(6)
    assert numbers.digest(array.astype(">i8")) == numbers.digest(array)
    others = [array.astype("int32"), array.reshape(2, 3), array + 1]
    assert len({numbers.digest(one) for one in (array, *others)}) == 4
