"""Several exports as one: the mean of the probabilities that they give to each token.

Shapes: T asked positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from megatron_mdm.core.errors import ConfigError
from megatron_mdm.corpus.tokenizer import hash_tokenizer
from megatron_mdm.inference.exported import ExportedModel
from megatron_mdm.inference.passes import Judgement, Passes, judge_logits


class Ensemble:
    """A `ScoringModel` of several members, which are all loaded at once, on one device.

    Of autoregressive models it averages the probabilities of the next token; of masked diffusion
    those of each hidden token, given the same corrupted text, so that a score is the bound of that
    average predictor. Guidance acts in each member. By Jensen's inequality the loss of a token is
    at most the mean of the members' losses.

    Args:
        members: Two or more. Each is compared with the first before the next is loaded.

    Raises:
        ConfigError: Members differ in objective, vocabulary or tokenizer, or there is one alone.
    """

    def __init__(self, members: Iterable[ExportedModel]) -> None:
        self.members: list[ExportedModel] = []
        for member in members:
            if self.members:
                _check_agreement(self.members[0], member)
            self.members.append(member)
        if len(self.members) < 2:
            raise ConfigError("An ensemble has two or more members: give --model several times.")
        facts = [member.facts for member in self.members]
        self.facts = replace(
            facts[0],
            name=f"the mean of {len(facts)} models",
            max_length=min(one.max_length for one in facts),
            takes_log_snr=any(one.takes_log_snr for one in facts),
        )
        self.tokenizer = self.members[0].tokenizer

    @property
    def device(self) -> torch.device:
        """See `ScoringModel.device`."""
        return self.members[0].device

    @torch.inference_mode()
    def judge(self, passes: Passes) -> Judgement:
        """See `ScoringModel.judge`; the mean is taken in float32, of logarithms."""
        sum_TV = self._find_log_probs(self.members[0], passes)
        for member in self.members[1:]:
            torch.logaddexp(sum_TV, self._find_log_probs(member, passes), out=sum_TV)
        # The softmax of the judgement divides the sum by the number of members.
        return judge_logits(sum_TV, passes)

    @staticmethod
    def _find_log_probs(member: ExportedModel, passes: Passes) -> Tensor:
        logits_TV = member.compute_logits(passes)
        return logits_TV.sub_(logits_TV.logsumexp(1, keepdim=True))


def _check_agreement(first: ExportedModel, other: ExportedModel) -> None:
    one, two = first.facts, other.facts
    hashes = (hash_tokenizer(each.tokenizer.backend_tokenizer)[:12] for each in (first, other))
    kinds = ("autoregressive" if each.is_causal else "masked diffusion" for each in (one, two))
    compared = {
        "objectives": tuple(kinds),
        "numbers of tokens": (one.vocab_size, two.vocab_size),
        "tokenizers": tuple(hashes),
        "kinds of noise": (one.noise, two.noise),
        "mask tokens": (one.mask_token_id, two.mask_token_id),
        "ends of text": (one.end_token_id, two.end_token_id),
        "places of predictions": tuple(
            "before the token" if each.is_shifted else "at the token" for each in (one, two)
        ),
        "prompts": tuple(
            "seen whole" if each.sees_prompt else "read from the left" for each in (one, two)
        ),
    }
    for what, (ours, theirs) in compared.items():
        if ours != theirs:
            raise ConfigError(
                f"{one.name} and {two.name} have no probabilities in common to average, since "
                f"their {what} differ ({ours} and {theirs}): give models of one objective and one "
                "tokenizer."
            )
