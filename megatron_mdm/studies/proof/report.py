"""The tables and plots of a proof, from the files of its stages: no figure is typed by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.files import write_text_whole
from megatron_mdm.reporting.figures import PALETTE, REFERENCE_COLOR, open_figure, save_figure
from megatron_mdm.reporting.pages import Facts, Heading, Paragraph, Table
from megatron_mdm.studies.proof.running import Command, StageRecord, read_record

Part = Facts | Heading | Paragraph | Table
Read = Callable[[str], StageRecord]
# What docs/performance.md and docs/scaling.md keep between two such lines.
_BEGIN, _END = "<!-- measured on a GPU: begin -->", "<!-- measured on a GPU: end -->"
_GB = 1e9
# How far an estimate of memory may be off.
_MEMORY_TOLERANCE = 0.1
_SHOWN_KERNELS = 10
_NONE = "not measured"


class TrainedRow(NamedTuple):
    """A training benchmark, as tables and plots show it.

    Attributes:
        what: The model and what trains it.
        micro_batch_size: Sequences of a step.
        overrides: What differs from the defaults.
        tokens_per_second: Median.
        utilisation: Share of the data sheet's peak, of a measured matmul without one.
        peak_bytes: Measured on a GPU.
        estimated_bytes: For our cases.
    """

    what: str
    micro_batch_size: int
    overrides: str
    tokens_per_second: float
    utilisation: float
    peak_bytes: int | None
    estimated_bytes: int | None

    @property
    def name(self) -> str:
        """All that tells it from the others."""
        parts = (self.what, f"micro batch {self.micro_batch_size}", self.overrides)
        return ", ".join(filter(None, parts))


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
    written = []
    for folder in (out, docs) if docs else (out,):
        if trained:
            written += [draw_speed(folder, trained), draw_memory(folder, trained)]
        for name, text in texts.items():
            path = folder / f"{name}.md"
            write_text_whole(path, text if folder == out else _insert(path, text))
            written.append(path)
    return written


def list_trained(read: Read) -> list[TrainedRow]:
    """All training benchmarks that have a report, in order, none twice.

    Args:
        read: Reads a stage.
    """
    rows = []
    for stage in ("train", "memory"):
        for command in _done(read(stage), "train"):
            assert command.report is not None  # it is done
            rows += list(_read_trained(command.report))
    return list(dict.fromkeys(rows))


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
    parts.append(Table(heads, rows or [("all", *[_NONE] * 5)], note))
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
    note = f"The limit is {_MEMORY_TOLERANCE:.0%}."
    return [Table(heads, rows or [("all", *[_NONE] * 3)], note)]


def draw_speed(folder: Path, trained: Sequence[TrainedRow]) -> Path:
    """Draws tokens per second of every training benchmark.

    Args:
        folder: Gets `gpu_speed.png`.
        trained: At least one.

    Returns:
        The picture.
    """
    names = [row.name for row in trained]
    with open_figure(9.5, 1.0 + 0.34 * len(trained)) as (figure, (axes,)):
        colors = [PALETTE[0] if " ours" in f" {row.what}" else REFERENCE_COLOR for row in trained]
        values = [row.tokens_per_second for row in trained]
        bars = axes.barh(range(len(names)), values, color=colors)
        axes.bar_label(bars, [f" {row.utilisation:.0%}" for row in trained])
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 1.12 * max(values))
        axes.set_xlabel("tokens per second; beside the bar: MFU", loc="right")
    path = folder / "gpu_speed.png"
    save_figure(path, figure)
    return path


def draw_memory(folder: Path, trained: Sequence[TrainedRow]) -> Path:
    """Draws peak memory against the estimate, and how far that may be off.

    Args:
        folder: Gets `gpu_memory.png`.
        trained: Training benchmarks; those with both numbers are drawn.

    Returns:
        The picture.
    """
    points = [
        (row.estimated_bytes / _GB, row.peak_bytes / _GB)
        for row in trained
        if row.peak_bytes and row.estimated_bytes
    ]
    with open_figure(5.2, 4.6) as (figure, (axes,)):
        largest = 1.15 * max([1.0, *(max(point) for point in points)])
        line = [0.0, largest]
        axes.plot(line, line, color=REFERENCE_COLOR, lw=1)
        low, high = (
            [factor * end for end in line]
            for factor in (1 - _MEMORY_TOLERANCE, 1 + _MEMORY_TOLERANCE)
        )
        axes.fill_between(line, low, high, color=REFERENCE_COLOR, alpha=0.2, lw=0)
        if points:
            axes.scatter(*zip(*points, strict=True), color=PALETTE[0], zorder=3)
        else:
            axes.text(largest / 2, largest / 2, _NONE, ha="center")
        axes.set(xlim=line, ylim=line, xlabel="estimated, GB", ylabel="measured peak, GB")
        axes.set_title(f"Memory of a GPU; grey: within {_MEMORY_TOLERANCE:.0%}")
    path = folder / "gpu_memory.png"
    save_figure(path, figure)
    return path


def _read_trained(report: dict[str, Any]) -> Iterator[TrainedRow]:
    settings, results = report["settings"], report["results"]
    preset = settings["preset"]
    for case in settings["cases"]:
        found = results[case]
        share = found.get("share_of_peak", found["share_of_matmul"])
        yield TrainedRow(
            f"{preset} {case.replace('_', ' ')}, S {settings['seq_length']:,}",
            settings["micro_batch_size"],
            ", ".join(settings["overrides"]),
            found["tokens_per_second"]["median"],
            share["median"],
            found.get("peak_bytes"),
            found.get("estimated_bytes"),
        )


def _describe_machine(read: Read) -> list[tuple[str, str]]:
    command = next(iter(_done(read("environment"), "environment")), None)
    if command is None or command.report is None:
        return [("Machine", _NONE)]
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
    command = next(iter(_done(read("parity"), "parity")), None)
    if command is None or command.report is None:
        return [Paragraph(f"{_NONE.capitalize()}.")]
    results = command.report["results"]
    rows = []
    for name, case in results["cases"].items():
        off = case.get("deviations", {})
        cells = [f"{off[key]:.1e}" if key in off else "-" for key in _DEVIATIONS]
        verdict = "yes" if case["is_close"] else case.get("error", "no").partition("\n")[0]
        rows.append((name, *cells, verdict))
    note = (
        "Five steps beside the same on a CPU in float32, dropout off: the largest deviation, as a "
        f"share. Limits: {results['tolerances']}."
    )
    return [Table(("Case", "losses", "gradient norms", "held-out loss", "within"), rows, note)]


_DEVIATIONS = ("losses", "grad_norms", "held_out")


def _describe_profile(read: Read) -> list[Part]:
    command = next(iter(_done(read("profile"), "profile")), None)
    if command is None or command.report is None:
        return [Paragraph(f"{_NONE.capitalize()}.")]
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


def _describe_summaries(stage: str, benchmark: str) -> Callable[[Read], list[Part]]:
    """A table of all medians of a benchmark's reports."""

    def describe(read: Read) -> list[Part]:
        parts: list[Part] = []
        for command in _done(read(stage), benchmark):
            assert command.report is not None  # it is done
            rows = [
                (
                    name,
                    f"{summary['median']:,.6g}",
                    f"{summary['min']:,.6g}",
                    f"{summary['max']:,.6g}",
                )
                for name, summary in _find_summaries(command.report["results"])
            ]
            parts.append(Paragraph(f"    tools/benchmark.py {' '.join(command.words)}"))
            parts.append(Table(("Figure", "median", "least", "most"), rows))
        return parts or [Paragraph(f"{_NONE.capitalize()}.")]

    return describe


