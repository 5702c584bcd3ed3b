"""The reference: pages made of docstrings by pdoc, whose names exist."""

import importlib
import inspect
import re
import subprocess
import sys

import pytest
from launching import ROOT

PAGES = ("peft_lotra", "peft_lotra.analysis", "peft_lotra.adapters.lora", "peft_lotra.testing", "peft_lotra.advise")


def documented():
    """Docstrings of the public names on the pages, and of their public methods."""
    for page in PAGES:
        module = importlib.import_module(page)
        yield page, module, module.__doc__ or ""
        for name in getattr(module, "__all__", []):
            thing = getattr(module, name)
            yield f"{page}.{name}", module, inspect.getdoc(thing) or ""
            for method, function in vars(thing).items() if inspect.isclass(thing) else ():
                if not method.startswith("_") and callable(function):
                    yield f"{page}.{name}.{method}", module, inspect.getdoc(function) or ""


def resolves(path):
    """Whether a dotted name is a module, or something in one."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_every_public_name_has_a_docstring():
    described_together = {f"peft_lotra.OutputLoss.{name}" for name in ("value", "gradient", "factor")}
    lacking = {name for name, _, text in documented() if not text.strip() and ".test_" not in name}
    assert lacking - described_together == set()


def test_names_in_docstrings_exist():
    lacking = []
    for name, _, text in documented():
        for path in re.findall(r"`(peft_lotra(?:\.\w+)+)", text):
            if not resolves(path):
                lacking.append((name, path))
    assert not lacking


def test_the_command_of_contributing_makes_the_pages(tmp_path):
    pytest.importorskip("pdoc")
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (command,) = re.findall(r"^python -m pdoc .*$", text, flags=re.MULTILINE)
    assert [word for word in command.split() if word.startswith("peft_lotra")] == list(PAGES)
    arguments = command.replace("outputs/reference", str(tmp_path)).split()[1:]
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    assert pages >= {page.replace(".", "/") + ".html" for page in PAGES}
    front = (tmp_path / "peft_lotra.html").read_text()
    import peft_lotra

    assert all(f'id="{name}"' in front for name in peft_lotra.__all__)
