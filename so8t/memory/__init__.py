"""Where the bytes of a run go: planned before it starts, measured while it runs."""

from typing import TYPE_CHECKING

from so8t import cli

__all__ = [
    "BatchShape",
    "MemoryLedger",
    "OutOfMemory",
    "StepSpec",
    "device_memory",
    "plan_memory",
    "shape_of",
]

if TYPE_CHECKING:
    from so8t.memory.ledger import MemoryLedger, OutOfMemory
    from so8t.memory.plan import device_memory, plan_memory
    from so8t.memory.step import BatchShape, StepSpec, shape_of
else:
    __getattr__ = cli.on_demand(__name__, __all__, "ledger", "plan", "step")
