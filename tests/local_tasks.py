"""Tasks of the harness that need no network: texts of the tiny tokenizer's words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml


def _words(generator: np.random.Generator, low: int, high: int) -> str:
    return " ".join(
        f"w{number}" for number in generator.integers(2, 19, generator.integers(low, high))
    )


def write_tasks(folder: Path, num_documents: int = 10) -> Path:
    """Writes the tasks local_choice, local_word, local_text and local_story.

    Args:
        folder: An empty folder.
        num_documents: Of each task.

    Returns:
        The folder, for --include-path.
    """
    generator = np.random.default_rng(5)
    lines = []
    for _ in range(num_documents):
        question, last = _words(generator, 3, 9), _words(generator, 1, 2)
        choices = [_words(generator, 1, 6) for _ in range(3)]
        answer = int(generator.integers(0, 3))
        text = _words(generator, 20, 70)
        lines.append(
            {"question": question, "choices": choices, "answer": answer, "last": last, "text": text}
        )
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "metadata": {"version": 1},
    }
    tasks = {
        "local_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}],
        },
        "local_word": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{question}}",
            "doc_to_target": " {{last}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
        "local_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
        "local_story": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{last}}",
            "generation_kwargs": {"until": ["w7"], "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in tasks.items():
        tree = {"task": name, **common, **task}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return folder
