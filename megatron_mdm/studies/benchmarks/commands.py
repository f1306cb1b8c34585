"""The subcommands of `tools/benchmark.py`: each returns the report of one benchmark."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_mdm.studies.benchmarks.data_loading import measure_loader
from megatron_mdm.studies.benchmarks.data_preprocessing import measure_growth, measure_preprocessing
from megatron_mdm.studies.benchmarks.harness import make_report
from megatron_mdm.studies.benchmarks.token_corpora import measure_token_corpora

DATA_PARTS = {
    "preprocess": measure_preprocessing,
    "growth": measure_growth,
    "tokens": measure_token_corpora,
    "loader": measure_loader,
}


def add_subcommands(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommands; the chosen one's function becomes `run`.

    Args:
        parser: The tool's parser.
    """
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    _add_data(benchmarks.add_parser("data", help="preprocessing and the loader: rates, growth"))
    checkpoint = benchmarks.add_parser("checkpoint", help="saving, checking and loading: rates")
    checkpoint.add_argument("--repeats", type=int, default=3, help="runs of each case (default 3)")
    checkpoint.set_defaults(run=run_checkpoint)
    convert = benchmarks.add_parser("convert", help="import and export: memory and rates")
    convert.add_argument("--preset", default="smdm-170M", help="sizes of the model (smdm-170M)")
    convert.add_argument("--repeats", type=int, default=1, help="runs of each case (default 1)")
    convert.set_defaults(run=run_convert)
    _add_sample(benchmarks.add_parser("sample", help="generation: tokens a second, passes"))
    _add_score(benchmarks.add_parser("score", help="likelihoods: requests a second, passes"))
    _add_train(benchmarks.add_parser("train", help="training: tokens a second, share of matmul"))
    _add_head(benchmarks.add_parser("head", help="output layer and loss: time, peak memory"))
    _add_attention(benchmarks.add_parser("attention", help="attention: time, peak memory, masks"))


