"""Write fluids.csv.gz and fluids_constants.csv, by the package CoolProp (`pip install -e ".[fluids]"`).

    python examples/data/make_fluids.py

The fluids are those of CoolProp that are pure and whose equation of state holds at all points of the table. The spin
isomers of hydrogen and deuterium are left out.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import sys
from dataclasses import astuple, fields
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # modules of the other examples
import fluids_data
from command_line import exit_code, make_output_dir, new_parser
from fluids_data import Constants, coolprop, coolprop_fluid, is_pure

# They have the equations of hydrogen and deuterium, or nearly so: one that is held out would be no new fluid.
SPIN_ISOMERS = {"OrthoHydrogen", "ParaHydrogen", "OrthoDeuterium", "ParaDeuterium"}


def main(argv: list[str] | None = None) -> int:
    parser = new_parser(__doc__ or "")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent)
    args = parser.parse_args(argv)
    try:
        coolprop()
    except ImportError as error:
        parser.error(str(error))
    make_output_dir(parser, args)
    return exit_code(lambda: write(args), "The files are as they were, or in part.")


def write(args: argparse.Namespace) -> None:
    names = sorted(name for name in coolprop().CoolProp.FluidsList() if is_pure(name) and name not in SPIN_ISOMERS)
    points = len(fluids_data.TEMPERATURES) * len(fluids_data.PRESSURES)
    found = [fluid for fluid in map(coolprop_fluid, names) if len(fluid[2]) == points]

    table = [("task", *(f"x:{name}" for name in fluids_data.INPUTS), *(f"y:{name}" for name in fluids_data.OUTPUTS))]
    for name, _, rows in found:
        table += [(name, f"{t:g}", f"{p:g}", *(f"{value:.5f}" for value in outputs)) for t, p, *outputs in rows]
    lines = [("name", *(field.name for field in fields(Constants)))]
    for name, constants, _ in found:
        lines.append((name, *(f"{value:.6g}" if isinstance(value, float) else value for value in astuple(constants))))

    # without a time in it: the same numbers give the same file
    (args.output_dir / fluids_data.TABLE.name).write_bytes(gzip.compress(as_text(table).encode(), mtime=0))
    (args.output_dir / fluids_data.CONSTANTS.name).write_text(as_text(lines), encoding="utf-8")
    print(f"{len(found)} fluids of {len(found[0][2])} points each: {args.output_dir / fluids_data.TABLE.name}")


def as_text(rows: list[tuple[str, ...]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(main())
