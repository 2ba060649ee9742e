import subprocess
import sys

import pytest

from so8t.memory.process import peak_process_bytes

MIB = 2**20


def test_peak_is_that_of_this_process_not_of_the_one_that_started_it() -> None:
    held = b"x" * (300 * MIB)
    assert peak_process_bytes() > len(held)
    code = "from so8t.memory.process import peak_process_bytes; print(peak_process_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert MIB < int(done.stdout) < 200 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux cuts the name of a process")
def test_a_process_whose_name_ends_with_half_a_character_is_measured() -> None:
    code = (
        "import ctypes; ctypes.CDLL(None).prctl(15, '学習'.encode()[:4], 0, 0, 0)\n"  # 15 sets the name
        "from so8t.memory.process import peak_process_bytes; print(peak_process_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(done.stdout) > MIB
