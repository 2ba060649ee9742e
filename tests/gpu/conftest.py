"""Figures of the GPU tests: printed, and kept in one JSON that is whole after every test, of several runs too."""

import gc
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from so8t.files import atomic_write

GIB = 2**30
Record = Callable[..., None]


@pytest.fixture(scope="session")
def figures_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(os.environ.get("SO8T_GPU_JSON") or tmp_path_factory.mktemp("figures") / "gpu.json")


@pytest.fixture(scope="session")
def figures(figures_file: Path) -> dict[str, dict[str, Any]]:
    import bitsandbytes
    import peft
    import transformers

    properties = torch.cuda.get_device_properties(0)
    versions = {library.__name__: library.__version__ for library in (torch, transformers, peft, bitsandbytes)}
    machine = {"name": properties.name, "memory_gib": round(properties.total_memory / GIB, 1)}
    earlier = json.loads(figures_file.read_bytes()) if figures_file.exists() else {}
    return earlier | {"machine": machine | {"cuda": torch.version.cuda, "python": platform.python_version()} | versions}


@pytest.fixture
def record(
    figures: dict[str, dict[str, Any]], figures_file: Path, request: pytest.FixtureRequest, capsys: Any
) -> Record:
    """record(loss=..): figures of this test."""

    def add(**numbers: Any) -> None:
        figures.setdefault(request.node.name, {}).update(numbers)
        with atomic_write(figures_file) as file:
            file.write(json.dumps(figures, indent=1).encode())
        with capsys.disabled():
            print(f"\n{request.node.name}: {numbers} (in {figures_file})")

    return add


@pytest.fixture(autouse=True)
def empty_card() -> Iterator[None]:
    """What an earlier test left in the allocator's cache is not this test's."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture
def twelve_gib(empty_card: None) -> None:
    """Let this process have no more of the card than an RTX 3060 has."""
    torch.cuda.set_per_process_memory_fraction(min(1.0, 12 * GIB / torch.cuda.mem_get_info()[1]))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    folder = os.environ.get("SO8T_SMOLLM2")
    if not folder:
        pytest.skip("SO8T_SMOLLM2 names no folder with SmolLM2-135M-Instruct")
    return Path(folder)
