"""The commands of pages: with options they run, in a short form, and without they have a test of their own."""

import re
import shlex
from pathlib import Path

import accelerate_pde
import pytest
from accelerate.commands.launch import launch_command_parser
from scripts import call, restored
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("examples/*.md"), *ROOT.glob("examples/*/README.md")]
PAGES = [page for page in PAGES if page.name != "results.md" and page.parent.name != "method_comparison"]
SHORT = {
    "pde_family": ("--iterations", 1, "--parameters", 1, "--compared", 1, "--base-steps", 20),
    "serve": ("--requests", 30, "--adapters", 6, "--held", 3),
    "step_cost": ("--widths", 16, "--batches", 8, "--threads", 1, "--seconds", 0),
}


def shown(beginning):
    """The commands of the pages that begin so, on one line each: in blocks of bash, and in the text."""
    found = set()
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        commands = [command for block in blocks for line in block.splitlines() for command in line.split("&&")]
        commands += re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
        found |= {" ".join(command.partition("  #")[0].split()) for command in commands}
    return sorted(command for command in found if beginning in command)


PYTHON = [shlex.split(command.partition("python examples/")[2]) for command in shown("python examples/")]


def test_commands_are_found():
    assert ["fluids.py"] in PYTHON
    assert ["pde_family.py", "--frozen"] in PYTHON
    assert {Path(script).stem for script, *options in PYTHON if options} == SHORT.keys()
    assert len(shown("accelerate launch ")) > 2


@pytest.mark.parametrize("command", [command for command in PYTHON if len(command) == 1], ids=lambda c: c[0])
def test_a_command_without_options_has_a_test(command):
    assert (ROOT / "examples" / command[0]).exists()
    name = Path(command[0]).stem
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__))
    assert f'call("{name}"' in tests or f"import {name}" in tests


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in PYTHON if len(command) > 1], ids=" ".join)
def test_a_command_with_options_runs(command, tmp_path):
    script, *options = command
    assert (ROOT / "examples" / script).exists()
    name = Path(script).stem
    call(name, *options, *SHORT[name], "--output-dir", tmp_path)
    assert list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [*shown("accelerate launch --config"), *shown("torchrun ")])
def test_a_launchers_options_are_known(command, tmp_path, monkeypatch):
    """`test_processes.py` and `test_several_machines.py` run the launchers."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.replace("<address of the first>", "10.0.0.1"))
    accelerate = words[:2] == ["accelerate", "launch"]
    parser = launch_command_parser() if accelerate else get_args_parser()
    args = parser.parse_args(words[2 if accelerate else words.index("torchrun") + 1 :])
    assert Path(args.training_script).exists()
    assert Path(getattr(args, "config_file", None) or args.training_script).exists()
    with restored():
        accelerate_pde.parse_arguments([*args.training_script_args, "--output-dir", str(tmp_path)])
