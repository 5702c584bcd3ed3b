"""The package's rooms import one way: no circle, not even one that is hidden in a function."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "peft_lotra"
# From the ground up; a room imports from itself and from those before it.
ROOMS = ("preserved", "tucker", "placement", "calls", "coefficients", "standin", "families", "layers", "files")
ROOMS += ("registration", "config", "targets", "combination", "call_arguments", "model")
ROOMS += ("inference", "analysis", "training", "adapters", "testing", "advise")


def modules():
    """Module -> the modules of this package that it imports, wherever in its code."""
    paths = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items() if name != "__init__"}
    found = {}
    for name, path in paths.items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Import) and any("peft_lotra" in alias.name for alias in node.names))
            if isinstance(node, ast.ImportFrom) and node.level:
                source = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
                for alias in node.names:
                    names = [".".join([*source, alias.name]), ".".join(source)]
                    found[name].add(next(candidate for candidate in names if candidate in paths))
    return found


def test_every_room_has_its_place():
    assert {name.split(".")[0] for name in modules()} == set(ROOMS)


def test_rooms_import_those_before_them():
    against = [
        f"{name} imports {other}"
        for name, others in modules().items()
        for other in others
        if ROOMS.index(other.split(".")[0]) > ROOMS.index(name.split(".")[0])
    ]
    assert not against


def test_modules_import_in_no_circle():
    graph = modules()
    while leaves := [name for name, others in graph.items() if not others & graph.keys() - {name}]:
        for name in leaves:
            del graph[name]
    assert not graph


@pytest.mark.slow
def test_the_import_adds_nothing_to_what_peft_imports():
    code = "import sys, peft; before = {*sys.modules}; import peft_lotra; print(*sorted({*sys.modules} - before))"
    # The folder of the package is the first place where an interpreter with -c looks for it.
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    added = [name for name in done.stdout.split() if name.split(".")[0] not in sys.stdlib_module_names]
    assert "peft_lotra.model" in added
    others = [name for name in added if name.split(".")[0] != "peft_lotra"]
    assert not others, f"{len(others)} modules that should be imported where they are used: {others}"


def test_the_root_holds_few_files():
    assert len(list(PACKAGE.glob("*.py"))) <= 9


def test_no_file_is_too_long():
    assert not [path for path in PACKAGE.rglob("*.py") if len(path.read_text().splitlines()) > 400]
