"""How losses change with time, against arithmetic by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_mdm.inference.perplexity import DomainLoss
from megatron_mdm.inference.perplexity_tables import format_loss_table, format_shift_table


def loss_of(domain, losses, documents=None):
    values = np.array(losses, dtype=np.float64)
    # All of one document, unless it is said otherwise.
    return DomainLoss(domain, values, np.array(documents or [0] * len(values)), 10 * len(values))


# The second model's windows follow those of the first closely.
FOUND = {
    "ar": [loss_of("2023", [2.0, 3.0]), loss_of("2024", [2.5, 3.5]), loss_of("2025", [4.0, 4.0])],
    "mdm": [loss_of("2023", [2.2, 3.2]), loss_of("2024", [2.6, 3.6]), loss_of("2025", [4.1, 4.3])],
}


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_the_shift_is_the_difference_from_a_slice_with_the_errors_of_both():
    heads, _, *rows = cells(format_shift_table(FOUND, "2023"))
    assert heads == ["shards", "change of ar", "change of mdm", "change of mdm less that of ar"]
    assert [row[0] for row in rows] == ["2024", "2025"]
    # Two windows 1 apart have a standard error of 0.5; two slices of them its root-two fold.
    assert rows[0][1] == f"+0.5000 ± {math.sqrt(0.5):.4f}"
    assert rows[1][1] == "+1.5000 ± 0.5000"
    # Differences of 0.2 and 0.1 in every window: the change between them has no error.
    assert rows[0][3] == "-0.1000 ± 0.0000"
    # 0.1 and 0.3, mean 0.2 with an error of 0.1, against 0.2.
    assert rows[1][3][1:] == "0.0000 ± 0.1000"


def test_any_slice_can_be_the_one_to_start_from():
    _, _, *rows = cells(format_shift_table(FOUND, "2025"))
    assert [row[0] for row in rows] == ["2023", "2024"]
    assert rows[0][1].startswith("-1.5000")
    assert format_shift_table({"ar": FOUND["ar"]}, "2023").splitlines()[0].count("|") == 3


def test_the_table_of_losses_has_perplexities_and_paired_differences():
    heads, _, *rows = cells(format_loss_table(FOUND))
    assert heads[-1] == "mdm less ar"
    # Two windows say little of their spread: Student's quantile of one degree of freedom.
    low, high = (math.exp(2.5 + sign * 12.706205 * 0.5) for sign in (-1, 1))
    assert rows[0] == [
        "2023",
        "20",
        f"{math.exp(2.5):.2f} [{low:.2f}, {high:.2f}]",
        "2.5000 ± 0.5000",
        rows[0][4],
        "2.7000 ± 0.5000",
        "+0.2000 ± 0.0000",
    ]
    assert float(rows[0][4].split()[0]) == pytest.approx(math.exp(2.7), abs=0.01)


def test_the_error_over_documents_stands_in_brackets():
    """Two documents of two windows: their means are 2 and 4, 1 from the middle."""
    _, _, row = cells(
        format_loss_table({"ar": [loss_of("2023", [2.0, 2.0, 4.0, 4.0], [0, 0, 1, 1])]})
    )
    assert row[3] == f"3.0000 ± {math.sqrt(1 / 3):.4f} (1.0000)"
    # Student's quantile of one degree of freedom is a tangent.
    reach = math.tan(0.475 * math.pi)
    low, high = math.exp(3 - reach), math.exp(3 + reach)
    assert row[2] == f"{math.exp(3):.2f} [{low:.2f}, {high:.2f}]"
