from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mdm.config import check_layout, load_config
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.model.accounting import count_steps

CONFIGS = Path(__file__).parents[3] / "configs"
# A sweep says what it starts from: tests/unit/sweeps loads those, and tests/unit/inference those
# of an evaluation.
RECIPES = sorted(
    path.relative_to(CONFIGS).as_posix()
    for path in CONFIGS.rglob("*.yaml")
    if "base:" not in path.read_text() and path.parent.name != "eval"
)
PUBLISHED_STEPS = {
    "smdm/smdm-170M-1e19.yaml": 18_710,
    "smdm/smdm-1028M-3.3e21.yaml": 256_478,
    "data_constrained/mdm-425M-100M-tokens.yaml": 95_322,
    "data_constrained/ar-140M-100M-tokens.yaml": 9_532,
}
# Recipe: (GPUs, tensor-parallel size, pipeline stages).
LAYOUTS = {
    "smdm/smdm-170M-1e19.yaml": [(16, 1, 1), (8, 2, 1), (8, 4, 1), (8, 1, 2), (64, 2, 2)],
    "smdm/smdm-1028M-3.3e21.yaml": [(16, 1, 1), (128, 1, 1), (8, 2, 1), (64, 2, 4)],
    "data_constrained/mdm-425M-100M-tokens.yaml": [(32, 1, 1), (8, 2, 1), (8, 1, 2), (64, 2, 2)],
    "data_constrained/ar-140M-100M-tokens.yaml": [(16, 1, 1), (8, 2, 1), (8, 4, 1), (24, 2, 3)],
}
CASES = [(recipe, *layout) for recipe, layouts in LAYOUTS.items() for layout in layouts]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_loads_and_fits_one_process(recipe):
    layout = check_layout(load_config(CONFIGS / recipe), world_size=1)
    assert layout.data_parallel_size == 1


def test_the_published_runs_have_recipes():
    ours = {"demo_corpus.yaml", "demo/base.yaml", "reversal/base.yaml"}
    ours |= {"crossover/base.yaml", "crossover/gpu_base.yaml"}
    ours |= {recipe for recipe in RECIPES if recipe.startswith("fair_fight/")}
    ours |= {recipe for recipe in RECIPES if recipe.startswith("finetuning/")}
    assert set(PUBLISHED_STEPS) == set(LAYOUTS) == set(RECIPES) - ours


@pytest.mark.parametrize(("recipe", "steps"), PUBLISHED_STEPS.items())
def test_a_recipe_takes_the_published_number_of_steps(recipe, steps):
    assert count_steps(load_config(CONFIGS / recipe), num_windows=1) == steps


@pytest.mark.parametrize("recipe", PUBLISHED_STEPS)
def test_a_published_recipe_fits_a_node_of_eight_gpus_as_it_stands(recipe):
    config = load_config(CONFIGS / recipe)
    layout = check_layout(config, world_size=8)
    samples = layout.num_micro_batches * config.batch.micro_batch_size * layout.data_parallel_size
    assert samples == config.batch.global_batch_size


@pytest.mark.parametrize(("recipe", "gpus", "tensor", "stages"), CASES)
def test_a_published_recipe_fits_other_layouts(recipe, gpus, tensor, stages):
    overrides = [
        f"parallel.tensor_model_parallel_size={tensor}",
        f"parallel.pipeline_model_parallel_size={stages}",
    ]
    layout = check_layout(load_config(CONFIGS / recipe, overrides), gpus)
    assert layout.data_parallel_size * tensor * stages == gpus


def test_heads_that_do_not_divide_are_refused_for_a_recipe():
    override = "parallel.tensor_model_parallel_size=4"
    config = load_config(CONFIGS / "smdm/smdm-1028M-3.3e21.yaml", [override])
    with pytest.raises(ConfigError, match=r"does not divide model\.num_attention_heads=14: use 1,"):
        check_layout(config, world_size=8)
