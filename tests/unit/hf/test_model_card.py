from __future__ import annotations

import json

import pytest
import yaml

from megatron_mdm.checkpoint.manifest import CheckpointManifest
from megatron_mdm.core.errors import DataError
from megatron_mdm.hf.card import (
    TrainingFacts,
    collect_run_facts,
    escape_markdown,
    format_model_card,
)

MANIFEST = CheckpointManifest(
    format_version=6,
    step=10,
    consumed_samples=40,
    config={
        "run": {"initial_weights": None},
        "objective": {"kind": "mdm"},
        "data": {"seq_length": 16},
    },
    versions={"torch": "2.0", "megatron_mdm": "0.1"},
    data_fingerprint="f",
    skipped_steps=1,
)
SOURCE = {
    "path": "corpus/a|b_<i>c</i>",
    "unique_tokens": 320,
    "epochs": 2.0,
    "tokens_seen": 640,
    "windows_by_visits": {"2": 20},
    "predictions_per_token": 0.9375,
    "expected_predictions_per_token": 1.0,
}
FILES = {
    "run_info.json": {
        "num_steps": 20,
        "unique_tokens": 320,
        "flops_6nd": 8e15,
        "flops_exact": 1e16,
        "wall_seconds": 5.0,
    },
    "ledger.json": {"step": 10, "seen": [SOURCE], "planned": [SOURCE | {"epochs": 4.0}]},
}


def validation(step, mean):
    return {
        "step": step,
        "valid/nll_nats_per_token": mean,
        "valid/nll_standard_error": 0.25,
        "valid/num_tokens": 1024,
        "valid/noise_seed": 7,
    }


@pytest.fixture
def run_dir(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_text(json.dumps(content))
    records = [{"step": 1, "train/loss_nats_per_token": "nan"}, validation(5, 3.5)]
    records += [validation(10, 2.5), validation(15, 1.5)]
    lines = [json.dumps(record) for record in records]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 16, "val')
    return tmp_path


def card(saved, facts, title="my model", **options):
    return format_model_card(title, saved, 1234, facts, **({"has_tokenizer": True} | options))


def test_the_figures_are_those_of_the_checkpoints_step_and_not_of_the_whole_run(run_dir):
    facts = collect_run_facts(run_dir, MANIFEST)
    assert facts.figures == {
        "optimizer steps": "10 of 20",
        "steps whose update was left out": "1",
        "training tokens, with repetition": "640",
        "epochs": "2",
        "FLOPs, as 6 N D without embeddings": "4.000e+15",
        "FLOPs of all matrix products": "5.000e+15",
        "held-out loss": "2.5000 ± 0.2500 nats per token (mean and standard error) at step 10, "
        "on 1,024 tokens, an upper bound, with noise seed 7",
    }
    assert facts.gaps == []
    assert facts.origin == "It was trained from scratch."
    begun = MANIFEST.config | {"run": {"initial_weights": "runs/a"}}
    assert (
        "weights of runs/a"
        in collect_run_facts(run_dir, MANIFEST.model_copy(update={"config": begun})).origin
    )


def test_the_card_is_whole_and_quotes_nothing_as_markup(run_dir, tiny):
    text = card(tiny(), collect_run_facts(run_dir, MANIFEST))
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "transformers"
    assert "masked-diffusion" in front["tags"]
    (row,) = [line for line in text.splitlines() if "corpus/a" in line]
    assert row.startswith(r"| corpus/a\|b\_\<i\>c\</i\> | 320 | 2 of 4 | 640 | 20 ")
    assert row.endswith(" 2 | 0.9375 | 1.0000 |")
    assert "How often each source was seen up to step 10." in text
    assert "| torch | 2.0 |" in text
    assert 'from_pretrained("my model", trust_remote_code=True)' in text
    assert front["pipeline_tag"] == "fill-mask"
    assert "It loads in transformers 4.46 and later." in text
    for figure in ("2.5000 ± 0.2500", r"4.000e\+15", "| layers | 2 |", "| mask token | 19 |"):
        assert figure in text


def test_a_missing_file_is_said_to_be_missing(tmp_path, tiny):
    facts = collect_run_facts(tmp_path, MANIFEST)
    assert facts.figures.keys() == {
        "optimizer steps",
        "steps whose update was left out",
        "training tokens, with repetition",
    }
    text = card(tiny(), facts, has_tokenizer=False)
    for gap in ("`run_info.json`", "`ledger.json`", "no held-out loss"):
        assert gap in text.split("## Limits")[1]
    assert "## Data" not in text
    assert "No tokenizer travels with it" in text


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("run_info.json", "{", "cannot be read"),
        ("ledger.json", "[]", "must be a mapping"),
        ("ledger.json", '{"seen": 1, "planned": 2}', "is not a ledger"),
        ("metrics.jsonl", '{"step": 1}\nnothing\n{"step": 2}\n', "line 2"),
    ],
)
def test_a_damaged_file_is_named(run_dir, name, content, problem):
    (run_dir / name).write_text(content)
    with pytest.raises(DataError, match=problem) as caught:
        collect_run_facts(run_dir, MANIFEST)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "title", ["a|b", "x\n## y", "`c`", "<script>", '"); import os', "```", "[a](b)"]
)
def test_a_title_stays_a_title(tiny, title):
    text = card(tiny(), TrainingFacts("Unknown."), title=title)
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("# ")] == [f"# {escape_markdown(title)}"]
    assert lines.count("```") == 1
    code = text.split("```python\n")[1].split("\n```\n")[0]
    (call,) = [line for line in code.splitlines() if line.startswith("model = ")]
    argument = call.removeprefix("model = AutoModelForMaskedLM.from_pretrained(")
    assert json.loads(argument.removesuffix(", trust_remote_code=True)")) == title
    compile(code, "card", "exec")


def test_an_autoregressive_card_speaks_of_no_mask_and_no_bound(tiny):
    text = card(tiny(is_causal=True), TrainingFacts("Unknown."))
    assert "An autoregressive language model" in text
    assert "With `AutoModelForCausalLM`, `generate` is transformers' own." in text
    assert "mask token" not in text
    assert "ELBO" not in text
