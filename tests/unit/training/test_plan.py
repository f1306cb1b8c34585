from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from plan_examples import SEQ, VOCAB, plan_of, refusal, write_checkpoint, write_shards

from megatron_mdm.checkpoint.manifest import format_manifest, read_manifest
from megatron_mdm.checkpoint.storage import name_checkpoint
from megatron_mdm.config import ModelConfig
from megatron_mdm.core.errors import CheckpointError, ConfigError, DataError
from megatron_mdm.corpus.tokenizer import load_tokenizer
from megatron_mdm.corpus.tokenizer_training import save_tokenizer, train_byte_level_bpe
from megatron_mdm.data.writer import ShardWriter
from megatron_mdm.diffusion.stochastic_depth import build_stochastic_depth
from megatron_mdm.training import data_plan
from megatron_mdm.training import plan as plan_module
from megatron_mdm.training.plan import find_missing_space


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_byte_level_bpe(["some text to learn from"], 260), folder)
    return folder


def test_a_good_run_gets_a_plan_and_leaves_no_trace(tree):
    plan = plan_of(tree)
    assert plan.data.train.num_windows == 100 // SEQ
    assert plan.data.valid is None
    assert plan.num_steps == 5
    assert plan.resume_from is None
    assert (plan.device.type, plan.dtype) == ("cpu", torch.float32)
    assert (plan.layout.world_size, plan.layout.num_micro_batches) == (1, 2)
    assert plan.checkpoint_dir == Path(tree["run"]["dir"]) / "checkpoints"
    assert not plan.run_dir.exists()


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_shard_is_named(tree, tmp_path, suffix):
    (tmp_path / f"train{suffix}").unlink()
    message = refusal(DataError, tree)
    assert f"{tmp_path}/train{suffix} does not exist" in message
    assert "mdm prepare" in message


def test_missing_validation_shards_are_named(tree, tmp_path):
    message = refusal(DataError, tree, data={"valid": [{"path": str(tmp_path / "valid")}]})
    assert f"{tmp_path}/valid.idx does not exist" in message


@pytest.mark.parametrize(("suffix", "keep"), [(".bin", -2), (".bin", 0), (".idx", -1), (".idx", 9)])
def test_a_truncated_shard_is_named(tree, tmp_path, suffix, keep):
    path = tmp_path / f"train{suffix}"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is truncated" in refusal(DataError, tree)


def test_a_token_beyond_the_vocabulary_is_named_with_its_place(tree, tmp_path):
    write_shards(tmp_path / "train", [*range(50), VOCAB, *range(49)])
    message = refusal(DataError, tree)
    assert f"train holds the token id {VOCAB} at token 50" in message
    assert f"model.vocab_size={VOCAB}" in message


def test_the_last_token_of_the_vocabulary_is_allowed(tree, tmp_path):
    write_shards(tmp_path / "train", [VOCAB - 1] * 100)
    assert plan_of(tree).data.train.num_windows == 12


def test_shards_of_another_vocabulary_are_refused(tree, tmp_path):
    write_shards(tmp_path / "train", vocab_size=VOCAB + 1)
    message = refusal(DataError, tree)
    assert f"{tmp_path}/train.json has a vocabulary of {VOCAB + 1} tokens" in message
    assert f"more than model.vocab_size={VOCAB}: set model.vocab_size={VOCAB + 1}, or" in message
    message = refusal(DataError, tree, model={"padded_vocab_size": VOCAB})
    assert f"more than model.vocab_size={VOCAB}: run mdm prepare again" in message


def test_shards_of_a_smaller_vocabulary_fit_and_what_is_predicted_in_vain_is_said(tree, tmp_path):
    write_shards(tmp_path / "train", vocab_size=VOCAB)
    assert plan_of(tree).data.remarks == []
    write_shards(tmp_path / "train", vocab_size=VOCAB - 44)
    (remark,) = plan_of(tree).data.remarks
    assert f"vocabulary of {VOCAB - 44} tokens and model.vocab_size={VOCAB}, so" in remark
    # It does what it says: the same shapes, and nothing left to say.
    assert remark.endswith(
        f"a run with model.vocab_size={VOCAB - 44} and model.padded_vocab_size={VOCAB} keeps their "
        "rows and leaves them out"
    )
    model = {"vocab_size": VOCAB - 44, "padded_vocab_size": VOCAB}
    plan = plan_of(tree, model=model)
    assert plan.data.remarks == []
    shape = ("embedding_rows", "head_rows", "mask_id")
    before = ModelConfig.model_validate(tree["model"])
    assert [getattr(plan.config.model, name) for name in shape] == [
        getattr(before, name) for name in shape
    ]
    # A mask within the model's vocabulary that the data's tokenizer never makes.
    masked = plan_of(tree, model={"mask_token_id": VOCAB - 1})
    assert masked.config.model.mask_id == VOCAB - 1


