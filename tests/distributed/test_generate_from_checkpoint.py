"""A checkpoint generates under any division of ranks what its exported model generates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generating
import numpy as np
import pytest
import torch
from layouts import layout
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast
from worlds import World

from megatron_mdm.checkpoint.manifest import read_saved_model
from megatron_mdm.checkpoint.storage import CheckpointReader, resolve_checkpoint
from megatron_mdm.checkpoint.weights import write_weights_checkpoint
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.hf.export import export_to_hf
from megatron_mdm.inference.checkpoint import open_checkpoint
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.options import make_generation_options
from megatron_mdm.inference.prompts import Prompt
from megatron_mdm.inference.sampling import generate, make_drafts

GetWorld = Callable[[int], World]

# Tensor-parallel and pipeline-parallel size.
SIZES = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)]
VOCAB_SIZE, SEQ_LENGTH = 61, 16
KINDS: dict[str, dict[str, Any]] = {
    "mdm": {"model.qkv_bias": True, "model.num_query_groups": 2},
    "ar": {"objective.kind": "ar", "model.tie_embeddings": True, "model.qk_norm": True},
}
MIXTURE: dict[str, dict[str, Any]] = {"mixture": {"objective": {"kind": "mixture"}}}
REQUESTS: dict[str, list[dict[str, Any]]] = {
    "mdm": [
        {"prompt": "w5 w7 w9", "suffix": "w3 w4", "length": 6},
        {"prompt": "w5", "length": 12},
        {"prompt": "", "suffix": "w8", "length": 5},
        {"prompt": "w20 w21 w22 w23 w24", "length": 5},
    ],
    "ar": [
        {"prompt": "w5 w7 w9", "length": 6},
        {"prompt": "w5", "length": 6},
        {"prompt": "w20 w21 w22", "length": 6},
    ],
}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "mdm": {
        "greedy": {"decoding": {"num_steps": 4}},
        "sampled": {
            "decoding": {"temperature": 0.8, "order": "entropy", "top_p": 0.9},
            "num_samples": 2,
        },
        "guided": {"decoding": {"guidance_scale": 1.5, "block_length": 3}},
        "remasked": {"decoding": {"num_steps": 12, "remasking": 0.3, "temperature": 1.0}},
    },
    "ar": {
        "greedy": {},
        "sampled": {"decoding": {"temperature": 0.8, "top_k": 20}, "num_samples": 2},
    },
}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    words = {f"w{index}": index for index in range(VOCAB_SIZE - 1)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = "<end of text>"
    tokenizer.add_special_tokens([end])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(world_of: GetWorld, tokenizer_dir, tmp_path_factory):
    """By kind: a run's checkpoint, the same weights alone, and the exported model."""
    folders: dict[str, dict[str, Path]] = {}
    for kind, overrides in (KINDS | MIXTURE).items():
        root = tmp_path_factory.mktemp(kind)
        trained = root / "run" / "checkpoints"
        trained.mkdir(parents=True)
        world_of(1).run(
            generating.train_and_save, overrides=layout() | overrides, folder=str(trained)
        )
        reader = CheckpointReader(resolve_checkpoint(trained))
        saved = read_saved_model(reader.manifest)
        shapes = {name: tuple(reader.load(name).shape) for name in reader.list_names()}
        write_weights_checkpoint(
            reader,
            shapes,
            root / "weights",
            model=saved.model,
            kind=saved.kind,
            seq_length=saved.seq_length,
            run_ways=saved.run_ways,
            tensor_parallel_size=2,
        )
        export_to_hf(
            reader,
            saved,
            root / "exported",
            tokenizer_dir=tokenizer_dir,
            eos_token_id=VOCAB_SIZE - 1,
            metadata={},
        )
        folders[kind] = {"run": root / "run", "weights": root / "weights"}
        folders[kind]["exported"] = root / "exported"
    return folders


@pytest.fixture(scope="module")
def by_exported_model(made):
    """Ids that the tool gives with the exported model."""
    found = {}
    for kind in KINDS:
        model = ExportedModel(made[kind]["exported"])
        requests = [Prompt(**fields) for fields in REQUESTS[kind]]
        for name, fields in SETTINGS[kind].items():
            others = {name: value for name, value in fields.items() if name != "decoding"}
            options = make_generation_options(fields.get("decoding", {}), **others)
            drafts = make_drafts(requests, options, model.facts, model.tokenizer)
            found[kind, name] = [sample.ids for sample in generate(model, drafts, 8)]
    return found


def driver_answer(answers, tensor_parallel):
    """What the one rank that drives answers: the first of the last stage."""
    (driver,) = [rank for rank, answer in enumerate(answers) if answer is not None]
    assert driver == len(answers) - tensor_parallel
    return answers[driver]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "tp{}-pp{}".format(*sizes))
