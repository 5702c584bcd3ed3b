"""The main job in a short form, and what it leaves. Every script of examples/ can be called, and started."""

import inspect
import json
import resource
import runpy
import sys
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path

import pytest
from command_line import exit_code
from launching import fork
from scripts import EXAMPLES, call

SCRIPTS = sorted(path for path in EXAMPLES.rglob("*.py") if '__name__ == "__main__"' in path.read_text())
SHORT = ("--base-steps", 3, "--steps", 3)


def check_results(folder):
    assert list(folder.rglob("adapter_model.safetensors"))
    assert [path.stat().st_size > 10_000 for path in folder.rglob("*.png")] == [True]
    (table,) = (path for path in folder.rglob("*.json") if path.name != "adapter_config.json")
    rows = json.loads(table.read_text())
    assert len(json.dumps(rows)) > 100


@pytest.mark.parametrize(
    "arguments",
    [
        ("--pde", "hyperbolic", "--r", 2, 4, 4),
        pytest.param(("--pde", "parabolic", "--r", 4, "--kan", "pykan"), marks=pytest.mark.slow),
    ],
)
def test_pde_transfer(arguments, tmp_path):
    call("pde_transfer", *arguments, *SHORT, "--output-dir", tmp_path)
    check_results(tmp_path)


def test_pde_transfer_trains_the_base_once(tmp_path):
    arguments = ("--pde", "elliptic", *SHORT, "--output-dir", tmp_path)
    call("pde_transfer", *arguments)
    check_results(tmp_path)
    (base,) = tmp_path.rglob("*.pt")
    written = base.stat().st_mtime_ns
    assert "trained by an earlier run" in call("pde_transfer", *arguments).out
    assert base.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pde", "parabola"), "invalid choice: 'parabola'"),
        (("--r", 0), "positive integer"),
        (("--r", 1, 2), "one or three"),
        (("--compression-ratio", 2), "(0, 1]"),
        (("--steps", 0), "--steps"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    assert message in call("pde_transfer", *arguments, "--output-dir", tmp_path, code=2).err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(  # of what torch writes first, and of a later file
    ("script", "file_size"), [("pde_transfer", 3000), ("pde_transfer", 40_000), ("accelerate_pde", 3000)]
)
def test_a_limit_of_file_sizes_ends_in_one_line(script, file_size, tmp_path):
    arguments = ("--base-steps", 1, "--steps", 1, "--output-dir", tmp_path, *["--cpu"] * (script == "accelerate_pde"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, before[1]))
    try:
        error = call(script, *arguments, code=1).err
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "Traceback" not in error
    assert "Cannot write: " in error.splitlines()[-1]
    if script == "pde_transfer":
        call(script, *arguments)


def test_a_full_disk_ends_in_one_line(capsys):
    """Whatever else is wrong stays an error of its own."""

    def hidden():
        try:
            Path("/dev/full").write_text("x")
        except OSError:
            raise RuntimeError("the writer has failed") from None

    assert exit_code(lambda: Path("/dev/full").write_text("x"), "The base is kept.") == 1
    assert capsys.readouterr().err == "\nCannot write: No space left on device. The base is kept.\n"
    assert exit_code(hidden, "") == 1
    with pytest.raises(FileNotFoundError):
        exit_code(lambda: Path("/none/none").write_text("x"), "")
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 / 0, "")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_its_function_main(path):
    """So that tests may call it in their own process."""
    assert path.read_text().endswith('\n\nif __name__ == "__main__":\n    sys.exit(main())\n')
    assert list(inspect.signature(import_module(path.stem).main).parameters) == ["argv"]


def shows_help(path):
    """As `python path --help`: of the examples, a script finds what is in its own folder and what it adds itself."""
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", None)).startswith(str(EXAMPLES)):
            del sys.modules[name]
    ours = (str(EXAMPLES), str(Path(__file__).parent))
    sys.path[:] = [str(path.parent), *(folder for folder in sys.path if not folder.startswith(ours))]
    sys.argv = [str(path), "--help"]
    out = StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    return end.value.code, out.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_starts_by_itself(path):
    ((code, text),) = fork(shows_help, path, num_processes=1)
    assert code == 0
    assert "--help" in text
