"""The tables and plots of a proof, from the files of its stages: no figure is typed by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.files import write_text_whole
from megatron_mdm.reporting.pages import Facts, Heading, Paragraph, Table
from megatron_mdm.studies.proof.running import Command, StageRecord, read_record
from megatron_mdm.studies.proof.training_rows import (
    GIGABYTE,
    MEMORY_TOLERANCE,
    NOT_MEASURED,
    Read,
    TrainedRow,
    draw_memory,
    draw_speed,
    list_done,
    list_trained,
)

Part = Facts | Heading | Paragraph | Table
# What docs/performance.md and docs/scaling.md keep between two such lines.
_BEGIN, _END = "<!-- measured on a GPU: begin -->", "<!-- measured on a GPU: end -->"
_SHOWN_KERNELS = 10


def write_report(out: Path, docs: Path | None) -> list[Path]:
    """Writes tables and plots.

    Args:
        out: Folder of the proof; gets `performance.md`, `scaling.md`, `gpu_speed.png` and
            `gpu_memory.png`.
        docs: Folder of documentation whose pages of these names get the tables, and which gets the
            plots; None: none.

    Returns:
        What was written.

    Raises:
        ConfigError: There is no proof, or a page has no place for it.
        DataError: A file of the proof is damaged.
    """

    def read(stage: str) -> StageRecord:
        return read_record(out, stage)

    if not list(read("environment").commands):
        raise ConfigError(f"{out} has no environment.json: measure with tools/gpu_proof.py run.")
    trained = list_trained(read)
    pages = {"performance": describe_speed(read, trained), "scaling": describe_memory(trained)}
    texts = {name: "\n".join(part.to_markdown() for part in parts) for name, parts in pages.items()}
    contents = {out / f"{name}.md": text for name, text in texts.items()}
    if docs:
        pages_of_docs = {docs / f"{name}.md": text for name, text in texts.items()}
        contents |= {page: _insert(page, text) for page, text in pages_of_docs.items()}
    written = []
    if trained:
        for folder in filter(None, (out, docs)):
            written += [draw_speed(folder, trained), draw_memory(folder, trained)]
    for path, content in contents.items():
        write_text_whole(path, content)
    return [*written, *contents]


def describe_speed(read: Read, trained: Sequence[TrainedRow]) -> list[Part]:
    """The part of docs/performance.md: every stage but memory.

    Args:
        read: Reads a stage.
        trained: The training benchmarks.
    """
    parts: list[Part] = [Facts(_describe_machine(read))]
    heads = ("Training", "micro batch", "settings", "tokens/s", "MFU", "peak memory")
    rows = [
        (
            row.what,
            str(row.micro_batch_size),
            row.overrides or "-",
            f"{row.tokens_per_second:,.0f}",
            f"{row.utilisation:.1%}",
            _gigabytes(row.peak_bytes),
        )
        for row in trained
    ]
    note = (
        "MFU: useful FLOPs per token x tokens/s over the data sheet's peak (of a measured matmul "
        "where there is none). Useful FLOPs: 6 (linear layers + output layer at the positions that "
        "count) + 12 L S a, half of the last if causal; recomputation is not counted."
    )
    parts.append(Table(heads, rows or [("all", *[NOT_MEASURED] * 5)], note))
    for title, describe in _SECTIONS.items():
        parts += [Heading(title), *describe(read)]
    faults = [
        (stage, " ".join(command.words), _last_line(command))
        for stage in _STAGES
        for command in read(stage).faults
    ]
    if faults:
        parts += [Heading("What has no figure"), Table(("Stage", "Command", "Why"), faults)]
    return parts


def describe_memory(trained: Sequence[TrainedRow]) -> list[Part]:
    """The part of docs/scaling.md: peak memory beside the estimate.

    Args:
        trained: The training benchmarks.
    """
    rows = [
        (
            row.name,
            _gigabytes(row.peak_bytes),
            _gigabytes(row.estimated_bytes),
            f"{row.estimated_bytes / row.peak_bytes - 1:+.1%}",
        )
        for row in trained
        if row.peak_bytes and row.estimated_bytes
    ]
    heads = ("Setting", "measured", "estimated", "off by")
    note = f"The limit is {MEMORY_TOLERANCE:.0%}."
    return [Table(heads, rows or [("all", *[NOT_MEASURED] * 3)], note)]


def _describe_machine(read: Read) -> list[tuple[str, str]]:
    command = next(iter(list_done(read("environment"), "environment")), None)
    if command is None or command.report is None:
        return [("Machine", NOT_MEASURED)]
    machine, results = command.report["machine"], command.report["results"]
    device = dict(results["device"])
    kind = device.pop("kind")
    told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in device.items())
    rates = results["matmul_flops_per_second"]
    optional = [f"{name} {version}" for name, version in results["packages"].items() if version]
    kernels = [name for name, runs in results["attention_kernels"].items() if runs]
    return [
        ("Device", told or kind),
        ("Host", f"{machine['processor']}, {machine['cores']} cores, {machine['platform']}"),
        ("Versions", ", ".join(f"{name} {value}" for name, value in machine["versions"].items())),
        ("Optional packages", ", ".join(optional) or "none"),
        ("Kernels of attention", ", ".join(kernels) or "none"),
        (
            "Large matmul",
            ", ".join(f"{name} {rate / 1e12:.4g} TFLOP/s" for name, rate in rates.items()),
        ),
        ("Copy on the device", f"{results['copied_bytes_per_second'] / 1e9:,.0f} GB/s"),
        ("Writing to disk", f"{results['written_bytes_per_second'] / 1e9:.2f} GB/s"),
    ]


def _describe_parity(read: Read) -> list[Part]:
    reports = [one.report for one in list_done(read("parity"), "parity") if one.report]
    if not reports:
        return [Paragraph(f"{NOT_MEASURED.capitalize()}.")]
    rows = []
    for report in reports:
        for name, case in report["results"]["cases"].items():
            off = case.get("deviations", {})
            cells = [f"{off[key]:.1e}" if key in off else "-" for key in _DEVIATIONS]
            verdict = "yes" if case["is_close"] else case.get("error", "no").partition("\n")[0]
            rows.append((name, *cells, verdict))
    limits = "; ".join(
        f"{dtype} {', '.join(f'{limit:g}' for limit in of_dtype.values())}"
        for dtype, of_dtype in reports[0]["results"]["tolerances"].items()
    )
    note = (
        "Five steps beside the same on a CPU in float32, dropout off: the largest deviation, as a "
        f"share. Limits: {limits}."
    )
    return [Table(("Case", "losses", "gradient norms", "held-out loss", "within"), rows, note)]


_DEVIATIONS = ("losses", "grad_norms", "held_out")


def _describe_profile(read: Read) -> list[Part]:
    command = next(iter(list_done(read("profile"), "profile")), None)
    if command is None or command.report is None:
        return [Paragraph(f"{NOT_MEASURED.capitalize()}.")]
    results = command.report["results"]
    rows = [
        (
            f"`{row['name'][:70]}`",
            f"{row['calls_per_step']:.0f}",
            f"{row['milliseconds_per_step']:.2f}",
            f"{row['share']:.1%}",
        )
        for row in results.get("kernels", results["operators"])[:_SHOWN_KERNELS]
    ]
    idle = results.get("idle_share")
    told = f"Step of {results['step_seconds'] * 1e3:.1f} ms"
    told += "" if idle is None else f"; no kernel runs in {idle:.1%} of the time"
    table = Table(("Kernel", "calls per step", "ms per step", "share"), rows)
    return [Paragraph(f"{told}."), table]


def _describe_cases(stage: str, benchmark: str) -> Callable[[Read], list[Part]]:
    """Tables of all medians of a benchmark's reports: a row for each case."""

    def describe(read: Read) -> list[Part]:
        parts: list[Part] = []
        for command in list_done(read(stage), benchmark):
            assert command.report is not None  # it is done
            parts.append(Paragraph(f"`tools/benchmark.py {' '.join(command.words)}`"))
            parts += tabulate_medians(command.report["results"])
        return parts or [Paragraph(f"{NOT_MEASURED.capitalize()}.")]

    return describe