def run_data(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures the chosen parts, each in a folder of its own that is removed."""
    settings = {name: getattr(arguments, name) for name in ("workers", "megabytes", "repeats")}
    results = {}
    for part, measure in DATA_PARTS.items():
        if arguments.part in (part, "all"):
            with _scratch() as folder:
                results[part] = measure(arguments.root, folder, **settings)
    return make_report("data", {**settings, "root": str(arguments.root)}, results)


def run_checkpoint(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures checkpoints on the disk of the temporary folder."""
    # DeepSpeed looks for an accelerator when it is imported, and says so on standard output.
    os.environ["DS_ACCELERATOR"] = "cpu"
    from megatron_mdm.studies.benchmarks.checkpoints import measure_checkpoints

    with _scratch() as folder:
        results = measure_checkpoints(folder, repeats=arguments.repeats)
    return make_report("checkpoint", {"repeats": arguments.repeats}, results)


def run_convert(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures conversion on the disk of the temporary folder."""
    # Only here: the other benchmarks need not wait for transformers.
    from megatron_mdm.studies.benchmarks.conversion import measure_conversion

    settings = {"preset": arguments.preset, "repeats": arguments.repeats}
    with _scratch() as folder:
        results = measure_conversion(folder, **settings)
    return make_report("convert", settings, results)


def run_sample(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures the samplers beside one written as the papers' code does it."""
    from megatron_mdm.studies.benchmarks.sampling import SamplingSettings, measure_sampling

    settings = SamplingSettings(**_chosen(arguments, SamplingSettings._fields))
    results = measure_sampling(arguments.model, settings)
    model = None if arguments.model is None else str(arguments.model)
    return make_report("sample", {"model": model, **settings._asdict()}, results)


def run_score(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Measures likelihoods beside one request at a time, as the papers' code scores them.

    Returns:
        The report on the rank that leads.
    """
    from megatron_mdm.studies.benchmarks.scoring import ScoreSettings, measure_scoring

    settings = ScoreSettings(**_chosen(arguments, ScoreSettings._fields))
    results = measure_scoring(arguments.model, settings)
    if results is None:
        return None
    model = None if arguments.model is None else str(arguments.model)
    given = {"model": model, "num_processes": int(os.environ.get("WORLD_SIZE", "1"))}
    return make_report("score", given | settings._asdict(), results)


def run_train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures training steps beside a plain model and transformers' Llama."""
    if arguments.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    with _report_alone_on_stdout():
        from megatron_mdm.studies.benchmarks.training import TrainingSettings, measure_training

        settings = TrainingSettings(**_chosen(arguments, TrainingSettings._fields))
        return make_report("train", settings._asdict(), measure_training(settings))


def run_head(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures the output layer beside one that holds all logits."""
    with _report_alone_on_stdout():
        from megatron_mdm.studies.benchmarks.head import HeadSettings, measure_head

        settings = HeadSettings(**_chosen(arguments, HeadSettings._fields))
        return make_report("head", settings._asdict(), measure_head(settings))


def run_attention(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures attention beside scores written out and a mask by elements."""
    with _report_alone_on_stdout():
        from megatron_mdm.studies.benchmarks.attention import AttentionSettings, measure_attention

        settings = AttentionSettings(**_chosen(arguments, AttentionSettings._fields))
        return make_report("attention", settings._asdict(), measure_attention(settings))


def _chosen(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names}


def _report_alone_on_stdout() -> contextlib.AbstractContextManager[object]:
    """DeepSpeed and Megatron say what they found on standard output."""
    return contextlib.redirect_stdout(sys.stderr)


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        yield Path(folder)


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--part", choices=[*DATA_PARTS, "all"], default="all", help="what to measure (all)")
    add("--workers", type=int, default=2, help="processes that encode (default 2)")
    add("--megabytes", type=float, default=30, help="millions of bytes of text (default 30)")
    add("--repeats", type=int, default=3, help="runs of each case, in turn (default 3)")
    add(
        "--root",
        type=Path,
        default=Path(sysconfig.get_paths()["stdlib"]),
        help="Python sources to make documents of (default: this Python's standard library)",
    )
    parser.set_defaults(run=run_data)


def _add_sample(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", type=Path, help="exported model (default: the demo's sizes, random weights)")
    add("--num-tokens", type=int, default=256, help="new tokens a sequence (default 256)")
    add("--num-steps", type=int, default=128, help="steps a sequence (default 128)")
    add("--block-length", type=int, default=32, help="tokens of a block (default 32)")
    add("--batch-size", type=int, default=4, help="sequences at once (default 4)")
    add("--temperature", type=float, default=0.0, help="0 takes the best token (default 0)")
    add("--repeats", type=int, default=3, help="runs of each case, in turn (default 3)")
    parser.set_defaults(run=run_sample)


def _add_score(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", type=Path, help="exported model (default: the demo's sizes, random weights)")
    add("--num-questions", type=int, default=4, help="questions of each task (default 4)")
    add("--draws", type=int, default=128, help="random masks a request (default 128)")
    add("--guidance-scale", type=float, default=0.6, help="of the guided cases (default 0.6)")
    tasks = ("arc_easy", "openbookqa", "social_iqa", "piqa", "hellaswag", "boolq", "lambada_openai")
    add("--tasks", nargs="+", choices=tasks, default=tasks, help="shapes of requests (all)")
    add("--repeats", type=int, default=3, help="runs of each case, in turn (default 3)")
    parser.set_defaults(run=run_score)


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--preset", default="smdm-19M", help="sizes of the model, or demo (default smdm-19M)")
    add("--seq-length", type=int, default=512, help="tokens a window (default 512)")
    add("--vocab-size", type=int, default=32000, help="real tokens (default 32000)")
    add("--micro-batch-size", type=int, default=4, help="sequences a step (default 4)")
    add("--steps", type=int, default=3, help="steps of a measurement (default 3)")
    add("--repeats", type=int, default=5, help="measurements of each case (default 5)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default auto)")
    add("--compile", action="store_true", help="set run.compile for our cases on a CPU too")
    cases = ("ours", "model_alone", "plain", "transformers")
    add("--cases", nargs="+", choices=cases, default=cases, help="what to measure (default all)")
    parser.set_defaults(run=run_train)


def _add_head(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--hidden-size", type=int, default=384, help="width of the hidden states (default 384)")
    add("--vocab-size", type=int, default=50257, help="real tokens (default 50257)")
    add("--num-tokens", type=int, default=4096, help="positions, half of them masked (4096)")
    add("--repeats", type=int, default=3, help="runs of each case, in turn (default 3)")
    parser.set_defaults(run=run_head)


def _add_attention(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--seq-length", type=int, default=2048, help="tokens a window (default 2048)")
    add("--micro-batch-size", type=int, default=1, help="windows at once (default 1)")
    add("--num-heads", type=int, default=6, help="heads of queries (default 6)")
    add("--query-groups", type=int, help="heads of keys and values (default: as of queries)")
    add("--head-width", type=int, default=64, help="width of a head (default 64)")
    add("--document-length", type=int, default=256, help="mean tokens of a document (default 256)")
    add("--repeats", type=int, default=3, help="runs of each case, in turn (default 3)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default auto)")
    parser.set_defaults(run=run_attention)
