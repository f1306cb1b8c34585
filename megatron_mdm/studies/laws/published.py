"""What has been published, for a first plan before there are runs of one's own.

No complete law of masked diffusion under repetition is public: only where it overtakes AR and how
large its best models are. For AR there is a whole law. Both papers behind this page count N, and so
FLOPs, with embeddings.
"""

from __future__ import annotations

import math

from megatron_mdm.config import ModelSize, ParameterConvention
from megatron_mdm.core.statistics import Interval
from megatron_mdm.studies.laws.forms import DataConstrainedLaw
from megatron_mdm.studies.laws.power_law import PowerLaw, fit_power_law
from megatron_mdm.studies.laws.storage import LawFile

PARAMETERS: ParameterConvention = "with_embeddings"
# GPT-2's, of all published figures here.
VOCAB_SIZE = 50257

# Fitted to 182 public runs on C4 with 50,257 tokens of vocabulary; tests/golden has the runs. Their
# N holds the embedding: the smallest, 7,098,752, is of a shape with 0.59M without.
# Source: arXiv 2305.16264, appendix A, and its code.
AR_LAW = LawFile(
    law=DataConstrainedLaw(
        # 520.82, 1487.72 and 1.86914; the code gives logarithms.
        parameter_scale=math.exp(6.255414),
        token_scale=math.exp(7.3049974),
        irreducible_loss=math.exp(0.6254804),
        parameter_exponent=0.3526596,
        token_exponent=0.3526596,
        token_reuse=15.387756,
        parameter_reuse=5.309743,
    ),
    parameters=PARAMETERS,
    objective="ar",
    vocab_size=VOCAB_SIZE,
    fitted=("token_reuse", "parameter_reuse"),
    num_runs=182,
    ranges={
        "num_parameters": (7.1e6, 8.67e9),
        "num_tokens": (1e8, 9e11),
        "unique_tokens": (1e8, 1.78e11),
        "epochs": (1.0, 9000.0),
    },
    source="arXiv 2305.16264: 182 runs on C4",
)

# C_crit(U) = 2.12 * 10^1.956 * U^2.174 FLOPs, U in tokens. The unit follows from the figures beside
# it: at 100 million tokens it gives 4.7e19 FLOPs, between the best AR run (4.3e18) and the best MDM
# run (1.3e20) there. With U in millions it would be 4.3e6 FLOPs.
# Source: project page of arXiv 2507.15857, whose N and FLOPs count the embedding.
CRITICAL_LAW = PowerLaw(scale=2.12 * 10**1.956, exponent=2.174)
# Where the paper's own curves cross, FLOPs by unique tokens; digitised from its figure. The power
# law gives 2.3e18, 1.05e19 and 4.7e19 there: 0.64, 0.81 and 1.8 times as much.
CROSSOVERS = {25e6: 3.6e18, 50e6: 1.3e19, 100e6: 2.6e19}
# So it is good to this factor, where it was measured.
CRITICAL_FACTOR = 1.8
# Unique tokens of the runs behind it.
# Source: arXiv 2507.15857, abstract and section 4: 25, 50 and 100 million.
CRITICAL_UNIQUE_TOKENS = (25e6, 100e6)

# Compute-optimal sizes of MDMs: 117M, 217M and 425M at 1e19, 3e19 and 1e20 FLOPs, N and FLOPs with
# embeddings. The shapes are those of dc-117M, dc-217M and dc-425M, so both counts are known.
# Source: arXiv 2507.15857, public code; its best MDM on 100M unique tokens is the third.
MDM_SIZES_AT_FLOPS = {
    1e19: ModelSize(with_embeddings=123_587_328, without_embeddings=84_953_856),
    3e19: ModelSize(with_embeddings=217_503_104, without_embeddings=172_409_216),
    1e20: ModelSize(with_embeddings=416_887_040, without_embeddings=352_467_200),
}


def critical_flops(*, unique_tokens: float) -> float:
    """The published power law.

    Args:
        unique_tokens: U in tokens.

    Returns:
        C_crit in FLOPs, 6 N D with embeddings in N.
    """
    return CRITICAL_LAW.at(unique_tokens)


def critical_band(critical: float) -> Interval:
    """How well the published power law is known.

    Args:
        critical: C_crit, of either count.

    Returns:
        It over and times `CRITICAL_FACTOR`, which the crossovers behind it were read to lie within;
        beyond their 25 to 100 million tokens nobody knows.
    """
    return Interval(critical / CRITICAL_FACTOR, critical * CRITICAL_FACTOR)


def mdm_optimal_size(parameters: ParameterConvention) -> PowerLaw:
    """N of the compute-optimal MDM as a power of the budget in FLOPs.

    Args:
        parameters: How N and the FLOPs are counted, of what is given and of what comes out.

    Returns:
        The least-squares line through the published sizes. Shapes are no power law, so the lines
        of the two conventions are not quite the same one.
    """
    budgets = [
        size.convert_flops(flops, PARAMETERS, parameters)
        for flops, size in MDM_SIZES_AT_FLOPS.items()
    ]
    sizes = [size.count_in(parameters) for size in MDM_SIZES_AT_FLOPS.values()]
    return fit_power_law(budgets, sizes)
