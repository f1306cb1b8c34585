"""Tensors that say they lie on a GPU and compute on the CPU, for machines without one.

An operation that mixes both devices raises, as on a GPU, and the values are those of the CPU.
There are no gradients: PyTorch's engine wants a real device for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
# They take tensors of both devices; of an index the GPU's kernel takes the CPU's too.
_CROSSING = {"aten::copy_", "aten::_to_copy", "aten::to", "aten::index", "aten::index_put_"}
# For these PyTorch asks for the device itself, before it looks at what stands for it.
_WITHOUT_GUARD: dict[Any, Any] = {
    Tensor.__invert__: torch.bitwise_not,
    Tensor.__int__: lambda tensor: int(tensor.host),
    Tensor.contiguous: torch.ops.aten.contiguous,
    Tensor.copy_: torch.ops.aten.copy_,
    Tensor.nonzero: torch.ops.aten.nonzero,
}
_MAKE_TENSOR = torch.tensor


class GpuTensor(Tensor):
    """Stands for a tensor of the CPU.

    Attributes:
        host: The tensor that it stands for.
    """

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> GpuTensor:
        made = Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), dtype=host.dtype, device=GPU
        )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = _WITHOUT_GUARD.get(func, func)
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"GpuTensor({self.host})"

    def __getitem__(self, index: Any) -> GpuTensor:
        return GpuTensor(self.host[tree_map(_host_of, index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, Tensor) and value.dim() and not isinstance(value, GpuTensor):
            raise RuntimeError("an assignment mixes tensors of the GPU and the CPU")
        self.host[tree_map(_host_of, index)] = _host_of(value)

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a tensor on a GPU has no numpy array")

    def tolist(self) -> Any:
        return self.host.tolist()


class _Generator(torch.Generator):
    """Draws the same numbers wherever it is asked to be."""

    def __new__(cls, device: Any = None) -> _Generator:
        return super().__new__(cls, "cpu")


class _Factories(TorchDispatchMode):
    """Takes also those operations that no tensor of the GPU takes part in."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_gpu = [isinstance(tensor, GpuTensor) for tensor in tensors]
    if any(on_gpu) and name not in _CROSSING:
        # A number may lie on the CPU.
        places = zip(tensors, on_gpu, strict=True)
        if any(tensor.dim() and not here for tensor, here in places):
            raise RuntimeError(f"{name} mixes tensors of the GPU and the CPU")
    stays = any(on_gpu) if name != "aten::copy_" else on_gpu[0]
    # Under inference mode a move comes with its device among the arguments.
    named = kwargs.get("device") or next((a for a in args if isinstance(a, torch.device)), None)
    if named is not None:
        stays = torch.device(named).type == "cuda"
        args = tuple(torch.device("cpu") if isinstance(a, torch.device) else a for a in args)
        kwargs |= {"device": torch.device("cpu")} if "device" in kwargs else {}
    hosts = tree_map(_host_of, (args, kwargs))
    known = {id(_host_of(tensor)): tensor for tensor in tensors}
    result = func(*hosts[0], **hosts[1])

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        # What an operation changed in place is the same tensor afterwards.
        if id(leaf) in known and isinstance(known[id(leaf)], GpuTensor) == stays:
            return known[id(leaf)]
        return GpuTensor(leaf) if stays else leaf

    return tree_map(place, result)


def _host_of(value: Any) -> Any:
    return value.host if isinstance(value, GpuTensor) else value


def move(module: nn.Module) -> nn.Module:
    """Puts a module's parameters onto the GPU, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(GpuTensor(parameter.data), False)
    return module


def _make_tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
    made = _MAKE_TENSOR(data, *args, **kwargs)
    return made if device is None or torch.device(device).type == "cpu" else GpuTensor(made)


@contextmanager
def pretended_gpu(patch: pytest.MonkeyPatch) -> Iterator[Callable[[Tensor], Tensor]]:
    """Lets a block use the GPU that there is not.

    Args:
        patch: Undone afterwards.

    Yields:
        Moves a tensor there.
    """
    with patch.context() as patched, _Factories():
        patched.setattr(torch.cuda, "_lazy_init", lambda: None)
        patched.setattr(torch, "Generator", _Generator)
        patched.setattr(torch, "tensor", _make_tensor)
        yield GpuTensor
