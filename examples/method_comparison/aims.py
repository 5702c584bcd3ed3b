"""What the comparison was to show, and whether it has."""

from __future__ import annotations

from collections.abc import Mapping

from compared_methods import FIRST_ORDER, OPTIMIZERS
from experiments import Experiment
from lines import Results
from rows import Case, Row, case_of, table

NEAR_REFERENCE = {  # methods that shall come near to the first one of an experiment, in every case
    **dict.fromkeys(("images_kan", "images_resnet", "images_wide"), ("lotra",)),
    **dict.fromkeys(("text_code", "text_code_long", "text_reviews"), ("lotra",)),
    "slim_images": ("slim",),
}
TENTH, SLIM = 0.1, "Slim 1/10"
SAME_SECONDS = "LoTRA at ≤ 1/10 against full fine-tuning by Adam, same seconds"
FAMILIES, STEPS_LIMIT = ("elliptic", "parabolic", "hyperbolic"), 1.2  # of LoTRA's error to full fine-tuning's by Adam
WITH_PEFT = tuple(f"pde_{name}" for name in (*FAMILIES, "burgers", "cross", "fastkan"))  # where PEFT's methods are


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
    return [aim, where, f"{measured} ({best.label})", limit, "yes" if reached else "**no**"]


def aims(experiments: list[Experiment], results: Mapping[str, Results]) -> str:
    """What was to be shown, and what has been measured; empty if none of these experiments has an aim."""
    by_name, lines, halved = {experiment.name: experiment for experiment in experiments}, [], []

    def cases(name: str) -> list[Case]:
        experiment = by_name.get(name)
        return [case_of(experiment, case, results[name]) for case in experiment.cases] if experiment else []

    def add(aim: str, where: str, case: Case, ours: dict[str, list[float | None]], other: Row, limit: float) -> None:
        if not ours:
            return
        value, label = min((case.middle(ours[label]) / case.middle(other.finals), label) for label in ours)
        lines.append([aim, where, f"{value:.2f} × ({label})", f"≤ {limit:g} ×", "yes" if value <= limit else "**no**"])
        if aim == SAME_SECONDS:
            halved.append(value <= 0.5)

    for family in FAMILIES:
        for case in cases(f"pde_{family}")[:1]:
            full = case.reference
            small = within_a_tenth(rows_by(case, ("lotra",)))
            add(SAME_SECONDS, family, case, {row.label: row.at(full.seconds) for row in small}, full, 1.0)
            for optimizer in FIRST_ORDER:
                ours = {row.label: row.finals for row in rows_by(case, ("lotra",), (optimizer,)) if row in small}
                aim = f"LoTRA by {FIRST_ORDER[optimizer].split(':')[1]} against full fine-tuning by Adam, same steps"
                add(aim, family, case, ours, full, STEPS_LIMIT)
    if len(halved) == len(FAMILIES):
        reached = "yes" if sum(halved) >= 2 else "**no**"
        lines.append([f"{SAME_SECONDS}: half the error", "PDEs", f"on {sum(halved)}", "on 2", reached])
    for name in WITH_PEFT:
        for case in cases(name)[:1]:
            for optimizer in OPTIMIZERS:
                ours = {row.label: row.finals for row in rows_by(case, ("lotra",), (optimizer,))}
                for row in rows_by(case, ("lora", "lora_parameters", "loha", "lokr"), (optimizer,)):
                    aim = "LoTRA against PEFT's methods, by the same optimizer, same steps"
                    add(aim, f"{name}, {row.label}", case, ours, row, 1.0)
    for case in cases("pde_widths"):
        if case.task.width >= 64 and (everything := rows_by(case, ("full",), ("lm",))):
            (ours,) = rows_by(case, ("lotra",), ("lm",))
            value = case.middle(ours.finals) / case.middle(everything[0].at(ours.seconds))
            aim = "LoTRA by LM against LM on everything, same seconds"
            lines.append([aim, case.name, f"{value:.2g} × ({ours.label})", "≤ 1 ×", "yes" if value <= 1 else "**no**"])
    for name in ("images_kan", "images_resnet"):
        for case in cases(name):
            ours, theirs = (case.best(rows_by(case, ("lotra",), (optimizer,))) for optimizer in ("lm", "adam"))
            value = case.middle(ours.finals) - case.middle(theirs.finals)
            where = f"{name}, {case.name}"
            reached = "yes" if value >= 0 else "**no**"
            lines.append(["LoTRA by LM level with Adam", where, f"{value:+.2f} points ({ours.label})", "≥ 0", reached])
    for case in cases("slim_functions"):
        if case.task.noise:
            ours = {SLIM: case.rows[SLIM].finals}
            add("a Slim KAN against the dense one, noisy samples", case.name, case, ours, case.reference, 1.0)
    for name, methods in NEAR_REFERENCE.items():
        for case in cases(name):
            small = within_a_tenth(rows_by(case, methods))
            lines.append(near_reference(f"{name}, {case.name}".removesuffix(", "), case, small))
    return table(["aim", "where", "measured, ratio of medians", "limit", "reached"], lines) if lines else ""
