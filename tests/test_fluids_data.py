"""examples/data/: what is in the table of fluids, by physics; tables of one's own; fluids of CoolProp."""

import gzip
import importlib.metadata
import importlib.util
import re
import sys

import fluids_data
import pytest
import torch
from conftest import assert_equal
from fluids_data import CONSTANTS, TABLE, from_coolprop, from_csv, load
from scripts import call

needs_coolprop = pytest.mark.skipif(
    importlib.util.find_spec("CoolProp") is None, reason="the fluids are those of CoolProp, which is not installed"
)
KINDS = {"noble gas", "quantum fluid", "hydrocarbon", "refrigerant", "other"}


@pytest.fixture(scope="module")
def fluids():
    return load()


def on_grid(fluids, name):
    """T/T_c, shape (11, 1), p/p_c, shape (39,), and Z, h_r/(R T_c), c_r/R, shape (11, 39) each."""
    x, y = (values.view(11, 39, -1) for values in fluids.unscaled(fluids.x[name], fluids.y[name]))
    return x[:, :1, 0], x[0, :, 1], y[..., 0], y[..., 1], y[..., 2].expm1()


def simpson(values, step):
    """∫ over the last axis, which has an odd number of equidistant points."""
    return step / 3 * (values[..., :-2:2] + 4 * values[..., 1::2] + values[..., 2::2]).sum(-1)


def test_the_table(fluids):
    assert TABLE.stat().st_size + CONSTANTS.stat().st_size <= 400_000
    assert len(fluids.names) == 61
    assert list(fluids.constants) == list(fluids.names)
    assert {constants.kind for constants in fluids.constants.values()} == KINDS
    assert (fluids.inputs, fluids.outputs) == (fluids_data.INPUTS, fluids_data.OUTPUTS)
    grid = torch.cartesian_prod(torch.tensor(fluids_data.TEMPERATURES), torch.tensor(fluids_data.PRESSURES))
    for name in fluids.names:
        assert fluids.y[name].shape == (429, 3)
        assert fluids.y[name].isfinite().all()
        x, y = fluids.unscaled(fluids.x[name], fluids.y[name])
        assert_equal(x, grid)
        assert 0 < y[:, 0].min() < y[:, 0].max() < 1, "all are denser than the ideal gas"
        assert_equal(torch.cat(fluids.scaled(x, y), 1), torch.cat([fluids.x[name], fluids.y[name]], 1))
    together = torch.cat(list(fluids.y.values()))
    assert together.mean(0).abs().max() < 1e-10
    assert_equal(together.std(0, correction=0), torch.ones(3))


def test_heat_capacity_is_the_derivative_of_enthalpy(fluids):
    """h(T₂) − h(T₁) = ∫ c dT at constant p. Simpson's rule is good where p is far below that of the peak."""
    for name in fluids.names:
        _, p, _, h, c = on_grid(fluids, name)
        difference = (h[-1] - h[0] - simpson(c.T, 0.02))[p < 0.75]
        assert difference.abs().max() < 0.01 * (h[-1] - h[0])[p < 0.75].abs().max(), name


def test_enthalpy_follows_from_compressibility(fluids):
    """(∂h/∂p)_T = v − T (∂v/∂T)_p, that is ∂(h_r/RT_c)/∂(p/p_c) = −(T/T_c)² / (p/p_c) · ∂Z/∂(T/T_c)."""
    for name in fluids.names:
        t, p, z, h, _ = on_grid(fluids, name)
        slope = -(t[1:-1] ** 2) / p * (z[2:] - z[:-2]) / 0.04
        difference = h[1:-1, -1] - h[1:-1, 0] - simpson(slope, 0.1)
        assert difference.abs().max() < 0.01 * (h[:, -1] - h[:, 0]).abs().max(), name


def virial(t, p, omega):
    """Z = 1 + B p/(R T) with Pitzer's correlation of B by the acentric factor, for molecules that are not polar."""
    return 1 + (0.083 - 0.422 / t**1.6 + omega * (0.139 - 0.172 / t**4.2)) * p / t