def test_a_run_from_before_rows_were_told_apart_goes_on(tree):
    path = write_checkpoint(tree)
    manifest = read_manifest(path)
    del manifest.config["model"]["padded_vocab_size"]
    (path / "manifest.json").write_text(format_manifest(manifest))
    assert plan_of(tree).resume_from == path
    message = refusal(ConfigError, tree, model={"padded_vocab_size": VOCAB + 9})
    assert f"model.padded_vocab_size={VOCAB + 9} differs from the null of {path}" in message


def test_shards_of_another_tokenizer_are_refused(tree, tmp_path, tokenizer_dir):
    handle = load_tokenizer(str(tokenizer_dir))
    options = {"data": {"tokenizer": str(tokenizer_dir)}, "model": {"vocab_size": VOCAB}}
    write_shards(tmp_path / "train", tokenizer_sha256="cd" * 32)
    message = refusal(DataError, tree, **options)
    assert f"{tmp_path}/train.json was made by the tokenizer 'tok'" in message
    assert handle.sha256[:12] in message
    write_shards(tmp_path / "train", tokenizer_sha256=handle.sha256)
    assert plan_of(tree, **options).data.train.num_windows == 12


def test_the_plan_records_the_tokenizer_of_the_data(tree, tmp_path, tokenizer_dir, monkeypatch):
    handle = load_tokenizer(str(tokenizer_dir))
    sizes = {"model": {"vocab_size": VOCAB}}
    monkeypatch.chdir(tokenizer_dir.parent)
    write_shards(tmp_path / "train", tokenizer=tokenizer_dir.name, tokenizer_sha256=handle.sha256)
    found = plan_of(tree, **sizes).data.tokenizer
    assert (found.name, found.place) == (tokenizer_dir.name, str(tokenizer_dir))
    assert (found.sha256, found.vocab_size) == (handle.sha256, VOCAB)
    monkeypatch.chdir(tmp_path)
    assert plan_of(tree, **sizes).data.tokenizer == found.model_copy(update={"place": None})
    monkeypatch.setenv("RANK", "1")
    assert plan_of(tree, **sizes).data.tokenizer is None


def test_a_tokenizer_that_is_not_there_is_named(tree, tmp_path):
    message = refusal(DataError, tree, data={"tokenizer": str(tmp_path / "nowhere")})
    assert f"{tmp_path}/nowhere does not exist" in message


def test_a_corpus_shorter_than_a_window_is_refused(tree):
    message = refusal(DataError, tree, data={"seq_length": 101})
    assert "train holds 100 tokens, less than one window of data.seq_length=101" in message


def test_a_run_dir_below_a_file_is_refused(tree, tmp_path):
    # Root may write anywhere, but not below a file.
    run_dir = str(tmp_path / "train.bin" / "deep" / "run")
    message = find_missing_space(plan_of(tree, run={"dir": run_dir}))
    assert f"run.dir={run_dir} cannot be written" in message


def test_a_run_dir_that_is_a_file_is_refused(tree, tmp_path):
    message = find_missing_space(plan_of(tree, run={"dir": str(tmp_path / "train.bin")}))
    assert f"run.dir={tmp_path}/train.bin cannot be written" in message


def test_a_run_dir_without_permission_is_refused(tree, monkeypatch):
    monkeypatch.setattr(plan_module.os, "access", lambda path, mode: False)
    message = find_missing_space(plan_of(tree))
    assert f"run.dir={tree['run']['dir']} cannot be written" in message


def test_a_full_disk_is_refused_with_both_sizes(tree, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1234, 1234))
    # Nothing that keeps a plan from being made: the run may start elsewhere.
    message = find_missing_space(plan_of(tree))
    # Two vocabularies of 384 rows, two layers of 4 d^2 + 3 d f + 2 d, a norm; 12 bytes for each.
    layer = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16
    needed = 12 * (2 * 384 * 16 + 2 * layer + 16)
    assert f"has 1,234 bytes free, less than one checkpoint of {needed:,} bytes" in message


