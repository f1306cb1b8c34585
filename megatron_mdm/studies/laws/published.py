"""What has been published, for a first plan before there are runs of one's own.

No complete law of masked diffusion under repetition is public: only where it overtakes AR
(`critical.PUBLISHED`) and how large its best models are. For AR there is a whole law. Both papers
behind this page count N, and so FLOPs, with embeddings.
"""

from __future__ import annotations

import math

from megatron_mdm.config import ModelSize, ParameterConvention
from megatron_mdm.studies.laws.forms import DataConstrainedLaw
from megatron_mdm.studies.laws.power_law import PowerLaw, fit_power_law
from megatron_mdm.studies.laws.storage import LawFile

# GPT-2's, of all published figures here.
PUBLISHED_VOCAB_SIZE = 50257

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
    parameters="with_embeddings",
    objective="ar",
    vocab_size=PUBLISHED_VOCAB_SIZE,
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

# Unique tokens of the runs behind the published critical compute.
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


def mdm_optimal_size(parameters: ParameterConvention) -> PowerLaw:
    """N of the compute-optimal MDM as a power of the budget in FLOPs.

    Args:
        parameters: How N and the FLOPs are counted, of what is given and of what comes out.

    Returns:
        The least-squares line through the published sizes. Shapes are no power law, so the lines
        of the two conventions are not quite the same one.
    """
    budgets = [
        size.convert_flops(flops, "with_embeddings", parameters)
        for flops, size in MDM_SIZES_AT_FLOPS.items()
    ]
    sizes = [size.count_in(parameters) for size in MDM_SIZES_AT_FLOPS.values()]
    return fit_power_law(budgets, sizes)
