"""Keeps the libraries' engines quiet: what they print and warn of says nothing about a run."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def quiet_engines(*, use_cpu: bool | None = None) -> None:
    """Sets what DeepSpeed, Megatron-Core, PEFT and transformers read when they are imported.

    Call it before that, where it can be. PYTHONWARNINGS, where it is set, decides on warnings.

    Args:
        use_cpu: DeepSpeed shall compute on the CPU and look for nothing else; None: where PyTorch
            sees no GPU.
    """
    if "PYTHONWARNINGS" not in os.environ:
        # Megatron-Core warns of every optional package that is not there.
        warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
        # Names that newer versions of PyTorch and transformers deprecate.
        for module in ("torch.distributed", "transformers"):
            warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    # Our feed-forward block derives from Megatron-Core's, which says so once a layer.
    logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(_is_news)
    # They are shown for loading weights, which takes seconds.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    if use_cpu is None:
        import torch

        use_cpu = not torch.cuda.is_available()
    if use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Unknown MLP type")
