"""The main job runs, in a short form, and leaves what it promises."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "pde_transfer.py"
sys.path.append(str(SCRIPT.parent))
from command_line import exit_code  # noqa: E402


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=240
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("--pde", "elliptic"),
        ("--pde", "parabolic", "--r", 4),
        ("--pde", "hyperbolic", "--r", 2, 4, 4),
        ("--kan", "pykan"),
    ],
)
def test_pde_transfer(arguments, tmp_path):
    short = ("--base-steps", 3, "--steps", 3, "--output-dir", tmp_path)
    first = run(*arguments, *short)
    assert first.returncode == 0, first.stderr
    assert list(tmp_path.rglob("adapter_model.safetensors"))
    assert [path.stat().st_size > 10_000 for path in tmp_path.rglob("*.png")] == [True]
    (table,) = (path for path in tmp_path.rglob("*.json") if path.name != "adapter_config.json")
    rows = json.loads(table.read_text())
    assert len(json.dumps(rows)) > 100
    bases = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    assert len(bases) == 1
    second = run(*arguments, *short)
    assert second.returncode == 0, second.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")} == bases, "the base was trained again"


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
    done = run(*arguments, "--output-dir", tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def limited(script, file_size, *arguments):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    command = [
        sys.executable,
        str(SCRIPT.with_name(script)),
        "--base-steps",
        "1",
        "--steps",
        "1",
        *map(str, arguments),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, preexec_fn=limit)


@pytest.mark.parametrize("file_size", [3000, 40_000])  # of what torch writes first, and of a later file
@pytest.mark.parametrize("script", ["pde_transfer.py", "accelerate_pde.py"])
def test_a_limit_of_file_sizes_ends_in_one_line(script, file_size, tmp_path):
    done = limited(script, file_size, "--output-dir", tmp_path, *["--cpu"] * (script == "accelerate_pde.py"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Cannot write: " in done.stderr.splitlines()[-1]
    after = run("--base-steps", 1, "--steps", 1, "--output-dir", tmp_path) if script == SCRIPT.name else None
    assert after is None or after.returncode == 0, after.stderr


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
