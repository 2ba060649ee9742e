"""Counting the bytes of tensors for as long as they live: real ones of a run, or fake ones of a trace."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass(frozen=True)
class Phase:
    """A part of a step: bytes of tensors allocated at its end, and at its peak."""

    allocated: int
    peak: int

    def worse(self, other: "Phase | None") -> "Phase":
        return self if other is None else Phase(max(self.allocated, other.allocated), max(self.peak, other.peak))


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations make, for as long as they live; real tensors or fake ones.

    With `fake`, what depends on data (`_result_by_shape`) and what kernels allocate inside (`_scratch`) is filled in.
    """

    def __init__(self, block_bytes: int = 1, fake: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._block_bytes = block_bytes
        self._fake = fake
        self._seen: set[int] = set()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that exist already."""
        for tensor in tensors:
            self._add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # most calls in a trace, and a fake tensor knows the answer
            return args[0].device
        scratch = _scratch(func, args) if self._fake and func.namespace == "bitsandbytes" else []
        self.hold(scratch)
        result = _result_by_shape(func, args) if self._fake else None
        if result is None:
            result = func(*args, **(kwargs or {}))
        results = (tensor for tensor in tree_iter(result) if isinstance(tensor, Tensor))
        # a storage that cannot be resized is not torch's own: a mapped file, or a part of a buffer
        self.hold(tensor for tensor in results if tensor.untyped_storage().resizable())
        return result

    def phase(self) -> Phase:
        """The phase that ends now; another begins."""
        peak, self.peak = self.peak, self.now
        return Phase(self.now, peak)

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._seen:
            return
        size = -(-storage.nbytes() // self._block_bytes) * self._block_bytes
        self._seen.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, storage._cdata, size)

    def _freed(self, identity: int, size: int) -> None:
        self._seen.discard(identity)
        self.now -= size


def _result_by_shape(func: Any, args: Any) -> Any:
    """The result of an operation whose shape depends on data, at its usual size; None for all others."""
    if func is torch.ops.aten.nonzero.default:  # every element, the most there can be
        return torch.arange(args[0].numel()).view(-1, 1).expand(-1, args[0].ndim)
    if func is torch.ops.aten._grouped_mm.default:  # of experts; torch knows the shapes in bfloat16 only
        return _grouped_product(args[0], args[1], args[2] if len(args) > 2 else None)
    if func.namespace != "bitsandbytes":
        return None
    if func is torch.ops.bitsandbytes.int8_vectorwise_quant.default:  # no outliers
        return torch.empty_like(args[0], dtype=torch.int8), args[0].new_empty(len(args[0]), dtype=torch.float32), None
    if func is torch.ops.bitsandbytes.int8_mixed_scaled_mm.default:
        return args[0].new_empty(len(args[0]), len(args[2])), None
    return None


def _grouped_product(left: Tensor, right: Tensor, ends: Tensor | None) -> Tensor:
    """left [tokens, k] @ right [groups, k, n], or for the gradient left [m, tokens] @ right [tokens, n] by group."""
    if left.ndim == right.ndim == 2 and ends is not None:
        return left.new_empty(len(ends), left.shape[0], right.shape[1])
    return left.new_empty(*left.shape[:-1], right.shape[-1])


def _scratch(func: Any, args: Any) -> list[Tensor]:
    """What bitsandbytes holds while it computes; the others' is small, or shows as operations of its own."""
    if func is torch.ops.bitsandbytes.gemm_4bit.default:  # the whole weight, unpacked
        return [args[0].new_empty(tuple(args[2]))]
    if func is torch.ops.bitsandbytes.int8_mixed_scaled_mm.default:  # the product in int32, and in the kernel's float16
        dtypes = {torch.int32, torch.float16} - {args[0].dtype}
        return [args[0].new_empty((len(args[0]), len(args[2])), dtype=dtype) for dtype in dtypes]
    return []
