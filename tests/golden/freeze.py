"""Rewrites the golden files beside it: `.venv/bin/python tests/golden/freeze.py [NAME ...]`.

Golden files freeze the numbers of the code across a redesign, and nothing else: batches, losses,
gradient norms, initial weights, scores and generated tokens of small runs. They do not say that a
number is right, which is what the other tests are for. They may be rewritten only when a number
changes on purpose, in a commit that says why. A redesign edits `golden_adapter.py` instead.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
NAMES = ("batches", "training", "initial_weights", "scores", "tokens")


def main() -> None:
    """Makes the numbers anew and writes them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    names = parser.parse_args().names or NAMES
    if unknown := set(names) - set(NAMES):
        parser.error(f"{min(unknown)} is no golden file: use some of {', '.join(NAMES)}")
    sys.path[1:1] = [str(_TESTS), str(_TESTS.parent)]
    from threads import TEST_THREADS

    # Read once, when torch and transformers are imported.
    os.environ["OMP_NUM_THREADS"] = str(TEST_THREADS)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="golden-") as name:
        folder = Path(name)
        os.environ["HF_MODULES_CACHE"] = str(folder / "modules")
        for file, tree in _made(set(names), folder).items():
            _write(file, tree)


def _write(file: str, tree: object) -> None:
    from golden_numbers import FOLDER, as_text

    (FOLDER / f"{file}.json").write_text(as_text(tree) + "\n")


def _made(names: set[str], folder: Path) -> dict[str, object]:
    import golden_adapter as adapter
    import golden_numbers as numbers
    import golden_runs as runs
    from worlds import World

    adapter.write_shards(folder)
    made: dict[str, object] = {}
    if "batches" in names:
        made["batches"] = {run: numbers.batches_of(run, folder) for run in runs.RUNS}
    if names & {"scores", "tokens"}:
        exports = {kind: adapter.write_export(folder, kind) for kind in ("mdm", "ar")}
        made["scores"] = {
            "requests": {name: numbers.scores_of(name, exports) for name in runs.SCORINGS},
            "windows": {
                name: numbers.perplexity_of(name, exports, folder) for name in runs.PERPLEXITIES
            },
        }
        made["tokens"] = {
            "commands": {name: numbers.tokens_of(name, exports) for name in runs.GENERATIONS},
            "reveals": {name: numbers.reveals_of(name, exports) for name in runs.REVEALS},
        }
    if names & {"training", "initial_weights"}:
        # Every layout is compared with one process.
        world = World(1, folder / "world")
        (folder / "world").mkdir()
        made["training"], made["initial_weights"] = numbers.training_in(
            "one-process", folder, lambda size: world
        )
        world.stop()
    return {name: tree for name, tree in made.items() if name in names}


if __name__ == "__main__":
    main()
