"""How good generated texts are: likely under a judge, and varied.

A low perplexity alone says little: a text that repeats itself is very likely. Entropy and distinct
n-grams, compared with those of real texts of the same length and number, show repetition.

Letters: N texts, V tokens of a vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.core.errors import ConfigError, DataError
from megatron_mdm.core.statistics import Estimate
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.models import ModelFacts
from megatron_mdm.inference.requests import Request, ScoringSettings
from megatron_mdm.inference.scoring import Scorer, ScoreRequests
from megatron_mdm.inference.texts import encode_pair


class TextLosses(NamedTuple):
    """What a judge says of texts.

    Attributes:
        nats_N: float64 [N], negative log-likelihood of each continuation given its prompt.
        tokens_N: int64 [N], tokens of each continuation; 0 where it is empty.
    """

    nats_N: NDArray[np.float64]
    tokens_N: NDArray[np.int64]


class Judge:
    """Says how likely texts are.

    Args:
        model: An autoregressive export.
        writer_tokenizer: Of the models whose texts come.
        option: That names the model.

    Attributes:
        retokenizes: Has it another tokenizer than the models that write?

    Raises:
        ConfigError: It is a masked-diffusion model.
    """

    def __init__(self, model: ExportedModel, writer_tokenizer: Any, option: str) -> None:
        if not model.facts.is_causal:
            raise ConfigError(
                f"{option}: {model.facts.name} is a masked-diffusion model, which has no exact "
                "likelihood: give an autoregressive export as the judge."
            )
        self._model, self._writer_tokenizer = model, writer_tokenizer
        self._score = Scorer(model, ScoringSettings()).score
        self.retokenizes = describe_encoding(model.tokenizer) != describe_encoding(writer_tokenizer)

    def __call__(self, texts: Sequence[Request]) -> TextLosses:
        """Judges texts in the writers' tokens."""
        if self.retokenizes:
            model = self._model
            texts = retokenize(model.tokenizer, model.facts, texts, self._writer_tokenizer)
        return judge_texts(texts, self._score)


def describe_encoding(tokenizer: Any) -> dict[str, Any]:
    """All that decides how a fast tokenizer of transformers encodes."""
    told: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: part for name, part in told.items() if name not in ("padding", "truncation")}


def judge_texts(texts: Sequence[Request], score: ScoreRequests) -> TextLosses:
    """Scores continuations with a judge.

    Args:
        texts: Prompts and what follows them, in the judge's tokens; an empty continuation counts
            with no token.
        score: `Scorer.score` of an autoregressive model, with float32 weights.

    Returns:
        Nats and tokens of each.
    """
    written = [text for text in texts if text.continuation]
    scores = iter(score(written))
    nats = [-next(scores).log_likelihood if text.continuation else 0.0 for text in texts]
    sizes = [len(text.continuation) for text in texts]
    return TextLosses(np.array(nats, dtype=np.float64), np.array(sizes, dtype=np.int64))


def nats_per_token(losses: TextLosses) -> Estimate:
    """Loss of all texts, each token weighing the same; exp of it is the generative perplexity.

    The ratio of all nats to all tokens. Texts are independent, their tokens are not, so the error
    is one over texts: that of a ratio estimator, sqrt(sum of (nats - mean * tokens)^2 N / (N - 1))
    over the number of tokens. With texts of one length it is the usual one of a mean.

    Args:
        losses: Of `judge_texts`.

    Returns:
        Nats per token with a standard error; nan for one text.

    Raises:
        DataError: All texts are empty.

    Source:
        Generative perplexity: arXiv 2310.16834. The error: Cochran, Sampling
        Techniques, chapter 6.
    """
    total = int(losses.tokens_N.sum())
    if total == 0:
        raise DataError("All generated texts are empty: there is nothing to judge.")
    mean = math.fsum(losses.nats_N) / total
    count = len(losses.nats_N)
    if count < 2:
        return Estimate(mean, math.nan)
    residuals_N = losses.nats_N - mean * losses.tokens_N
    return Estimate(mean, math.sqrt(float(residuals_N @ residuals_N) * count / (count - 1)) / total)


def retokenize(
    judge_tokenizer: Any, facts: ModelFacts, texts: Sequence[Request], tokenizer: Any
) -> list[Request]:
    """Retokenizes texts for a judge with another tokenizer.

    They are decoded without special tokens, and prompt and continuation are encoded as one text.
    Nats per token are then per token of the judge.

    Args:
        judge_tokenizer: The judge's, a fast one of transformers.
        facts: Of the judge.
        texts: In the tokens of the model that wrote them.
        tokenizer: Of that model.

    Returns:
        The same in tokens of the judge. What does not fit its length behind the prompt is left out.

    Raises:
        DataError: A prompt alone is too long for the judge.
    """
    found = []
    for number, text in enumerate(texts):
        prompt = _decode(tokenizer, text.context)
        whole = _decode(tokenizer, (*text.context, *text.continuation))
        # Half a character at the prompt's end decodes differently once its other half follows.
        same = takewhile(lambda two: two[0] == two[1], zip(prompt, whole, strict=False))
        start = sum(1 for _ in same)
        if start == len(whole):
            found.append(Request((), ()))
            continue
        context, continuation, _ = encode_pair(judge_tokenizer, whole[:start], whole[start:])
        if not context and facts.end_token_id is not None:
            context = (facts.end_token_id,)
        room = facts.max_length - len(context)
        if room < 1:
            raise DataError(
                f"Prompt {number} has {len(context):,} tokens of {facts.name}, which takes "
                f"{facts.max_length:,} with at least one that follows: use shorter prompts."
            )
        found.append(Request(context, continuation[:room]))
    return found


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(
        tokenizer.decode([*ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )
