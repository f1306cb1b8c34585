"""Models that embed the noise level: the formula, gradients, and one model in all its forms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import communication_probe
import generating
import numpy as np
import packed_pairs
import pytest
import time_probe
import torch
from layouts import LAYOUTS, layout
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from worlds import World

from megatron_mdm.checkpoint.manifest import read_saved_model
from megatron_mdm.checkpoint.storage import CheckpointReader, resolve_checkpoint
from megatron_mdm.diffusion.probes import make_request_noise
from megatron_mdm.hf.conversion.check import check_export
from megatron_mdm.hf.export import export_to_hf
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.options import make_generation_options
from megatron_mdm.inference.prompts import Prompt
from megatron_mdm.inference.requests import Request, ScoringSettings
from megatron_mdm.inference.sampling import generate, make_drafts
from megatron_mdm.inference.scoring import Scorer, make_estimator
from megatron_mdm.studies.costs.communication import step_transfers

GetWorld = Callable[[int], World]

VOCAB_SIZE = 61
WITHOUT: dict[str, Any] = {"objective.process": {"kind": "hybrid", "p_u": 0.2}}
WITH = WITHOUT | {"model.time_embedding": True}


def test_a_model_begins_as_one_without(world_of: GetWorld) -> None:
    (one,), (other,) = (
        world_of(1).run(cases.train, overrides=overrides, num_steps=2)
        for overrides in (WITH, WITHOUT)
    )
    assert one["losses"][0] == other["losses"][0]
    # The first update moves it.
    assert one["losses"][1] != other["losses"][1]


def test_what_is_added_and_its_gradient_are_those_of_the_formula(world_of: GetWorld) -> None:
    (found,) = world_of(1).run(time_probe.look_into_a_pass, overrides=WITH)
    angles_BK = np.pi * np.outer(found["log_snr"].astype(np.float64), np.arange(1, 33)) / 20
    features_BF = np.concatenate([np.cos(angles_BK), np.sin(angles_BK)], axis=1)
    expected_BH = features_BF @ found["weight"].T.astype(np.float64)
    for added_BH in found["added"]:
        np.testing.assert_allclose(added_BH, expected_BH, atol=1e-6)
    gradient_HF = np.einsum("sbh,bf->hf", found["gradient_there"], features_BF)
    error = np.linalg.norm(found["gradient"] - gradient_HF)
    assert error < 1e-5 * np.linalg.norm(gradient_HF)
    # And the whole network, in a random direction.
    slope = float((gradient_HF * found["direction"]).sum())
    assert abs(slope) > 0.1
    assert found["slope"] == pytest.approx(slope, rel=5e-3)


@pytest.mark.parametrize("name", ["tp2-sp-zero1", "pp2-zero1"])
def test_pairs_of_a_window_with_noise_of_their_own_train_alike(
    world_of: GetWorld, name: str
) -> None:
    overrides = packed_pairs.FINETUNING | {"objective.kind": "mdm"} | WITH
    (expected,) = world_of(1).run(cases.train, overrides=overrides)
    size, parallel = LAYOUTS[name]
    for found in world_of(size).run(cases.train, overrides=overrides | parallel):
        cases.assert_same_run(found, expected, rtol=2e-5)


def test_ranks_that_share_a_sequence_send_its_gradient_and_nothing_else(
    world_of: GetWorld,
) -> None:
    counted, predicted = [], []
    for overrides in (WITH, WITHOUT):
        overrides = overrides | layout(tp=2, sp=True, zero=0)
        measured = world_of(2).run(communication_probe.count, overrides=overrides, dtype="fp32")
        counted.append(measured[0][0])
        found = Counter[str]()
        config = cases.config_of(overrides)
        for one in step_transfers(config, 0, world_size=2, dtype="fp32"):
            found[one.operation] += one.total_bytes
        predicted.append(found)
    # Four micro batches of a weight [32, 64] in float32.
    added = {name: counted[0][name] - counted[1][name] for name in counted[0]}
    assert added == {name: 0 for name in added} | {"all_reduce": 4 * 32 * 64 * 4}
    assert predicted[0]["all_reduce"] - predicted[1]["all_reduce"] == added["all_reduce"]


@pytest.fixture(scope="module")
def made(world_of: GetWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained checkpoint, its export, and the tokenizer."""
    root = tmp_path_factory.mktemp("time")
    folders = {name: root / name for name in ("checkpoints", "exported", "tokenizer")}
    folders["checkpoints"] = root / "run" / "checkpoints"
    folders["checkpoints"].mkdir(parents=True)
    words = {f"w{index}": index for index in range(VOCAB_SIZE - 1)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained(folders["tokenizer"])
    world_of(1).run(
        generating.train_and_save,
        overrides=layout() | WITH,
        folder=str(folders["checkpoints"]),
    )
    reader = CheckpointReader(resolve_checkpoint(folders["checkpoints"]))
    assert reader.load("time_embedding.weight").abs().max() > 0.01
    saved = read_saved_model(reader.manifest)
    export_to_hf(
        reader,
        saved,
        folders["exported"],
        tokenizer_dir=folders["tokenizer"],
        eos_token_id=VOCAB_SIZE - 1,
        metadata={},
    )
    return folders


def test_the_export_has_the_logits_of_the_checkpoint(made: dict[str, Path]) -> None:
    check = check_export(made["checkpoints"], made["exported"])
    assert check.passed, check.describe()
    model = ExportedModel(made["exported"])
    tokens_BS = torch.zeros(1, 5, dtype=torch.int64)
    one, other = (
        model._model(tokens_BS, log_snr=torch.tensor([value])).logits for value in (-3.0, 3.0)
    )
    assert (one - other).abs().max() > 0.05
    assert "an embedding of the noise level" in (made["exported"] / "README.md").read_text()


def test_scores_of_the_export_are_held_out_losses_of_the_run(
    world_of: GetWorld, made: dict[str, Path]
) -> None:
    model, settings = ExportedModel(made["exported"]), ScoringSettings(draws=8)
    text = tuple(np.random.default_rng(1).integers(0, VOCAB_SIZE, 16).tolist())
    (score,) = Scorer(model, settings).score([Request((), text)])
    noise = make_request_noise(settings.seed, (), text)
    probes = make_estimator(model.facts, settings).draw_probes(noise, text, 0)
    chances_B2 = np.array([probe.chances for probe in probes], dtype=np.float32)
    (losses_B,) = world_of(1).run(
        time_probe.held_out_losses,
        overrides=layout() | WITH,
        folder=str(made["checkpoints"]),
        arrays={
            "inputs": np.stack([probe.shown_L for probe in probes]),
            "targets": np.tile(np.array(text), (8, 1)),
            "weights": np.stack([probe.weights_L for probe in probes]).astype(np.float32),
            "log_snr": np.array([[probe.log_snr] for probe in probes], dtype=np.float32),
            "clean_chance": chances_B2[:, :1].repeat(16, axis=1),
            "uniform_chance": chances_B2[:, 1:].repeat(16, axis=1),
        },
    )
    assert score.log_likelihood == pytest.approx(-float(losses_B.mean()), rel=1e-4)


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)], ids=["tp2", "pp2"])
def test_a_checkpoint_on_ranks_samples_what_its_export_does(
    world_of: GetWorld, made: dict[str, Path], sizes: tuple[int, int]
) -> None:
    requests = [{"prompt": "w3 w4", "length": 6}, {"prompt": "w5", "length": 3}]
    decoding = {"num_steps": 5, "correction_steps": 3, "guidance_scale": 0.5}
    ranks = world_of(2).run(
        generating.samples,
        checkpoint=made["checkpoints"],
        tokenizer=made["tokenizer"],
        sizes=sizes,
        requests=requests,
        settings={"decoding": decoding},
    )
    (found,) = [ids for ids in ranks if ids is not None]
    model, options = ExportedModel(made["exported"]), make_generation_options(decoding)
    prompts = [Prompt(**request) for request in requests]
    drafts = make_drafts(prompts, options, model.facts, model.tokenizer)
    assert found == [one.ids for one in generate(model, drafts, options.batch_size)]
