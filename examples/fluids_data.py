"""Tables of tasks: properties of real fluids over reduced temperature and pressure, or data of your own.

`load` reads `data/fluids.csv.gz`, `from_csv` any table of the same form, and `from_coolprop` computes a fluid that the
table may not have. `data/make_fluids.py` writes the table, and `data/README.md` says what is in it.
"""

from __future__ import annotations

import csv
import gzip
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"
TABLE, CONSTANTS = DATA / "fluids.csv.gz", DATA / "fluids_constants.csv"

INPUTS = ("T/T_c", "p/p_c")
# Compressibility factor, residual enthalpy, residual isobaric heat capacity. Residual: minus that of the ideal gas at
# the same T. The heat capacity has a peak of 20 to 55 R where p is just above p_c, hence the logarithm. It may be
# negative, as that of helium at high p, but is above −R.
OUTPUTS = ("Z", "h_r/(R T_c)", "ln(1 + c_r/R)")
# There is one phase above T_c. At the critical point the heat capacity is infinite, hence the distance of 5 %.
TEMPERATURES = tuple(round(1.05 + 0.02 * step, 2) for step in range(11))
PRESSURES = tuple(round(0.2 + 0.1 * step, 1) for step in range(39))


@dataclass(frozen=True)
class Constants:
    """What is known of a fluid without the table.

    Attributes:
        kind: "noble gas", "quantum fluid", "hydrocarbon", "refrigerant" or "other".
        acentric_factor: −1 − log₁₀ of the reduced vapour pressure at T = 0.7 T_c.
        critical_temperature: T_c in K.
        critical_pressure: p_c in MPa.
        molar_mass: in g/mol.
        equation: the reference equation of state, by CoolProp's key of its publication.
    """

    kind: str
    acentric_factor: float
    critical_temperature: float
    critical_pressure: float
    molar_mass: float
    equation: str


@dataclass(frozen=True)
class Tasks:
    """Samples of y = f_task(x), scaled for a network. All tasks have the same scales.

    Attributes:
        inputs, outputs: the names of the columns.
        x: inputs of each task, scaled to [−1, 1]. shapes: (points, inputs)
        y: outputs of each task, with mean 0 and standard deviation 1 over all tasks. shapes: (points, outputs)
        low, high: the range of the inputs before they were scaled. shape: (inputs,)
        mean, std: of the outputs before they were scaled. shape: (outputs,)
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    x: dict[str, Tensor]
    y: dict[str, Tensor]
    low: Tensor
    high: Tensor
    mean: Tensor
    std: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.x)

    def scaled(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """From the units of the table to those of the network."""
        return 2 * (x - self.low) / (self.high - self.low) - 1, (y - self.mean) / self.std

    def unscaled(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """From the units of the network to those of the table."""
        return self.low + (x + 1) / 2 * (self.high - self.low), self.mean + self.std * y


@dataclass(frozen=True)
class Fluids(Tasks):
    """Tasks that are fluids, with their constants."""

    constants: dict[str, Constants]


def load() -> Fluids:
    """The fluids of `data/fluids.csv.gz`: 61 of 429 points each, with 2 inputs and 3 outputs."""
    with CONSTANTS.open(encoding="utf-8", newline="") as file:
        constants = {
            name: Constants(kind, *map(float, numbers), equation)
            for name, kind, *numbers, equation in list(csv.reader(file))[1:]
        }
    tasks = from_csv(TABLE)
    return Fluids(**{field.name: getattr(tasks, field.name) for field in fields(tasks)}, constants=constants)


def from_csv(path: str | Path) -> Tasks:
    """The tasks of a table of comma-separated values, in UTF-8; the name may end in .gz.

        task,x:temperature,x:pressure,y:density
        water,300,1,996.6
        water,350,1,973.7
        ethanol,300,1,783.5

    A line is one sample. The first column names the task, "x:" stands before the names of inputs and "y:" before those
    of outputs, at least one of each. Tasks may have different numbers of samples, in any order.

    Raises:
        ValueError: naming file, line and column. FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            header, samples = _read(path, file)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, csv.Error) as error:
        raise ValueError(f"{path} should be a table in UTF-8, gzipped if its name ends in .gz: {error}.") from error

    values = {task: torch.tensor(rows, dtype=torch.float64) for task, rows in samples.items()}
    together = torch.cat(list(values.values()))
    low, high, mean, std = together.amin(0), together.amax(0), together.mean(0), together.std(0, correction=0)
    for name, smallest, largest in zip(header[1:], low.tolist(), high.tolist(), strict=True):
        if smallest == largest:
            raise ValueError(f"{path}, column {name!r}: all values are {largest:g}. Leave the column out.")

    dtype = torch.get_default_dtype()
    inputs, outputs = ([name.startswith(mark) for name in header[1:]] for mark in ("x:", "y:"))
    scales = [scale.to(dtype) for scale in (low[inputs], high[inputs], mean[outputs], std[outputs])]
    names = [tuple(name[2:].strip() for name in header if name.startswith(mark)) for mark in ("x:", "y:")]
    tasks = Tasks(*names, {}, {}, *scales)
    for task, rows in values.items():
        tasks.x[task], tasks.y[task] = tasks.scaled(rows[:, inputs].to(dtype), rows[:, outputs].to(dtype))
    return tasks


