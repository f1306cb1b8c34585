"""A mixture from text to ledger, by the tools and with a restart under another layout."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest
import yaml
from commands import NUM_STEPS, SEQ_LENGTH, Run, pretrain, run, torchrun

from megatron_mdm.config import load_config
from megatron_mdm.data.loader import TrainingBatches
from megatron_mdm.data.store import open_tokens
from megatron_mdm.diffusion.objectives import build_objective
from megatron_mdm.training.data_plan import plan_data

pytestmark = pytest.mark.slow

SUBSET_TOKENS = 600
OVERRIDES = ["data.order=documents", "data.attention=document", "data.reader_threads=2"]


@pytest.fixture(scope="module")
def mixed(recipe, tmp_path_factory) -> Run:
    """A run on two sources: a subset by reference, seen 2.5 times, and the rest of the corpus."""
    root = tmp_path_factory.mktemp("mixed")
    tree = yaml.safe_load(recipe.read_text("utf-8"))
    whole = tree["data"]["train"][0]["path"]
    subset = ["tools/subset_data.py", "--input", whole, "--tokens", SUBSET_TOKENS]
    run(*subset, "--output-prefix", root / "subset").succeeded()
    assert open_tokens(root / f"subset-{SUBSET_TOKENS}").num_tokens == SUBSET_TOKENS
    tree["data"]["train"] = [
        {"path": str(root / f"subset-{SUBSET_TOKENS}"), "epochs": 2.5},
        # The subset is seen as part of the whole as well, and caps hold over content.
        {"path": whole, "max_epochs": 4},
    ]
    path = root / "mixed.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    result = run(*pretrain(path, root / "whole", *OVERRIDES)).succeeded()
    return Run(root / "whole", path, OVERRIDES, result)


def ledger_of(run_dir):
    return json.loads((run_dir / "ledger.json").read_text("utf-8"))


def test_the_ledger_of_a_run_equals_a_recount(mixed):
    config = load_config(mixed.recipe, [f"run.dir={mixed.dir}", *OVERRIDES])
    plan = plan_data(config)
    batches = TrainingBatches(
        plan.train.sources,
        plan.order,
        build_objective(config),
        global_batch_size=8,
        micro_batch_size=8,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    masked, visits = Counter(), Counter()
    for step in range(NUM_STEPS):
        (batch,) = batches.read_step(step)
        for source, row in zip(batch.sources_B.tolist(), batch.inputs_BS, strict=True):
            masked[source] += int((row == config.model.mask_id).sum())
            visits[source] += 1
    seen = ledger_of(mixed.dir)["seen"]
    subset_windows = SUBSET_TOKENS // SEQ_LENGTH
    assert visits[0] == round(2.5 * subset_windows)
    assert sum(visits.values()) == 8 * NUM_STEPS
    for source, ledger in enumerate(seen):
        assert ledger["visits"] == visits[source]
        assert ledger["predictions"] == masked[source]
        assert ledger["tokens_seen"] == visits[source] * SEQ_LENGTH
    assert seen[0]["windows_by_visits"] == {
        "2": 3 * subset_windows - visits[0],
        "3": visits[0] - 2 * subset_windows,
    }


def test_a_planned_run_shows_the_ledger_that_the_run_prints(mixed):
    plan = run("tools/inspect_data.py", "--plan", mixed.recipe, *OVERRIDES).succeeded().output
    table = plan.splitlines()[1:]
    # Header, two sources, and what they share.
    assert len(table) == 4
    assert "\n".join(table) in mixed.result.output
    assert f"{NUM_STEPS:,} steps, {8 * NUM_STEPS} windows" in plan


def test_a_restart_with_two_replicas_ends_with_the_same_ledger(mixed, tmp_path):
    folder = mixed.stopped_at_half(tmp_path / "again")
    result = torchrun(2, *mixed.command(folder, *mixed.overrides)).succeeded()
    assert "resuming from" in result.output
    assert ledger_of(folder) == ledger_of(mixed.dir)


def test_the_report_shows_how_often_each_source_was_seen(mixed, tmp_path):
    page = tmp_path / "report.html"
    run("tools/report.py", "--run", mixed.dir, "--output", page).succeeded()
    html = page.read_text("utf-8")
    seen = ledger_of(mixed.dir)["seen"]
    assert f"{seen[0]['unique_tokens']:,}" in html
    assert f"{seen[0]['predictions_per_token']:.4f}" in html
    assert f"<td>{seen[0]['epochs']:.4g}</td>" in html


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.train.1.max_epochs=0.001", "data.train.1.max_epochs=0.001 does not let"),
        ("data.train.0.epochs=100", "windows by its epochs and the whole run has 64"),
        ("data.train.0.max_unique_tokens=5", "less than one window of data.seq_length"),
        ("data.train.0.weight=2", "has weight=2.0 and epochs=2.5"),
    ],
)
def test_an_impossible_plan_is_refused_in_one_line(mixed, override, told):
    result = run("tools/inspect_data.py", "--plan", mixed.recipe, override)
    assert result.status == 2
    (line,) = result.error_lines
    assert told in line


def test_document_attention_needs_shards_that_name_the_end(mixed, tmp_path):
    whole = load_config(mixed.recipe).data.train[1].path
    for extension in (".bin", ".idx"):
        shutil.copy(f"{whole}{extension}", tmp_path / f"bare{extension}")
    sources = f"data.train=[{{path: {tmp_path}/bare}}]"
    result = run("tools/inspect_data.py", "--plan", mixed.recipe, sources, *OVERRIDES)
    assert result.status == 2
    assert "data.attention=document needs to know where documents end" in result.error_lines[0]
