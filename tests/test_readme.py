"""README.md and docs/: their snippets run, their commands parse, their links lead somewhere."""

import contextlib
import importlib
import io
import json
import re
import shlex
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from so8t import cli
from so8t.config import PolicyConfig, load_config
from so8t.data import read_conversation
from so8t.policy import broken_rule

README = Path("README.md")
PAGES = [README, Path("CHANGELOG.md"), *sorted(Path("docs").glob("*.md"))]
OLD_RUN = Path("tests/fixtures/version_1/run")
BLOCK = re.compile(r"(<!-- snippet: .*? -->\n)?```(\w*)\n(.*?)```", re.DOTALL)


def blocks_of(path: Path, language: str) -> list[str]:
    """The code blocks of a page in this language, without those that tests/test_extending.py applies."""
    found = BLOCK.findall(path.read_text(encoding="utf-8"))
    return [text for snippet, kind, text in found if kind == language and not snippet]


def commands() -> Iterator[tuple[Path, str]]:
    """Every command line of ours, in blocks and in the text, without its comment."""
    for page in PAGES:
        for line in re.findall(r"(python (?:train\.py|-m so8t\.)[^`\n]*)", page.read_text(encoding="utf-8")):
            yield page, line.partition("#")[0].partition("&&")[0].strip()


def test_readme_is_short() -> None:
    assert 7000 < README.stat().st_size <= 9 * 1024


def test_loop_in_readme_is_that_of_train_py() -> None:
    lines = Path("train.py").read_text(encoding="utf-8")
    start, end = lines.index("            # count the whole step first"), lines.index("            # watch\n")
    assert textwrap.dedent(lines[start:end]).strip() in README.read_text(encoding="utf-8")


def test_table_of_the_format_is_that_of_record_py() -> None:
    rows = re.findall(r"^\|.*$", Path("so8t/logits/record.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert "\n".join(rows) in Path("docs/logits.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), f"{page} links to {target}"


def test_every_page_of_docs_is_linked_from_readme() -> None:
    text = README.read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page != README and page.as_posix() not in text] == []


@pytest.mark.parametrize(
    ("page", "code"),
    [(page, code) for page in PAGES for code in blocks_of(page, "python")],
    ids=lambda value: str(value).splitlines()[0][:40],
)
def test_python_runs(page: Path, code: str, tmp_path: Path) -> None:
    if code.startswith("# count the whole step"):
        pytest.skip("the loop, which is compared with train.py")
    (tmp_path / "logits").mkdir()
    name = next((OLD_RUN / "logits").glob("logits_*")).name
    shutil.copy(OLD_RUN.parent / "forms" / "full_all.pt", tmp_path / "logits" / name)
    code = code.replace("runs/default", tmp_path.as_posix())
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, page.as_posix(), "exec"), {"step": 0})


@pytest.mark.parametrize("code", [code for page in PAGES for code in blocks_of(page, "toml")])
def test_toml_is_a_config(code: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    lines = Path("config.toml").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith("sources = ")]  # the pages give it as a table
    path.write_text("\n".join([*kept, code]), encoding="utf-8")
    load_config(path)


@pytest.mark.parametrize(("page", "line"), list(commands()), ids=str)
def test_commands_are_understood(page: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "run", lambda name, command, *failures: 0)  # what comes after the command line is read
    _, *arguments = shlex.split(line)
    if arguments[0] == "train.py":
        options = cli.train_parser(None).parse_args(arguments[1:])
        load_config(options.config, options.overrides)
    else:
        main = importlib.import_module(f"{arguments[1]}.command").main
        assert main(arguments[2:] or [OLD_RUN.as_posix()]) == 0


@pytest.mark.parametrize(
    "line", [line for page in PAGES for code in blocks_of(page, "json") for line in code.splitlines()]
)
def test_rows_may_be_trained_on(line: str) -> None:
    row = json.loads(line)
    conversation = read_conversation(row)
    assert conversation.is_trained[-1]
    assert broken_rule(row, conversation.messages, PolicyConfig()) is None
