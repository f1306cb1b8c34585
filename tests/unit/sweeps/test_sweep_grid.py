"""From one YAML file to runs: hand-worked products, and every way to write it wrongly."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mdm.config import check_layout, dump_config, load_config
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.studies.sweeps.grid import expand, field_of, load_sweep
from megatron_mdm.studies.sweeps.sweep_file import SweepFile, axes_of

REPO = Path(__file__).parents[3]
BASE = {
    "run": {"dir": "unset"},
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "vocab_size": 100,
    },
    "data": {"train": [{"path": "train"}], "seq_length": 32},
    "batch": {"global_batch_size": 4},
    "schedule": {"steps": 10},
}


@pytest.fixture
def write(tmp_path):
    """Writes a sweep over a small model, and returns the file."""

    def writer(base=BASE, **sections):
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
        tree = {"base": str(tmp_path / "base.yaml"), "dir": "runs/x", **sections}
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path

    return writer


def names_and(sweep, *fields):
    return [(run.name, *(field_of(run.config, field) for field in fields)) for run in sweep.runs]


def refusal(path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_sweep(path)
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(r": \S.*[.?]$", message), "no remedy"
    assert str(path) in message
    return message


def test_linked_fields_plain_fields_and_named_points(write):
    sweep = load_sweep(
        write(
            set={"optimizer.weight_decay": 0.5},
            axes={
                "objective": [
                    {"objective.kind": "ar"},
                    {"objective.kind": "mdm", "objective.process.masking": "fixed_count"},
                ],
                "run.seed": [0, 7],
                "size": {"small": {"model.num_layers": 2}, "large": {"model.num_layers": 4}},
            },
        )
    )
    fields = ("objective.kind", "objective.process.masking", "run.seed", "model.num_layers")
    assert names_and(sweep, *fields) == [
        ("ar_seed-0_small", "ar", None, 0, 2),
        ("ar_seed-0_large", "ar", None, 0, 4),
        ("ar_seed-7_small", "ar", None, 7, 2),
        ("ar_seed-7_large", "ar", None, 7, 4),
        ("mdm-fixed_count_seed-0_small", "mdm", "fixed_count", 0, 2),
        ("mdm-fixed_count_seed-0_large", "mdm", "fixed_count", 0, 4),
        ("mdm-fixed_count_seed-7_small", "mdm", "fixed_count", 7, 2),
        ("mdm-fixed_count_seed-7_large", "mdm", "fixed_count", 7, 4),
    ]
    assert sweep.fields == fields
    assert {run.config.optimizer.weight_decay for run in sweep.runs} == {0.5}
    assert [str(run.folder) for run in sweep.runs] == [f"runs/x/{run.name}" for run in sweep.runs]


def test_isoflop_is_budgets_times_sizes(write):
    sizes = {"s": {"model.hidden_size": 32}, "l": {"model.hidden_size": 64}}
    path = write(isoflop={"budgets": [1e10, 3e10], "sizes": sizes})
    assert names_and(load_sweep(path), "schedule.flops", "schedule.steps", "model.hidden_size") == [
        ("flops-1e10_s", 1e10, None, 32),
        ("flops-1e10_l", 1e10, None, 64),
        ("flops-3e10_s", 3e10, None, 32),
        ("flops-3e10_l", 3e10, None, 64),
    ]


def test_numbers_without_a_point_are_numbers(write):
    path = write()
    path.write_text(path.read_text() + "axes: {optimizer.lr: [1e-3, 2e-3]}\n")
    assert names_and(load_sweep(path), "optimizer.lr") == [("lr-0.001", 1e-3), ("lr-0.002", 2e-3)]


def test_repetition_is_unique_tokens_times_epochs_or_budgets(write):
    grid = {"unique_tokens": [320, 640], "epochs": [1, 2.5]}
    unique = "data.train.0.max_unique_tokens"
    sweep = load_sweep(write(repetition=grid))
    assert names_and(sweep, unique, "schedule.epochs", "schedule.steps") == [
        ("max_unique_tokens-320_epochs-1", 320, 1.0, None),
        ("max_unique_tokens-320_epochs-2.5", 320, 2.5, None),
        ("max_unique_tokens-640_epochs-1", 640, 1.0, None),
        ("max_unique_tokens-640_epochs-2.5", 640, 2.5, None),
    ]
    sweep = load_sweep(write(repetition={"unique_tokens": [320, 640], "flops": [1e9]}))
    assert names_and(sweep, unique, "schedule.flops") == [
        ("max_unique_tokens-320_flops-1e9", 320, 1e9),
        ("max_unique_tokens-640_flops-1e9", 640, 1e9),
    ]


LABELS = st.text("abcAB019.-+", min_size=1, max_size=6).filter(lambda text: text[0].isalnum())
AXES = st.lists(
    st.lists(LABELS, min_size=1, max_size=4, unique_by=str.casefold), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(AXES)
def test_the_product_is_whole_and_every_run_is_found_by_its_name(labels):
    axes = {
        f"axis{number}": {
            label: {f"section{number}.key": place} for place, label in enumerate(points)
        }
        for number, points in enumerate(labels)
    }
    runs = expand(axes_of(SweepFile(base="base", dir="dir", axes=axes)))
    size = 1
    for points in labels:
        size *= len(points)
    # No label holds "_", so that a name says which points it is made of.
    places = {
        tuple(points.index(part) for points, part in zip(labels, name.split("_"), strict=True))
        for name, _ in runs
    }
    assert len(runs) == len(places) == size
    for name, fields in runs:
        expected = [
            points.index(part) for points, part in zip(labels, name.split("_"), strict=True)
        ]
        assert list(fields.values()) == expected


def test_what_an_attempt_is_given_reads_back_as_the_same_run(write, tmp_path):
    (run,) = load_sweep(write(axes={"model.preset": ["dc-7M"]}, set={"run.seed": 5})).runs
    path = tmp_path / "given.yaml"
    path.write_text(dump_config(run.config))
    assert load_config(path) == run.config


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({}, "has no axes"),
        ({"axis": {}}, "axis is not a known key: did you mean axes"),
        ({"dir": None, "axes": {"run.seed": [1]}}, "dir=null is not valid: it should be text"),
        ({"isoflop": {"budgets": [1e9]}}, "isoflop.sizes is missing"),
        ({"isoflop": {"budget": [1e9], "sizes": {}}}, "isoflop.budget is not a known key"),
        ({"isoflop": {"budgets": [-1], "sizes": {}}}, "isoflop.budgets.0=-1 is not valid"),
        ({"isoflop": {"budgets": [], "sizes": {}}}, "isoflop.budgets=[] is not valid"),
        ({"isoflop": {"budgets": [1e9], "sizes": {}}}, "isoflop.sizes is empty"),
        ({"repetition": {"unique_tokens": [64]}}, "either epochs or flops, but neither is set"),
        (
            {"repetition": {"unique_tokens": [64], "epochs": [1], "flops": [1e9]}},
            "either epochs or flops, but both are set",
        ),
        ({"axes": {"run.seed": []}}, "axes.run.seed is empty"),
        ({"axes": {"size": {}}}, "axes.size is empty"),
        ({"axes": {"run.seed": 3}}, "axes.run.seed is not a list of values"),
        ({"axes": {"seed": [1, 2]}}, "axes.seed has the point 1 without fields"),
        ({"axes": {"seed": 1}}, "axes.seed is not an axis"),
        ({"axes": {"size": {"small": {}}}}, "axes.size has the point small without fields"),
        ({"axes": {"size": [{"layers": 2}]}}, "axes.size sets layers, which is not a field"),
        ({"axes": {"run.seed": [1, 1]}}, 'axes.run.seed has the same point twice, {"run.seed": 1}'),
        ({"axes": {"run.dir": ["a"]}}, "sets run.dir, which follows from the sweep's dir"),
        ({"set": {"run.dir": "a"}, "axes": {"run.seed": [1]}}, "set sets run.dir"),
        (
            {"axes": {"run.seed": [1], "both": [{"run.seed": 2}]}},
            "axes.run.seed sets run.seed and axes.both sets run.seed",
        ),
        (
            {"set": {"run.seed": 1}, "axes": {"run.seed": [2, 3]}},
            "set sets run.seed and axes.run.seed sets run.seed",
        ),
        (
            {"set": {"schedule.steps": 3}, "repetition": {"unique_tokens": [64], "epochs": [1]}},
            "set sets schedule.steps and repetition.epochs sets schedule.epochs",
        ),
        (
            {"axes": {"data.train.0.epochs": [1], "data.train": [[{"path": "b"}]]}},
            'axes.data.train has the value [{"path": "b"}], which makes no name',
        ),
        (
            {"axes": {"a": {"x": {"data.train": []}}, "b": {"y": {"data.train.0.epochs": 1}}}},
            "axes.a sets data.train and axes.b sets data.train.0.epochs",
        ),
        ({"axes": {"data.tokenizer": ["a/b"]}}, "point 'tokenizer-a/b', which cannot be part of"),
        ({"axes": {"size": {"..": {"run.seed": 1}}}}, "axes.size has the point '..', which cannot"),
        ({"axes": {"size": {"_slurm": {"run.seed": 1}}}}, "'_slurm', which cannot"),
        (
            {"axes": {"size": {"a": {"run.seed": 1}, "A": {"run.seed": 2}}}},
            "axes.size has two points of the name A",
        ),
        (
            {
                "axes": {
                    "p": {"a": {"run.seed": 1}, "a_b": {"run.seed": 2}},
                    "q": {"b_c": {"optimizer.lr": 1e-3}, "c": {"optimizer.lr": 2e-3}},
                }
            },
            "Two runs would have the name a_b_c",
        ),
        ({"axes": {"p": {"a" * 300: {"run.seed": 1}}}}, "a name of 300 characters"),
        ({"axes": {"run.seeds": [1]}}, "run seeds-1: run.seeds is not a known key: did you mean"),
        ({"axes": {"optimizer.lr": [1e-3, -1]}}, "run lr--1: optimizer.lr=-1 is not valid"),
        ({"axes": {"model.vocab_size.x": [1]}}, "model.vocab_size.x does not lead to a field"),
        (
            {"set": {"checkpoint.resume": "never"}, "axes": {"run.seed": [1]}},
            "checkpoint.resume=never does not let a sweep",
        ),
        (
            {
                "axes": {"model.preset": ["dc-7M", "dc-14M"]},
                "set": {"model.attention_dropout": 0, "model.hidden_dropout": 0}
                | {"model.init_std": 0.02, "model.output_init_std": 0.02}
                | {"model.tie_embeddings": False},
            },
            "the runs preset-dc-7M and preset-dc-14M are the same run",
        ),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_in_one_sentence(write, sections, said):
    assert said in refusal(write(**sections))


def test_files_that_cannot_be_read_are_refused(write, tmp_path):
    path = tmp_path / "none.yaml"
    assert "cannot be read" in refusal(path)
    path.write_text("- 1")
    assert "holds no sweep" in refusal(path)
    path.write_text("base: nowhere.yaml\ndir: x\naxes: {run.seed: [1]}\n")
    assert "base=nowhere.yaml does not exist" in refusal(path)
    path.write_text("dir: x\ndir: y\n")
    assert "the key 'dir' stands twice" in refusal(path)
    two = {**BASE, "data": {**BASE["data"], "train": [{"path": "a"}, {"path": "b"}]}}
    grid = {"unique_tokens": [64], "epochs": [1]}
    assert "data.train has 2 sources, but repetition" in refusal(write(two, repetition=grid))


def test_runs_are_chosen_by_name(write):
    sweep = load_sweep(write(axes={"run.seed": [0, 1, 10], "optimizer.lr": [1e-3]}))
    chosen = sweep.select(["seed-1_lr-0.001", "seed-0*"])
    assert [run.name for run in chosen] == ["seed-0_lr-0.001", "seed-1_lr-0.001"]
    assert sweep.select([]) == list(sweep.runs)
    with pytest.raises(ConfigError, match=r"--only=seed-2 matches none of the 3 runs"):
        sweep.select(["seed-2"])


@pytest.mark.parametrize(
    ("name", "number"), [("learning_rates", 12), ("isoflop", 24), ("repetition", 18)]
)
def test_the_examples_can_be_run(name, number, monkeypatch):
    monkeypatch.chdir(REPO)
    sweep = load_sweep(REPO / f"configs/sweeps/{name}.yaml")
    assert len(sweep.runs) == number
    for run in sweep.runs:
        assert check_layout(run.config, world_size=1).data_parallel_size == 1
