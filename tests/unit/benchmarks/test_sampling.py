from __future__ import annotations

import pytest
import torch

from megatron_mdm.config import ModelConfig
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.model.accounting import count_parameters
from megatron_mdm.studies.benchmarks.exported_models import make_random_model
from megatron_mdm.studies.benchmarks.public_code import public_sampler
from megatron_mdm.studies.benchmarks.sampling import measure_sampling
from megatron_mdm.studies.benchmarks.settings import SamplingSettings


class _Logits:
    """An output of logits that rise with the position, so that the last is the surest."""

    def __init__(self, x_BS):
        sure_S = 1 + torch.arange(x_BS.shape[1], dtype=torch.float32)
        self.logits = torch.zeros(*x_BS.shape, 5)
        self.logits[..., 3] = sure_S + 8 * torch.arange(len(x_BS))[:, None]


def test_public_way_chooses_over_the_batch_truncates_and_wastes_passes():
    states = []
    filled = public_sampler(
        _Logits,
        torch.full((2, 3), 4),
        mask_token_id=4,
        num_steps=10,
        temperature=0.0,
        callback=lambda x: states.append((x == 4).sum(1).tolist()),
    )
    assert filled.tolist() == [[3, 3, 3], [3, 3, 3]]
    assert len(states) == 10
    # int(6 * 0.1) = 0, and so on until six masks meet six steps; the second sequence, surer by
    # far, is filled before the first has a token.
    assert states[:3] == [[3, 3]] * 3
    assert [3, 0] in states


def test_our_cases_waste_no_pass_and_are_counted():
    settings = SamplingSettings(
        num_tokens=12, num_steps=6, block_length=4, batch_size=2, temperature=0.5, repeats=1
    )
    results = measure_sampling(settings)
    for case in ("whole", "blocks", "blocks_cached", "guided"):
        assert results[case]["forward_passes"] == 6
        assert results[case]["passes_that_revealed_nothing"] == 0
        assert results[case]["tokens_a_pass_and_sequence"] == {"least": 2, "mean": 2, "most": 2}
    assert results["public"]["forward_passes"] == 6
    compared = {"whole_over_public", "blocks_cached_over_public", "guided_over_whole"}
    assert compared < set(results["ratios"])


def test_models_with_random_weights_have_the_presets_sizes():
    for is_causal in (False, True):
        model = make_random_model("dc-7M", 16, torch.device("cpu"), is_causal=is_causal)
        assert model.config.is_causal == is_causal
        assert not model.training
        found = sum(weight.numel() for weight in model.parameters())
        assert found == count_parameters(ModelConfig.model_validate({"preset": "dc-7M"})).total
        # Drawn, and neither zeros nor ones, which are faster.
        spread = float(model.model.layers[0].mlp.up_proj.weight.detach().std())
        assert 0.01 < spread < 0.05


def test_settings_and_models_that_cannot_be_measured_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--num-steps=0"):
        measure_sampling(SamplingSettings(num_steps=0))
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        measure_sampling(SamplingSettings(model=tmp_path))
    with pytest.raises(ConfigError, match="--preset=smdm-18M is unknown: use one of demo, smdm-6M"):
        measure_sampling(SamplingSettings(preset="smdm-18M"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--device=cuda needs a GPU"):
            measure_sampling(SamplingSettings(device="cuda"))
