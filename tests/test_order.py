"""The house has one direction: a package imports only from those before it, and no file imports in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ("data", "sid", "prepare", "model", "runtime", "evaluate", "train", "serve")
BASE = ("errors", "files", "memory", "config", "progress", "spans", "staging")  # files that every package may use
TOP = ("api", "cli", "__main__", "__init__")  # files that may use every package, and those before them


def modules() -> dict[str, Path]:
    """Every module of the package and of kernels, by its dotted name."""
    found = {}
    for folder, prefix in (("negfast", "negfast"), ("kernels", "negfast.kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = [prefix, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ``known`` that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known.keys()


def rank(module: str) -> int:
    """The place of a module in the order; the kernels know nothing of the package, its base files only each other."""
    part = [*module.split("."), "__init__"][1]
    if part == "kernels":
        return 0
    if part in BASE:
        return 1
    return 2 + (*ORDER, *TOP).index(part)


KNOWN = modules()


@pytest.mark.parametrize("module", sorted(KNOWN))
def test_a_module_imports_only_from_those_before_it(module):
    against = {other for other in imports(KNOWN[module], KNOWN) if rank(other) > rank(module) and other != "negfast"}
    assert not against, f"{module} imports {', '.join(sorted(against))}"


def test_no_files_import_in_a_circle():
    graph = {module: imports(path, KNOWN) - {module, "negfast"} for module, path in KNOWN.items()}
    TopologicalSorter(graph).prepare()


def test_every_folder_has_its_place():
    folders = {path.name for path in (ROOT / "negfast").iterdir() if (path / "__init__.py").is_file()}
    files = {path.stem for path in (ROOT / "negfast").glob("*.py")}
    assert folders - {"kernels"} == set(ORDER) and files == {*BASE, *TOP}
