"""Who may import whom: imports point one way, and from outside a package only what its __init__ exports."""

import ast
from pathlib import Path

import pytest

WINGS = {"analyze", "export", "logits", "memory", "policy", "report", "serve"}
# who may import a wing, beside train.py; all other imports of a wing's go to the modules of training
ALLOWED = {
    ("report", "analyze"),
    ("report", "logits"),
    ("report", "policy"),
    ("analyze", "logits"),
    ("memory", "logits"),  # the plan of what saving takes
    ("export", "policy"),  # the card says what was left out
    ("data", "policy"),
    ("evaluate", "logits"),
}
PACKAGES = {path.parent.name for path in Path("so8t").glob("*/__init__.py")}
FILES = [Path("train.py"), *sorted(Path("so8t").rglob("*.py"))]


def part_of(path: Path) -> str:
    """The wing or the flat module that a file belongs to."""
    return path.parts[1].removesuffix(".py") if path.parts[0] == "so8t" else "train"


def imports_of(path: Path) -> list[tuple[str, str]]:
    """(module, name) of everything of so8t's own that the file imports, wherever in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("so8t", "train"):
            found += [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.split(".")[0] in ("so8t", "train")]
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path: Path) -> None:
    own = part_of(path)
    for module, name in imports_of(path):
        parts = module.split(".")
        if module == "train":  # the memory command traces the loop's own forward
            assert path == Path("so8t/memory/command.py")
            continue
        target = parts[1] if len(parts) > 1 else name
        if target == own:
            continue
        if target in PACKAGES:
            assert len(parts) == 2, f"{path} reaches into so8t.{target}: import what its __init__ exports"
        if own == "train":
            assert target not in ("analyze", "report", "export", "serve")
        elif target in WINGS:
            assert (own, target) in ALLOWED, f"{path} may not import so8t.{target}"


def test_there_are_no_circles() -> None:
    below: dict[str, set[str]] = {}
    for path in FILES:
        if path.stem in ("command", "__main__"):  # they stand above all packages: so8t.data's loads a model's tokenizer
            continue
        targets = {[*module.split("."), name][1] for module, name in imports_of(path) if module != "train"}
        below.setdefault(part_of(path), set()).update(targets - {part_of(path)})
    while below:
        lowest = [part for part, targets in below.items() if not targets & below.keys()]
        assert lowest, f"a circle among {sorted(below)}"
        below = {part: targets for part, targets in below.items() if part not in lowest}
