"""The model card: what an exported model is, what it was trained on, and what is unknown."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_mdm.checkpoint.manifest import RAW, CheckpointManifest, SavedModel
from megatron_mdm.config.objective import find_recorded_objective
from megatron_mdm.diffusion.interpolating import describe_process
from megatron_mdm.reporting.ledger_rows import build_ledger_rows
from megatron_mdm.reporting.metrics import NLL, name_average_group
from megatron_mdm.reporting.run_folder import RunFolder, find_last_with

_LEDGER_HEADER = (
    "source",
    "unique tokens",
    "epochs",
    "tokens seen",
    "windows x visits",
    "predictions per token",
    "expected",
)
_ACTIVATIONS = {"swiglu": "SwiGLU", "relu2": "squared ReLU"}
OLDEST_TRANSFORMERS = "4.46"
"""The oldest version that loads exports; tests/versions does so."""


@dataclass(frozen=True)
class TrainingFacts:
    """Facts of a model besides its sizes; `gaps` says what is unknown.

    Attributes:
        origin: One sentence on where the weights come from.
        figures: Names and values of the training run, in order.
        ledger: Rows of the data ledger, in the order of its header.
        ledger_step: The optimizer step that the ledger speaks of.
        versions: Versions of the libraries that made the weights.
        gaps: One sentence for each fact that a reader would look for and that is missing.
    """

    origin: str
    figures: Mapping[str, str] = field(default_factory=dict)
    ledger: Sequence[Sequence[str]] = ()
    ledger_step: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    gaps: Sequence[str] = ()


def collect_run_facts(
    run_dir: Path, manifest: CheckpointManifest, weights: str = RAW
) -> TrainingFacts:
    """Collects the facts of one of a run's checkpoints.

    Args:
        run_dir: The run's folder.
        manifest: The checkpoint's.
        weights: `raw`, or the name of the average that is exported.

    Returns:
        The facts; a file that is missing is a gap.

    Raises:
        DataError: A file is there and damaged.
    """
    run = RunFolder(run_dir)
    info, ledger = run.run_info, run.ledger
    until = [record for record in run.records if record["step"] <= manifest.step]
    group = "valid" if weights == RAW else name_average_group(weights)
    validation = find_last_with(until, NLL.replace("valid", group))
    config = manifest.config
    tokens = manifest.consumed_samples * config["data"]["seq_length"]
    planned = f" of {info['num_steps']:,}" if "num_steps" in info else ""
    figures = {"optimizer steps": f"{manifest.step:,}{planned}"}
    if weights != RAW:
        figures["weights"] = f"average {weights}: {manifest.averages[weights]}"
    elif manifest.averages:
        figures["weights"] = f"as trained (averages there are: {', '.join(manifest.averages)})"
    if manifest.skipped_steps:
        figures["steps whose update was left out"] = f"{manifest.skipped_steps:,}"
    figures["training tokens, with repetition"] = f"{tokens:,}"
    if info:
        share = manifest.step / info["num_steps"]
        figures["epochs"] = f"{tokens / info['unique_tokens']:.4g}"
        figures["FLOPs, as 6 N D without embeddings"] = f"{share * info['flops_6nd']:.3e}"
        if "flops_6nd_with_embeddings" in info:
            counted = share * info["flops_6nd_with_embeddings"]
            figures["FLOPs, as 6 N D with embeddings"] = f"{counted:.3e}"
        figures["FLOPs of all matrix products"] = f"{share * info['flops_exact']:.3e}"
    if validation:
        figures["held-out loss"] = _format_validation(
            validation, group, is_exact=find_recorded_objective(config).nll_is_exact
        )
    start = config.get("run", {}).get("initial_weights")
    origin = f"It began with the weights of {start}." if start else "It was trained from scratch."
    absent = {
        "The run left no `run_info.json`: epochs and FLOPs are not known.": not info,
        "The run left no `ledger.json`: how often each source was seen is not known.": not ledger,
        "The run left no held-out loss up to this step.": not validation,
    }
    return TrainingFacts(
        origin=origin,
        figures=figures,
        ledger=build_ledger_rows(ledger),
        ledger_step=ledger.get("step"),
        versions=manifest.versions,
        gaps=[sentence for sentence, is_absent in absent.items() if is_absent],
    )


def format_model_card(
    title: str,
    saved: SavedModel,
    num_parameters: int,
    facts: TrainingFacts,
    *,
    folder: str | None = None,
    has_tokenizer: bool,
) -> str:
    """Writes a model card.

    Args:
        title: Name of the model, such as that of its run.
        saved: The model.
        num_parameters: Number of exported parameters.
        facts: What is known besides.
        folder: What it is loaded by; None: its name.
        has_tokenizer: A tokenizer travels with the model.

    Returns:
        Markdown with YAML front matter, as the Hugging Face hub reads it.
    """
    sections = [
        _format_front_matter(saved),
        f"# {escape_markdown(title)}",
        _summarize(saved, num_parameters, facts),
        "## Loading\n\n" + _describe_usage(folder or title, saved, has_tokenizer),
        "## Sizes\n\n" + _format_table(("", ""), list(_list_sizes(saved, num_parameters).items())),
    ]
    if facts.figures:
        sections.append("## Training\n\n" + _format_table(("", ""), list(facts.figures.items())))
    if facts.ledger:
        step = "" if facts.ledger_step is None else f" up to step {facts.ledger_step:,}"
        sections.append(
            f"## Data\n\nHow often each source was seen{step}.\n\n"
            + _format_table(_LEDGER_HEADER, facts.ledger)
        )
    if facts.versions:
        sections.append("## Versions\n\n" + _format_table(("", ""), list(facts.versions.items())))
    limits = [*facts.gaps, *_list_limits(saved)]
    sections.append("## Limits\n\n" + "\n".join(f"- {sentence}" for sentence in limits))
    return "\n\n".join(sections) + "\n"


def escape_markdown(text: str) -> str:
    """Escapes a text so that a line or a table cell of Markdown shows it as it is.

    Args:
        text: For example a path.

    Returns:
        The text in one line, with a backslash before what Markdown or HTML would read as markup.
    """
    line = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$-])", r"\\\1", line)


def _format_validation(record: Mapping[str, Any], group: str, is_exact: bool) -> str:
    mean = float(record[NLL.replace("valid", group)])
    error = record.get(f"{group}/nll_standard_error")
    text = f"{mean:.4f} nats per token (of one window) at step "
    if error is not None:
        text = f"{mean:.4f} ± {float(error):.4f} nats per token (mean and standard error) at step "
    text += f"{record['step']:,}, on {record['valid/num_tokens']:,} tokens"
    if not is_exact:
        text += f", an upper bound, with noise seed {record['valid/noise_seed']}"
    return text


def _format_front_matter(saved: SavedModel) -> str:
    tags = ["megatron_mdm", "causal-lm" if saved.is_causal else "masked-diffusion"]
    if len(saved.ways) > 1:
        tags = ["megatron_mdm", "causal-lm", "masked-diffusion"]
    if saved.noise is not None:
        tags[1] = f"{describe_process(saved.noise)['kind']}-diffusion"
    task = "text-generation" if saved.is_causal else "fill-mask"
    fields = {"library_name": "transformers", "pipeline_tag": task, "tags": tags}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _summarize(saved: SavedModel, num_parameters: int, facts: TrainingFacts) -> str:
    kind = "An autoregressive" if saved.is_causal else "A masked-diffusion"
    if saved.noise is not None:
        kind = "A diffusion"
    if len(saved.ways) > 1:
        kind = "An autoregressive and masked-diffusion"
    return (
        f"{kind} language model with {num_parameters:,} parameters, for sequences of up to "
        f"{saved.seq_length:,} tokens. {escape_markdown(facts.origin)} "
        "`training_metadata.json` holds what is known of the training."
    )


def _list_sizes(saved: SavedModel, num_parameters: int) -> dict[str, str]:
    model = saved.model
    mask = {"mask token": f"{model.mask_id}"} if "mdm" in saved.ways else {}
    if saved.noise is not None:
        told = describe_process(saved.noise)
        settings = [f"{name}={value:g}" for name, value in told.items() if name != "kind"]
        mask["noise"] = ", ".join([told["kind"], *settings])
    num_unused = model.vocabulary_rows - model.vocab_size
    unused = {"rows that no token uses": f"{num_unused:,}"} if num_unused else {}
    yes = {True: "yes", False: "no"}
    cap = model.attention_soft_cap
    return {
        "parameters": f"{num_parameters:,}",
        "layers": f"{model.num_layers}",
        "width": f"{model.hidden_size:,}",
        "heads": f"{model.num_attention_heads} of {model.head_width}",
        "key and value heads": f"{model.query_groups}",
        f"{_ACTIVATIONS[model.mlp]} width": f"{model.ffn_hidden_size:,}",
        **({"biases of the feed-forward block": "yes"} if model.mlp_bias else {}),
        "vocabulary": f"{model.vocab_size:,}",
        **unused,
        **mask,
        "tied embeddings": yes[model.tie_embeddings],
        "biases on queries, keys and values": yes[model.qkv_bias],
        "norms on queries and keys": (
            "of all heads together" if model.qk_norm == "width" else yes[model.qk_norm]
        ),
        **({} if cap is None else {"cap of attention scores": f"{cap:g}"}),
        **({"a learned key and value that all tokens see": "yes"} if model.attention_sink else {}),
        **({"an embedding of the noise level": "yes"} if model.time_embedding else {}),
        "base of the rotary angles": f"{model.rotary_base:g}",
    }


def _describe_usage(folder: str, saved: SavedModel, has_tokenizer: bool) -> str:
    name = json.dumps(folder)
    lines = [
        "from transformers import AutoModelForMaskedLM, AutoTokenizer",
        "",
        f"model = AutoModelForMaskedLM.from_pretrained({name}, trust_remote_code=True)",
    ]
    if has_tokenizer:
        lines += [
            f"tokenizer = AutoTokenizer.from_pretrained({name}, trust_remote_code=True)",
            'prompt = tokenizer("Once upon a time", add_special_tokens=False, return_tensors="pt")',
            "tokens = model.generate(prompt.input_ids, max_new_tokens=64, seed=1)",
            "print(tokenizer.decode(tokens[0]))",
        ]
    text = "```python\n" + "\n".join(lines) + "\n```\n\n"
    text += f"It loads in transformers {OLDEST_TRANSFORMERS} and later."
    if saved.is_causal:
        text += " With `AutoModelForCausalLM`, `generate` is transformers' own."
    text += _describe_ways(saved)
    if not has_tokenizer:
        text += "\n\nNo tokenizer travels with it: use the one that it was trained with."
    if not saved.is_causal:
        text += (
            f"\n\nThe mask token is {saved.model.mask_id}: `model.infill(input_ids)` fills each "
            "one of a sequence, wherever it stands."
        )
        if has_tokenizer:
            text += " The tokenizer has it as `mask_token`, for the pipeline `fill-mask`."
    return text


def _describe_ways(saved: SavedModel) -> str:
    """How a mixture of objectives runs otherwise, and where it predicts."""
    if saved.run_ways is None:
        return ""
    text = ""
    if len(saved.ways) > 1:
        usual = "next-token prediction" if saved.is_causal else "masked diffusion"
        text += (
            "\n\nIt was trained for next-token prediction and for masked diffusion, and runs as "
            f"{usual} unless told otherwise: `from_pretrained(..., is_causal=True)` continues "
            "text, with `prefix_lm=True` the tokens of a prompt see each other, and "
            "`is_causal=False` unmasks."
        )
    if saved.run_ways.is_shifted:
        text += (
            "\n\nIn masked diffusion the hidden state before a mask predicts the token there, so "
            "the first token of a text has to be given."
        )
    return text


def _list_limits(saved: SavedModel) -> list[str]:
    limits = [
        "It continues and fills in text like that of its training data; it was not taught to "
        "follow instructions, and what it writes was not checked for truth or harm.",
        f"Positions beyond {saved.seq_length:,} tokens were not trained.",
        "`trust_remote_code=True` runs the Python files of this folder: read them, or load it from "
        "a place that you trust.",
    ]
    if not saved.is_causal:
        limits.append(
            "Its likelihood is known as a bound (the ELBO), not exactly; compare it with that of "
            "an autoregressive model with this in mind."
        )
    return limits


def _format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        header,
        ["---"] * len(header),
        *([escape_markdown(cell) for cell in row] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
