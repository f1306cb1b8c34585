"""Tasks of a run are tried before it starts; what cannot be evaluated is refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from local_tasks import write_tasks
from plan_examples import changed, plan_of, refusal, write_shards

from megatron_mdm.config import parse_config
from megatron_mdm.core.errors import CheckpointError, ConfigError, DataError
from megatron_mdm.corpus.tokenizer import load_tokenizer
from megatron_mdm.corpus.tokenizer_training import save_tokenizer, train_byte_level_bpe
from megatron_mdm.inference.tasks.downstream import Downstream, list_task_metrics

HINT = "hooks.kind=downstream: "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_byte_level_bpe(["w1 w2 w3"], 260), folder)
    return folder


@pytest.fixture
def tasks(tmp_path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    return write_tasks(folder, 4)


@pytest.fixture
def hooked(tree, tmp_path, tokenizer, tasks):
    """A run with tasks that can start."""
    handle = load_tokenizer(str(tokenizer))
    made_by = {"tokenizer": str(tokenizer), "tokenizer_sha256": handle.sha256}
    eod = {"eod_token_id": handle.eod_token_id, "vocab_size": handle.vocab_size}
    special = {"special_tokens": handle.special_tokens}
    shards = write_shards(tmp_path / "made", [3, 4, 5] * 30, **made_by, **eod, **special)
    data = {"train": [{"path": str(shards)}]}
    return changed(tree, data=data) | {"hooks": [hook_of(tasks)]}


def hook_of(folder: Path, **fields):
    hook = {"kind": "downstream", "tasks": ["local_choice"], "include_path": str(folder)}
    return {name: value for name, value in (hook | fields).items() if value is not None}


def refusal_of(kind, hooked, **sections) -> str:
    hook = sections.pop("hook", {})
    return refusal(kind, hooked | {"hooks": [hooked["hooks"][0] | hook]}, **sections)


def test_a_run_with_tasks_gets_a_plan_with_the_hook(hooked):
    (hook,) = plan_of(hooked).hooks
    assert isinstance(hook, Downstream)
    assert (hook.name, hook.state_dict()) == ("downstream", {})


def test_only_the_first_rank_loads_tasks(hooked, tasks, monkeypatch):
    (tasks / "documents.jsonl").unlink()
    monkeypatch.setenv("RANK", "1")
    assert plan_of(hooked).hooks


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        pytest.param(
            {"tasks": ["no_such"]},
            f"{HINT}tasks=no_such is none of the ",
            marks=pytest.mark.slow,  # the harness reads thousands of its own
        ),
        ({"include_path": "gone"}, f"{HINT}include_path=gone is no folder: name one with YAML"),
        ({"recipe": "gone.yaml"}, f"{HINT}recipe=gone.yaml cannot be read "),
        (
            {"recipe": "DIR/recipe.yaml"},
            f"{HINT}tasks=local_choice is not in the recipe, which has local_word",
        ),
        ({"tasks": None, "recipe": "DIR/bad.yaml"}, "bad.yaml: tasks.local_word.drawz"),
    ],
)
def test_tasks_and_recipes_that_are_not_there_are_named(hooked, tasks, fields, told):
    (tasks / "recipe.yaml").write_text("tasks: {local_word: null}\n")
    (tasks / "bad.yaml").write_text("tasks: {local_word: {drawz: 3}}\n")
    hook = {
        name: value.replace("DIR", str(tasks)) if isinstance(value, str) else value
        for name, value in fields.items()
    }
    assert told in refusal_of(ConfigError, hooked, hook=hook)


def test_a_task_whose_data_are_gone_is_named(hooked, tasks):
    (tasks / "documents.jsonl").unlink()
    message = refusal_of(ConfigError, hooked)
    assert message.startswith(f"{HINT}the task local_choice cannot be evaluated (FileNotFoundError")
    assert message.endswith("mend its YAML file or its data, or leave it out.")


def test_a_task_whose_documents_are_of_another_form_is_named(hooked, tasks):
    lines = [json.loads(line) for line in (tasks / "documents.jsonl").read_text().splitlines()]
    for line in lines:
        line["question_text"] = line.pop("choices")
    (tasks / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    message = refusal_of(ConfigError, hooked)
    assert message.startswith(f"{HINT}the task local_choice cannot be evaluated (")


def test_a_task_whose_file_is_of_another_form_is_named(hooked, tasks):
    path = tasks / "local_choice.yaml"
    path.write_text(yaml.safe_dump({"task": "local_choice", "output_type": "essay"}))
    assert "the task local_choice cannot be evaluated (" in refusal_of(ConfigError, hooked)


def test_data_without_a_tokenizer_cannot_be_asked_with_texts(hooked, tmp_path):
    write_shards(tmp_path / "bare")
    message = refusal_of(ConfigError, hooked, data={"train": [{"path": str(tmp_path / "bare")}]})
    assert message == (
        "hooks.kind=downstream needs the tokenizer that made the data, and neither the shards nor "
        "data.tokenizer name one: set data.tokenizer."
    )


EMA = {"kind": "ema", "horizon_tokens": 100}


def test_an_average_is_evaluated_behind_the_hook_that_keeps_it(hooked):
    mine = hooked["hooks"][0] | {"weights": "ema"}
    raw = hooked["hooks"][0]
    hooks = plan_of(hooked | {"hooks": [EMA, mine, raw]}).hooks
    assert [hook.name for hook in hooks] == ["ema", "downstream_ema", "downstream"]
    for others, there in (([mine, EMA], "none"), ([EMA | {"name": "slow"}, mine], "slow")):
        message = refusal(ConfigError, hooked | {"hooks": others})
        assert message == (
            "hooks.kind=downstream.weights=ema has to be an average of a hook that stands before "
            f"it, of which there are {there}: put such a hook above, or leave weights out."
        )


def test_settings_that_the_objective_does_not_go_with_are_refused(hooked, tasks):
    (tasks / "recipe.yaml").write_text("tasks: {local_choice: {guidance_scale: 0.5}}\n")
    hook = {"recipe": str(tasks / "recipe.yaml")}
    message = refusal_of(ConfigError, hooked, hook=hook, objective={"kind": "ar"})
    assert message.startswith(f"{HINT}guidance_scale=0.5 needs a pass with the context masked")
    assert plan_of(hooked | {"hooks": [hooked["hooks"][0] | hook]}).hooks


def test_an_objective_that_nothing_else_runs_is_refused(hooked, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "extension" / "components"))
    objective = {"kind": "own_objective:SuffixConfig"}
    message = refusal_of(CheckpointError, hooked, objective=objective)
    assert "exports and generation cannot run" in message


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"every_steps": 2, "every_epochs": 1},
            "hooks.kind=downstream has every_epochs=1.0 and every_steps=2: keep one.",
        ),
        ({"tasks": None}, "hooks.kind=downstream has no tasks: give tasks, recipe or both."),
        ({"tasks": []}, "hooks.0.tasks"),
        ({"draws": 1}, "hooks.0.draws=1 is not valid"),
        ({"every": 3}, "every"),
    ],
)
def test_fields_that_do_not_fit_are_refused(tree, tmp_path, fields, told):
    tree["hooks"] = [hook_of(tmp_path, **fields)]
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    assert told in str(caught.value)


def test_an_evaluation_that_fails_is_left_out_and_ends_the_run_at_its_end(hooked, monkeypatch):
    (hook,) = plan_of(hooked).hooks
    lines: list[str] = []
    run = SimpleNamespace(
        step=3,
        mesh=SimpleNamespace(device=SimpleNamespace(type="cpu")),
        paused=lambda: pytest.MonkeyPatch.context(),
        say=lines.append,
        is_due=lambda every: True,
    )
    monkeypatch.setattr(Downstream, "_evaluate", lambda self, run: "ValueError: no such field")
    run.is_last_step = False
    hook.after_step(run)
    assert lines == ["the tasks at step 3 were left out: ValueError: no such field"]
    run.is_last_step = True
    with pytest.raises(DataError, match=r"^the tasks at step 3 were left out: ValueError"):
        hook.after_step(run)


def test_of_a_group_its_mean_is_listed_and_of_tasks_each():
    values = {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "a"}
    word = {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A"}
    entry = {"results": {"one": values, "two": word}, "noise": {"one": {"acc": 0.01}}}
    one = {
        "downstream/one/acc": 0.5,
        "downstream/one/acc_standard_error": 0.1,
        "downstream/one/acc_noise": 0.01,
    }
    assert list_task_metrics("one", entry) == one
    both = list_task_metrics("a_tag", entry)
    assert both == one | {"downstream/two/exact_match_strict-match": 0.25}
