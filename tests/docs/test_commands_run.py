"""Documented commands without a remark of what they need are run as printed, on little text."""

from __future__ import annotations

import re

import pytest
import yaml
import zstandard
from documented import REPO, list_blocks, list_pages
from world import World

# The demo on a corpus in seconds.
SHRUNK = {
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "vocab_size": 300,
    },
    "data": {"seq_length": 192},
    "schedule": {"steps": 4, "warmup_steps": 1},
    "validation": {"num_samples": 4},
}
CHEAPER = {
    "--workers 16": "--workers 2",
    "--valid-fraction 0.001": "--valid-fraction 0.1",
    "--vocab-size 4096": "--vocab-size 300",
    "step_00001400": "step_00000004",
    "--bootstrap 200": "--bootstrap 2",
    "token_reuse=4:1000": "token_reuse",
}
# Run by tests of their own.
ELSEWHERE = ("tutorial.md",)
BLOCKS = [
    block
    for page in list_pages()
    for block in list_blocks(page)
    if block.needs is None and page.name not in ELSEWHERE
]


@pytest.fixture(scope="module")
def demo_corpus(tmp_path_factory) -> World:
    """What the pages speak of: the corpus, the finished demo on it, and two recipes."""
    world = World(tmp_path_factory.mktemp("clone"))
    world.shrink_config("demo_corpus.yaml", **SHRUNK)
    world.run(
        ".venv/bin/python tools/demo_corpus.py --config configs/demo_corpus.yaml "
        "--corpus-root sources\n"
        "cp -r runs/demo-corpus/corpus corpus"
    )
    for file in (world.root / "corpus").glob("*.jsonl"):
        file.with_name(f"{file.name}.zst").write_bytes(zstandard.compress(file.read_bytes()))
    tree = yaml.safe_load((world.root / "configs/demo_corpus.yaml").read_text())
    for name in ("run", "pair"):
        tree["run"]["dir"] = f"runs/{name}"
        (world.root / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return world


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_a_block_of_commands_runs_as_printed(block, demo_corpus):
    text = block.text
    for word, other in CHEAPER.items():
        text = text.replace(word, other)
    shown = demo_corpus.run(text)
    assert "Traceback" not in shown


@pytest.mark.slow
def test_the_snippets_of_the_readme_run(demo_corpus):
    snippets = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
    for snippet in snippets:
        # Of the demo's own facts; the export of the corpus stands in for its model.
        code = snippet.replace("runs/demo/mdm/hf", "runs/demo-corpus/hf")
        path = demo_corpus.root / "snippet.py"
        path.write_text(code)
        shown = demo_corpus.run(f"PYTHONPATH={REPO} .venv/bin/python snippet.py")
        assert shown.count(" nats: ") == 3
