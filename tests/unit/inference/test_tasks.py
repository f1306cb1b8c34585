"""lm-evaluation-harness over a small export: what comes out is what was scored."""

from __future__ import annotations

import json
import math
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import yaml
from lm_eval.tasks import TaskManager
from local_tasks import write_tasks

from megatron_mdm.core.errors import ConfigError, DataError
from megatron_mdm.core.options import run_command
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.options import DEFAULT_SCORING, ScoringOptions
from megatron_mdm.inference.requests import Request, ScoringSettings
from megatron_mdm.inference.scoring import Scorer
from megatron_mdm.inference.tasks.command import choose_recipes, run
from megatron_mdm.inference.tasks.harness import HarnessModel, HarnessWorker
from megatron_mdm.inference.tasks.recipe import TaskSettings, load_recipe

SETTINGS = ScoringSettings(draws=8)
CONFIGS = Path(__file__).parents[3] / "configs/eval"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def documents(tasks):
    return [json.loads(line) for line in (tasks / "documents.jsonl").read_text().splitlines()]


def harness_of(folder, scoring=SETTINGS):
    worker = HarnessWorker(ExportedModel(folder))
    model = HarnessModel.from_worker(worker, worker.make_pool())
    model.settings = TaskSettings(scoring)
    return model


def evaluate(model, tasks, name):
    manager = TaskManager(include_path=tasks, include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model, tasks=[name], task_manager=manager, bootstrap_iters=10
    )


def ids_of(text):
    return tuple(int(word[1:]) for word in text.split())


@pytest.mark.parametrize("is_causal", [False, True])
def test_accuracy_is_how_often_the_answer_scores_highest(export, tiny, tasks, documents, is_causal):
    model = harness_of(export(tiny(is_causal=is_causal))[0])
    found = evaluate(model, tasks, "local_choice")["results"]["local_choice"]
    scorer = Scorer(model._model, SETTINGS)
    right = 0
    for document in documents:
        requests = [
            Request(ids_of(document["question"]), ids_of(choice)) for choice in document["choices"]
        ]
        scores = [score.log_likelihood for score in scorer.score(requests)]
        right += int(np.argmax(scores)) == document["answer"]
    assert found["acc,none"] == pytest.approx(right / len(documents))
    # One context token was scored with every continuation, and each has an error.
    assert len(model.scores) == 3 * len(documents)


