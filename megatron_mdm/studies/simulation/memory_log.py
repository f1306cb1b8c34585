"""Bytes that live tensors hold, by what they were made for, when they are most."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryLog(TorchDispatchMode):
    """Follows every storage from its making to its end, while it is entered.

    Attributes:
        fullest: By moment, bytes by kind when their sum was greatest. Moments are `start`,
            `forward`, `backward` and `update`. Kinds are `weights`, `gradients`, `optimizer`,
            `activations` and `buffers`: what a backward pass or a reduction makes on its way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fullest: dict[str, dict[str, int]] = {}
        self._kind = "weights"
        self._is_stepping = False
        self._live: Counter[str] = Counter()
        self._known: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # What DeepSpeed keeps as shapes alone lies on a device without memory.
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._follow(leaf.untyped_storage())
        return result

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Says what new tensors are for, outside of backward passes."""
        before = self._kind, self._is_stepping
        self._kind, self._is_stepping = kind, kind == "activations"
        try:
            yield
        finally:
            self._kind, self._is_stepping = before

    def recount(self, tensor: torch.Tensor | None, kind: str) -> None:
        """Counts a tensor as another kind than what it was made as."""
        key = None if tensor is None else tensor.untyped_storage()._cdata
        if key in self._known:
            self._move(key, kind, self._known[key][1])

    def follow_optimizer(self, optimizer: Any) -> None:
        """Counts what an optimizer makes in its update as its state.

        Args:
            optimizer: PyTorch's, or DeepSpeed's around one.
        """
        base = getattr(optimizer, "optimizer", optimizer)
        base.register_step_pre_hook(lambda *_: self._enter_update())
        base.register_step_post_hook(lambda *_: self._leave_update())

    def _enter_update(self) -> None:
        self._kind = "optimizer"

    def _leave_update(self) -> None:
        self._kind = "activations"

    @property
    def _moment(self) -> str:
        # What an engine makes of an optimizer before the first step is no update.
        if not self._is_stepping:
            return "start"
        if torch._C._current_graph_task_id() != -1:
            return "backward"
        return "update" if self._kind == "optimizer" else "forward"

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = "", 0
            weakref.finalize(storage, self._forget, key)
            self._move(key, "buffers" if self._moment == "backward" else self._kind, size)
        elif size != self._known[key][1]:
            self._move(key, self._known[key][0], size)

    def _move(self, key: int, kind: str, size: int) -> None:
        before, earlier = self._known[key]
        self._live[before] -= earlier
        self._live[kind] += size
        self._known[key] = kind, size
        moment = self._moment
        if sum(self._live.values()) > sum(self.fullest.get(moment, {}).values()):
            self.fullest[moment] = {name: held for name, held in self._live.items() if held}

    def _forget(self, key: int) -> None:
        kind, size = self._known.pop(key)
        self._live[kind] -= size
