"""Plans: hand-worked decisions, the published best runs, honest gaps in what is known."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mdm.config import load_config, preset_names
from megatron_mdm.errors import ConfigError
from megatron_mdm.lab.plan_command import plan_run
from megatron_mdm.lab.planner import make_plan, preset_sizes
from megatron_mdm.laws.forms import ChinchillaLaw, DataConstrainedLaw
from megatron_mdm.laws.storage import LawFile, write_law
from megatron_mdm.scaling.accounting import training_steps

ROOT = Path(__file__).resolve().parents[3]


def chinchilla(irreducible: float, scale: float = 400.0) -> ChinchillaLaw:
    return ChinchillaLaw(scale, scale, irreducible, 0.5, 0.5)


def law_file(law, objective, bootstrap=(), **ranges) -> LawFile:
    return LawFile(law=law, objective=objective, bootstrap=tuple(bootstrap), ranges=ranges)


def plan(unique_tokens=1e8, training_flops=1e20, **options):
    laws = options.pop("laws", {})
    return make_plan(
        unique_tokens=unique_tokens, training_flops=training_flops, laws=laws, **options
    )


def test_without_laws_the_published_critical_compute_decides():
    # 2.12 x 10^1.956 x (1e8)^2.174 = 10^(0.3263 + 1.956 + 17.392) = 4.724e19 FLOPs.
    for flops, choice in ((4.7e19, "ar"), (4.75e19, "mdm")):
        made = plan(training_flops=flops)
        assert made.choice == choice
        assert made.published_critical_flops == pytest.approx(4.724e19, rel=1e-3)
    assert plan(unique_tokens=1e10, training_flops=1e22).choice == "ar"


def test_the_published_best_runs_on_100_million_tokens_come_out():
    """AR 140M for 50 epochs; MDM 425M for 500 (arXiv 2507.15857)."""
    small = plan(training_flops=6 * 106_192_128 * 50 * 1e8).options["ar"]
    assert small.preset == "dc-140M"
    assert small.epochs == pytest.approx(50)
    large = plan(training_flops=6 * 352_467_200 * 500 * 1e8).options["mdm"]
    assert large.preset == "dc-425M"
    assert large.epochs == pytest.approx(500)


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
    sizes = preset_sizes("dc")
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
        (clear.options["ar"].loss - 0.45, clear.options["ar"].loss + 0.45), abs=0.011
    )
    assert "too close to call" in plan(laws={"ar": ar, "mdm": near}).reason


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
    assert any("beyond R_D = 15" in warning for warning in beyond.warnings)
    assert any("extrapolates" in warning for warning in plan(unique_tokens=1e6).warnings)
    tiny = plan(unique_tokens=1e6, training_flops=1e12).options["mdm"]
    assert any("outside the dc presets" in warning for warning in tiny.warnings)


def test_sizes_are_those_of_every_preset_of_the_family():
    for family in ("dc", "smdm"):
        names = [name for name in preset_names() if name.startswith(family + "-")]
        assert list(preset_sizes(family)) == names
    assert preset_sizes("smdm")["smdm-170M"] == 169_897_728


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unique_tokens": 0.0}, "--unique-tokens=0 is not valid"),
        ({"training_flops": -1.0}, "--flops=-1 is not valid"),
        ({"training_flops": math.inf}, "--flops=inf is not valid"),
        ({"unique_tokens": 1e20, "training_flops": 1e8}, "the budget in FLOPs and the corpus in"),
        ({"family": "gpt"}, "--family=gpt is not known: use one of dc, smdm."),
    ],
)
def test_numbers_out_of_range_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        plan(**options)


def run_command(folder: Path, **options):
    settings = dict(
        unique_tokens=1e8,
        training_flops=1e20,
        law_paths=[],
        family="dc",
        cluster="h100",
        num_gpus=8,
        config_path=folder / "run.yaml",
        train_prefix="shards/train",
        valid_prefix="shards/valid",
        plot_path=folder / "plan.png",
    )
    return plan_run(**(settings | options))


def test_the_configuration_is_ready_to_run(tmp_path):
    made, costs = run_command(tmp_path)
    config = load_config(tmp_path / "run.yaml", [])
    assert config.objective.kind == made.choice == "mdm"
    assert config.model.preset == "dc-425M"
    assert config.data.train[0].max_unique_tokens == 10**8
    assert config.schedule.flops == 1e20
    steps = training_steps(config, num_windows=10**8 // 2048)
    # C / (6 N B S), rounded down.
    assert steps == costs["mdm"].steps == int(1e20 / (6 * 352_467_200 * 256 * 2048))
    assert costs["mdm"].gpu_hours == pytest.approx(steps * costs["mdm"].step_seconds * 8 / 3600)
    # The run says no more than it has to.
    assert len((tmp_path / "run.yaml").read_text().splitlines()) < 45
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_has_no_cost_and_few_steps_are_said(tmp_path):
    made, costs = run_command(tmp_path, training_flops=1e23, num_gpus=1, unique_tokens=1e11)
    assert made.options["ar"].num_parameters > 5e9
    assert "ar" not in costs
    made, _ = run_command(tmp_path, training_flops=1e15, unique_tokens=1e7)
    assert any("only" in warning and "steps" in warning for warning in made.warnings)


def test_law_files_are_sorted_by_objective_and_wrong_ones_named(tmp_path):
    for name, objective in (("ar", "ar"), ("mdm", "mdm"), ("other", "mdm"), ("nobody", None)):
        write_law(tmp_path / f"{name}.json", law_file(chinchilla(2.0), objective))
    paths = [tmp_path / "ar.json", tmp_path / "mdm.json"]
    assert run_command(tmp_path, law_paths=paths)[0].critical is not None
    with pytest.raises(ConfigError, match="is a second law of mdm: give one of each"):
        run_command(tmp_path, law_paths=[*paths, tmp_path / "other.json"])
    with pytest.raises(ConfigError, match="does not say whether it is of AR or MDM"):
        run_command(tmp_path, law_paths=[tmp_path / "nobody.json"])
    for options in ({"num_gpus": 0}, {"config_path": tmp_path / "run.json"}):
        with pytest.raises(ConfigError):
            run_command(tmp_path, **options)


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
