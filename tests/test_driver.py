import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from so8t import driver

SETTING = "expandable_segments:True"


@pytest.fixture(params=["Windows", "WSL", "Linux"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """This machine, as it would tell of itself."""
    monkeypatch.setattr(sys, "platform", "win32" if request.param == "Windows" else "linux")
    release = {"Windows": "10", "WSL": "5.15.167.4-microsoft-standard-WSL2", "Linux": "6.8.0-51-generic"}
    monkeypatch.setattr(platform, "release", lambda: release[request.param])
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    return str(request.param)


def test_segments_grow_where_that_works(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert driver.allocator_settings() == ({"PYTORCH_ALLOC_CONF": SETTING} if system == "Linux" else {})
    assert driver.lends_host_memory() is (system != "Linux")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    assert driver.allocator_settings() == {}  # what the user has set stays


def test_train_sets_the_allocator_before_torch_is_imported() -> None:
    code = "import sys; from so8t import driver; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
    lines = Path("train.py").read_text(encoding="utf-8").splitlines()
    assert lines.index("import torch") > next(n for n, line in enumerate(lines) if "allocator_settings()" in line)


def test_a_driver_that_torch_cannot_use_is_one_sentence_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if not Path("/proc/driver/nvidia/version").exists():
        assert driver.unused_gpu(None) == driver.unused_gpu("13.0") == ""
    program = tmp_path / ("nvidia-smi.exe" if os.name == "nt" else "nvidia-smi")
    program.touch(mode=0o755)
    assert shutil.which("nvidia-smi")
    sentence = driver.unused_gpu(None)
    assert "this torch is built for CPUs only: pip install" in sentence
    assert sentence.endswith("torch --index-url https://download.pytorch.org/whl/cu130")
    assert "CUDA 12.6" in driver.unused_gpu("12.6")
