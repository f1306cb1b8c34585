"""The options of generation, and the file that keeps them beside an exported model."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import pytest
import torch
from exported_code import decoding
from transformers import AutoModelForMaskedLM

Decoding = decoding.Decoding
FILE = "mdm_generation_config.json"


def load(folder, **options):
    return AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperatur": 1.0}, "temperatur is no option of generation: did you mean temperature"),
        ({"zzz": 1}, "zzz is no option of generation: use one of num_steps, order"),
        ({"temperature": "1"}, "temperature='1' has the wrong type: it must be float"),
        ({"temperature": True}, "temperature=True has the wrong type"),
        ({"num_steps": 1.5}, "num_steps=1.5 has the wrong type: it must be int | None"),
        ({"use_cache": 1}, "use_cache=1 has the wrong type: it must be bool"),
        ({"seed": None}, "seed=None has the wrong type"),
        ({"forbidden_token_ids": [1, "2"]}, "has the wrong type"),
        ({"order": "best"}, "order='best' is unknown"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be 1 or more"),
        ({"use_cache": True, "cache_refresh_steps": 0}, "cache_refresh_steps=0 must be 1 or more"),
        ({"cache_refresh_steps": 4}, "cache_refresh_steps=4 has no effect without a cache"),
        ({"end_token_id": 0, "stop_at_end": False}, "end_token_id=0 contradicts stop_at_end"),
    ],
    ids=str,
)
def test_a_wrong_option_gets_one_sentence(options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Decoding().override(options)
    assert "\n" not in str(error.value)


def test_options_survive_json(tmp_path):
    options = {
        "num_steps": 12,
        "order": "entropy",
        "temperature": 1,
        "top_p": 0.9,
        "block_length": 4,
        "forbidden_token_ids": [3, 4],
        "use_cache": True,
        "cache_refresh_steps": 2,
        "max_new_tokens": 17,
    }
    given = Decoding().override(options)
    given.save(tmp_path)
    written = json.loads((tmp_path / FILE).read_text())
    assert written == json.loads(json.dumps(asdict(Decoding()))) | options
    assert Decoding.load(tmp_path / FILE) == given
    assert given.forbidden_token_ids == (3, 4)


def test_defaults_come_from_the_folder_and_go_with_the_model(tiny, export, tmp_path):
    folder, _, _ = export(tiny())
    options = {"max_new_tokens": 5, "temperature": 1.0, "order": "random"}
    prompt = torch.tensor([[3, 4]])
    expected = load(folder).generate(prompt, **options)
    assert load(folder).generation_defaults.max_new_tokens == 64
    (folder / FILE).write_text(json.dumps(options))
    model = load(folder)
    assert torch.equal(model.generate(prompt), expected)
    assert torch.equal(model.generate(prompt, generation_config={"seed": 0}), expected)
    assert model.generate(prompt, max_new_tokens=3).shape == (1, 5)
    model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "generation_config.json").exists()
    again, _ = load(tmp_path / "again", output_loading_info=True)
    assert torch.equal(again.generate(prompt), expected)


def test_a_spoilt_file_of_defaults_is_named(tiny, export):
    folder, _, _ = export(tiny())
    for text, message in (
        ("{", "Expecting"),
        ("[]", "no JSON object"),
        ('{"tmp": 1}', "tmp is no"),
    ):
        (folder / FILE).write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            load(folder)
        assert FILE in str(error.value)
