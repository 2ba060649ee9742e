"""How this machine's NVIDIA driver behaves, and whether torch can use it. Does not import torch."""

import os
import platform
import shutil
import sys
from pathlib import Path

# of pytorch.org/get-started; a driver older than 580 needs cu126 in its place
CUDA_TORCH = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"


def lends_host_memory() -> bool:
    """Whether a full GPU gets host memory instead of an out-of-memory error: on Windows, and in WSL by the same driver.

    https://nvidia.custhelp.com/app/answers/detail/a_id/5490
    """
    return sys.platform == "win32" or "microsoft" in platform.release().lower()


def allocator_settings() -> dict[str, str]:
    """Environment variables that must be set before torch is imported, unless the user has set one of them.

    Expandable segments: without them, rows of many lengths strand memory in blocks of the wrong size. Windows and WSL
    do not have them. The older name of the variable still counts where a user has set it.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if lends_host_memory() or any(name in os.environ for name in names):
        return {}
    return {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def unused_gpu(cuda_build: str | None) -> str:
    """One sentence if there is an NVIDIA driver that torch does not use, else "".

    cuda_build: torch.version.cuda, None in a build for CPUs.
    """
    signs = [shutil.which("nvidia-smi"), shutil.which("nvcuda.dll"), Path("/proc/driver/nvidia/version").exists()]
    if not any(signs):
        return ""
    if cuda_build is None:
        return f"device: this machine has an NVIDIA driver, but this torch is built for CPUs only: {CUDA_TORCH}"
    return (
        f"device: this machine has an NVIDIA driver, but this torch (CUDA {cuda_build}) finds no GPU with it: is "
        f"CUDA_VISIBLE_DEVICES empty, or the driver too old? For another CUDA: {CUDA_TORCH}"
    )
