"""A pretended accelerator with real values, in any build of torch: a host tensor that meets the device's raises.

    python tests/pretended_accelerator.py COMMANDS.json OUTCOMES.json

COMMANDS: a list of {"name", "device" ("sim" or "cpu"), "module", "arguments"}: each module's main(arguments) is run in
this one process, OUTCOMES tells the exit code (null: it raised), what it printed, and the most device memory it took.

torch's PrivateUse1 becomes the device "sim". A tensor on it is ordinary memory under another device's name, handed over
by DLPack without a copy, and every operation without a kernel of its own lands in `_compute`, which computes it on the
CPU. So autograd, autocast, views and the memory's lifetime are torch's own. Copies to the host on another stream come
late, as on a GPU: until somebody waits for them the host's memory holds rubbish.
"""

import contextlib
import ctypes
import functools
import importlib
import io
import json
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from torch import Tensor
from torch.utils import backend_registration

NAME = "sim"
GIB = 2**30
aten = torch.ops.aten
_CPU_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_CPU, _PRIVATE_USE = 1, 12  # DLPack's names of devices
_SET = ("set_.source_Storage", "set_.source_Storage_storage_offset")
_ON_METADATA = ("as_strided", "view", "_reshape_alias", "unfold", *_SET)
_IN_16_BITS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")  # by autocast
_plain_empty = torch.empty
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


class Memory:
    """Bytes of the device's tensors, as its allocator would count them."""

    live = peak = 0
    capacity = 8 * GIB

    @classmethod
    def add(cls, storage: torch.UntypedStorage) -> None:
        size = -(-storage.nbytes() // 512) * 512
        if cls.live + size > cls.capacity:
            raise torch.OutOfMemoryError(f"{NAME} out of memory. Tried to allocate {size} bytes")
        cls.live += size
        cls.peak = max(cls.peak, cls.live)
        weakref.finalize(storage, cls._free, size)

    @classmethod
    def _free(cls, size: int) -> None:
        cls.live -= size

    @classmethod
    def reset_peak(cls, device: Any = None) -> None:
        cls.peak = cls.live


def _same_memory(tensor: Tensor, device: int) -> Tensor:
    capsule = torch._C._to_dlpack(tensor)
    ctypes.c_int32.from_address(_pointer_of(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)).value = device
    return torch._C._from_dlpack(capsule)


def _to_device(tensor: Tensor) -> Tensor:
    moved = _same_memory(tensor, _PRIVATE_USE)
    Memory.add(moved.untyped_storage())
    return moved


def _to_host(tensor: Tensor) -> Tensor:
    return _same_memory(tensor, _CPU) if tensor.device.type == NAME else tensor


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _map(function, item) for name, item in value.items()}
    return [_map(function, item) for item in value] if isinstance(value, list | tuple) else function(value)


@functools.cache
def _outs(op: Any) -> list[str]:
    return [argument.name for argument in op._schema.arguments if argument.kwarg_only and argument.is_write]


def _compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation with a device tensor among its arguments. Host tensors with dimensions are refused."""
    given: dict[int, Tensor] = {}  # the device's tensors, by the host's that stand for them
    hosts: list[Tensor] = []
    resized: list[tuple[Tensor, Tensor]] = []

    def take(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if not isinstance(value, Tensor):
            return value
        if value.device.type != NAME:
            if value.ndim:
                raise RuntimeError(f"{op}: a tensor of shape {tuple(value.shape)} is on the host, others on {NAME}")
            return value
        hosts.append(_to_host(value))
        given[id(hosts[-1])] = value
        return hosts[-1]

    def give(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return given[id(value)] if id(value) in given else _to_device(value)

    host_args, host_kwargs = _map(take, args), _map(take, kwargs)
    for name in _outs(op):  # an empty one is there to be resized, which borrowed memory cannot be
        out = kwargs[name]
        if not out.numel():
            host_kwargs[name] = fresh = _plain_empty(0, dtype=out.dtype)
            given[id(fresh)] = out
            resized.append((out, fresh))
    results = op(*host_args, **host_kwargs)
    for out, fresh in resized:
        new = _to_device(fresh)
        place = new.untyped_storage(), 0, new.size(), new.stride()
        aten.set_.source_Storage_storage_offset.redispatch(_CPU_KERNELS, out, *place)
    return _map(give, results)


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **others: Any) -> Tensor:
    return _to_device(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **others: Any) -> Tensor:
    return _to_device(torch.empty_strided(size, stride, dtype=dtype))


class _Copy:
    """To the host, at some later time; until then the host's memory holds rubbish."""

    def __init__(self, host: Tensor, source: Tensor) -> None:
        self.tensors: tuple[Tensor, ...] = (host, source)
        self._lock = threading.Lock()  # the loop and the writer both wait
        host.view(-1).view(torch.uint8).fill_(255)

    def finish(self) -> None:
        with self._lock:
            if self.tensors:
                self.tensors[0].copy_(self.tensors[1])
            self.tensors = ()  # the device's memory is free again


class Stream(torch.Stream):
    """One of the device's queues. Only copies to the host wait in it: the rest is computed at once."""

    default: "Stream"
    current: "Stream"

    def __init__(self, device: Any = None) -> None:
        self.copies: list[_Copy] = []

    def __enter__(self) -> "Stream":
        Stream.current = self
        return self

    def __exit__(self, *error: object) -> None:
        Stream.current = Stream.default

    def wait_stream(self, other: torch.Stream) -> None:
        Event(other).synchronize()

    def record_event(self, event: Any = None) -> "Event":  # type: ignore[override]
        return Event(self)


