"""Plans: hand-worked decisions, beside the published best runs, honest gaps in what is known."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mdm.config import list_presets, load_config
from megatron_mdm.core.errors import ConfigError, DataError
from megatron_mdm.core.options import run_command
from megatron_mdm.model.accounting import count_steps
from megatron_mdm.studies.laws.forms import ChinchillaLaw, DataConstrainedLaw, GeometricLaw
from megatron_mdm.studies.laws.overfitting import OverfittingLaw
from megatron_mdm.studies.laws.storage import LawFile, write_law
from megatron_mdm.studies.sweeps.plan_command import PlanSettings, plan_run
from megatron_mdm.studies.sweeps.plan_options import count_preset_sizes
from megatron_mdm.studies.sweeps.planner import convert_published_threshold, make_plan

ROOT = Path(__file__).resolve().parents[3]


def chinchilla(irreducible: float, scale: float = 400.0) -> ChinchillaLaw:
    return ChinchillaLaw(scale, scale, irreducible, 0.5, 0.5)


def law_file(law, objective, bootstrap=(), parameters="with_embeddings", **ranges) -> LawFile:
    return LawFile(
        law=law,
        parameters=parameters,
        objective=objective,
        bootstrap=tuple(bootstrap),
        ranges=ranges,
    )


def plan(unique_tokens=1e8, training_flops=1e20, **options):
    laws = options.pop("laws", {})
    return make_plan(
        unique_tokens=unique_tokens, training_flops=training_flops, laws=laws, **options
    )


def counted_by_hand(hidden: int, layers: int) -> int:
    """N with embeddings of the family: 4 d^2 + 3 d f + 6 d a layer, and V d."""
    inner = (8 * hidden // 3) // 64 * 64
    return layers * (4 * hidden**2 + 3 * hidden * inner + 6 * hidden) + 50_257 * hidden


def ar_loss_by_hand(size: float, tokens: float, unique: float) -> float:
    """The published AR law (arXiv 2305.16264, appendix A), written out."""
    a, b, e, alpha = math.exp(6.255414), math.exp(7.3049974), math.exp(0.6254804), 0.3526596
    r_d, r_n = 15.387756, 5.309743
    # alpha = beta: N*(D) = G (D G), G = (A / B)^(1 / (2 alpha)).
    useful = min(size, (a / b) ** (1 / alpha) * unique)
    n = useful * (1 + r_n * (1 - math.exp(-(size / useful - 1) / r_n)))
    d = unique * (1 + r_d * (1 - math.exp(-(tokens / unique - 1) / r_d)))
    return e + a / n**alpha + b / d**alpha


def test_without_laws_the_published_critical_compute_decides_outside_its_band():
    # 2.12 x 10^1.956 x (1e8)^2.174 = 10^(0.3263 + 1.956 + 17.392) = 4.724e19 FLOPs, known to a
    # factor of 1.8: 2.62e19 to 8.50e19.
    for flops, choice, leaning in (
        (2.6e19, "ar", "ar"),
        (2.65e19, "either", "ar"),
        (4.7e19, "either", "ar"),
        (4.75e19, "either", "mdm"),
        (8.4e19, "either", "mdm"),
        (8.6e19, "mdm", "mdm"),
    ):
        made = plan(training_flops=flops)
        assert (made.choice, made.leaning) == (choice, leaning)
        assert made.published_critical_flops == pytest.approx(4.724e19, rel=1e-3)
        assert made.published_band == pytest.approx((4.724e19 / 1.8, 4.724e19 * 1.8), rel=1e-3)
    assert plan(unique_tokens=1e10, training_flops=1e22).choice == "ar"
    # The power law says 2.3e18 here, the paper's own curves cross at 3.6e18.
    assert plan(unique_tokens=25e6, training_flops=3e18).choice == "either"


def test_the_threshold_is_converted_with_the_shape_that_it_belongs_to():
    # 2.12 x 10^1.956 x (2.5e7)^2.174 = 2.32e18, with embeddings. The published MDM there has the
    # shape of dc-57M: 35,842,752 of 64,810,944 parameters without.
    assert convert_published_threshold(25e6, "with_embeddings") == pytest.approx(2.32e18, rel=1e-3)
    without = convert_published_threshold(25e6, "without_embeddings")
    assert without == pytest.approx(2.3198e18 * 35_842_752 / 64_810_944, rel=1e-3)
    assert without == pytest.approx(1.28e18, rel=5e-3)
    for flops, choice in ((1.28e18 / 1.9, "ar"), (1.28e18, "either"), (1.28e18 * 1.9, "mdm")):
        made = plan(unique_tokens=25e6, training_flops=flops, parameters="without_embeddings")
        assert made.choice == choice
        assert made.published_critical_flops == pytest.approx(without)


def test_the_published_law_is_fed_the_n_that_it_was_fitted_to():
    made = plan(unique_tokens=1e9, training_flops=1e19)
    option = made.options["ar"]
    assert option.preset == "dc-217M"
    # 1e19 / (6 x 217,503,104).
    assert option.num_tokens == pytest.approx(7.66e9, rel=1e-3)
    size = counted_by_hand(896, 18)
    assert option.size.with_embeddings == size == 217_503_104
    assert option.loss == pytest.approx(ar_loss_by_hand(size, 1e19 / 6 / size, 1e9), rel=1e-9)
    # It is the least of all presets, by hand.
    counts = [one.with_embeddings for one in count_preset_sizes("dc").values()]
    assert option.loss == pytest.approx(min(ar_loss_by_hand(n, 1e19 / 6 / n, 1e9) for n in counts))
    # A budget in the other count buys other tokens; the law is fed its own N all the same.
    other = plan(unique_tokens=1e9, training_flops=1e19, parameters="without_embeddings")
    option = other.options["ar"]
    assert option.num_tokens == pytest.approx(1e19 / 6 / option.size.without_embeddings)
    assert option.loss == pytest.approx(
        ar_loss_by_hand(option.size.with_embeddings, option.num_tokens, 1e9), rel=1e-9
    )


def test_beside_the_published_best_runs_on_100_million_tokens():
    """AR dc-140M for 50 epochs, MDM dc-425M for 500 (arXiv 2507.15857) at these budgets.

    The published laws do not name these runs: they name the next preset of each.
    """
    unique = 99_952_399
    for kind, hidden, layers, epochs, neighbours, expected in (
        ("ar", 768, 15, 50, ("dc-117M", "dc-140M", "dc-163M"), ("dc-117M", 58.6)),
        ("mdm", 1280, 18, 500, ("dc-425M", "dc-489M"), ("dc-489M", 438)),
    ):
        flops = 6 * counted_by_hand(hidden, layers) * epochs * unique
        option = plan(unique_tokens=unique, training_flops=flops).options[kind]
        assert option.preset in neighbours
        assert option.preset == expected[0]
        assert option.epochs == pytest.approx(expected[1], rel=1e-3)
    # Between the AR runs the law sees hardly a difference: 3.890 and 3.891.
    flops = 6 * counted_by_hand(768, 15) * 50 * unique
    gaps = [
        ar_loss_by_hand(size, flops / 6 / size, unique)
        for size in (counted_by_hand(768, 12), counted_by_hand(768, 15))
    ]
    assert 0 < gaps[1] - gaps[0] < 0.003


def test_a_run_is_not_planned_beyond_its_best_number_of_epochs():
    # beta B / (delta P) = 1e6 and kappa = beta: E* = 1e4 / N^(1 / 3) on any number of tokens.
    law = OverfittingLaw(400.0, 400.0, 1.0, 0.5, 0.5, 2e-4, 0.5, 1.0)
    option = plan(training_flops=1e22, laws={"mdm": law_file(law, "mdm")}).options["mdm"]
    assert option.stops_early
    assert 1 < option.epochs <= 1e4 / option.size.with_embeddings ** (1 / 3)
    # Nothing that the budget pays for would be a thousandth of a nat better.
    losses = [
        float(law.loss(num_parameters=n, num_tokens=1e8 * epochs, unique_tokens=1e8))
        for n in (size.with_embeddings for size in count_preset_sizes("dc").values())
        for epochs in (1e4 / n ** (1 / 3), option.epochs, 1e14 / 6 / n)
    ]
    assert min(losses) <= option.loss <= min(losses) + 0.001


def test_a_run_stops_where_its_law_expects_nothing_of_more_epochs():
    # Everything is worn out after a few times R_D = 15.4 epochs: the rest of 1e20 FLOPs buys
    # less than a thousandth of a nat.
    option = plan().options["ar"]
    assert option.stops_early
    assert option.training_flops < 0.9e20
    assert option.training_flops == pytest.approx(
        6 * option.size.with_embeddings * option.num_tokens
    )
    counts = [one.with_embeddings for one in count_preset_sizes("dc").values()]
    least = min(ar_loss_by_hand(n, 1e20 / 6 / n, 1e8) for n in counts)
    assert least < option.loss <= least + 0.001
    assert option.loss == pytest.approx(
        ar_loss_by_hand(option.size.with_embeddings, option.num_tokens, 1e8), rel=1e-9
    )
    # Where a tenth of the budget still buys something all of it is spent.
    whole = plan(unique_tokens=1e9, training_flops=1e19).options["ar"]
    assert (whole.stops_early, whole.training_flops) == (False, 1e19)


def test_an_expected_loss_above_that_of_a_guess_is_refused():
    # ln 50,257 = 10.825. By hand the law says 16.1 for the smallest preset, on 2.2 epochs.
    tokens = 1e14 / 6 / 7_000_448
    assert ar_loss_by_hand(7_000_448, tokens, 1.09e6) == pytest.approx(16.09, abs=0.01)
    made = plan(unique_tokens=1.09e6, training_flops=1e14)
    assert made.options["ar"].loss is None
    assert made.gains == ()
    assert any("above ln V = 10.82" in warning for warning in made.options["ar"].warnings)
    # Where it would have to decide there is no plan.
    laws = {"ar": law_file(chinchilla(2.0, 1e4), "ar"), "mdm": law_file(chinchilla(2.0), "mdm")}
    with pytest.raises(
        ConfigError, match=r"law of ar expects .* than the ln V = 10\.82 of a guess"
    ):
        plan(unique_tokens=1e6, training_flops=1e14, laws=laws)


def test_losses_of_another_vocabulary_are_not_given():
    made = plan(unique_tokens=5e8, training_flops=1e19, vocab_size=4096)
    option = made.options["ar"]
    # 12 layers of 7,077,888 + 6 x 768, and 4,096 x 768.
    assert count_preset_sizes("dc", 4096)["dc-117M"].with_embeddings == 12 * 7_082_496 + 3_145_728
    assert option.loss is None
    assert any("50,257" in warning and "4,096" in warning for warning in option.warnings)
    assert any("50,257 tokens of vocabulary" in warning for warning in made.warnings)


def test_one_law_for_both_sides_is_a_tie():
    resamples = [chinchilla(2.0 + 0.01 * step) for step in range(50)]
    laws = {kind: law_file(chinchilla(2.0), kind, resamples) for kind in ("ar", "mdm")}
    made = plan(laws=laws)
    assert made.choice == "either"
    assert "a tie" in made.reason
    assert "%" not in made.reason
    assert made.critical.verdict == "tie"


def test_laws_that_count_differently_are_compared_at_presets_alone():
    # In the other count N is smaller, so the same constants expect more.
    laws = {
        "ar": law_file(chinchilla(2.0), "ar"),
        "mdm": law_file(chinchilla(2.0), "mdm", parameters="without_embeddings"),
    }
    made = plan(unique_tokens=1e12, laws=laws)
    assert made.choice == "ar"
    for kind, convention in (("ar", "with_embeddings"), ("mdm", "without_embeddings")):
        option = made.options[kind]
        n, d = option.size.count_in(convention), 1e20 / 6 / option.size.with_embeddings
        assert option.loss == pytest.approx(2.0 + 400 / n**0.5 + 400 / d**0.5)
    assert made.critical is None
    assert any("count parameters differently" in warning for warning in made.warnings)


def test_a_law_that_does_not_say_which_n_it_takes_is_refused():
    laws = {"ar": law_file(chinchilla(2.0), "ar", parameters=None)}
    with pytest.raises(
        DataError, match=r"with or without embeddings .*: fit it again with --param"
    ):
        plan(laws=laws)


def test_with_both_laws_the_lower_loss_decides():
    # The laws differ by their irreducible loss alone, so the difference is 0.25 at any size.
    laws = {"ar": law_file(chinchilla(2.0), "ar"), "mdm": law_file(chinchilla(1.75), "mdm")}
    made = plan(laws=laws)
    assert made.choice == "mdm"
    assert made.options["ar"].loss - made.options["mdm"].loss == pytest.approx(0.25)
    assert "0.25 below" in made.reason
    assert made.critical.verdict == "always"
    assert plan(laws={"ar": laws["mdm"], "mdm": laws["ar"]}).choice == "ar"


def test_the_preset_of_the_least_loss_is_chosen():
    # Equal exponents and scales: the best N is sqrt(C / 6), here 4.08e9.
    made = plan(unique_tokens=1e12, laws={"ar": law_file(chinchilla(2.0), "ar")})
    sizes = {name: size.with_embeddings for name, size in count_preset_sizes("dc").items()}
    expected = {
        name: 2.0 + 400 / size**0.5 + 400 / (1e20 / 6 / size) ** 0.5 for name, size in sizes.items()
    }
    best = min(expected, key=expected.__getitem__)
    option = made.options["ar"]
    assert option.preset == best == "dc-4516M"
    assert option.loss == pytest.approx(expected[best])
    assert option.num_tokens == pytest.approx(1e20 / 6 / sizes[best])
    assert option.epochs == pytest.approx(option.num_tokens / 1e12)


def test_resamples_give_intervals_and_say_when_it_is_open():
    spread = [0.01 * step for step in range(-50, 51)]
    ar = law_file(chinchilla(2.0), "ar", [chinchilla(2.0 + one) for one in spread])
    far = law_file(chinchilla(1.0), "mdm", [chinchilla(1.0 - one) for one in spread])
    near = law_file(chinchilla(1.99), "mdm", [chinchilla(1.99 - one) for one in spread])
    clear = plan(laws={"ar": ar, "mdm": far})
    assert "100% of the resamples" in clear.reason
    low, high = clear.options["ar"].interval
    assert (low, high) == pytest.approx(
        (clear.options["ar"].loss - 0.475, clear.options["ar"].loss + 0.475), abs=0.011
    )
    close = plan(laws={"ar": ar, "mdm": near})
    assert "too close to call" in close.reason
    assert (close.choice, close.leaning) == ("either", "mdm")


def test_more_data_and_compute_are_worth_what_the_law_says():
    law = chinchilla(2.0)
    made = plan(unique_tokens=1e12, training_flops=6e18, laws={"ar": law_file(law, "ar")})
    # N = D = 1e9: 2 + 800 / sqrt(1e9). Ten times the compute is sqrt(10) times both.
    now = 2.0 + 800 / 1e9**0.5
    gains = {gain.change: gain for gain in made.gains}
    assert gains["twice the unique tokens"].difference == pytest.approx(0.0, abs=1e-9)
    then = 2.0 + 800 / (1e9 * 10**0.5) ** 0.5
    assert gains["ten times the compute"].loss == pytest.approx(then, rel=1e-6)
    assert gains["ten times the compute"].difference == pytest.approx(then - now, rel=1e-4)


def test_extrapolation_and_overfitting_are_said():
    law = DataConstrainedLaw(500, 1500, 1.9, 0.35, 0.35, 15.0, 5.0)
    known = law_file(law, "ar", num_parameters=(1e7, 1e9), epochs=(1.0, 40.0))
    within = plan(training_flops=1e18, laws={"ar": known}).options["ar"]
    beyond = plan(training_flops=1e19, laws={"ar": known}).options["ar"]
    assert not any("epochs=" in warning for warning in within.warnings)
    assert any(
        warning.startswith("epochs=") and "1 to 40" in warning for warning in beyond.warnings
    )
    assert any("reach, R_D = 15," in warning for warning in beyond.warnings)
    # delta 0.0625 is (1 - 0.0625) / 0.0625 = 15 in the same terms.
    geometric = law_file(GeometricLaw(500, 1500, 1.9, 0.35, 0.35, 0.0625, 0.15), "ar")
    beyond = plan(training_flops=1e19, laws={"ar": geometric}).options["ar"]
    assert any("reach, R_D = 15," in warning for warning in beyond.warnings)
    assert any("extrapolates" in warning for warning in plan(unique_tokens=1e6).warnings)
    tiny = plan(unique_tokens=1e6, training_flops=1e12).options["mdm"]
    assert any("outside the presets" in warning for warning in tiny.warnings)


def test_sizes_are_those_of_every_preset_of_the_family():
    for family in ("dc", "smdm"):
        names = [name for name in list_presets() if name.startswith(family + "-")]
        assert list(count_preset_sizes(family)) == names
    assert count_preset_sizes("smdm")["smdm-170M"].without_embeddings == 169_897_728
    assert plan(family="smdm").budget.parameters == "without_embeddings"
    assert plan(family="dc").budget.parameters == "with_embeddings"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unique_tokens": 0.0}, "--unique-tokens=0 is not valid"),
        ({"training_flops": -1.0}, "--flops=-1 is not valid"),
        ({"training_flops": math.inf}, "--flops=inf is not valid"),
        ({"unique_tokens": 1e20, "training_flops": 1e8}, "the budget in FLOPs and the corpus in"),
    ],
)
def test_numbers_out_of_range_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        plan(**options)


def plan_in(folder: Path, **options):
    settings = dict(
        unique_tokens=1e8,
        flops=1e20,
        out=folder / "run.yaml",
        train="shards/train",
        valid="shards/valid",
        plot=folder / "plan.png",
    )
    return plan_run(PlanSettings(**(settings | options)))


def test_the_configuration_is_ready_to_run(tmp_path):
    made, costs = plan_in(tmp_path)
    config = load_config(tmp_path / "run.yaml", [])
    assert config.objective.kind == made.choice == "mdm"
    assert config.model.preset == "dc-425M"
    assert config.data.train[0].max_unique_tokens == 10**8
    assert (config.schedule.flops, config.schedule.flops_parameters) == (1e20, "with_embeddings")
    steps = count_steps(config, num_windows=10**8 // 2048)
    # C / (6 N B S), rounded down, with the published N: 1e20 / (6 x 416,887,040 x 256 x 2,048).
    assert steps == costs["mdm"].steps == 76_253
    assert costs["mdm"].gpu_hours == pytest.approx(steps * costs["mdm"].step_seconds * 8 / 3600)
    # The run says no more than it has to.
    assert len((tmp_path / "run.yaml").read_text().splitlines()) < 45
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_has_no_cost_and_few_steps_are_said(tmp_path):
    made, costs = plan_in(tmp_path, flops=1e23, gpus=1, unique_tokens=1e11)
    assert made.options["ar"].size.with_embeddings > 5e9
    assert "ar" not in costs
    made, _ = plan_in(tmp_path, flops=1e15, unique_tokens=1e7)
    assert any("only" in warning and "steps" in warning for warning in made.warnings)


def test_law_files_are_sorted_by_objective_and_wrong_ones_named(tmp_path):
    for name, objective in (("ar", "ar"), ("mdm", "mdm"), ("other", "mdm"), ("nobody", None)):
        write_law(tmp_path / f"{name}.json", law_file(chinchilla(2.0), objective))
    paths = [tmp_path / "ar.json", tmp_path / "mdm.json"]
    assert plan_in(tmp_path, law=paths)[0].critical is not None
    with pytest.raises(ConfigError, match="is a second law of mdm: give one of each"):
        plan_in(tmp_path, law=[*paths, tmp_path / "other.json"])
    write_law(tmp_path / "which.json", law_file(chinchilla(2.0), "ar", parameters=None))
    with pytest.raises(ConfigError, match=r"which\.json does not say whether it counts parameters"):
        plan_in(tmp_path, law=[tmp_path / "which.json"])
    with pytest.raises(ConfigError, match="does not say whether it is of AR or MDM"):
        plan_in(tmp_path, law=[tmp_path / "nobody.json"])
    with pytest.raises(ConfigError, match=r"--out=.*run\.json has to end in \.yaml"):
        plan_in(tmp_path, out=tmp_path / "run.json")


def test_the_command_line_prints_text_or_json(tmp_path):
    command = [sys.executable, "tools/plan_run.py", "--unique-tokens", "1e8", "--flops", "1e20"]
    ran = subprocess.run(
        [*command, "--json"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(ran.stdout)
    assert (found["choice"], found["options"]["mdm"]["preset"]) == ("mdm", "dc-425M")
    assert found["options"]["mdm"]["loss"] is None
    wrong = subprocess.run(
        [*command[:-1], "0"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert wrong.returncode == 2
    assert wrong.stderr == "error: --flops=0 is not valid: give a positive number.\n"


@pytest.mark.parametrize(
    ("option", "value"), [("--family", "gpt"), ("--gpus", "0"), ("--parameters", "all")]
)
def test_wrong_options_are_named(option, value):
    line = ["--unique-tokens", "1e8", "--flops", "1e20", option, value]
    with pytest.raises(ConfigError, match=f'"{value}" for {option}'):
        run_command(PlanSettings, "", line)
