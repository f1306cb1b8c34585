"""The model `mdm` of lm-evaluation-harness: exported models of both objectives.

Importing this module registers it: `lm_eval.simple_evaluate(model="mdm", model_args={"pretrained":
DIR, "draws": 256})`. mdm evaluate uses it with several processes and with recipes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from megatron_mdm.config.objective import RunWay
from megatron_mdm.core.errors import ConfigError
from megatron_mdm.diffusion.noise import Purpose
from megatron_mdm.diffusion.probes import make_request_noise
from megatron_mdm.inference.ensemble import Ensemble
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.models import ModelFacts
from megatron_mdm.inference.options import DTYPES, make_generation_options
from megatron_mdm.inference.prompts import Prompt
from megatron_mdm.inference.rank_pool import RankPool
from megatron_mdm.inference.requests import Request, Score, ScoringSettings
from megatron_mdm.inference.sampling import generate, make_drafts
from megatron_mdm.inference.scoring import make_scoring_task, score_on_ranks
from megatron_mdm.inference.tasks.recipe import TaskSettings
from megatron_mdm.inference.texts import (
    add_up,
    cut_rolling_requests,
    encode,
    encode_pair,
    fit_context,
)

_DEFAULT_NEW_TOKENS = 256


class GenerationRequest(NamedTuple):
    """A request of the harness to continue a text.

    Attributes:
        text: The prompt.
        num_new_tokens: Most new tokens.
        temperature: None: as the settings say.
    """

    text: str
    num_new_tokens: int
    temperature: float | None


class HarnessWorker:
    """The worker on every rank: scores requests and continues texts of its share.

    Args:
        model: The same on every rank.
    """

    def __init__(self, model: ExportedModel | Ensemble) -> None:
        self.model = model

    def make_pool(self) -> RankPool:
        """Makes the pool of all ranks, each with a worker of its own."""
        return RankPool({"score": make_scoring_task(self.model), "continue": self.continue_texts})

    def continue_texts(self, items: list[tuple[TaskSettings, GenerationRequest]]) -> list[str]:
        """Continues texts; the settings of all are those of the first."""
        results: list[str] = [""] * len(items)
        for temperature in {one.temperature for _, one in items}:
            places = [
                place for place, (_, one) in enumerate(items) if one.temperature == temperature
            ]
            texts = self._continue(items[0][0], [items[place][1] for place in places])
            for place, text in zip(places, texts, strict=True):
                results[place] = text
        return results

    def _continue(self, task: TaskSettings, requests: Sequence[GenerationRequest]) -> list[str]:
        # Of several models mdm evaluate takes no task of this kind.
        assert isinstance(self.model, ExportedModel)
        decoding = dict(task.decoding)
        temperature = requests[0].temperature
        if temperature is None and self.model.facts.decoding.temperature is None:
            # As the harness has it: the best token.
            temperature = 0.0
        if temperature is not None:
            decoding.setdefault("temperature", temperature)
        options = make_generation_options(decoding, end_of_text="stop")
        drafts = make_drafts(
            [Prompt(prompt=one.text, length=one.num_new_tokens) for one in requests],
            options,
            self.model.facts,
            self.model.tokenizer,
            cut_prompts=True,
        )
        # Random numbers belong to the prompt, not to its place in the list.
        noises = [make_request_noise(task.scoring.seed, one.request.context, ()) for one in drafts]
        drafts = [
            replace(one, seed=int(noise.make_generator(Purpose.VALIDATION, 0).integers(2**31)))
            for one, noise in zip(drafts, noises, strict=True)
        ]
        found = generate(self.model, drafts, task.batch_size, progress=False)
        return [sample.completion for sample in found]


@register_model("mdm")
class HarnessModel(LM):
    """An exported model as lm-evaluation-harness sees it.

    One rank runs the harness; `RankPool` shares the work, so the harness counts one process.

    Args:
        pretrained: Folder of an exported model.
        dtype: `float32`, `bfloat16` or `exported`.
        run_as: How a mixture of objectives runs: `ar`, `mdm` or `prefix`.
        batch_size: Most samples of a pass of generation.
        max_batch_size: Not used.
        device: Not used: a GPU if there is one.
        **scoring: Fields of `ScoringSettings`.

    Raises:
        ConfigError: An option does not exist or does not fit.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "float32",
        run_as: RunWay | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **scoring: Any,
    ) -> None:
        super().__init__()
        del max_batch_size, device
        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype} is none of {', '.join(DTYPES)}: choose one.")
        try:
            settings = ScoringSettings(**scoring)
        except TypeError:
            known = ", ".join(ScoringSettings.__dataclass_fields__)
            unknown = sorted(set(scoring) - set(ScoringSettings.__dataclass_fields__))
            raise ConfigError(
                f"{unknown[0]} is no option of the model mdm: choose among {known}."
            ) from None
        worker = HarnessWorker(ExportedModel(Path(pretrained), DTYPES[dtype], run_as))
        task = TaskSettings(settings, batch_size=int(batch_size) if batch_size else 16)
        self._begin(worker, worker.make_pool(), task)

    @classmethod
    def from_worker(cls, worker: HarnessWorker, pool: RankPool) -> HarnessModel:
        """Makes the model of ranks that exist already; set `settings` before each task."""
        model = cls.__new__(cls)
        LM.__init__(model)
        model._begin(worker, pool, TaskSettings())
        return model

    def _begin(self, worker: HarnessWorker, pool: RankPool, settings: TaskSettings) -> None:
        self._model, self._pool = worker.model, pool
        self._device = torch.device("cpu")
        self.settings = settings
        #: The score of each likelihood request of the last task, by the id of its `Instance`.
        self.scores: dict[int, Score] = {}

    @property
    def facts(self) -> ModelFacts:
        """What requests have to fit."""
        return self._model.facts

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Scores continuations; see `ScoringSettings` for what is exact and what is a bound."""
        facts = self._model.facts
        pairs = [
            fit_context(encode_pair(self._model.tokenizer, *one.args), facts, _name_document(one))
            for one in requests
        ]
        scores = self._score(pairs)
        self.scores |= {id(one): score for one, score in zip(requests, scores, strict=True)}
        return [(score.log_likelihood, bool(score.is_greedy)) for score in scores]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Scores whole texts, each by itself, in windows."""
        facts = self._model.facts
        prefix = () if facts.end_token_id is None else (facts.end_token_id,)
        windows = [
            cut_rolling_requests(
                encode(self._model.tokenizer, one.args[0]),
                facts.max_length,
                prefix=prefix,
                context_tokens=self.settings.rolling_context,
            )
            for one in requests
        ]
        scores = iter(self._score([window for found in windows for window in found]))
        totals = []
        for one, found in zip(requests, windows, strict=True):
            parts = [next(scores) for _ in found]
            self.scores[id(one)] = add_up(parts)
            totals.append(self.scores[id(one)].log_likelihood)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues texts up to the first of their stop strings."""
        asked, stops = [], []
        for one in requests:
            text, options = one.args
            until = options.get("until") or []
            stops.append([until] if isinstance(until, str) else list(until))
            length = int(options.get("max_gen_toks") or _DEFAULT_NEW_TOKENS)
            temperature = float(options["temperature"]) if options.get("do_sample") else None
            asked.append((self.settings, GenerationRequest(text, length, temperature)))
        texts = self._pool.map("continue", asked)
        return [_cut_at_stop(text, stop) for text, stop in zip(texts, stops, strict=True)]

    def _score(self, requests: Sequence[Request]) -> list[Score]:
        return score_on_ranks(self._pool, "score", self.settings.scoring, requests)


def _name_document(one: Instance) -> str:
    return f"{one.task_name or 'task'}, document {one.doc_id}"


def _cut_at_stop(text: str, stops: Sequence[str]) -> str:
    ends = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