class Event:
    def __init__(self, stream: Any) -> None:
        stream.copies = [copy for copy in stream.copies if copy.tensors]
        self._copies = list(stream.copies)

    def synchronize(self) -> None:
        for copy in self._copies:
            copy.finish()


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    host_source, host_target = _to_host(source), _to_host(target)
    if target.device.type == NAME or not non_blocking:
        host_target.copy_(host_source)
        return target
    assert target.data_ptr() in _pinned, "an asynchronous copy to memory that is not pinned waits for the device"
    if Stream.current is Stream.default:
        host_target.copy_(host_source)
        return target
    Stream.current.copies.append(_Copy(host_target, host_source))
    return target


class _Pinned:
    """The addresses of the memory that is pinned."""

    def __init__(self) -> None:
        self._ranges: dict[int, range] = {}

    def add(self, tensor: Tensor) -> Tensor:
        start = tensor.data_ptr()
        self._ranges[start] = range(start, start + tensor.nbytes)
        weakref.finalize(tensor.untyped_storage(), self._ranges.pop, start, None)
        return tensor

    def __contains__(self, address: int) -> bool:
        return any(address in memory for memory in list(self._ranges.values()))


_pinned = _Pinned()


def _empty_pinned(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
    tensor = _plain_empty(*size, **options)
    return _pinned.add(tensor) if pin_memory and tensor.numel() else tensor


class _Module(backend_registration._DummyBackendModule):
    """`torch.sim`, as torch and the libraries ask a device's module."""

    available = False

    def is_available(self) -> bool:
        return self.available

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return Memory.capacity - Memory.live, Memory.capacity

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    def set_device(self, device: Any) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass


class _Hook(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return _module.available


_module = _Module()


def _in_16_bits(op: Any, *args: Any, **kwargs: Any) -> Any:
    dtype = torch.get_autocast_dtype(NAME)

    def cast(value: Any) -> Any:
        is_cast = isinstance(value, Tensor) and value.is_floating_point() and value.device.type == NAME
        return value.to(dtype) if is_cast else value

    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)  # type: ignore[attr-defined]
    with torch._C._ExcludeDispatchKeyGuard(autocast):
        return op(*_map(cast, args), **_map(cast, kwargs))


def _quantize_int8(weight: Any, device: Any) -> Any:
    """Int8Params._quantize, which gives a host's tensor the device's data: torch allows that for CUDA, not for us."""
    quantized, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.data.to(device, torch.float16))
    return type(weight)(quantized, requires_grad=False, has_fp16_weights=False, CB=quantized, SCB=scales)


def _operator(name: str, operators: Any = aten) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(operators, packet), overload or "default")


def install() -> list[torch.library.Library]:
    """Register the device for the rest of the process, before its first backward pass; keep the result alive."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_module, hook=_Hook())
    every, kernels, quantized = (torch.library.Library(name, "IMPL") for name in ("_", "aten", "bitsandbytes"))
    every.fallback(_compute, "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in _ON_METADATA:  # they look at no number, so the CPU's kernels do
        kernels.impl(name, functools.partial(_operator(name).redispatch, _CPU_KERNELS), "PrivateUse1")
    for name in _IN_16_BITS:
        kernels.impl(name, functools.partial(_in_16_bits, _operator(name)), "AutocastPrivateUse1")
    for name in torch._C._dispatch_get_all_op_names():  # else they are compiled for a device that nobody knows
        if name.startswith("bitsandbytes::"):
            operator = _operator(name.removeprefix("bitsandbytes::"), torch.ops.bitsandbytes)
            quantized.impl(name, functools.partial(_compute, operator), "PrivateUse1")
    kernels.impl("empty.memory_format", _empty, "PrivateUse1")
    kernels.impl("empty_strided", _empty_strided, "PrivateUse1")
    kernels.impl("_copy_from", _copy_from, "PrivateUse1")
    kernels.impl("record_stream", lambda tensor, stream: None, "PrivateUse1")
    replaced: dict[str, Any] = {
        "memory_allocated": lambda device=None: Memory.live,
        "memory_reserved": lambda device=None: Memory.live,
        "max_memory_allocated": lambda device=None: Memory.peak,
        "reset_peak_memory_stats": Memory.reset_peak,
        "current_stream": lambda device=None: Stream.current,
    }
    for name, function in replaced.items():  # torch's own ask an allocator that only C++ can give
        setattr(torch.accelerator, name, function)
    bitsandbytes.nn.Int8Params._quantize = _quantize_int8
    Stream.default = Stream.current = Stream(NAME)
    torch.Stream = Stream  # type: ignore[misc, assignment]
    torch.empty = _empty_pinned  # type: ignore[assignment]
    return [every, kernels, quantized]


def run(module: str, arguments: list[str], device: str) -> dict[str, Any]:
    _module.available = device == NAME
    printed = io.StringIO()
    exit_code = None
    start = Memory.peak = Memory.live
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            exit_code = importlib.import_module(module).main(arguments)
        except Exception:
            traceback.print_exc()
    return {"exit_code": exit_code, "output": printed.getvalue(), "device_bytes": Memory.peak - start}


def kind_of(spec: Any, layers: int | None) -> tuple[Any, ...]:
    """One trace for each kind of model; only of the device's job with a probe is what the plan says looked at."""
    exactly = (spec.micro_batch, layers) if spec.probe and spec.device_type == NAME else ()
    return spec.config.model_spec, spec.device_type, spec.probe, exactly


if __name__ == "__main__":
    _libraries = install()
    from memory_cases import traced_once  # imports train.py, when there is the device

    commands = json.loads(Path(sys.argv[1]).read_bytes())
    with traced_once(kind_of):
        outcomes = {command.pop("name"): run(**command) for command in commands}
    Path(sys.argv[2]).write_text(json.dumps(outcomes), encoding="utf-8")