def test_perplexity_of_long_texts_is_that_of_their_windows(export, tiny, tasks, documents):
    model = harness_of(export(tiny(is_causal=True))[0])
    found = evaluate(model, tasks, "local_text")["results"]["local_text"]
    total, words = 0.0, 0
    limit, scorer = model._model.facts.max_length, Scorer(model._model, SETTINGS)
    for document in documents:
        ids = ids_of(document["text"])
        words += len(ids)
        # One token, the last of the window before, is all that goes from window to window.
        seen = (0, *ids)
        for start in range(0, len(ids), limit - 1):
            part = ids[start : start + limit - 1]
            total += scorer.score([Request(seen[start : start + 1], part)])[0].log_likelihood
    # words of the harness are split by its own pattern, which agrees here
    assert found["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-4)


def test_greedy_matches_count_for_accuracy(export, tiny, tasks, documents):
    chain = ScoringSettings("chain_rule", greedy_match="left_to_right")
    model = harness_of(export(tiny())[0], chain)
    found = evaluate(model, tasks, "local_word")["results"]["local_word"]
    assert found["acc,none"] == np.mean([bool(score.is_greedy) for score in model.scores.values()])
    mean = np.mean([score.log_likelihood for score in model.scores.values()])
    assert found["perplexity,none"] == pytest.approx(math.exp(-mean))


@pytest.mark.parametrize("is_causal", [False, True])
def test_texts_end_at_their_stop_strings_whoever_stands_beside_them(
    export, tiny, tasks, documents, is_causal
):
    model = harness_of(export(tiny(is_causal=is_causal))[0])
    one_at_a_time = []

    class Instance:
        task_name, doc_id = "local_story", 0

        def __init__(self, prompt):
            self.args = (prompt, {"until": ["w7"], "max_gen_toks": 8})

    prompts = [Instance(document["question"]) for document in documents]
    for prompt in prompts:
        one_at_a_time += model.generate_until([prompt])
    assert model.generate_until(prompts[::-1])[::-1] == one_at_a_time
    assert all("w7" not in text for text in one_at_a_time)
    assert evaluate(model, tasks, "local_story")["results"]["local_story"]


def test_the_harness_can_be_given_the_name(export, tiny, tasks):
    folder = export(tiny())[0]
    manager = TaskManager(include_path=tasks, include_defaults=False)
    found = lm_eval.simple_evaluate(
        model="mdm",
        model_args={"pretrained": str(folder), "draws": 8},
        tasks=["local_choice"],
        task_manager=manager,
        bootstrap_iters=10,
    )
    ours = evaluate(harness_of(folder), tasks, "local_choice")
    assert found["results"] == ours["results"]
    with pytest.raises(ConfigError, match="drawz is no option of the model mdm"):
        HarnessModel(str(folder), drawz=3)


def test_a_folder_that_is_not_there_is_refused(export, tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"--include-path=.*gone is no folder"):
        command(
            "--model",
            export(tiny())[0],
            "--tasks",
            "local_word",
            "--include-path",
            tmp_path / "gone",
        )


def test_data_that_cannot_be_downloaded_are_one_sentence(export, tiny, tmp_path):
    tree = {"task": "away", "dataset_path": "nobody/nothing", "test_split": "test"}
    tree |= {"output_type": "loglikelihood", "doc_to_text": "{{a}}", "doc_to_target": "{{b}}"}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/away.yaml").write_text(yaml.safe_dump(tree))
    options = ("--tasks", "away", "--include-path", tmp_path / "tasks")
    with pytest.raises(
        ConfigError, match=r"^The data of the task away are not in .*: run the same"
    ):
        command("--model", export(tiny())[0], *options)


def command(*options):
    run_command(run, None, [str(option) for option in options])


def test_an_autoregressive_model_is_said_to_be_scored_exactly(export, tiny, tasks, capsys):
    folder = export(tiny(is_causal=True))[0]
    command("--model", folder, "--tasks", "local_choice", "--include-path", tasks)
    table = capsys.readouterr().out
    assert "exact likelihood" in table
    assert "draws" not in table


@pytest.mark.slow
def test_a_second_run_writes_the_same_bytes(export, tiny, tasks, tmp_path, capsys):
    folder = export(tiny())[0]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "defaults": {"draws": 8, "num_fewshot": 0},
                "tasks": {
                    "local_choice": {"guidance_scale": 0.5},
                    "local_word": {"estimator": "chain_rule", "greedy_match": "confidence"},
                    "local_text": None,
                    "local_story": {"decoding": {"num_steps": 4}},
                },
            },
            sort_keys=False,
        )
    )
    given = ["--model", folder, "--recipe", recipe, "--include-path", tasks, "--log-samples"]
    for out in ("first", "second"):
        command(*given, "--out", tmp_path / out)
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == [
        "results.json",
        "results.md",
        *(f"samples_local_{one}.jsonl" for one in ("choice", "story", "text", "word")),
    ]
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    tree = json.loads((tmp_path / "first/results.json").read_text())
    assert [*tree["tasks"]] == ["local_choice", "local_word", "local_text", "local_story"]
    choice = tree["tasks"]["local_choice"]
    assert choice["settings"]["scoring"]["guidance_scale"] == 0.5
    assert choice["num_requests"] == 30
    mean_error = choice["mean_standard_error_of_log_likelihoods"]
    assert choice["mean_reach_of_95_percent_intervals"] >= 1.96 * mean_error >= 0
    # 49 / 10 degrees of freedom for 8 draws, and as many again for each window.
    text = tree["tasks"]["local_text"]
    ratio = (
        text["mean_reach_of_95_percent_intervals"] / text["mean_standard_error_of_log_likelihoods"]
    )
    assert 1.97 < ratio < 2.59
    assert 0 <= choice["noise"]["local_choice"]["acc"] < 0.5
    assert tree["tasks"]["local_word"]["noise"]["local_word"]["perplexity"] == 0
    assert tree["tasks"]["local_story"]["noise"] == {"local_story": {}}
    table = (tmp_path / "first/results.md").read_text()
    assert "fixed count, 8 draws, w 0.5" in table
    assert "num_steps 4" in table
    assert capsys.readouterr().out.count(table) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "no_such_task"], "--tasks=no_such_task is none of the"),
        ([], "There are no tasks"),
        (["--recipe", "missing.yaml"], "--recipe=missing.yaml cannot be read"),
        (["--tasks", "local_choice", "--draws", "1"], "draws=1 is too small"),
        (
            ["--recipe", str(CONFIGS / "smdm.yaml"), "--max-draws", "64"],
            "max_draws=64 is less than the draws=1024 of one round",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(export, tiny, tasks, options, said):
    folder = export(tiny())[0]
    with pytest.raises(ConfigError, match=said):
        command("--model", folder, "--include-path", tasks, *options)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_that_come_along_can_be_used(path):
    chosen = load_recipe(path).choose(None)
    assert all(
        recipe.build_settings(TaskSettings()).scoring.draws >= 32 for recipe in chosen.values()
    )
    assert len(load_recipe(path).choose(["piqa"])) == 1
    with pytest.raises(ConfigError, match="--tasks=gsm8k is not in the recipe"):
        load_recipe(path).choose(["gsm8k"])


@pytest.fixture(scope="module")
def known_tasks():
    """Reading them all takes ten seconds."""
    return set(TaskManager().all_tasks)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_harness_knows_the_tasks_of_the_recipes(path, known_tasks):
    assert set(load_recipe(path).tasks) <= known_tasks


def scoring_of(recipe, task):
    return load_recipe(CONFIGS / recipe).choose([task])[task].build_settings(TaskSettings()).scoring


@pytest.mark.parametrize(
    ("task", "estimator", "scale"),
    [
        ("arc_easy", "monte_carlo", 0.6),
        ("boolq", "chain_rule", 1.6),
        ("hellaswag", "monte_carlo", 0.7),
        ("openbookqa", "chain_rule", 1.6),
        ("piqa", "chain_rule", 0.6),
        ("race", "monte_carlo", 0.7),
        ("social_iqa", "monte_carlo", 0.6),
        ("lambada_standard", "chain_rule", 1.1),
    ],
)
def test_the_recipe_of_the_larger_models_is_that_of_their_scripts(task, estimator, scale):
    found = scoring_of("smdm.yaml", task)
    assert (found.estimator, found.guidance_scale) == (estimator, scale)
    assert found.draws == 1024
    assert found.greedy_match == ("confidence" if task == "lambada_standard" else "none")


def test_the_recipe_of_the_data_constrained_suite_is_what_its_paper_states():
    for task in load_recipe(CONFIGS / "data_constrained.yaml").tasks:
        found = scoring_of("data_constrained.yaml", task)
        assert (found.estimator, found.draws, found.guidance_scale) == ("monte_carlo", 32, 0)
        assert found.greedy_match == ("confidence" if task == "lambada_standard" else "none")


def settings_of(*options):
    def chosen(
        *,
        recipe: Path | None = None,
        tasks: str | None = None,
        scoring: ScoringOptions = DEFAULT_SCORING,
    ):
        return choose_recipes(recipe, tasks, scoring)

    recipes = run_command(chosen, None, options)
    return {name: recipe.build_settings(TaskSettings()).scoring for name, recipe in recipes.items()}


def test_what_the_command_line_gives_goes_before_the_recipe():
    smdm = ["--recipe", str(CONFIGS / "smdm.yaml")]
    found = settings_of(*smdm, "--draws", "32")
    assert {one.draws for one in found.values()} == {32}
    assert found["race"].estimator == "monte_carlo"
    assert found["race"].guidance_scale == 0.7
    found = settings_of(*smdm, "--guidance-scale", "0", "--estimator", "fixed_count")
    assert {(one.guidance_scale, one.estimator) for one in found.values()} == {(0, "fixed_count")}
    assert {one.draws for one in found.values()} == {1024}
    few = settings_of("--recipe", str(CONFIGS / "data_constrained.yaml"), "--max-draws", "64")
    assert {(one.draws, one.max_draws) for one in few.values()} == {(32, 64)}
    many = settings_of(*smdm, "--draws", "5000", "--target-standard-error", "0.1")["race"]
    assert (many.draws, many.max_draws, many.target_standard_error) == (5000, 5000, 0.1)


def test_without_a_recipe_the_options_have_their_defaults():
    assert settings_of("--tasks", "piqa") == {"piqa": ScoringSettings()}
    assert settings_of("--tasks", "piqa", "--draws", "8")["piqa"].draws == 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tasks: {}", "tasks"),
        ("tasks: {piqa: {estimater: chain_rule}}", r"tasks\.piqa\.estimater"),
        ("tasks: {piqa: {draws: many}}", r"tasks\.piqa\.draws"),
        ("tasks: [", "is not valid YAML"),
    ],
)
def test_recipes_that_say_what_none_says_are_refused(tmp_path, text, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        command("--model", "unused", "--recipe", path)


def test_continuations_that_do_not_fit_are_refused(export, tiny):
    model = harness_of(export(tiny())[0])

    class Instance:
        task_name, doc_id = "long", 3
        args = ("w2", " w3" * 40)

    with pytest.raises(DataError, match="long, document 3 has a continuation of 40 tokens"):
        model.loglikelihood([Instance()])
    Instance.args = ("w2", "")
    with pytest.raises(DataError, match="is empty"):
        model.loglikelihood([Instance()])
