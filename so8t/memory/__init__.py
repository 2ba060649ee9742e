"""Where the bytes of a run go: planned before it starts, measured while it runs."""

from so8t.memory.fakes import BatchShape, shape_of
from so8t.memory.ledger import MemoryLedger, OutOfMemory
from so8t.memory.plan import device_memory, plan_memory
from so8t.memory.trace import StepSpec

__all__ = ["BatchShape", "MemoryLedger", "OutOfMemory", "StepSpec", "device_memory", "plan_memory", "shape_of"]
