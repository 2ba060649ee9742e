import gc
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

# Both are read when torch and transformers are imported, by the tests and by the processes that they start.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# on tensors this small, threads that wait for one another on a busy machine cost a hundred times the work
os.environ.setdefault("OMP_NUM_THREADS", "1")

# traces of the memory plan, shared by all workers and processes of a run of the tests, and by nothing else
if "SO8T_TESTS_CACHE" not in os.environ:
    os.environ["SO8T_TESTS_CACHE"] = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="so8t-cache")

gc.disable()  # until everything is imported, see `short_searches`

# a shell lets what it starts in the background ignore Ctrl-C, and so would the processes that the tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--windows-files", action="store_true", help="pretend the file semantics of Windows")


@pytest.fixture
def is_windows_files(request: pytest.FixtureRequest) -> bool:
    """Whether files behave as on Windows, by nature or by --windows-files."""
    return sys.platform == "win32" or bool(request.config.getoption("--windows-files"))


@pytest.fixture(autouse=True)
def _windows_files(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.config.getoption("--windows-files"):
        from windows_files import pretend_windows

        pretend_windows(monkeypatch)


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """so8t's own log: what another library says depends on the tests that ran before in the same process."""
    with caplog.filtering(logging.Filter("so8t")):
        yield caplog


# the imports are in the fixtures because they take seconds, which a test of the configuration need not wait for


@pytest.fixture(scope="session", autouse=True)
def short_searches() -> Iterator[None]:
    """Searches for garbage leave out torch and transformers: half a million objects, a sixth of the tests' time."""
    gc.freeze()  # for good: pytest itself searches several times at the end
    gc.enable()
    with patch("gc.freeze"), patch("gc.unfreeze"):
        yield


@pytest.fixture(scope="session", autouse=True)
def no_fsync() -> Iterator[None]:
    """It makes files outlive a power cut, which no test stages, and costs seconds on a busy disk."""
    with patch("os.fsync"):
        yield


@pytest.fixture(scope="session")
def base_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of tiny models, by the names that model_cases gives them."""
    from model_cases import save_base_models

    return save_base_models(tmp_path_factory.mktemp("base_models"))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained("so8t/demo")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The folder of a tiny Phi-3 with the demo's tokenizer."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 1, "eos_token_id": 0}
    Phi3ForCausalLM(Phi3Config(**sizes, **heads, bos_token_id=None)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def memorised_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the default model, gates far from the identity, that knows the sample's first row by heart."""
    from run_cases import copy_rows

    import train

    folder = tmp_path_factory.mktemp("memorised")
    copy_rows(folder / "rows.jsonl", 0, 1)
    keys = [f"data.train_data={folder / 'rows.jsonl'}", f"training.output_dir={folder / 'run'}", "so8t.init_scale=0.5"]
    keys += ["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=1"]
    keys += ["training.max_steps=40", "training.optim=adamw", "training.save_steps=0", "training.save_logits=false"]
    assert train.main(["config.toml", *keys]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Headless Chromium with the driver that its package brings; nothing is downloaded."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--host-resolver-rules=MAP evil.test 127.0.0.1")  # what a rebound name comes to
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield window
    window.quit()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    if sys.platform != "linux":
        pytest.skip("only Linux mounts one so simply")
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)], capture_output=True)
    if mount.returncode != 0:
        pytest.skip("this process may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
