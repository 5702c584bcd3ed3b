"""What the comparison was to show, and whether it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from compared_methods import OPTIMIZERS
from experiments import Experiment
from lines import Results
from rows import Case, Row, case_of, table

NEAR_REFERENCE = ("images_resnet", "images_wide", "text_code", "text_code_long")  # where the first method is the aim
TENTH = 0.1
SAME_SECONDS = "LoTRA at ≤ 1/10 against full fine-tuning by Adam, same seconds"
SMALL = "LoTRA at ≤ 1/10 by LM against a small KAN from scratch by LM, same iterations"
FAMILIES = ("elliptic", "parabolic", "hyperbolic", "burgers")


def rows_by(case: Case, methods: tuple[str, ...], optimizers: tuple[str, ...] = OPTIMIZERS) -> list[Row]:
    settings = case.experiment.methods
    return [
        row
        for label, row in case.rows.items()
        if settings[label]["method"] in methods and settings[label].get("optimizer", "adam") in optimizers
    ]


def within_a_tenth(rows: list[Row]) -> list[Row]:
    """Those that train at most a tenth as many numbers as there are coefficients."""
    return [row for row in rows if row.trainable <= TENTH * row.results[0]["coefficients"]]


def near_reference(where: str, case: Case, rows: list[Row]) -> list[str]:
    """How near the best of the rows comes to the reference: by a difference of accuracies, a factor on losses."""
    best = case.best(rows)
    ours, theirs = case.middle(best.finals), case.middle(case.reference.finals)
    if case.task.higher_is_better:
        measured, limit, reached = f"{ours - theirs:+.2f} points", "≥ −1 point", ours >= theirs - 1
    else:
        measured, limit, reached = f"{ours / theirs:.3f} ×", "≤ 1.01 ×", ours <= 1.01 * theirs
    aim = f"near to {case.reference.label}, at a tenth of the parameters"
    return [aim, where, f"{measured} ({best.label})", limit, _said(reached)]


def aims(experiments: list[Experiment], results: Mapping[str, Results]) -> str:
    """What was to be shown, and what has been measured; empty if none of these experiments has an aim."""
    found = _Aims({experiment.name: experiment for experiment in experiments}, results)
    parts = (found.of_pdes, found.of_widths, found.of_reference)
    lines = [line for part in parts for line in part()]
    return table(["aim", "where", "measured, ratio of medians", "limit", "reached"], lines) if lines else ""


class _Aims:
    """The lines of the table, part by part."""

    def __init__(self, by_name: Mapping[str, Experiment], results: Mapping[str, Results]) -> None:
        self.by_name, self.results = by_name, results

    def cases(self, name: str) -> list[Case]:
        experiment = self.by_name.get(name)
        return [case_of(experiment, case, self.results[name]) for case in experiment.cases] if experiment else []

    def of_pdes(self) -> Iterator[list[str]]:
        for family in FAMILIES:
            for case in self.cases(f"pde_{family}")[:1]:
                full, small = case.reference, within_a_tenth(rows_by(case, ("lotra",)))
                yield from _ratio(SAME_SECONDS, family, case, {row.label: row.at(full.seconds) for row in small}, full)
                by_lm = {row.label: row.finals for row in rows_by(case, ("lotra",), ("lm",)) if row in small}
                for row in [row for label, row in case.rows.items() if "width" in case.experiment.methods[label]]:
                    yield from _ratio(SMALL, family, case, by_lm, row)

    def of_widths(self) -> Iterator[list[str]]:
        for case in self.cases("pde_widths"):
            if case.task.width >= 64 and (everything := rows_by(case, ("full",), ("lm",))):
                ours = rows_by(case, ("lotra",), ("lm",))[-1]
                value = case.middle(ours.at(everything[0].seconds)) / case.middle(everything[0].finals)
                aim = "LoTRA by LM against LM on everything, same seconds"
                yield [aim, case.name, f"{value:.2g} × ({ours.label})", "≤ 1 ×", _said(value <= 1)]

    def of_reference(self) -> Iterator[list[str]]:
        for name in NEAR_REFERENCE:
            for case in self.cases(name):
                small = within_a_tenth(rows_by(case, ("lotra",)))
                yield near_reference(f"{name}, {case.name}".removesuffix(", "), case, small)


def _said(reached: bool) -> str:
    return "yes" if reached else "**no**"


def _least(case: Case, ours: dict[str, list[float | None]], other: Row) -> tuple[float, str]:
    return min((case.middle(ours[label]) / case.middle(other.finals), label) for label in ours)


def _ratio(
    aim: str, where: str, case: Case, ours: dict[str, list[float | None]], other: Row, limit: float = 1.0
) -> Iterator[list[str]]:
    """A line for the best of our rows beside another one; none if there are no rows."""
    if ours:
        value, label = _least(case, ours, other)
        yield [aim, where, f"{value:.2f} × ({label})", f"≤ {limit:g} ×", _said(value <= limit)]