def tabulate_medians(results: dict[str, Any]) -> list[Part]:
    """Lays out summaries of a benchmark: cases with the same figures share a table.

    Args:
        results: Of a report; what belongs to single tasks is left out.

    Returns:
        Tables, a row for each case and a column for each of its figures.
    """
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}

    def visit(tree: dict[str, Any], path: str) -> None:
        inner = {key: value for key, value in tree.items() if isinstance(value, dict)}
        medians = {key: value["median"] for key, value in inner.items() if "spread" in value}
        if medians:
            cells = [_format_figure(f"{path} {key}", value) for key, value in medians.items()]
            groups.setdefault(tuple(medians), []).append((path or "-", *cells))
        for key, value in inner.items():
            if key not in medians and key != "tasks":
                visit(value, f"{path}, {_spell(key)}".removeprefix(", "))

    visit(results, "")
    return [Table(("Case", *map(_spell, heads)), rows) for heads, rows in groups.items()]


def _format_figure(name: str, value: float) -> str:
    if " over " in _spell(name):
        return f"{value:.2f}x"
    if "flops_per_second" in name:
        return f"{value / 1e12:.4g} T"
    if "bytes" in name and "per second" not in _spell(name):
        return f"{value / GIGABYTE:.3g} GB"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _spell(key: str) -> str:
    return key.replace("_", " ")


def _describe_crossover(read: Read) -> list[Part]:
    reports = [one.report for one in list_done(read("crossover"), "tools/crossover.py")]
    if not reports or reports[-1] is None:
        return [Paragraph(f"{NOT_MEASURED.capitalize()}.")]
    return [Paragraph(line) for line in reports[-1]["output"].splitlines() if line.strip()]


_SECTIONS: dict[str, Callable[[Read], list[Part]]] = {
    "Losses beside a CPU": _describe_parity,
    "Where a step's time goes": _describe_profile,
    "Output layer": _describe_cases("head", "head"),
    "Attention": _describe_cases("attention", "attention"),
    "Generation": _describe_cases("sample", "sample"),
    "Likelihoods": _describe_cases("score", "score"),
    "Loader": _describe_cases("loader", "data"),
    "Checkpoints": _describe_cases("checkpoint", "checkpoint"),
    "AR against masked diffusion": _describe_crossover,
}
_STAGES = (
    *("environment", "parity", "train", "profile", "head", "attention", "memory", "sample"),
    *("score", "loader", "checkpoint", "crossover"),
)


def _last_line(command: Command) -> str:
    lines = [line for line in (command.error or "").splitlines() if line.strip()]
    return f"{command.status.replace('_', ' ')}: {lines[-1] if lines else 'nothing was said'}"


def _gigabytes(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / GIGABYTE:.2f} GB"


def _insert(page: Path, text: str) -> str:
    content = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, begin, rest = content.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ConfigError(
            f"{page} has no place for the figures: add the lines {_BEGIN} and {_END}."
        )
    return f"{before}{begin}\n\n{text}\n{end}{after}"