def test_thin_gases_follow_the_virial_equation(fluids):
    for name in ("Argon", "Krypton", "Xenon", "Methane", "Nitrogen", "Oxygen", "Ethane", "n-Propane", "n-Pentane"):
        z = on_grid(fluids, name)[2][-1, 0].item()
        # the third virial coefficient and the errors of the correlation are some per cent of 1 − Z
        assert abs(z - virial(1.25, 0.2, fluids.constants[name].acentric_factor)) < 0.1 * (1 - z), name


def test_corresponding_states(fluids):
    """Noble gases, apart from the light ones, nearly coincide; others do not."""

    def distance(a, b):
        return (fluids.y[a] - fluids.y[b]).square().mean().sqrt().item()

    for other in ("Krypton", "Xenon"):
        assert 0 < distance("Argon", other) < 0.05
    assert distance("Argon", "Xenon") < distance("Argon", "Neon") < distance("Argon", "Helium")
    assert min(distance("Argon", other) for other in ("Water", "Ethanol", "Helium", "n-Octane")) > 0.25


TABLE_OF_TWO = """task,x:T,y:v,x:p,y: w
b,1,2,30,4

a,2,3,10,-1
b,3,7,20,0.5
"""


@pytest.mark.parametrize("form", ["plain", "marked as UTF-8", "gzipped"])
def test_own_table(form, tmp_path):
    path = tmp_path / ("own.csv.gz" if form == "gzipped" else "own.csv")
    content = TABLE_OF_TWO.encode("utf-8-sig" if form == "marked as UTF-8" else "utf-8")
    path.write_bytes(gzip.compress(content) if form == "gzipped" else content)
    tasks = from_csv(path)
    assert (tasks.names, tasks.inputs, tasks.outputs) == (("b", "a"), ("T", "p"), ("v", "w"))
    assert_equal(tasks.x["b"], torch.tensor([[-1.0, 1.0], [1.0, 0.0]]))
    assert_equal(tasks.x["a"], torch.tensor([[0.0, -1.0]]))
    assert_equal(tasks.mean, torch.tensor([4.0, 3.5 / 3]))
    x, y = tasks.unscaled(tasks.x["b"], tasks.y["b"])
    assert_equal(x, torch.tensor([[1.0, 30.0], [3.0, 20.0]]))
    assert_equal(y, torch.tensor([[2.0, 4.0], [7.0, 0.5]]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the first column should be 'task', separated from the others by commas, got ''"),
        ("task;x:T;y:v\na;1;2\n", "line 1: the first column should be 'task', .* got 'task;x:T;y:v'"),
        ("task,T,y:v\na,1,2\n", "line 1, column 'T': a name should begin with 'x:'"),
        ("task,x:T,x:T,y:v\na,1,2,3\n", "line 1, column 'x:T': .* be there once"),
        ("task,x:T\na,1\n", "line 1: there should be an output, a column whose name begins with 'y:'"),
        ("task,y:v\na,1\n", "line 1: there should be an input, a column whose name begins with 'x:'"),
        ("task,x:T,y:v\n", "there should be samples below line 1"),
        ("task,x:T,y:v\na,1,2\nb,1\n", "line 3: there should be 3 columns as in line 1, got 2"),
        ("task,x:T,y:v\na,1,2\n ,1,3\n", "line 3, column 'task': should be a name, got ' '"),
        ("task,x:T,y:v\na,1,2\n\nb,1,n/a\n", "line 4, column 'y:v': should be a finite number, got 'n/a'"),
        ("task,x:T,y:v\na,inf,2\n", "line 2, column 'x:T': should be a finite number, got 'inf'"),
        ("task,x:T,y:v\na,,2\n", "line 2, column 'x:T': should be a finite number, got ''"),
        ("task,x:T,y:v\na,1,2\nb,1,3\n", "column 'x:T': all values are 1. Leave the column out"),
        ("task,x:T,y:v\na,1,2\nb,2,2\n", "column 'y:v': all values are 2. Leave the column out"),
        ("task,x:T,y:v\nW\u00e4rme,1,2\n", "should be a table in UTF-8"),
    ],
)
def test_bad_tables(text, message, tmp_path):
    path = tmp_path / "own.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + message):
        from_csv(path)