def _find_summaries(tree: Any, name: str = "") -> Iterator[tuple[str, dict[str, float]]]:
    if not isinstance(tree, dict):
        return
    if "median" in tree and "spread" in tree:
        yield name, tree
        return
    for key, value in tree.items():
        yield from _find_summaries(value, f"{name}, {key}".removeprefix(", ").replace("_", " "))


def _describe_crossover(read: Read) -> list[Part]:
    reports = [one.report for one in _done(read("crossover"), "tools/crossover.py")]
    if not reports or reports[-1] is None:
        return [Paragraph(f"{_NONE.capitalize()}.")]
    return [Paragraph(line) for line in reports[-1]["output"].splitlines() if line.strip()]


_SECTIONS: dict[str, Callable[[Read], list[Part]]] = {
    "Losses beside a CPU": _describe_parity,
    "Where a step's time goes": _describe_profile,
    "Output layer": _describe_summaries("head", "head"),
    "Attention": _describe_summaries("attention", "attention"),
    "Generation": _describe_summaries("sample", "sample"),
    "Likelihoods": _describe_summaries("score", "score"),
    "Loader": _describe_summaries("loader", "data"),
    "Checkpoints": _describe_summaries("checkpoint", "checkpoint"),
    "AR against masked diffusion": _describe_crossover,
}
_STAGES = (
    *("environment", "parity", "train", "profile", "head", "attention", "memory", "sample"),
    *("score", "loader", "checkpoint", "crossover"),
)


def _done(record: StageRecord, benchmark: str) -> list[Command]:
    return [one for one in record.commands if one.status == "done" and one.words[0] == benchmark]


def _last_line(command: Command) -> str:
    lines = [line for line in (command.error or "").splitlines() if line.strip()]
    return f"{command.status.replace('_', ' ')}: {lines[-1] if lines else 'nothing was said'}"


def _gigabytes(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / _GB:.2f} GB"


def _insert(page: Path, text: str) -> str:
    content = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, begin, rest = content.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ConfigError(
            f"{page} has no place for the figures: add the lines {_BEGIN} and {_END}."
        )
    return f"{before}{begin}\n\n{text}\n{end}{after}"
