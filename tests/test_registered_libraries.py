"""The table of examples/kan_libraries.md, and the registered layers of libraries that PyPI has, as they are.

Only the libraries that are installed are tried; `[test-libraries]` and tests/libraries.txt have them all.
"""

import importlib.util
import re
import sys
from importlib.metadata import distributions
from pathlib import Path

import kan_libraries
import pytest
import torch
from kan_libraries import ENTRIES, key, quiet, read, row, table
from scripts import call

from peft_lotra.coefficients import registered_kan_layers, registry
from peft_lotra.testing import KANLayerTests

ROOT = Path(__file__).parents[1]
PAGE = read((ROOT / "examples" / "kan_libraries.md").read_text())
ELSEWHERE = {"pykan", "convkan", "inkan"}  # go through the harness in other tests
INSTALLED = {str(distribution.metadata["Name"]).lower().replace("_", "-") for distribution in distributions()}
TRIED = [entry for entry in ENTRIES if "(git)" in entry.library or entry.library in INSTALLED]
REGISTERED = [
    entry
    for entry in TRIED
    if entry.name in registered_kan_layers()
    and entry.library not in ELSEWHERE
    and "does not run" not in PAGE[entry.library, entry.title][3]
]


def name_of(entry):
    return f"{entry.library} {entry.title}".replace("`", "")


@pytest.mark.parametrize("entry", TRIED, ids=name_of)
@pytest.mark.filterwarnings("ignore")
def test_the_page_says_what_the_command_finds(entry):
    (cells,), left = table([entry], PAGE)
    if left:
        pytest.skip(left[0])
    if "(git)" not in entry.library and entry.version() != version_of(PAGE[key(cells)][0]):
        pytest.skip(f"{cells[0]} is installed, and the page is of {PAGE[key(cells)][0]}")
    assert cells[:4] == PAGE[key(cells)][:4]
    assert "NOT" not in cells[3]


def version_of(cell):
    return cell.rpartition(" ")[2]


def test_every_row_is_of_an_entry_and_of_a_pinned_version():
    assert list(PAGE) == [(entry.library, entry.title) for entry in ENTRIES]
    text = (ROOT / "tests" / "libraries.txt").read_text() + (ROOT / "pyproject.toml").read_text()
    pins = {name.lower().replace("_", "-"): version for name, version in re.findall(r"([\w-]+)==([\w.]+)", text)}
    for (library, _), cells in PAGE.items():
        if "(git)" not in library:
            assert pins[library.lower()] == version_of(cells[0])


def test_every_registered_layer_of_a_library_is_tried(monkeypatch):
    ours = {"ChebyKANLayer", "fastkan", "efficient_kan"}  # have no package on PyPI
    tried = {entry.name for entry in ENTRIES}
    spec = importlib.util.spec_from_file_location("peft_lotra.coefficients.fresh", registry.__file__)
    fresh = importlib.util.module_from_spec(spec)  # the table of now has layers that tests have registered
    monkeypatch.setitem(sys.modules, spec.name, fresh)
    spec.loader.exec_module(fresh)
    names = fresh.registered_kan_layers()
    assert "kan.KANLayer.KANLayer" in names
    assert not [name for name in names if name.partition(".")[0] not in ours and name not in tried]


@pytest.mark.parametrize(
    "entry",
    [pytest.param(entry, id=name_of(entry)) for entry in REGISTERED]
    or [pytest.param(None, marks=pytest.mark.skip(reason="no library with a registered layer is installed"))],
)
@pytest.mark.filterwarnings("ignore")
class TestRegistered(KANLayerTests):
    @pytest.fixture(autouse=True)
    def _entry(self, entry):
        self.entry = entry
        self.ranks = (1, 1, 2)
        try:
            with quiet():
                layer, x = entry.build().double(), entry.make_sample()
                layer(x.to(torch.complex128 if x.is_complex() else torch.float64))
        except RuntimeError as error:  # then it has its row of the table
            if "expected scalar type" not in str(error):
                raise
            pytest.skip(f"the layer computes in float32 only: {error}")

    def make_layer(self):
        with quiet():
            return self.entry.build()

    def make_sample(self):
        return self.entry.make_sample()


def test_the_command_leaves_a_page_that_is_right(tmp_path):
    page = tmp_path / "page.md"
    page.write_text((ROOT / "examples" / "kan_libraries.md").read_text())
    done = call("kan_libraries", "--page", page, "--only", "fast-kan (git)")
    assert "FastKANLayer" in done.out
    assert page.read_text() == (ROOT / "examples" / "kan_libraries.md").read_text()


def test_a_row_of_a_layer_that_is_wrong_says_so(monkeypatch):
    """An adapter that has no effect, and a merge that changes the output."""
    from peft_lotra.model import LoTRAModel

    entry = next(entry for entry in ENTRIES if entry.library == "fast-kan (git)")
    assert row(entry)[3] == "registered"
    monkeypatch.setattr(LoTRAModel, "merge_and_unload", lambda model: lambda x: 2 * model(x))
    assert row(entry)[3] == f"registered{kan_libraries.WRONG}merging changes the output"
    fresh = kan_libraries.LoTRAConfig
    monkeypatch.setattr(kan_libraries, "LoTRAConfig", lambda **kwargs: fresh(**kwargs | {"init_weights": True}))
    assert row(entry)[3].endswith("the adapter has no effect")