@pytest.mark.parametrize("kind", KINDS)
def test_every_division_of_ranks_generates_what_the_exported_model_does(
    world_of: GetWorld, made, by_exported_model, tokenizer_dir, kind: str, sizes
) -> None:
    # Both kinds of checkpoint turn up under one and several ranks.
    source = "run" if sizes in [(1, 1), (2, 2)] else "weights"
    for name, settings in SETTINGS[kind].items():
        answers = world_of(sizes[0] * sizes[1]).run(
            generating.samples,
            checkpoint=made[kind][source],
            tokenizer=tokenizer_dir,
            sizes=sizes,
            requests=REQUESTS[kind],
            settings=settings,
        )
        assert driver_answer(answers, sizes[0]) == by_exported_model[kind, name], name


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "tp{}-pp{}".format(*sizes))
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_exported_model(
    world_of: GetWorld, made, tokenizer_dir, kind: str, sizes
) -> None:
    generator = np.random.default_rng(3)
    top = VOCAB_SIZE + (kind == "mdm")
    rows = [generator.integers(0, top, length).tolist() for length in (16, 1, 9)]
    answers = world_of(sizes[0] * sizes[1]).run(
        generating.first_logits,
        checkpoint=made[kind]["run"],
        tokenizer=tokenizer_dir,
        sizes=sizes,
        rows=rows,
    )
    logits = driver_answer(answers, sizes[0])
    model = AutoModelForMaskedLM.from_pretrained(made[kind]["exported"], trust_remote_code=True)
    for row, found in zip(rows, logits, strict=True):
        with torch.no_grad():
            expected = model.eval()(torch.tensor([row])).logits[0].numpy()
        assert expected.std() > 0.3
        np.testing.assert_allclose(found[: len(row), :VOCAB_SIZE], expected, atol=1e-5)
        assert (found[:, VOCAB_SIZE:] == -np.inf).all()


@pytest.mark.parametrize("way", ["ar", "mdm"])
def test_a_mixture_generates_in_either_way_what_the_exported_model_does(
    world_of: GetWorld, made, tokenizer_dir, way: str
) -> None:
    requests = [one for one in REQUESTS[way] if one["prompt"]]
    model = ExportedModel(made["mixture"]["exported"], way=way)
    options = make_generation_options({})
    drafts = make_drafts([Prompt(**one) for one in requests], options, model.facts, model.tokenizer)
    expected = [sample.ids for sample in generate(model, drafts, 8)]
    for source, sizes in (("run", (1, 1)), ("weights", (1, 2))):
        answers = world_of(sizes[0] * sizes[1]).run(
            generating.samples,
            checkpoint=made["mixture"][source],
            tokenizer=tokenizer_dir,
            sizes=sizes,
            requests=requests,
            settings={},
            way=way,
        )
        assert driver_answer(answers, sizes[0]) == expected


@pytest.mark.parametrize(
    ("kind", "way", "message"),
    [
        ("mdm", "ar", "--run-as=ar is not how --checkpoint=.* was trained to run: use mdm, or"),
        ("ar", "prefix", "use ar, or leave it out"),
        ("mixture", "prefix", "--run-as=prefix works with exported models only"),
    ],
)
def test_a_way_that_a_checkpoint_cannot_run_in_is_refused(
    made, tokenizer_dir, kind: str, way: str, message: str
) -> None:
    opened = open_checkpoint(made[kind]["run"], way=way, tokenizer=str(tokenizer_dir))
    with pytest.raises(ConfigError, match=message), opened:
        pass


def test_an_error_of_the_driver_frees_the_other_ranks(
    world_of: GetWorld, made, tokenizer_dir
) -> None:
    common = {"checkpoint": made["mdm"]["run"], "tokenizer": tokenizer_dir, "sizes": (2, 2)}
    answers = world_of(4).run(generating.failing_work, **common)
    assert "ConfigError: There are 2 seeds for 1 sequences" in driver_answer(answers, 2)
    # And the same ranks can generate again.
    answers = world_of(4).run(generating.samples, requests=REQUESTS["mdm"], settings={}, **common)
    assert len(driver_answer(answers, 2)) == len(REQUESTS["mdm"])


@pytest.mark.parametrize(
    ("world_size", "sizes", "message"),
    [
        (2, (1, 1), "is 1, but 2 processes were launched: use torchrun --nproc-per-node=1"),
        (2, (2, 2), "is 4, but 2 processes were launched"),
        (3, (1, 3), "pipeline_model_parallel_size=3 does not divide model.num_layers=4"),
        (8, (8, 1), "tensor_model_parallel_size=8 does not divide model.num_attention_heads=4"),
        (1, (0, 1), "tensor_model_parallel_size=0 is not valid"),
    ],
)
def test_a_number_of_ranks_that_does_not_fit_is_refused(
    made, tokenizer_dir, monkeypatch, world_size: int, sizes, message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    tensor, pipeline = sizes
    options = {"tensor_parallel": tensor, "pipeline_parallel": pipeline}
    opened = open_checkpoint(made["mdm"]["run"], tokenizer=str(tokenizer_dir), **options)
    with pytest.raises(ConfigError, match=message), opened:
        pass


def test_a_checkpoint_without_a_tokenizer_needs_one(made) -> None:
    with pytest.raises(ConfigError, match=r"names no tokenizer: give the model's as --tokenizer"):
        open_checkpoint(made["mdm"]["weights"]).__enter__()


def test_the_tool_runs_under_torchrun(made, by_exported_model, tokenizer_dir, tmp_path) -> None:
    repo = Path(__file__).resolve().parents[2]
    prompts, page = tmp_path / "prompts.jsonl", tmp_path / "replay.html"
    prompts.write_text("".join(json.dumps(request) + "\n" for request in REQUESTS["mdm"]))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["tools/generate.py", "--checkpoint", made["mdm"]["run"], "--prompts", prompts]
    command += ["--tokenizer", tokenizer_dir, "--pipeline-parallel", 2, "--steps", 4, "--jsonl"]
    run = subprocess.run(
        [sys.executable, *launch, *map(str, command), "--html", str(page)],
        cwd=repo,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    made_ids = [json.loads(line)["ids"] for line in run.stdout.splitlines()]
    assert made_ids == by_exported_model["mdm", "greedy"]
    assert page.stat().st_size > 10_000
