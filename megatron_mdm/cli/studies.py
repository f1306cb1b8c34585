"""Commands that plan runs and report on them."""

from __future__ import annotations

from pathlib import Path

from threadpoolctl import threadpool_limits

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.core.files import format_json
from megatron_mdm.reporting.comparison import write_comparison
from megatron_mdm.reporting.report import write_report
from megatron_mdm.studies.costs.command import EstimateSettings, describe_run
from megatron_mdm.studies.laws.command import analyze_table
from megatron_mdm.studies.laws.request import FitSettings
from megatron_mdm.studies.sweeps.plan_command import PlanSettings, plan_run
from megatron_mdm.studies.sweeps.plan_report import format_plan, plan_to_tree

_FIT_DEFAULTS = FitSettings()


def plan(settings: PlanSettings) -> None:
    """Prints a plan; writes the configuration and the picture where asked to.

    Args:
        settings: What there is to spend.
    """
    made, costs = plan_run(settings)
    if settings.json:
        print(format_json(plan_to_tree(made, costs), indent=2))
        return
    print("\n".join(format_plan(made, costs, settings.cluster)))
    for what, path in (("configuration", settings.out), ("picture", settings.plot)):
        if path is not None:
            print(f"wrote the {what} {path}")


def estimate(*overrides: str, settings: EstimateSettings) -> int:
    """Prints what the config's own layout, or the best ones, would need and take, or plays it.

    Ends with status 1 if ranks that were played wait for ever.

    Args:
        overrides: section.key=value, as for a run.
        settings: Which run, and on what.
    """
    if not settings.simulate:
        print(describe_run(settings, overrides))
        return 0
    # The engines take seconds to import.
    from megatron_mdm.studies.simulation.command import describe_simulations

    text, ends = describe_simulations(settings, overrides)
    print(text)
    return 0 if ends else 1


def fit(table: Path, /, *, settings: FitSettings = _FIT_DEFAULTS) -> None:
    """Prints what fits came to; writes the law file and plots where asked to.

    Args:
        table: CSV or Parquet, a row a run.
        settings: What to fit and what to write.
    """
    # Fits solve many small problems: threads would only wait for each other.
    with threadpool_limits(1):
        found = analyze_table(table, settings)
    print(format_json(found.tree, indent=2) if settings.json else "\n".join(found.lines))


def report(
    *, run: tuple[Path, ...], samples: Path | None = None, output: Path | None = None
) -> None:
    """Writes the page and prints where it is.

    Args:
        run: Directory of the run; several are compared on common axes.
        samples: JSON file of samples to show.
        output: Page to write; without it, report.html in the directory, or comparison.html beside
            the first one.

    Raises:
        ConfigError: Samples were given for a comparison.
    """
    if len(run) == 1:
        page = write_report(run[0], output, samples_path=samples)
    elif samples is not None:
        raise ConfigError(
            f"--samples={samples} belongs to the report of one run, and --run names {len(run)}: "
            "leave the samples out, or name one run."
        )
    else:
        page = write_comparison(run, output)
    print(page)
