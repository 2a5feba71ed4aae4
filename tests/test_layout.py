"""The house: imports run down its floors, no files import each other in a circle, and no file is too long to read."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("kernels", "anchor", "integrations", "app")
HOSTS = ("transformers", "lmms_eval", "vllm")
MODULES = {
    path.relative_to(ROOT).with_suffix("").parts: path for area in FLOORS for path in (ROOT / area).rglob("*.py")
}
MAX_LINES = 400


def imported(module: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The package's modules that a module imports, also within functions and for type checkers."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        name = tuple((node.module or "").split(".")) if node.module else ()
        if node.level:
            base = (*module[: -node.level], *name)
        elif name[:1] == ("videoanchor_triton",):  # where a file is run on its own
            base = name[1:]
        else:
            continue
        for alias in node.names:
            yield (*base, alias.name) if (*base, alias.name) in MODULES else base


GRAPH = {module: set(imported(module)) for module in MODULES}


def test_imports_are_of_modules() -> None:
    """What the tests below see is all there is."""
    assert {path for paths in GRAPH.values() for path in paths} <= MODULES.keys()
    assert all(any(path[0] == area for path in GRAPH) for area in FLOORS)


@pytest.mark.parametrize("area", FLOORS)
def test_imports_run_down(area: str) -> None:
    below = FLOORS[: FLOORS.index(area) + 1]
    up = {(module, path) for module, paths in GRAPH.items() for path in paths if module[0] == area}
    assert not {(module, path) for module, path in up if path[0] not in below}


def test_hosts_stand_apart() -> None:
    """Each integration works without the other; the drop-in for transformers is the one that others may use."""
    for module, paths in GRAPH.items():
        if module[:2] == ("integrations", "transformers"):
            assert not {path for path in paths if path[:1] == ("integrations",) and path[1] in set(HOSTS) - {module[1]}}


def test_no_circle() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join("/".join(module) for module in error.args[1]))


@pytest.mark.parametrize("folder", [*FLOORS, "src/videoanchor_triton", "tests", "benchmarks", "examples"])
def test_no_file_is_too_long(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    assert not {str(path): n for path in files if (n := path.read_text(encoding="utf-8").count("\n")) > MAX_LINES}
