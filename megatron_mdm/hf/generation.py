"""Text in, text out, with an exported model: continue a prompt, or fill in before a suffix."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoModelForMaskedLM, AutoTokenizer, logging

from megatron_mdm.errors import ConfigError


@dataclass(frozen=True)
class GenerationSettings:
    """How to generate.

    Attributes:
        length: New tokens.
        steps: Forward passes; None: one per new token.
        order: Which masked token is revealed next; see `diffusion/samplers.py`.
        temperature: 0 takes the most probable token.
        guidance_scale: Unsupervised classifier-free guidance; 0 is none.
        seed: Seed of the first sample; every further one derives its own from it.
        num_samples: Samples a request.
    """

    length: int = 64
    steps: int | None = None
    order: str = "confidence"
    temperature: float = 0.0
    guidance_scale: float = 0.0
    seed: int = 0
    num_samples: int = 1

    def __post_init__(self) -> None:
        """Checks what the model does not check."""
        if self.num_samples < 1:
            raise ConfigError(f"num-samples={self.num_samples} must be 1 or more.")


class Request(NamedTuple):
    """One text with a hole.

    Attributes:
        prompt: Text before the new tokens.
        suffix: Text after them, None for none.
        length: New tokens, None for the settings' length.
    """

    prompt: str
    suffix: str | None = None
    length: int | None = None


class Sample(NamedTuple):
    """One generated text.

    Attributes:
        text: Prompt, completion and suffix, decoded together.
        completion: The new text alone.
        ids: All token ids.
    """

    text: str
    completion: str
    ids: list[int]


class TextGenerator:
    """An exported model with its tokenizer, on a GPU if there is one.

    Args:
        folder: Folder of an exported model.

    Raises:
        ConfigError: The folder holds no model that can be loaded.
    """

    def __init__(self, folder: Path) -> None:
        logging.disable_progress_bar()
        if not (folder / "config.json").is_file():
            raise ConfigError(f"--model={folder} has no config.json: give an exported model.")
        try:
            model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
            self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        except (OSError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"--model={folder} cannot be loaded: {reason}") from error
        self._model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def complete(self, request: Request, settings: GenerationSettings) -> list[Sample]:
        """Generates for one request.

        Args:
            request: The text with a hole.
            settings: How.

        Returns:
            `settings.num_samples` samples.

        Raises:
            ConfigError: An option does not fit the model.
        """
        prompt_BS = self._encode(request.prompt, settings.num_samples)
        suffix = request.suffix
        length = request.length or settings.length
        try:
            tokens_BS = self._model.generate(
                prompt_BS,
                max_new_tokens=length,
                suffix_ids=None if suffix is None else self._encode(suffix, settings.num_samples),
                num_steps=settings.steps,
                order=settings.order,
                temperature=settings.temperature,
                guidance_scale=settings.guidance_scale,
                seed=settings.seed,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        start = prompt_BS.shape[1]
        return [
            Sample(
                text=self._tokenizer.decode(ids),
                completion=self._tokenizer.decode(ids[start : start + length]),
                ids=ids,
            )
            for ids in tokens_BS.tolist()
        ]

    def _encode(self, text: str, copies: int) -> torch.Tensor:
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return torch.tensor([ids] * copies, dtype=torch.long, device=self._model.device)


def read_requests(path: Path) -> list[Request]:
    """Reads requests from a JSON list of objects with prompt, suffix and length.

    Args:
        path: JSON file.

    Returns:
        The requests.

    Raises:
        ConfigError: The file cannot be read or has another form.
    """
    try:
        return [Request(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--requests={path} cannot be read ({reason}): give a JSON list of objects with "
            "prompt, and optionally suffix and length."
        ) from None


def report_entry(
    request: Request, samples: list[Sample], settings: GenerationSettings
) -> dict[str, Any]:
    """A request's samples in the form that the report reads.

    Args:
        request: The text with a hole.
        samples: What was generated.
        settings: How.

    Returns:
        A JSON-able object.
    """
    shown = {name: value for name, value in asdict(settings).items() if value is not None}
    if request.length is not None:
        shown["length"] = request.length
    return {
        "kind": "prompt" if request.suffix is None else "infill",
        "prompt": request.prompt,
        "suffix": request.suffix or "",
        "completions": [sample.completion for sample in samples],
        "settings": shown,
    }
