"""torch.compile, with room for all the kernels that a process may need of a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# With and without gradients, for queries and for keys, for each shape and each model: a run needs
# six of the rotary embedding, and one process may train and judge several models.
_MOST_KERNELS = 64


def compile_function(
    function: Callable[..., Any], *, dynamic: bool | None = None
) -> Callable[..., Any]:
    """Compiles a function when it is called.

    By itself PyTorch stops after eight kernels of a function, warns, and from then on runs it as it
    is written: FlexAttention would write out the scores of all S x S pairs.

    Args:
        function: What to compile.
        dynamic: False: a kernel for each shape; None: from the second shape on one for all.

    Returns:
        The function, compiled.
    """
    # Imported here, since it takes a second, and few processes compile.
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, _MOST_KERNELS)
    return torch.compile(function, dynamic=dynamic)
