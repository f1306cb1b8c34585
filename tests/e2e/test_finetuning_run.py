"""Fine-tuning as a user does it: conversations, shards, a run that goes on, an export, answers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml
from commands import NUM_STEPS, REPO, Run, pretrain, run, run_all, torchrun
from transformers import AutoTokenizer

from megatron_mdm.corpus.conversations import PLAIN_CHAT_TEMPLATE
from megatron_mdm.reporting.metrics import read_metrics

pytestmark = pytest.mark.slow

LOSS, NLL = "train/loss_nats_per_token", "valid/nll_nats_per_token"


@pytest.fixture(scope="module")
def pairs(recipe, tmp_path_factory):
    """Shards of 120 pairs, some of them with two answers."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = [{"prompt": f"{n} twice:", "response": f" {n}{n}"} for n in range(80)]
    for n in range(20):
        roles = ("user", "assistant", "user", "assistant")
        texts = (f"{n}?", f"{n}!", "again?", f"{n}{n}!")
        messages = [
            {"role": role, "content": text} for role, text in zip(roles, texts, strict=True)
        ]
        lines.append({"messages": messages})
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = run(
        "tools/prepare_finetuning.py",
        *("--input", path, "--tokenizer", recipe.parent / "tokenizer"),
        *("--output-prefix", folder / "chats", "--valid-fraction", "0.15"),
    ).succeeded()
    assert "tokens of prompts" in made.output
    return folder / "chats"


def finetuning(pairs, weights_of, *overrides) -> list[str]:
    return [
        f"data.train=[{{path: {pairs}}}]",
        f"data.valid=[{{path: {pairs}-valid}}]",
        f"run.initial_weights={weights_of}",
        "data.seq_length=64",
        "objective.stochastic_length_ratio=0",
        *overrides,
    ]


@pytest.fixture(scope="module")
def tuned(pairs, whole_runs, recipe, tmp_path_factory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("tuned")
    own = {
        "mdm": ["finetuning.fill_to=12", "finetuning.prompt_dropout=0.1"],
        "ar": [*whole_runs["ar"].overrides],
    }
    overrides = {
        kind: finetuning(pairs, whole_runs[kind].dir, *own[kind]) for kind in ("mdm", "ar")
    }
    results = run_all(
        *(
            pretrain(recipe, root / kind, *overrides[kind], script=f"finetune_{kind}")
            for kind in ("mdm", "ar")
        )
    )
    return {
        kind: Run(root / kind, recipe, overrides[kind], result.succeeded())
        for kind, result in zip(("mdm", "ar"), results, strict=True)
    }


def curve(run_dir):
    entries = list(read_metrics(run_dir / "metrics.jsonl"))
    return [entry[LOSS] for entry in entries if LOSS in entry], [
        entry[NLL] for entry in entries if NLL in entry
    ]


@pytest.mark.parametrize("kind", ["mdm", "ar"])
def test_a_run_begins_with_the_weights_and_learns_responses(tuned, kind):
    losses, held_out = curve(tuned[kind].dir)
    assert len(losses) == NUM_STEPS
    assert losses[-1] < losses[0]
    assert held_out[-1] < held_out[0]


def test_a_stopped_run_goes_on_exactly_and_under_another_layout(tuned, tmp_path):
    one = tuned["mdm"]
    same, divided = (one.stopped_at_half(tmp_path / name) for name in ("same", "divided"))
    command = pretrain(one.recipe, same, *one.overrides, script="finetune_mdm")
    assert "other conditions" not in run(*command).succeeded().output
    command = pretrain(one.recipe, divided, *one.overrides, script="finetune_mdm")
    told = torchrun(2, *command, "parallel.tensor_model_parallel_size=2").succeeded().output
    layout = "ranks 1 -> 2, parallel.tensor_model_parallel_size 1 -> 2; the run goes on, equal to"
    assert told.count(f"other conditions than those of step_00000004: {layout}") == 1
    assert curve(same) == curve(one.dir)
    for found, expected in zip(curve(divided), curve(one.dir), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_tuned_model_is_exported_answers_and_is_evaluated(tuned, tmp_path):
    documents = tmp_path / "asked.jsonl"
    lines = [{"question": f"{n} twice:", "answer": f"{n}{n}"} for n in range(6)]
    documents.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    likely = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{[answer, 'no']}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }
    said = {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    }
    for name, task in (("likely", likely), ("said", said)):
        tree = {"task": name, **common, **task}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    for kind in ("mdm", "ar"):
        export = tmp_path / kind
        run("tools/convert_checkpoint.py", "to-hf", "--run", tuned[kind].dir, "--output", export)
        answered = run(
            "tools/generate.py",
            *("--model", export, "--prompt", "7 twice:", "--length", "12"),
        ).succeeded()
        assert "7 twice:" in answered.output
        run(
            "tools/evaluate.py",
            *("--model", export, "--tasks", "likely,said", "--include-path", tmp_path),
            *("--draws", "8", "--out", tmp_path / f"{kind}-results"),
        ).succeeded()
        found = json.loads((tmp_path / f"{kind}-results/results.json").read_text())["tasks"]
        assert found["likely"]["num_requests"] == 12
        assert 0 <= found["said"]["results"]["said"]["exact_match,none"] <= 1


def test_a_run_and_its_export_give_the_same_answers_in_a_chat(tuned, tmp_path):
    export = tmp_path / "export"
    run("tools/convert_checkpoint.py", "to-hf", "--run", tuned["mdm"].dir, "--output", export)
    loaded = AutoTokenizer.from_pretrained(export, trust_remote_code=True)
    assert loaded.chat_template == PLAIN_CHAT_TEMPLATE

    def chat(*model) -> str:
        words = ("-m", "megatron_mdm", "chat", *map(str, model), "--length", "8")
        done = subprocess.run(
            [sys.executable, *words],
            input="7?\n",
            capture_output=True,
            text=True,
            cwd=REPO,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert chat("--checkpoint", tuned["mdm"].dir) == chat("--model", export)


def test_what_does_not_fit_is_one_line_and_status_2(pairs, whole_runs, recipe, tmp_path):
    weights = whole_runs["mdm"].dir
    cases = {
        "holds text and no prompts with responses": finetuning(recipe.parent / "train", weights),
        "run.initial_weights is not set": ["objective.stochastic_length_ratio=0"],
        "objective.stochastic_length_ratio=0.2 has no meaning where responses are learned": [],
        "data.attention=document has no meaning where responses are learned": finetuning(
            pairs, weights, "data.attention=document"
        ),
        "pairs of": finetuning(pairs, weights, "data.seq_length=8"),
        "finetuning.fill_to=5 fills with end-of-text tokens": finetuning(
            pairs, weights, "finetuning.fill_to=5", "finetuning.end_of_text=none"
        ),
    }
    commands = [
        pretrain(recipe, tmp_path / str(number), *overrides, script="finetune_mdm")
        for number, overrides in enumerate(cases.values())
    ]
    for (message, _), result in zip(cases.items(), run_all(*commands), strict=True):
        assert result.status == 2
        (line,) = result.error_lines
        assert message in line
