"""By which code a result is: the version of peft_lotra, and a hash of the modules that the result depends on."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

import peft_lotra

HERE = Path(__file__).parent
FOLDERS = (HERE, HERE.parent, HERE.parent / "benchmarks")  # where modules of the examples lie
# Which runs there are, and where; their settings are in every line. How files are written.
NOT_OF_A_RESULT = {"experiments", "jobs", "version", "measuring", "reporting", "command_line", "pictures"}
# Of the library: which layers are found, what only shows or tests, and what only imports.
NO_RESULT_OF = ("advise.py", "analysis/plots.py", "analysis/summary.py", "coefficients/registry.py", "files/")
NO_RESULT_OF += ("inference/", "testing/")


def modules_of(task: str) -> tuple[str, str]:
    """Where a result of `run.py` comes from."""
    return "perform", f"tasks/{task}"


@cache
def version(*modules: str) -> str:
    """The library's, and a hash of the code that results of these modules depend on."""
    code = sorted(_code(path)[0] for path in sources(*modules))
    return f"{peft_lotra.__version__}+{hashlib.sha256(repr(code).encode()).hexdigest()[:8]}"


def sources(*modules: str) -> set[Path]:
    """Of the library, what a result can depend on; of these examples, the modules and what they import."""
    library = Path(peft_lotra.__file__).parent
    found = {path for path in library.rglob("*.py") if path.name != "__init__.py"}
    found = {path for path in found if not path.relative_to(library).as_posix().startswith(NO_RESULT_OF)}
    waiting = [*modules]
    while waiting:
        name = waiting.pop()
        files = (path for folder in FOLDERS for path in (folder / f"{name}.py", folder / name / "__init__.py"))
        path = next((path for path in files if path.exists()), None)
        if path and name not in NOT_OF_A_RESULT and path not in found:
            found.add(path)
            waiting += _code(path)[1]
    return found


@cache
def _code(path: Path) -> tuple[str, list[str]]:
    """What it does, without comments, docstrings and texts of errors and warnings; the modules that it imports."""
    tree, imported = ast.parse(path.read_text()), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported += [node.module] if node.module and not node.level else []
        elif isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
        said = node.exc if isinstance(node, ast.Raise) else node
        if isinstance(said, ast.Call) and (said is not node or ast.unparse(node.func) == "warnings.warn"):
            said.args = []
    return ast.unparse(tree), imported
