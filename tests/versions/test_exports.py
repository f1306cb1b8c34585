"""Exports in other versions of transformers: the same numbers as in this environment's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_checkpoints import RandomSource, save_word_tokenizer, tiny_model

from megatron_mdm.hf.card import OLDEST_TRANSFORMERS
from megatron_mdm.hf.export import export_to_hf

PROGRAM = Path(__file__).with_name("use_exports.py")
VERSIONS = {
    # The oldest that is promised, and the last that copies only what the model's file imports.
    "4.46.3": ("huggingface-hub==0.36.2", "tokenizers==0.20.3"),
    "5.9.0": ("huggingface-hub==1.33.0", "tokenizers==0.22.2"),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("exports")
    save_word_tokenizer(root / "tokenizer")
    for name, changes in {"mdm": {}, "ar": {"is_causal": True, "num_query_groups": 2}}.items():
        saved = tiny_model(**changes)
        options = {"tokenizer_dir": root / "tokenizer", "eos_token_id": 0, "metadata": {}}
        options["chat_template"] = "w5 {{ messages[0].content }}{{ ' w6' * add_generation_prompt }}"
        export_to_hf(RandomSource(saved), saved, root / name, **options)
    return root


def use(exports: Path, folder: Path, packages: Path | None = None) -> dict:
    """Runs the program with the packages of a folder in front of this environment's."""
    folder.mkdir()
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules")}
    if packages is not None:
        environment["PYTHONPATH"] = str(packages)
    command = [sys.executable, PROGRAM, exports, folder / "found.pt"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "found.pt")


@pytest.fixture(scope="module")
def expected(exports, tmp_path_factory) -> dict[str, torch.Tensor]:
    return use(exports, tmp_path_factory.mktemp("here") / "use")["found"]


def test_the_oldest_version_is_the_one_that_cards_promise():
    assert next(iter(VERSIONS)).startswith(f"{OLDEST_TRANSFORMERS}.")


@pytest.mark.parametrize("version", VERSIONS)
def test_exports_are_the_same_models(other_transformers, exports, expected, tmp_path, version):
    packages = other_transformers((f"transformers=={version}", *VERSIONS[version]))
    result = use(exports, tmp_path / "use", packages)
    assert result["version"] == version
    assert result["found"].keys() == expected.keys()
    for name, tensor in result["found"].items():
        torch.testing.assert_close(tensor, expected[name], msg=f"{name} in {version}")
    found = result["found"]
    assert torch.equal(found["causal"], found["causal masked"])
    assert torch.equal(found["greedy"], found["greedy without a cache"])
    assert torch.equal(found["greedy"][:, 5:], found["greedy of ours"][:, 5:])
    torch.testing.assert_close(found["gradient True"], found["gradient False"])
    torch.testing.assert_close(found["resized"], found["logits"])
