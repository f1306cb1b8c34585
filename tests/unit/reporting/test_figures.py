"""One colour for each objective, in shades where it has several curves."""

from __future__ import annotations

from megatron_mdm.reporting.figures import (
    OBJECTIVE_COLORS,
    PALETTE,
    color_objectives,
    open_figure,
    render_svg,
)


def test_an_objective_has_its_colour_whatever_stands_beside_it():
    assert color_objectives(["mdm", "ar"]) == [OBJECTIVE_COLORS["mdm"], OBJECTIVE_COLORS["ar"]]
    assert color_objectives(["my:Own", "ar", "my:Other"]) == [
        PALETTE[0],
        OBJECTIVE_COLORS["ar"],
        PALETTE[1],
    ]
    assert color_objectives([None]) == [PALETTE[0]]


def test_several_curves_of_an_objective_have_shades_of_its_own():
    two = color_objectives(["mdm", "ar", "mdm"])
    assert two[:2] == [OBJECTIVE_COLORS["mdm"], OBJECTIVE_COLORS["ar"]]
    many = color_objectives(["ar"] * 5)
    assert many[2] == OBJECTIVE_COLORS["ar"]
    assert len(set(many)) == 5
    brightness = [sum(bytes.fromhex(one[1:])) for one in many]
    assert brightness == sorted(brightness)


def test_every_colour_of_a_plot_has_a_counterpart_on_a_dark_page():
    with open_figure(3, 2) as (figure, (axes,)):
        axes.plot([0, 1], color=OBJECTIVE_COLORS["mdm"], label="mdm")
        axes.legend()
    svg = render_svg(figure, "one")
    assert svg.count("var(--c0072b2, #0072b2)") == 2
    assert "--c0072b2: #" in svg
    # Text is dark grey on a light page and light grey on a dark one.
    assert "var(--c3c4149, #3c4149)" in svg
    dark = svg.split("--c3c4149: #")[1][:6]
    assert min(bytes.fromhex(dark)) > 180