def test_a_run_without_a_gpu_cannot_ask_for_one(tree, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "run.device=cuda needs a GPU" in refusal(ConfigError, tree, run={"device": "cuda"})


def test_compiling_for_a_cpu_needs_a_compiler(tree, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    message = refusal(ConfigError, tree, run={"device": "cpu", "compile": "on"})
    assert "run.compile=on needs a C++ compiler on a CPU, but g++ and clang++ cannot" in message
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/c++" if name == "c++" else None)
    monkeypatch.setenv("CXX", "c++")
    assert plan_of(tree, run={"device": "cpu", "compile": "on"}).device.type == "cpu"


def test_more_processes_than_gpus_are_refused(tree, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    message = refusal(ConfigError, tree, run={"device": "cuda"})
    assert "LOCAL_RANK=3 has no GPU of its own, this node has 1" in message


def test_bf16_without_master_weights_is_refused(tree):
    message = refusal(ConfigError, tree, run={"dtype": "bf16"}, parallel={"zero_stage": 0})
    assert "parallel.zero_stage=0 with bf16 would keep no float32 master weights" in message
    assert plan_of(tree, run={"dtype": "bf16"}).dtype == torch.bfloat16


def test_sizes_are_checked_against_the_launched_processes(tree, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "batch.global_batch_size=4 is not a multiple" in refusal(ConfigError, tree)


def test_a_budget_that_buys_no_step_is_refused(tree):
    message = refusal(ConfigError, tree, schedule={"steps": None, "flops": 1.0})
    assert "schedule.flops=1 does not pay for one step" in message


def test_annealing_has_to_leave_steps_for_full_attention(tree):
    message = refusal(ConfigError, tree, objective={"attention_annealing_steps": 5})
    assert "objective.attention_annealing_steps=5 leaves none of the run's 5 steps" in message
    assert "use at most 4." in message
    assert plan_of(tree, objective={"attention_annealing_steps": 4}).num_steps == 5


def test_the_latest_checkpoint_is_resumed(tree):
    path = write_checkpoint(tree)
    assert plan_of(tree).resume_from == path
    assert plan_of(tree, checkpoint={"resume": "required"}).resume_from == path


def test_resume_never_refuses_a_run_that_has_checkpoints(tree):
    write_checkpoint(tree)
    message = refusal(ConfigError, tree, checkpoint={"resume": "never"})
    assert "checkpoint.resume=never, but " in message
    assert "run/checkpoints holds step_00000003" in message


def test_resume_required_refuses_a_run_that_has_none(tree):
    message = refusal(CheckpointError, tree, checkpoint={"resume": "required"})
    assert "checkpoint.resume=required, but " in message
    assert "run/checkpoints holds no checkpoint" in message


def test_a_damaged_checkpoint_is_refused_before_anything_starts(tree):
    path = write_checkpoint(tree)
    (path / "weights-tp0-pp0-dp0.safetensors").write_bytes(b"short")
    assert "weights-tp0-pp0-dp0.safetensors has 5 bytes" in refusal(CheckpointError, tree)


def test_a_latest_that_names_nothing_is_refused(tree):
    path = write_checkpoint(tree)
    shutil.rmtree(path)
    assert "latest names 'step_00000003'" in refusal(CheckpointError, tree)


@pytest.mark.parametrize(
    ("section", "field", "value", "saved"),
    [
        ("model", "hidden_size", 32, "16"),
        ("run", "seed", 7, "0"),
        ("data", "seq_length", 4, "8"),
        ("data", "order", "documents", "shuffle"),
        ("batch", "global_batch_size", 8, "4"),
        ("optimizer", "lr", 0.001, "0.0002"),
        ("objective", "kind", "ar", "mdm"),
        ("objective", "attention_annealing_steps", 2, "0"),
        ("model", "mask_token_id", 200, "null"),
        ("model", "tie_embeddings", True, "false"),
    ],
)
def test_a_resumed_run_cannot_change_what_it_computes(tree, section, field, value, saved):
    path = write_checkpoint(tree)
    message = refusal(ConfigError, tree, **{section: {field: value}})
    shown = str(value).lower() if isinstance(value, bool) else value
    assert f"{section}.{field}={shown} differs from the {saved} of {path}" in message
    assert f"restore {section}.{field}={saved}." in message


def test_a_resumed_run_may_change_how_it_runs(tree):
    path = write_checkpoint(tree)
    plan = plan_of(
        tree,
        run={"num_threads": 3},
        parallel={"zero_stage": 2},
        batch={"micro_batch_size": 1},
        validation={"num_samples": 3},
        checkpoint={"every_steps": 2},
        reporting={"log_every_steps": 2},
    )
    assert plan.resume_from == path


def test_a_moved_run_dir_is_resumed(tree, tmp_path):
    write_checkpoint(tree)
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    found = plan_of(tree, run={"dir": str(moved)}).resume_from
    assert found == moved / "checkpoints" / name_checkpoint(3)


def test_a_resume_on_other_data_under_the_same_path_is_refused(tree, tmp_path):
    path = write_checkpoint(tree)
    assert plan_of(tree).resume_from == path
    bin_file = tmp_path / "train.bin"
    tokens = bytearray(bin_file.read_bytes())
    tokens[-4] ^= 1
    bin_file.write_bytes(tokens)
    message = refusal(DataError, tree)
    assert f"not those that {path} was trained on" in message


def test_a_resume_follows_data_that_moved(tree, tmp_path):
    path = write_checkpoint(tree)
    (tmp_path / "moved").mkdir()
    for suffix in (".bin", ".idx"):
        (tmp_path / f"train{suffix}").rename(tmp_path / f"moved/train{suffix}")
    assert plan_of(tree, data={"train": [{"path": f"{tmp_path}/moved/train"}]}).resume_from == path


def test_the_same_shards_twice_are_one_content(tree, tmp_path):
    twice = [{"path": str(tmp_path / "train")}] * 2
    plan = plan_of(tree, data={"train": twice})
    (remark,) = plan.data.remarks
    start = f"{100 // SEQ * SEQ} tokens stand in data.train.0 and data.train.1: the run sees each "
    assert remark.startswith(start)
    visits = plan.data.order.count_visits(plan.data.order.total)
    assert remark == f"{start}{sum(visits) / (100 // SEQ):.4f} times"
    # Each entry alone is within its cap, the content is not.
    capped = [{"path": str(tmp_path / "train"), "max_epochs": 0.5 + visits[0] / (100 // SEQ)}] * 2
    message = refusal(ConfigError, tree, data={"train": capped})
    assert message.startswith("data.train.0.max_epochs=")
    assert "does not hold over content: 96 of its tokens stand more than once" in message


def test_validation_on_what_is_trained_on_is_said(tree, tmp_path):
    plan = plan_of(tree, data={"valid": [{"path": str(tmp_path / "train")}]})
    assert plan.data.remarks == [
        "96 tokens of data.valid.0 are trained on: its loss is not that of unseen text"
    ]


def test_a_source_without_visits_is_said(tree, tmp_path):
    write_shards(tmp_path / "other", range(100, 200))
    sources = [
        {"path": str(tmp_path / "train"), "weight": 1.0},
        {"path": str(tmp_path / "other"), "weight": 1e-9},
    ]
    (remark,) = plan_of(tree, data={"train": sources}).data.remarks
    assert remark.startswith(f"data.train.1 ({tmp_path}/other) gets none of the run's ")


def test_an_id_below_zero_is_named(tree, tmp_path):
    with ShardWriter(tmp_path / "train", np.int32) as writer:
        writer.add_document([*range(50), -1, *range(49)])
        writer.finish()
    message = refusal(DataError, tree)
    assert "train holds the token id -1 at token 50, and ids begin at 0" in message


def test_a_mask_token_within_shards_without_a_manifest_is_named(tree):
    message = refusal(DataError, tree, model={"mask_token_id": 60})
    assert "train holds the token id 60 at token 60, which is model.mask_token_id: set" in message
    assert plan_of(tree, model={"mask_token_id": 200}).num_steps == 5


def test_shards_are_looked_at_before_a_tokenizer_is_waited_for(tree, monkeypatch):
    def wait(*_):
        raise AssertionError("waited for a tokenizer")

    monkeypatch.setattr(data_plan, "load_tokenizer", wait)
    sources = {"valid": [{"path": "missing/valid"}], "tokenizer": "someone/some-tokenizer"}
    assert "missing/valid" in refusal(DataError, tree, data=sources)


def test_batches_of_a_run_say_which_blocks_are_left_out_where_any_can_be(tree):
    found = []
    for rate in (0.0, 0.5):
        plan = plan_of(tree, model={"stochastic_depth": rate})
        batches = data_plan.open_batches(
            plan.config, plan.data, data_parallel_rank=1, data_parallel_size=2
        ).read_step(3)
        found.append(batches[0])
    plain, scaled = found
    assert not plain.model_inputs
    np.testing.assert_array_equal(plain.inputs_BS, scaled.inputs_BS)
    depth = build_stochastic_depth(plan.config)
    expected = [depth(position)["block_scales"] for position in (14, 15)]
    np.testing.assert_array_equal(scaled.model_inputs["block_scales"], expected)
