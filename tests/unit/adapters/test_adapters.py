"""Adapters learn what the run_ would teach: the same batches, the same loss, fewer weights."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from adapter_examples import SIZES, VOCAB, tree_of, write_pairs, write_tokenizer
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from megatron_mdm.config import Config, check_layout, parse_config
from megatron_mdm.core.errors import BadStepsError
from megatron_mdm.data.prompt_response_pairs import read_prompt_lengths
from megatron_mdm.diffusion.samples import SEGMENT_IDS
from megatron_mdm.distributed.processes import start_process_group
from megatron_mdm.hf.adapters.model import AdaptedModel
from megatron_mdm.hf.adapters.rows import gather, separate
from megatron_mdm.hf.adapters.saving import merge_adapter, save_adapter
from megatron_mdm.hf.adapters.settings import AdapterSettings
from megatron_mdm.hf.adapters.training import AdapterEngine, learn_adapters
from megatron_mdm.training.data_plan import DataPlan, open_batches, plan_data
from megatron_mdm.training.plan import RunPlan

CPU = torch.device("cpu")
METADATA = {"base_model": "somewhere"}


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def prefix(tmp_path_factory, byte_tokenizer):
    return write_pairs(tmp_path_factory.mktemp("pairs"), byte_tokenizer)


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    start_process_group(CPU)
    yield
    dist.destroy_process_group()


class Run(NamedTuple):
    """Adapters that can be learned."""

    config: Config
    data: DataPlan
    model: AdaptedModel

    def fit(self, log):
        layout = check_layout(self.config, 1)
        plan = RunPlan(self.config, layout, CPU, torch.float32, self.data)
        learn_adapters(plan, self.model, log)


@pytest.fixture
def begin(export, tiny, prefix):
    """Prepares a run; returns (run, model, export's folder)."""

    def run(kind="mdm", settings=None, **sections):
        folder = export(tiny(**SIZES, is_causal=kind == "ar"))[0]
        sections["objective"] = {"kind": kind, **sections.get("objective", {})}
        config = parse_config(tree_of(prefix, **sections))
        model = AdaptedModel(folder, settings or AdapterSettings(rank=3), seed=0, device=CPU)
        return Run(config, plan_data(config), model), model, folder

    return run


def micro_batches(run_, step=0):
    batches = open_batches(run_.config, run_.data, data_parallel_rank=0, data_parallel_size=1)
    return batches.read_step(step)


def packed_losses(folder, batch):
    """Losses of whole windows, their pairs kept apart by a mask over pairs of positions."""
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    inputs_BS = torch.from_numpy(batch.inputs_BS)
    documents_BS = torch.from_numpy(batch.model_inputs[SEGMENT_IDS])
    sees_BSS = documents_BS[:, :, None] == documents_BS[:, None, :]
    if model.config.is_causal:
        sees_BSS = sees_BSS.tril()
    places_1S = torch.arange(inputs_BS.shape[1])[None]
    backbone = model.model
    code = type(backbone).forward.__globals__
    rotary = code["rotary_angles"](places_1S, model.config.head_dim, model.config.rope_theta)
    inputs = code["AttentionInputs"](rotary, sees_BSS[:, None], None)
    hidden_BSH = backbone.embed_tokens(inputs_BS)
    for layer in backbone.layers:
        hidden_BSH = layer(hidden_BSH, inputs)
    logits_BSV = model.output_logits(backbone.norm(hidden_BSH))
    losses_BS = F.cross_entropy(
        logits_BSV.transpose(1, 2), torch.from_numpy(batch.targets_BS), reduction="none"
    )
    weights_BS = torch.from_numpy(batch.weights_BS)
    return torch.where(weights_BS != 0, losses_BS * weights_BS, 0).sum(1).detach()


@pytest.mark.parametrize("kind", ["mdm", "ar"])
def test_before_the_first_step_the_loss_is_that_of_the_packed_windows(begin, kind):
    run_, _, folder = begin(kind)
    batches = micro_batches(run_)
    # Several pairs share a window, or nothing would be shown.
    assert all(batch.model_inputs[SEGMENT_IDS].max() >= 2 for batch in batches)
    expected_MB = torch.stack([packed_losses(folder, batch) for batch in batches])
    engine = AdapterEngine(run_.config, run_.model)
    found_MB = torch.stack([engine.evaluate(batch) for batch in batches])
    torch.testing.assert_close(found_MB.float(), expected_MB, rtol=1e-5, atol=1e-5)
    loss_sum = engine.train_step(0, batches, lr=1e-2).loss_sum.item()
    assert loss_sum == pytest.approx(float(expected_MB.sum()), rel=1e-5)


@pytest.mark.parametrize("kind", ["mdm", "ar"])
def test_only_adapters_change_and_the_loss_falls(begin, kind):
    run_, model, folder = begin(kind, schedule={"steps": 30}, run={"seed": 1})
    before = {name: one.detach().clone() for name, one in model.peft.named_parameters()}
    losses = []
    run_.fit(lambda record: losses.append(record["train/loss_nats_per_token"]))
    exported = load_file(folder / "model.safetensors")
    for name, parameter in model.peft.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name
        if "lora_" not in name:
            saved = name.removeprefix("base_model.model.").replace("base_layer.", "")
            assert torch.equal(parameter, exported[saved])
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize("kind", ["mdm", "ar"])
def test_what_is_predicted_of_prompts_has_no_gradient(begin, kind):
    run_, model, _ = begin(kind)
    (rows,) = gather(separate(micro_batches(run_)[0]), 10_000, VOCAB)
    seen = []
    model.base.model.norm.register_forward_hook(lambda *call: seen.append(call[2]))
    losses_R = model._compute_row_losses(rows)
    (gradient_RLH,) = torch.autograd.grad(losses_R.sum(), seen[0])
    is_learned_RL = rows.weights_RL != 0
    assert bool((gradient_RLH[~is_learned_RL] == 0).all())
    assert bool((gradient_RLH[is_learned_RL] != 0).any(dim=-1).all())
    # Prompts are what the shards say they are: AR predicts the first of a response at the last.
    prompts = {
        bytes(tokens): length
        for tokens, length in zip(*documents_of(run_.data.train.sources[0]), strict=True)
    }
    for row in range(len(is_learned_RL)):
        (places,) = is_learned_RL[row].nonzero(as_tuple=True)
        source_L = rows.targets_RL[row].tolist()
        if kind == "ar":
            source_L = rows.inputs_RL[row].tolist()
        (prompt,) = {
            length
            for tokens, length in prompts.items()
            if tokens == bytes(token % 256 for token in source_L)[: len(tokens)]
            and len(tokens) > places.max() + (kind == "ar")
        }
        assert places.min() >= prompt - (kind == "ar")


def documents_of(source):
    """Tokens of each document, modulo 256, and the length of its prompt."""
    lengths = source.source.document_lengths.astype(int)
    stops = np.cumsum(lengths)
    texts = [
        (source.source.read(start, stop) % 256).astype(np.uint8)
        for start, stop in zip((stops - lengths).tolist(), stops.tolist(), strict=True)
    ]
    return texts, read_prompt_lengths(source.source).tolist()


def test_gradients_do_not_depend_on_how_rows_are_grouped(begin):
    run_, model, _ = begin()
    batch = micro_batches(run_)[0]

    def gradient(max_tokens):
        model.peft.zero_grad()
        sum(losses_R.sum() for _, losses_R in model.compute_losses(batch, max_tokens)).backward()
        return torch.cat([one.grad.flatten() for one in model.list_adapters()])

    torch.testing.assert_close(gradient(1), gradient(10_000), rtol=1e-5, atol=1e-6)


def test_steps_depend_on_the_seed_alone_even_with_dropout(begin):
    results = []
    for _ in range(2):
        run_, model, _ = begin(settings=AdapterSettings(rank=2, dropout=0.3))
        run_.fit(lambda record: None)
        results.append(torch.cat([one.detach().flatten() for one in model.list_adapters()]))
    assert torch.equal(*results)


def test_held_out_windows_are_judged_when_the_run_says(begin, prefix):
    run_, _, _ = begin(
        data={"valid": [{"path": str(prefix)}]},
        validation={"every_epochs": 0.5, "num_samples": 2},
        schedule={"steps": 5},
        batch={"micro_batch_size": 1, "global_batch_size": 2},
    )
    records = []
    run_.fit(records.append)
    half_epoch = run_.data.train.num_windows / 2 / 2
    due = {math.ceil(number * half_epoch) for number in range(1, 10)}
    judged = [one["step"] for one in records if "valid/nll_nats_per_token" in one]
    assert judged == sorted({step for step in due if step <= 5} | {5})
    assert len(judged) < 5


def test_a_saved_adapter_loads_through_peft_and_a_merged_one_without_it(begin, tmp_path):
    settings = AdapterSettings(rank=2, alpha=5.0, targets=("v_proj", "down_proj"))
    run_, model, folder = begin(settings=settings)
    run_.fit(lambda record: None)
    model.peft.eval()
    tokens = torch.randint(0, VOCAB, (3, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.peft(tokens).logits
    save_adapter(model.peft, tmp_path / "adapter", METADATA)
    merge_adapter(model.peft, folder, tmp_path / "merged", METADATA)

    base = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        unadapted = base(tokens).logits
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")(tokens).logits
    assert torch.equal(loaded, expected)
    merged = AutoModelForMaskedLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    assert (unadapted - expected).abs().max() > 0.01
    # An export like the one it came from.
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {path.name for path in folder.iterdir()} - {"__pycache__"}
    assert not any(path.suffix in (".bin", ".pt", ".pkl") for path in tmp_path.rglob("*"))


def test_a_merge_keeps_files_and_dtype_of_a_sharded_export(export, tiny, prefix, tmp_path):
    folder = export(tiny(**SIZES), max_shard_bytes=6000, dtype=torch.bfloat16)[0]
    files = sorted(path.name for path in folder.glob("*.safetensors*"))
    assert len(files) > 2
    model = AdaptedModel(folder, AdapterSettings(rank=2), seed=0, device=CPU)
    for name, one in model.peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(one)
    merge_adapter(model.peft, folder, tmp_path / "merged", METADATA)
    merged = tmp_path / "merged"
    assert sorted(path.name for path in merged.glob("*.safetensors*")) == files
    for name in files:
        if not name.endswith(".json"):
            assert {one.dtype for one in load_file(merged / name).values()} == {torch.bfloat16}
    # Added up before it is rounded, once.
    layer = model.base.model.layers[1].mlp.up_proj
    delta = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    wanted = (layer.base_layer.weight + delta).bfloat16()
    loaded = AutoModelForMaskedLM.from_pretrained(merged, trust_remote_code=True, dtype="auto")
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, wanted)


def test_a_loss_that_is_not_finite_ends_the_run_before_the_adapters_change(begin):
    run_, model, _ = begin()
    next(iter(model.base.model.embed_tokens.parameters())).data.fill_(torch.nan)
    before = [one.detach().clone() for one in model.list_adapters()]
    with pytest.raises(BadStepsError, match=r"step 1 the loss is nan .* lower optimizer\.lr"):
        run_.fit(lambda record: None)
    assert all(map(torch.equal, before, model.list_adapters()))