def test_a_table_that_is_not_gzipped(tmp_path):
    path = tmp_path / "own.csv.gz"
    path.write_text(TABLE_OF_TWO)
    with pytest.raises(ValueError, match="own.csv.gz should be a table in UTF-8, gzipped if its name ends in .gz"):
        from_csv(path)


def test_without_coolprop(monkeypatch):
    monkeypatch.setitem(sys.modules, "CoolProp", None)
    monkeypatch.setitem(sys.modules, "CoolProp.CoolProp", None)
    with pytest.raises(ImportError, match=r'pip install "CoolProp>=6"'):
        from_coolprop("Argon")
    assert 'pip install "CoolProp>=6"' in call("make_fluids", code=2).err


@needs_coolprop
def test_a_fluid_of_coolprop(fluids):
    computed = from_coolprop("nitrogen")
    assert (computed.names, computed.constants["Nitrogen"].kind) == (("Nitrogen",), "other")
    assert_equal(computed.x["Nitrogen"], fluids.x["Nitrogen"])
    rounded = (computed.y["Nitrogen"] - fluids.y["Nitrogen"]).abs() * fluids.std
    assert 0 < rounded.max() < 1e-4

    new = from_coolprop("R1234yf")  # its equation ends at 410 K = 1.11 T_c
    x, _ = new.unscaled(new.x["R1234yf"], new.y["R1234yf"])
    assert 1.05 <= x[:, 0].min() < x[:, 0].max() < 1.12
    assert new.y["R1234yf"].isfinite().all()


@needs_coolprop
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Phlogiston", "`name` should be a pure fluid of CoolProp, got 'Phlogiston'"),
        ("Air", "`name` should be a pure fluid of CoolProp, got 'Air'"),
        ("MD4M", "`name`: the equation of 'MD4M' holds at no point with T ≥ 1.05 T_c"),
    ],
)
def test_fluids_that_there_are_not(name, message):
    with pytest.raises(ValueError, match=message):
        from_coolprop(name)


@needs_coolprop
def test_hot_gases_follow_the_virial_equation(monkeypatch):
    """At T = 2 T_c and p = p_c, where the third virial coefficient adds less than 0.01 to Z."""
    monkeypatch.setattr(fluids_data, "TEMPERATURES", (2.0,))
    monkeypatch.setattr(fluids_data, "PRESSURES", (1.0,))
    for name in ("Argon", "Nitrogen"):
        _, constants, ((_, _, z, _, _),) = fluids_data.coolprop_fluid(name)
        assert z < 0.99
        assert abs(z - virial(2.0, 1.0, constants.acentric_factor)) < 0.01


@pytest.mark.slow
@needs_coolprop
def test_the_command_makes_the_same_table(tmp_path):
    if importlib.metadata.version("coolprop") not in (TABLE.parent / "README.md").read_text():
        pytest.skip("the table is of another version of CoolProp")
    assert "61 fluids of 429 points" in call("make_fluids", "--output-dir", tmp_path).out
    assert (tmp_path / CONSTANTS.name).read_text() == CONSTANTS.read_text()
    made, kept = (gzip.decompress((path / TABLE.name).read_bytes()) for path in (tmp_path, TABLE.parent))
    made, kept = (re.split(rb"[,\n]", text) for text in (made, kept))
    assert len(made) == len(kept)
    # another processor may round the last digit the other way
    assert all(a == b or abs(float(a) - float(b)) < 2e-5 for a, b in zip(made, kept, strict=True))
