"""The only file here that knows the package: a redesign edits this one, and never the numbers.

Everything takes and gives plain values: trees of configuration, paths, arrays by name, numbers.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from golden_runs import (
    CONVERSATIONS,
    CORPORA,
    MODEL,
    MODEL_SEQ_LENGTH,
    NUM_TRAINED_STEPS,
    VOCAB_SIZE,
    Tree,
    model_weight,
)
from numpy.typing import NDArray
from pair_shards import write_pairs
from threads import TEST_THREADS
from weight_pieces import piece_of

from megatron_mdm.cli.tree import build_tree
from megatron_mdm.config import Config, ModelConfig, parse_config
from megatron_mdm.core.options import run_app
from megatron_mdm.distributed.mesh import open_mesh
from megatron_mdm.distributed.processes import start_process_group
from megatron_mdm.model.shards import name_shards
from megatron_mdm.model.transformer import build_model
from megatron_mdm.training.data_plan import open_batches, plan_data
from megatron_mdm.training.engine import Engine
from megatron_mdm.training.plan import make_plan
from megatron_mdm.training.validation import Validation

Arrays = dict[str, NDArray[Any]]
# What golden files call the inputs of the model besides tokens.
_MODEL_INPUTS = {
    "segment_ids": "documents",
    "position_ids": "places",
    "dropped_keys_seed": "key_seeds",
    "dropped_keys_rates": "key_rates",
}
_PROCESS_FIELDS = (
    "masking",
    "eps",
    "noise_schedule",
    "schedule_power",
    "t_min",
    "t_max",
    "weighting",
)
# Held-out tokens of any tokenizer.
NAMELESS = "nameless"


def _config_of(tree: Tree) -> Config:
    """Reads a tree in the words of golden files, in which a forward process has no section."""
    objective = dict(tree.get("objective", {}))
    process = {name: objective.pop(name) for name in _PROCESS_FIELDS if name in objective}
    return parse_config({**tree, "objective": {**objective, "process": process}})


def write_shards(folder: Path) -> None:
    """Writes every corpus with the project's own writer, as its tools lay them out.

    Args:
        folder: To write to.
    """
    for name, texts in CORPORA.items():
        # The end of text comes after each; without a recipe the shards are those of plain texts.
        write_pairs(folder / name, [(text, []) for text in texts], VOCAB_SIZE, with_recipe=False)
    for name, pairs in CONVERSATIONS.items():
        write_pairs(folder / name, pairs, VOCAB_SIZE)
    for ending in (".bin", ".idx"):
        # Without a manifest, which would ask for the tokenizer that made them.
        shutil.copyfile(folder / f"held-out{ending}", folder / f"{NAMELESS}{ending}")


def order_of(tree: Tree) -> tuple[Arrays, str, list[float]]:
    """What stands at each position of a whole run.

    Args:
        tree: The run.

    Returns:
        Source, window and shift of every position; the fingerprint of the data, by which a resumed
        run knows them; and the learning rate of every step.
    """
    config = _config_of(tree)
    data = plan_data(config)
    visits = data.order.find_visits(np.arange(data.order.total))
    arrays: Arrays = {
        "source": visits.source_N,
        "window": visits.window_N,
        "shift": visits.shift_N,
    }
    rates = [_rate(config, step, data.num_steps) for step in range(data.num_steps)]
    return arrays, data.fingerprint, rates


def _rate(config: Config, step: int, num_steps: int) -> float:
    optimizer = config.optimizer
    return config.schedule.rate(step, num_steps, lr=optimizer.lr, min_lr=optimizer.min_lr)


def micro_batches(tree: Tree, steps: range, rank: int, size: int) -> list[list[Arrays]]:
    """The micro batches of a replica.

    Args:
        tree: The run.
        steps: Optimizer steps.
        rank: The replica.
        size: Replicas.

    Returns:
        Arrays by name, of each micro batch of each step.
    """
    config = _config_of(tree)
    batches = open_batches(
        config, plan_data(config), data_parallel_rank=rank, data_parallel_size=size
    )
    return [
        [
            {
                "inputs": batch.inputs_BS,
                "targets": batch.targets_BS,
                "weights": batch.weights_BS,
                "lengths": batch.lengths_B,
                "sources": batch.sources_B,
                **{
                    _MODEL_INPUTS.get(name, name): values
                    for name, values in batch.model_inputs.items()
                },
            }
            for batch in batches.read_step(step)
        ]
        for step in steps
    ]


def train_on_ranks(trees: dict[str, Tree], with_weights: list[str]) -> dict[str, Any]:
    """What every rank of a world does: trains a few steps of each run, then validates.

    Args:
        trees: Runs by name.
        with_weights: Those whose initial weights are wanted.

    Returns:
        For each run, the numbers of `_train`, and under `initial_weights` this rank's pieces.
    """
    # The objects of the imported libraries stay; collecting after a run need not walk through them.
    gc.collect()
    gc.freeze()
    return {name: _train(tree, name in with_weights) for name, tree in trees.items()}


def _train(tree: Tree, with_weights: bool) -> dict[str, Any]:
    plan = make_plan(_config_of(tree))
    config, data = plan.config, plan.data
    start_process_group(plan.device)
    torch.set_num_threads(TEST_THREADS)
    found: dict[str, Any] = {"losses": [], "grad_norms": []}
    with open_mesh(config.parallel, plan.device) as mesh:
        model = build_model(config, mesh, plan.dtype)
        if with_weights:
            shards = name_shards(model, mesh)
            found["initial_weights"] = [piece_of(shard, shard.parameter) for shard in shards]
        engine = Engine(config, plan.layout, mesh, model, plan.dtype)
        batches = open_batches(
            config,
            data,
            data_parallel_rank=mesh.dp.rank,
            data_parallel_size=mesh.dp.size,
        )
        for step in range(NUM_TRAINED_STEPS):
            rate = _rate(config, step, plan.num_steps)
            result = engine.train_step(step, batches.read_step(step), rate)
            total = result.loss_sum.clone()
            dist.all_reduce(total)
            found["losses"].append(total.item() / config.batch.global_batch_size)
            found["grad_norms"].append(result.grad_norm)
        metrics, windows = Validation(config, data.train, data.valid, data.read_content())(engine)
        found["validation"] = metrics
        found["windows"] = {
            "document": windows.document_N.tolist(),
            "nll": windows.nll_N.tolist(),
            "nll_given_first": windows.nll_given_first_N.tolist(),
        }
        engine.deepspeed.destroy()
        del engine
        gc.collect()
    return found


# What follows imports transformers where it is needed: ranks do without.


def write_export(folder: Path, kind: str) -> Path:
    """Exports the tiny model of fixed weights.

    Args:
        folder: To write to.
        kind: `mdm` or `ar`.

    Returns:
        The export.
    """
    from megatron_mdm.checkpoint.manifest import SavedModel
    from megatron_mdm.hf.export import export_to_hf
    from megatron_mdm.model.parameters import find_parameter_shape, list_parameter_names

    saved = SavedModel(ModelConfig(**MODEL), kind, MODEL_SEQ_LENGTH)

    class FixedWeights:
        def list_names(self) -> list[str]:
            return list_parameter_names(saved.model)

        def load(self, name: str) -> torch.Tensor:
            return torch.from_numpy(model_weight(name, find_parameter_shape(name, saved.model)))

    return export_to_hf(
        FixedWeights(),
        saved,
        folder / kind,
        tokenizer_dir=_write_tokenizer(folder / "tokenizer"),
        eos_token_id=0,
        metadata={},
    ).path


def _write_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0, "<unk>": 1} | {f"w{number}": number for number in range(2, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder


def scores(
    export: Path, requests: list[tuple[list[int], list[int]]], settings: Tree
) -> list[list[Any]]:
    """Scores continuations.

    Args:
        export: The model.
        requests: Context and continuation of each.
        settings: Options of scoring.

    Returns:
        For each request log-likelihood, its standard error, whether greedy decoding would have
        written it, and the forward passes.
    """
    from megatron_mdm.inference.exported import ExportedModel
    from megatron_mdm.inference.requests import Request, ScoringSettings
    from megatron_mdm.inference.scoring import Scorer

    scorer = Scorer(ExportedModel(export), ScoringSettings(**settings))
    asked = [Request(tuple(context), tuple(rest)) for context, rest in requests]
    return [
        [score.log_likelihood, score.standard_error, score.is_greedy, score.num_passes]
        for score in scorer.score(asked)
    ]


def losses_of_windows(export: Path, shards: Path, options: list[str]) -> Tree:
    """What tools/perplexity.py says of windows.

    Args:
        export: The model.
        shards: Folder of the corpora.
        options: More of the command line.

    Returns:
        Its numbers by name.
    """
    out = shards / "perplexity.json"
    base = ["--model", str(export), "--data", str(shards / NAMELESS), "--seq-length", "16"]
    _run_tool("perplexity", [*base, "--num-windows", "5", "--out", str(out), *options])
    found: Tree = json.loads(out.read_text())["models"][str(export)][NAMELESS]
    return found


def generated(export: Path, options: list[str]) -> list[list[int]]:
    """The tokens of the samples that tools/generate.py prints.

    Args:
        export: The model.
        options: The command line without the model.
    """
    output = _run_tool("generate", ["--model", str(export), *options])
    return [json.loads(line)["ids"] for line in output.splitlines()]


def reveals(
    export: Path, prompts: list[list[int]], options: Tree
) -> tuple[list[NDArray[np.int64]], list[list[float]]]:
    """Follows the steps of an export's own `generate`, as transformers loads it.

    Args:
        export: The model.
        prompts: Tokens, the same number for each.
        options: Of `generate`.

    Returns:
        The tokens after each step, and the probabilities with which the new ones were chosen.
    """
    from transformers import AutoModelForMaskedLM, logging

    logging.disable_progress_bar()
    model = AutoModelForMaskedLM.from_pretrained(export, trust_remote_code=True).eval()
    steps: list[Any] = []
    model.generate(torch.tensor(prompts), callback=steps.append, **options)
    probabilities = steps[-1].probability_BS[:, len(prompts[0]) :].double().tolist()
    return [step.x_BS.numpy() for step in steps], probabilities


def _run_tool(name: str, arguments: list[str]) -> str:
    """Runs a command in this process, which spares the seconds of its imports."""
    torch.set_num_threads(TEST_THREADS)
    output = io.StringIO()
    with _kept_path(), contextlib.redirect_stdout(output):
        run_app(build_tree(), [name, *arguments])
    return output.getvalue()


@contextlib.contextmanager
def _kept_path() -> Iterator[None]:
    """Takes back what a command does to the path of modules and to the environment."""
    with mock.patch.object(sys, "path", list(sys.path)), mock.patch.dict(os.environ):
        yield
