"""The code of the guides and of the notebook runs as it stands there, and links between pages lead somewhere."""

import json
import os
import re
from pathlib import Path
from unittest.mock import patch

import matplotlib
import pytest
from scripts import restored
from test_transformers import needs_mixin

from peft_lotra.coefficients import registry

ROOT = Path(__file__).parents[1]
PAGES = sorted({ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("examples/**/*.md")})
SLOW = [
    pytest.param("examples/transformers.md", marks=[needs_mixin, pytest.mark.slow]),
    pytest.param("examples/quickstart.ipynb", marks=pytest.mark.slow),
    pytest.param("examples/pykan.md", marks=pytest.mark.slow),  # pykan draws and looks for formulas
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path):
    """The Python code of a page, in order."""
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text())["cells"]
        return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return [code for language, code in FENCE.findall(path.read_text()) if language == "python"]


def shown(path):
    """What a page shows as printed."""
    if path.suffix == ".ipynb":
        outputs = [output for cell in json.loads(path.read_text())["cells"] for output in cell.get("outputs", [])]
        assert {output["output_type"] for output in outputs} == {"stream", "display_data"}  # with a picture
        return ["".join(output["text"]) for output in outputs if output["output_type"] == "stream"]
    return [text for language, text in FENCE.findall(path.read_text()) if not language]


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


def shows(out, table):
    """Whether the lines of a table are in the output, with numbers within a factor of 3: fits end where they end."""

    def split(line):
        return NUMBER.sub("#", line), [float(number.replace(",", "")) for number in NUMBER.findall(line)]

    printed = [split(line) for line in out.splitlines()]
    return all(
        any(
            text == own and all(a / 3 <= b <= 3 * a for a, b in zip(numbers, found, strict=True))
            for own, found in printed
        )
        for text, numbers in map(split, table.splitlines())
    )


@pytest.mark.parametrize("name", ["README.md", "examples/families.md", "examples/adapters.md", *SLOW])
@pytest.mark.filterwarnings("ignore")  # libraries warn, which a reader sees too
def test_the_code_runs(name, tmp_path, capsys):
    path = ROOT / name
    code = blocks(path)
    assert len(code) > 1
    with restored(), patch.dict(registry._REGISTRY):  # guides register layers
        matplotlib.use("Agg")  # there are no windows here
        os.chdir(tmp_path)
        exec(compile("\n".join(code), name, "exec"), {"__name__": "guide"})
    out = capsys.readouterr().out
    for table in shown(path):  # what a page shows as output
        assert table in out or shows(out, table), f"{table}is shown, and printed is\n{out}"


GUIDES = [f"examples/{name}.md" for name in ("families", "adapters", "pykan", "transformers", "several_processes")]


def words(pages, without=""):
    return sum(len(re.sub(without, "", page.read_text()).split()) for page in pages)


def test_pages_are_short():
    """A page that grows has to lose something else: details belong into docstrings."""
    assert words([ROOT / "README.md"], without=FENCE) <= 700
    assert words([ROOT / "CONTRIBUTING.md"]) <= 2000
    assert words([ROOT / name for name in (*GUIDES, "examples/limits.md")]) <= 9000


def test_all_pages_together_are_short():
    assert words(PAGES) <= 18_000


def anchors(text):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(FENCE, "", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]|\]\(.*?\)", "", h).lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = re.sub(FENCE, "", path.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_every_example_is_in_the_index():
    text = (ROOT / "examples" / "README.md").read_text()
    names = {path.name for path in ROOT.glob("examples/*") if path.suffix in (".py", ".md", ".ipynb")} - {"README.md"}
    assert not [name for name in names if f"({name})" not in text]


def test_every_benchmark_is_in_its_index():
    folder = ROOT / "examples" / "benchmarks"
    text = (folder / "README.md").read_text()
    assert not [path.name for path in folder.glob("*.py") if path.name not in text]