def _read(path: Path, file: Iterable[str]) -> tuple[list[str], dict[str, list[list[float]]]]:
    """The header, and for each task its samples, in the order of the columns."""
    reader = csv.reader(file)
    header = [name.strip() for name in next(reader, [])]
    if header[:1] != ["task"]:
        raise ValueError(
            f"{path}, line 1: the first column should be 'task', separated from the others by commas, "
            f"got {','.join(header)!r}."
        )
    for name in header[1:]:
        if name[:2] not in ("x:", "y:") or header.count(name) > 1:
            raise ValueError(
                f"{path}, line 1, column {name!r}: a name should begin with 'x:' for an input or 'y:' for an output, "
                "and be there once."
            )
    for mark, kind in (("x:", "an input"), ("y:", "an output")):
        if not any(name.startswith(mark) for name in header):
            raise ValueError(f"{path}, line 1: there should be {kind}, a column whose name begins with {mark!r}.")

    samples: dict[str, list[list[float]]] = {}
    for row in reader:
        if not row:
            continue
        where = f"{path}, line {reader.line_num}"
        if len(row) != len(header):
            raise ValueError(f"{where}: there should be {len(header)} columns as in line 1, got {len(row)}.")
        if not row[0].strip():
            raise ValueError(f"{where}, column 'task': should be a name, got {row[0]!r}.")
        numbers = [_number(cell) for cell in row[1:]]
        for name, cell, number in zip(header[1:], row[1:], numbers, strict=True):
            if not math.isfinite(number):
                raise ValueError(f"{where}, column {name!r}: should be a finite number, got {cell!r}.")
        samples.setdefault(row[0].strip(), []).append(numbers)
    if not samples:
        raise ValueError(f"{path}: there should be samples below line 1, one a line.")
    return header, samples


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def from_coolprop(name: str) -> Fluids:
    """A fluid of the package CoolProp at the points of the table, in the scales of the table.

    If the equation of the fluid does not hold over the whole range, the points are those at which it holds.

    Args:
        name: CoolProp's name or another that it knows, such as "R1234yf" or "CO2". The result has CoolProp's name,
            "CarbonDioxide".

    Raises:
        ImportError: if CoolProp is not installed.
        ValueError: if there is no such pure fluid, or its equation holds at none of the points.
    """
    own_name, constants, rows = coolprop_fluid(name)
    if not rows:
        raise ValueError(
            f"`name`: the equation of {name!r} holds at no point with T ≥ {TEMPERATURES[0]} T_c and "
            f"p ≥ {PRESSURES[0]} p_c. Choose another fluid."
        )
    fluids = load()
    values = torch.tensor(rows)
    x, y = fluids.scaled(values[:, : len(INPUTS)], values[:, len(INPUTS) :])
    return replace(fluids, x={own_name: x}, y={own_name: y}, constants={own_name: constants})


def coolprop_fluid(name: str) -> tuple[str, Constants, list[tuple[float, ...]]]:
    """CoolProp's name of a pure fluid, its constants, and (inputs, outputs) at the points where its equation holds."""
    library = coolprop()
    if not is_pure(name):
        raise ValueError(
            f"`name` should be a pure fluid of CoolProp, got {name!r}. Their names: CoolProp.CoolProp.FluidsList()."
        )
    state = library.AbstractState("HEOS", name)
    own_name, gas_constant = state.name(), state.gas_constant()
    critical_temperature, critical_pressure = state.T_critical(), state.p_critical()
    constants = Constants(
        _kind(own_name, library.CoolProp.get_fluid_param_string(name, "formula")),
        state.acentric_factor(),
        critical_temperature,
        critical_pressure / 1e6,
        state.molar_mass() * 1e3,
        library.CoolProp.get_BibTeXKey(own_name, "EOS"),
    )
    rows = []
    for reduced_temperature in TEMPERATURES:
        for reduced_pressure in PRESSURES:
            temperature, pressure = reduced_temperature * critical_temperature, reduced_pressure * critical_pressure
            if temperature <= state.Tmax() and pressure <= state.pmax():
                state.update(library.PT_INPUTS, pressure, temperature)
                compressibility = pressure / (state.rhomolar() * gas_constant * temperature)
                enthalpy = state.hmolar_residual() / (gas_constant * critical_temperature)
                heat_capacity = math.log1p((state.cpmolar() - state.cp0molar()) / gas_constant)
                rows.append((reduced_temperature, reduced_pressure, compressibility, enthalpy, heat_capacity))
    return own_name, constants, rows


def coolprop() -> ModuleType:
    """The package CoolProp."""
    try:
        import CoolProp.CoolProp
    except ImportError as error:
        raise ImportError('Fluids beyond the table need the package CoolProp: pip install "CoolProp>=6".') from error
    return CoolProp


def is_pure(name: str) -> bool:
    """Whether CoolProp has a fluid of this name that is one substance. Air, for instance, has an equation as if."""
    try:
        return coolprop().CoolProp.get_fluid_param_string(name, "pure") == "true"
    except (ValueError, RuntimeError):  # the latter before CoolProp 8
        return False


def _kind(name: str, formula: str) -> str:
    """Which group of `Constants.kind` a fluid is in. Refrigerants are those that are known by their R number alone."""
    if name in ("Neon", "Argon", "Krypton", "Xenon"):
        return "noble gas"
    if name == "Helium" or name.endswith(("Hydrogen", "Deuterium")):
        return "quantum fluid"
    if re.match("RC?[0-9]", name):
        return "refrigerant"
    return "hydrocarbon" if set(re.findall("[A-Z][a-z]?", formula)) == {"C", "H"} else "other"
