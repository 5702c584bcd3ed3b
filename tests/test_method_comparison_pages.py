"""The pages of the method comparison are what report.py writes from the stored lines, and no line is missing."""

import json
import shutil
from statistics import median

import jobs
import pytest
import report
import run
from convection import METHODS as CONVECTION_METHODS
from drawings import COLOURS, FEW_LABELS, OTHER_SIZES, PDE_LABELS
from experiments import load_experiments
from family_methods import METHODS as FAMILY_METHODS
from few_sample_methods import METHODS
from few_sample_tasks import DOMAINS
from found import FAMILY_ENTRIES, Experiments, as_run
from scripts import EXAMPLES, call

SUITE = EXAMPLES / "method_comparison"


def test_pages_are_what_the_report_writes(tmp_path):
    folder = tmp_path / "pages"
    out = call("report", "--folder", folder).out
    tables, _ = report.pages(SUITE / "results")
    for name in tables:
        assert str(folder / name) in out
        assert (folder / name).read_text() == (SUITE / name).read_text(), f"{name}: run report.py"
    pictures = list((folder / "images").iterdir())
    assert sorted(picture.name for picture in pictures) == sorted(p.name for p in (SUITE / "images").iterdir())
    assert all(picture.stat().st_size > 10_000 for picture in pictures)


PARTS = [run.of_module(name, False, SUITE) for name in run.MODULES]
PARTS += [run.of_experiment(experiment, SUITE) for experiment in load_experiments()]


@pytest.mark.parametrize(("name", "jobs_of"), [part[:2] for part in PARTS], ids=[part[0] for part in PARTS])
def test_every_job_has_its_line(name, jobs_of):
    path = SUITE / "results" / f"{name}.jsonl"
    lines, used = jobs.read_lines(path), set()
    for names, _ in jobs_of(path):
        found = [k for k, line in enumerate(lines) if jobs.is_of(names, line)]
        assert len(found) == 1, names
        used |= {*found}
    assert len(used) == len(lines), "a line of no job"
    for line in lines:
        assert line["version"]
        assert all(line["environment"][key] for key in ("torch", "threads", "processor", "commit")), line


def test_the_longest_parts_are_there():
    assert {*run.LONGEST} <= {name for name, *_ in PARTS}


def test_lines_of_families_and_few_samples_have_methods():
    few = jobs.read_lines(SUITE / "results" / "few_samples.jsonl")
    assert {line["method"] for line in few if "samples" in line} == {*METHODS}
    families = jobs.read_lines(SUITE / "results" / "families.jsonl")
    assert {line["method"] for line in families} == {*FAMILY_METHODS}
    convection = jobs.read_lines(SUITE / "results" / "convection.jsonl")
    assert {line["method"] for line in convection} == {*CONVECTION_METHODS}
    assert {line["domain"] for line in few} == {*DOMAINS} >= {*report.DRAWN}
    assert {*METHODS} >= FEW_LABELS.keys()
    assert {entry.colour for entry in FAMILY_ENTRIES.values()} <= {*COLOURS}
    found = map(Experiments(SUITE / "results").of_pde, report.PDES.values())
    labels = {label for of_pde in found for label in of_pde}
    assert labels == {*PDE_LABELS, *OTHER_SIZES}


def test_what_lacks_stops_the_report_before_anything_is_written(tmp_path):
    results = tmp_path / "results"
    shutil.copytree(SUITE / "results", results)
    path = results / "pde_elliptic.jsonl"
    path.write_text(path.read_text().replace('"full, LM"', '"full, renamed"'))
    error = call("report", "--results", results, "--folder", tmp_path / "pages", code=1).err
    assert "pde_elliptic.jsonl has no run of 'full, LM' in 'λ = 1.3'" in error
    assert not (tmp_path / "pages").exists()


def test_ratios():
    one, other = "full, LM", "LoTRA 1/10, LM"
    lines = call("report", "--ratio", one, other).out.splitlines()
    of_pde = Experiments(SUITE / "results").of_pde(report.PDES["wave, c 2 → 2.5"])
    (a, s), (b, t) = (
        [median(values) for values in zip(*((r.metric, r.seconds) for r in of_pde[label]), strict=True)]
        for label in (one, other)
    )
    assert f"wave, c 2 → 2.5: {report.number(a / b)} ×, in {report.number(s / t)} × the seconds" in lines
    assert len(lines) == 6
    as_it_is = call("report", "--ratio", "joint, as it is", "family, as it is").out.splitlines()
    assert all(line.endswith(" ×") for line in as_it_is)  # which takes no seconds
    error = call("report", "--ratio", one, "full, ML", code=1).err
    assert "--ratio: no case has both 'full, LM' and 'full, ML'; there are [" in error


def test_markers():
    text = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n"
    assert report.updated(text, "x", "new") == "a\n<!-- begin x -->\nnew\n<!-- end x -->\nb\n"
    with pytest.raises(ValueError, match="should have one <!-- begin y --> and one <!-- end y -->"):
        report.updated(text, "y", "new")


def test_medians_and_ranges():
    assert report.spread([3e-4, 1e-3, 0.2]) == "1.0e-3 (3.0e-4–0.2)"
    assert report.spread([float("inf"), 0.1, float("inf")]) == "diverged (0.1–diverged)"
    assert [report.number(value) for value in (0.0123, 4.56, 145.2)] == ["0.012", "4.6", "145"]
    line = {"trainable": 5, "zero_shot": 1.0, "marks": [[0, 0.0, 1.0], [3, 2.0, None]]}
    run = as_run(line)
    assert (run.trained, run.metric, run.seconds) == (5, float("inf"), 2.0)


def test_core_of_a_family_at_the_target(tmp_path):
    marks = [[0, 0.0, 0.5], [5, 1.0, 0.1]]
    tasks = [{"parameters": [at], "inside": True, "marks": marks} for at in (1.3, 1.4)]
    line = {"case": "elliptic", "method": "family", "numbers": {"online": 7}, "tasks": tasks}
    (tmp_path / "families.jsonl").write_text(json.dumps(line) + "\n")
    (run,) = Experiments(tmp_path).cores("elliptic", 1.3)
    assert (run.trained, run.before, run.metric, run.seconds) == (7, 0.5, 0.1, 1.0)
