from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer

from megatron_mdm.corpus import preprocess as module
from megatron_mdm.corpus.options import PreprocessOptions
from megatron_mdm.corpus.tokenizer import END_OF_TEXT

REPOSITORY = Path(__file__).resolve().parents[3]
TEXTS = ["def f():\n    return 1\n", "", f"a {END_OF_TEXT} b", "日本語 🙂", "x" * 500] * 12


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def preprocess(inputs, tokenizer_name, output_prefix, **options):
    options = PreprocessOptions(**options)
    return module.preprocess(inputs, tokenizer_name, output_prefix, options).manifests[0]


def files(prefix):
    return [Path(f"{prefix}.{extension}").read_bytes() for extension in ("bin", "idx", "json")]


def documents_of(prefix):
    return [ids.tolist() for ids in IndexedDataset(str(prefix))]


def encode_alone(tokenizer, text):
    backend = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    backend.encode_special_tokens = True
    return [*backend.encode(text, add_special_tokens=False).ids, 0]


def names(prefix):
    return sorted(path.name for path in prefix.parent.iterdir()) if prefix.parent.exists() else []


def run(*arguments, cwd, env=None):
    command = [sys.executable, REPOSITORY / "tools" / arguments[0], *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)


def assert_one_error_line(result, start):
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {start}")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith(".\n")
