"""Plants small faults in the core of the package, one at a time, and counts how many of them the tests find.

    python tests/mutants.py                    # 30 faults, the first tier of the tests
    python tests/mutants.py -- -m "" tests     # what follows "--" goes to pytest

A fault swaps an operator, negates a condition, or changes an integer by one, at a place drawn by the seed. Faults that
change nothing but the cost of a pass survive in any suite. A line for each fault says what became of it.
"""

from __future__ import annotations

import argparse
import ast
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from launching import LIMIT

ROOT = Path(__file__).parents[1]
CORE = ("standin/*.py", "tucker/*.py", "layers/lotra.py", "families/*.py")
SWAPPED = {"+": "-", "-": "+", "*": "/", "//": "*", "%": "+", "**": "*", "@": "*"}
COMPARED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is": "is not", "is not": "is"}
COMPARED |= {"in": "not in", "not in": "in"}


def faults(source: str) -> Iterator[tuple[ast.expr, str]]:
    """Expressions of a module and what to write in their place. Annotations and f-strings stay as they are."""
    tree = ast.parse(source)
    left_alone = set()
    for node in ast.walk(tree):
        for part in (getattr(node, name, None) for name in ("annotation", "returns")):
            left_alone |= set(ast.walk(part)) if part is not None else set()
        if isinstance(node, ast.JoinedStr | ast.Raise):
            left_alone |= set(ast.walk(node))
    for node in ast.walk(tree):
        if node in left_alone:
            continue
        if isinstance(node, ast.BinOp) and (operator := _text(node.op)) in SWAPPED:
            yield node, f"({ast.unparse(node.left)} {SWAPPED[operator]} {ast.unparse(node.right)})"
        elif isinstance(node, ast.Compare) and len(node.ops) == 1:
            yield node, f"({ast.unparse(node.left)} {COMPARED[_text(node.ops[0])]} {ast.unparse(node.comparators[0])})"
        elif isinstance(node, ast.BoolOp):
            other = ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
            yield node, f"({ast.unparse(other)})"
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield node, str(node.value + 1)
        elif isinstance(node, ast.If | ast.IfExp):
            yield node.test, f"(not ({ast.unparse(node.test)}))"


def _text(operator: ast.AST) -> str:
    shown = ast.unparse(
        ast.Compare(ast.Name("a"), [operator], [ast.Name("b")])
        if isinstance(operator, ast.cmpop)
        else ast.BinOp(ast.Name("a"), operator, ast.Name("b"))
    )
    return shown[2:-2]


def planted(source: str, node: ast.expr, text: str) -> str:
    """The source with `text` in the place of an expression."""
    lines = source.encode().splitlines(keepends=True)
    start, end = node.lineno - 1, node.end_lineno - 1
    before, after = lines[start][: node.col_offset], lines[end][node.end_col_offset :]
    return b"".join([*lines[:start], before, text.encode(), after, *lines[end + 1 :]]).decode()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="the numbers of the faults to try")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    arguments = parser.parse_args(argv)
    package = ROOT / "peft_lotra"
    places = [
        (path.relative_to(ROOT), *fault)
        for pattern in CORE
        for path in sorted(package.glob(pattern))
        for fault in faults(path.read_text())
    ]
    drawn = random.Random(arguments.seed).sample(places, arguments.count)
    found = 0
    tried = arguments.only if arguments.only is not None else range(len(drawn))
    for number in tried:
        path, node, text = drawn[number]
        source = (ROOT / path).read_text()
        with tempfile.TemporaryDirectory(prefix="peft_lotra_") as folder:
            copy = Path(folder, "copy")
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "outputs", "__pycache__"))
            (copy / path).write_text(planted(source, node, text))
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments.pytest]
            try:
                survived = subprocess.run(command, cwd=copy, capture_output=True, timeout=3 * LIMIT).returncode == 0
            except subprocess.TimeoutExpired:
                survived = False
        found += not survived
        place = f"{path}:{node.lineno}: {ast.get_source_segment(source, node)} -> {text}"
        print(f"{number:3} {'SURVIVED' if survived else 'found'}  {' '.join(place.split())}", flush=True)
    print(f"{found} of {len(tried)} found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
