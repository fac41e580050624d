"""No two modules of a package import each other, not even for type annotations."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

Graph = Mapping[str, Iterable[str]]


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_statements(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    """Imports that run with the module, and those under `if TYPE_CHECKING` and in `try`."""
    found: list[ast.Import | ast.ImportFrom] = []
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)
    return found


def imported_names(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.level == 0, "imports are absolute"
    return [f"{node.module}.{alias.name}" for alias in node.names]


def imports_within(package: Path, root: Path = ROOT) -> dict[str, set[str]]:
    """Which modules of `package` each of them imports."""
    paths = {module_name(path, root): path for path in package.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        names = [
            n for s in import_statements(ast.parse(path.read_text())) for n in imported_names(s)
        ]
        targets = {name if name in paths else name.rpartition(".")[0] for name in names}
        graph[module] = (targets & paths.keys()) - {module}
    return graph


def find_cycle(graph: Graph) -> list[str] | None:
    """A cycle of `graph`, its first module repeated at the end; None if there is none."""
    finished: set[str] = set()

    def search(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return None
        for target in sorted(graph[module]):
            if cycle := search(target, [*path, module]):
                return cycle
        finished.add(module)
        return None

    return next((cycle for module in sorted(graph) if (cycle := search(module, []))), None)


@pytest.mark.parametrize(
    "package",
    sorted(str(path.parent.relative_to(ROOT)) for path in (ROOT / "portalm").glob("*/__init__.py")),
)
def test_a_package_has_no_import_cycle(package: str) -> None:
    graph = imports_within(ROOT / package)

    cycle = find_cycle(graph)

    assert graph
    assert cycle is None, " -> ".join(cycle)


def test_a_cycle_by_type_annotations_is_found(tmp_path: Path) -> None:
    house = tmp_path / "house"
    (house / "cellar").mkdir(parents=True)
    for name, code in {
        "__init__.py": "from house.hall import door",
        "hall.py": "import house.cellar.stairs",
        "cellar/__init__.py": "",
        "cellar/stairs.py": "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from house.attic import beam",
        "attic.py": "from house import hall",
        "garden.py": "def late():\n    from house import garden, hall",
    }.items():
        (house / name).write_text(code)

    cycle = find_cycle(imports_within(house, tmp_path))

    assert cycle == ["house.hall", "house.cellar.stairs", "house.attic", "house.hall"]


def test_imports_inside_functions_make_no_cycle(tmp_path: Path) -> None:
    house = tmp_path / "house"
    house.mkdir()
    (house / "hall.py").write_text("def late():\n    from house import garden")
    (house / "garden.py").write_text("from house import hall")

    assert find_cycle(imports_within(house, tmp_path)) is None
