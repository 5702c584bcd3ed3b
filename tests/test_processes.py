"""Several processes and their deaths: examples/accelerate_pde.py and what it rests on."""

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import sys
import types
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from accelerate.tracking import GeneralTracker
from conftest import approx, assert_different, assert_equal
from filelock import FileLock
from launching import HAS_FSDP2, ROOT, fork, fork_by_torchrun, has_fsdp2, launch, running
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing import ProcessExitedException

from peft_lotra import initialize_lotra_weights
from peft_lotra.testing import assert_close

EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))
sys.path.append(str(EXAMPLES / "benchmarks"))

import accelerate_pde  # noqa: E402
import kill_recovery  # noqa: E402
import processes  # noqa: E402
from pde_transfer import attach_lotra, build_kan  # noqa: E402
from pdes import PDES, Points  # noqa: E402

pytestmark = pytest.mark.processes
SCRIPT = EXAMPLES / "accelerate_pde.py"
COMMON = ("--pde", "parabolic", "--base-steps", 3, "--cpu")
SHORT = (*COMMON, "--steps", 6, "--checkpoint-every", 2)
ADAPTER, CHECKPOINTS = "parabolic_lotra", "parabolic_checkpoints"
CHECK = "from accelerate import Accelerator; import processes; processes.check_processes(Accelerator())"
ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def example(*arguments, double=False, patch=None):
    """main() in a fork; what it refuses with, or None. `patch()` is called before.

    `double` is for runs that add up in different orders, such as one process and two: training amplifies rounding, by
    an amount that depends on the machine.
    """
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    if patch:
        patch()
    sys.argv = [str(SCRIPT), *map(str, arguments)]
    sys.stderr = sys.stdout = Path(os.devnull).open("w")
    try:
        code = accelerate_pde.main()
    except SystemExit as refusal:
        return str(refusal)
    assert code == 0
    return None


def trained(folder, adapter=ADAPTER):
    """The adapter's tensors, and the course of training."""
    tensors = load_file(folder / adapter / "adapter_model.safetensors")
    return tensors, json.loads((folder / f"{adapter}.json").read_text())["course"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The file of a trained base."""
    folder = tmp_path_factory.mktemp("base")
    fork(example, *COMMON, "--steps", 1, "--output-dir", folder, num_processes=1)
    (file,) = folder.glob("base_*.pt")
    assert trained(folder)[1]
    return file


@pytest.fixture
def folder(base, tmp_path):
    """A run's folder, where the base is."""
    return new_folder(base, tmp_path / "run")


def new_folder(base, path):
    path.mkdir()
    shutil.copy(base, path)
    return path


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    """Two processes, one random seed, no faults."""
    folder = new_folder(base, tmp_path_factory.mktemp("uninterrupted") / "run")
    fork(example, *SHORT, "--output-dir", folder)
    return trained(folder)


@pytest.fixture(scope="module")
def uninterrupted_double(base, tmp_path_factory):
    """The same in double precision."""
    folder = new_folder(base, tmp_path_factory.mktemp("double") / "run")
    fork(example, *SHORT, "--output-dir", folder, double=True)
    return trained(folder)


def assert_near(run, expected, tolerance):
    """In fp32."""
    for key, value in expected[0].items():
        assert_close(run[0][key], value, tolerance)
    torch.testing.assert_close(torch.tensor(run[1]), torch.tensor(expected[1]), rtol=tolerance, atol=0)


def assert_same(run, expected, tolerance):
    (tensors, course), (expected_tensors, expected_course) = run, expected
    for key, value in expected_tensors.items():
        assert_equal(tensors[key], value, tolerance)
    assert len(course) == len(expected_course)
    if tolerance == 0:
        assert course == expected_course
    courses = (torch.tensor(losses, dtype=torch.float64) for losses in (course, expected_course))
    torch.testing.assert_close(*courses, rtol=tolerance, atol=0)


# Shares --------------------------------------------------------------------------------------------------------------


def points_of(rank, processes, accumulation, step=1, number=256):
    accelerator = types.SimpleNamespace(
        process_index=rank, num_processes=processes, gradient_accumulation_steps=accumulation, device="cpu"
    )
    pde = PDES["hyperbolic"](2.0)
    return accelerate_pde.batch(accelerator, pde, 0, step, number)


@pytest.mark.parametrize(("processes", "accumulation", "number"), [(4, 2, 256), (3, 1, 256), (5, 2, 100)])
def test_a_batch_is_shared_out_completely(processes, accumulation, number):
    (whole,) = points_of(0, 1, 1, number=number)
    assert_different(whole[0], points_of(0, 1, 1, step=2, number=number)[0][0])
    parts = [part for rank in range(processes) for part in points_of(rank, processes, accumulation, number=number)]
    assert len(parts) == processes * accumulation
    for one, many in list(zip(whole, zip(*parts, strict=True), strict=True))[:2]:
        assert max(map(len, many)) - min(map(len, many)) <= 1
        assert sorted(torch.cat(many).tolist()) == sorted(one.tolist())
    pde = PDES["hyperbolic"](2.0)
    kan = build_kan("chebyshev", 0).double()
    losses = [pde.loss(kan, double(Points(*part[:2])), part[2]) for part in [whole, *parts]]
    assert_different(losses[1], losses[0])
    assert_equal(torch.stack(losses[1:]).mean(), losses[0])


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """One process, no faults, in double precision."""
    folder = new_folder(base, tmp_path_factory.mktemp("alone") / "run")
    fork(example, *COMMON, "--steps", 10, "--output-dir", folder, num_processes=1, double=True)
    return trained(folder)


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (2, 2), (3, 1)])
def test_any_number_of_processes_trains_the_same(alone, folder, processes, accumulation):
    arguments = (*COMMON, "--steps", 10, "--output-dir", folder)
    arguments += ("--gradient-accumulation-steps", accumulation)
    fork(example, *arguments, num_processes=processes, double=True)
    record = json.loads((folder / f"{ADAPTER}.json").read_text())
    assert record["processes"] == processes
    for key, value in alone[0].items():
        if "core" in key:
            assert_different(value, torch.zeros_like(value))  # trained
    assert_same(trained(folder), alone, 1e-12)


def test_processes_fit_one_family(tmp_path):
    """Also after a death, and sharded; the wave equation has conditions on derivatives."""
    arguments = (*SHORT, "--pde", "hyperbolic", "--family", "--r", 3, "--output-dir")
    runs, kinds = {}, [("one", 1, None), ("two", 2, None), ("sharded", 2, sharded)]
    for name, number, change in kinds if HAS_FSDP2 else kinds[:2]:
        folder = tmp_path / name
        if name == "two":
            with pytest.raises(ProcessExitedException):
                fork(example, *arguments, folder, double=True, patch=dies_in_a_family)
            assert (folder / "hyperbolic_family_checkpoints" / "step_0000004").exists()
        fork(example, *arguments, folder, num_processes=number, double=True, patch=change)
        runs[name] = trained(folder, "hyperbolic_family")
        errors = json.loads((folder / "hyperbolic_family.json").read_text())["errors"]
        assert [parameter for parameter, _ in errors] == [2.05, 2.35, 2.65, 2.95]
        assert sum(error for _, error in errors) / 4 == approx(runs[name][1][-1][2], rel=0.1)  # another grid
    tensors, course = runs["one"]
    assert course[-1][1] < course[0][1]
    assert all(value.any() and value.shape[-1] == 5 for key, value in tensors.items() if "core" in key)
    for run in runs.values():
        assert_same(run, runs["one"], 1e-9)


# What DDP sees -------------------------------------------------------------------------------------------------------


def pde_gradients(wrapped):
    """Gradients of two identical steps of DDP with a static graph, the PDE's loss inside or outside."""
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(static_graph=True)])
    pde = PDES["hyperbolic"](2.5)
    network, share = new_network(0).double(), double(Points(*accelerate_pde.batch(accelerator, pde, 0, 1, 256)[0][:2]))
    model = accelerator.prepare(accelerate_pde.Problem(network, pde) if wrapped else network)
    for _ in range(2):
        network.zero_grad()
        accelerator.backward(model(*share) if wrapped else pde.loss(model, share))
    return [p.grad for p in network.parameters() if p.requires_grad]


def double(points):
    return type(points)(*(p.double() for p in points))


def new_network(seed):
    """Base by seed 0, adapter by `seed`, with a core that is not zero."""
    kan = build_kan("chebyshev", 0)
    torch.manual_seed(seed)
    network = attach_lotra(kan, None, 0.1)
    for name, parameter in network.named_parameters():
        if "lotra_core" in name:
            nn.init.normal_(parameter, std=0.1)
    return network


def test_the_loss_belongs_inside_what_ddp_wraps():
    network, pde = new_network(0).double(), PDES["hyperbolic"](2.5)
    whole = double(Points(*accelerate_pde.batch(types.SimpleNamespace(**ONE_PROCESS), pde, 0, 1, 256)[0][:2]))
    pde.loss(network, whole).backward()
    expected = [p.grad for p in network.parameters() if p.requires_grad]
    inside, outside = fork(pde_gradients, True)[0], fork(pde_gradients, False)[0]
    differences = [(a - b).norm() / b.norm() for a, b in zip(outside, expected, strict=True)]
    assert max(differences) > 1e-2, "DDP with a static graph now takes derivatives outside as well"
    for actual, gradient in zip(inside, expected, strict=True):
        assert_equal(actual, gradient)


ONE_PROCESS = {"process_index": 0, "num_processes": 1, "gradient_accumulation_steps": 1, "device": "cpu"}


def digest(tensors):
    return [hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest() for tensor in tensors]


def adapters_by_rank(init):
    """With a random seed for each process: digests of every layer's factors before and after `prepare`, the factors
    before `prepare`, and those that were drawn.
    """
    accelerator, pde = Accelerator(), PDES["elliptic"](1.3)
    kan = build_kan("chebyshev", 0).double()
    torch.manual_seed(accelerator.process_index)
    network = attach_lotra(kan, None, 0.1)
    share = double(Points(*accelerate_pde.batch(accelerator, pde, 0, 0, 256)[0][:2]))
    kinds = ("lotra_core", "lotra_U1", "lotra_U2", "lotra_U3")
    factors = {kind: [p for name, p in network.named_parameters() if kind in name] for kind in kinds}
    drawn = {kind: [tensor.detach().clone() for tensor in tensors] for kind, tensors in factors.items()}
    if init == "gradient":
        initialize_lotra_weights(network, lambda: pde.loss(network, share).backward(), progressbar=False)
    before = {kind: digest(tensors) for kind, tensors in factors.items()}
    alone = {kind: [tensor.detach().clone() for tensor in tensors] for kind, tensors in factors.items()}
    accelerator.prepare(accelerate_pde.Problem(network, pde))
    return before, {kind: digest(tensors) for kind, tensors in factors.items()}, alone, drawn


@pytest.mark.parametrize("init", ["random", "gradient"])
def test_all_processes_start_from_the_same_factors(init):
    (before, after, _, drawn), (other_before, other_after, _, other_drawn) = fork(adapters_by_rank, init)
    for kind in ("lotra_U1", "lotra_U2", "lotra_U3"):
        assert_different(drawn[kind][0], other_drawn[kind][0])  # seeds of their own
    assert (before == other_before) == (init == "gradient")  # all factors, not those alone that the gradient sets
    assert before == after == other_after  # DDP takes the first process's, bit for bit
    if init == "gradient":
        assert before["lotra_U1"] == digest(drawn["lotra_U1"])


def test_gradient_initialisation_sees_the_whole_batch():
    pde, kan = PDES["elliptic"](1.3), build_kan("chebyshev", 0).double()
    network = attach_lotra(kan, None, 0.1)
    whole = double(Points(*accelerate_pde.batch(types.SimpleNamespace(**ONE_PROCESS), pde, 0, 0, 256)[0][:2]))
    half = type(whole)(*(p[::2] for p in whole))
    spans = {}
    for name, points in {"whole": whole, "half": half}.items():
        initialize_lotra_weights(network, lambda p=points: pde.loss(network, p).backward(), progressbar=False)
        spans[name] = [u @ u.mT for key, u in network.state_dict().items() if "lotra_U2" in key]
    shared = [u @ u.mT for u in fork(adapters_by_rank, "gradient")[1][2]["lotra_U2"]]
    assert any((a - b).norm() > 1e-2 for a, b in zip(spans["half"], spans["whole"], strict=True))
    for actual, expected in zip(shared, spans["whole"], strict=True):
        assert_equal(actual, expected, 1e-8)  # the span depends on gaps between singular values


def sharded():
    """accelerate leaves FSDP out on the CPU; its state is set by hand."""

    def make(**kwargs):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="no_wrap",
            state_dict_type="FULL_STATE_DICT",
            cpu_ram_efficient_loading=False,
        )
        accelerator = Accelerator(fsdp_plugin=plugin, **kwargs)
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        prepare = accelerator.prepare

        def checked(*args):
            prepared = prepare(*args)
            assert {type(p).__name__ for p in prepared[0].parameters()} == {"DTensor"}
            return prepared

        accelerator.prepare = checked
        return accelerator

    accelerate_pde.Accelerator = make


@has_fsdp2
def test_fsdp2_trains_the_same_and_saves_whole_tensors(uninterrupted_double, folder):
    fork(example, *SHORT, "--output-dir", folder, double=True, patch=sharded)
    assert_same(trained(folder), uninterrupted_double, 1e-9)


def by_zero():
    """accelerate leaves DeepSpeed out on the CPU, too."""
    from accelerate.utils import DeepSpeedPlugin
    from deepspeed import comm

    warnings.simplefilter("ignore")  # DeepSpeed's own

    def make(**kwargs):
        accelerator = Accelerator(**kwargs)
        comm.init_distributed("gloo")
        plugin = DeepSpeedPlugin(
            zero_stage=3, zero3_save_16bit_model=True, zero3_init_flag=False, gradient_clipping=1e9
        )
        plugin.deepspeed_config |= {
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        plugin.select(_from_accelerator_state=True)
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.DEEPSPEED
        AcceleratorState._shared_state["deepspeed_plugins"] = {"default": plugin}
        accelerator.deepspeed_engine_wrapped = None
        prepare = accelerator.prepare

        def checked(*args):
            prepared = prepare(*args)
            assert all(hasattr(p, "ds_id") for p in prepared[0].parameters())
            return prepared

        accelerator.prepare = checked
        return accelerator

    accelerate_pde.Accelerator = make


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_zero_3_trains_the_same_on_values(base, tmp_path, monkeypatch):
    """Also from a checkpoint. DeepSpeed takes no fp64."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    runs = {}
    for name, change in {"ddp": None, "zero": by_zero}.items():
        folder = new_folder(base, tmp_path / name)
        for steps in (4, 4):  # the second run finds the last checkpoint
            fork(example, *COMMON, "--values", "--steps", steps, "--output-dir", folder, patch=change)
        runs[name] = trained(folder)
    assert runs["ddp"][1][-1][1] < runs["ddp"][1][0][1]
    assert_near(runs["zero"], runs["ddp"], 1e-4)


# Killed --------------------------------------------------------------------------------------------------------------


def die(rank):
    if torch.distributed.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def dies_in(drawing):
    """A process dies where the example draws the points of a step, by the function of this name."""
    batch = getattr(accelerate_pde, drawing)

    def patched(accelerator, pde, seed, step, *others):
        if step == 5:
            die(1)
        return batch(accelerator, pde, seed, step, *others)

    setattr(accelerate_pde, drawing, patched)


def dies_in_a_step():
    dies_in("batch")


def dies_in_a_family():
    dies_in("family_batch")


def dies_with_half_a_checkpoint():
    save_state = Accelerator.save_state

    def patched(self, folder):
        save_state(self, folder)
        if any(folder.parent.glob("step_*")):  # not the first one
            file = folder / "model.safetensors"
            self.wait_for_everyone()
            if self.is_main_process:
                file.write_bytes(file.read_bytes()[:-100])
            die(0)

    Accelerator.save_state = patched


def dies_between_two_checkpoints():
    """The new one is complete and the old one still there."""
    remove = processes._remove

    def patched(path):
        if path.exists():
            die(0)
        remove(path)

    processes._remove = patched


def dies_with_half_an_adapter():
    save_pretrained = PeftModel.save_pretrained

    def patched(self, folder, **kwargs):
        save_pretrained(self, folder, **kwargs)
        file = Path(folder, "adapter_model.safetensors")
        file.write_bytes(file.read_bytes()[:-100])
        die(0)

    PeftModel.save_pretrained = patched


DEATHS = {  # the checkpoints that are left
    dies_in_a_step: [4],
    dies_with_half_a_checkpoint: [2],
    dies_between_two_checkpoints: [2, 4],
    dies_with_half_an_adapter: [6],
}


@pytest.mark.parametrize("death", DEATHS, ids=lambda death: death.__name__)
def test_a_killed_run_goes_on_to_the_same_end(death, uninterrupted, folder):
    with pytest.raises(ProcessExitedException):
        fork(example, *SHORT, "--output-dir", folder, patch=death)
    assert sorted(path.name for path in (folder / CHECKPOINTS).glob("step_*")) == [
        f"step_{n:07d}" for n in DEATHS[death]
    ]
    assert not (folder / ADAPTER).exists()
    fork(example, *SHORT, "--output-dir", folder)
    assert_same(trained(folder), uninterrupted, 0)
    assert [path.name for path in (folder / CHECKPOINTS).iterdir()] == ["step_0000006"]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [CHECKPOINTS, ADAPTER]


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (1, 2), (3, 1), (4, 1)])
def test_another_number_of_processes_goes_on(processes, accumulation, uninterrupted_double, stopped, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    arguments = (*SHORT, "--output-dir", folder, "--gradient-accumulation-steps", accumulation)
    fork(example, *arguments, num_processes=processes, double=True)
    assert_same(trained(folder), uninterrupted_double, 1e-9)
    expected = trained(folder)
    (folder / ADAPTER / "of an earlier adapter").touch()
    fork(example, *arguments, num_processes=processes, double=True)  # there is nothing left to do but to save again
    assert_same(trained(folder), expected, 0)
    assert {path.name for path in (folder / ADAPTER).iterdir()} == ADAPTER_FILES


@pytest.fixture(scope="module")
def stopped(base, tmp_path_factory):
    """A run of two processes in double precision that was killed in its fifth step."""
    folder = new_folder(base, tmp_path_factory.mktemp("stopped") / "run")
    with pytest.raises(ProcessExitedException):
        fork(example, *SHORT, "--output-dir", folder, double=True, patch=dies_in_a_step)
    return folder


def test_checkpoints_hold_no_frozen_base(stopped):
    (folder,) = (stopped / CHECKPOINTS).glob("step_*4")
    state = load_file(folder / "model.safetensors")
    assert {key.split(".")[-2] for key in state} == {"lotra_core", "lotra_U1", "lotra_U2", "lotra_U3"}
    assert (folder / "optimizer.bin").exists()
    assert list(folder.glob("random_states_*"))


def test_a_checkpoint_of_another_model_is_refused(stopped, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    (path,) = (folder / CHECKPOINTS).glob("step_*4/model.safetensors")
    state = load_file(path)
    save_file({key: value for key, value in state.items() if "U3" not in key}, path)
    (refusal,) = fork(example, *SHORT, "--output-dir", folder, num_processes=1, double=True)
    assert "is of another model: [" in refusal


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "processes", "message"),
    [
        (("--steps", 30), 1, "step_0000004 was made with steps=6, not 30: choose another --output-dir, or remove"),
        (
            ("--gradient-accumulation-steps", 20),
            2,
            "points for each side, fewer than 2 processes × 20 accumulation steps",
        ),
    ],
)
def test_a_run_that_cannot_go_on(arguments, processes, message, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    refusals = fork(example, *SHORT, *arguments, "--output-dir", tmp_path / "run", num_processes=processes)
    assert all(message in refusal for refusal in refusals)
    assert sorted((tmp_path / "run").rglob("*")) == sorted(
        tmp_path / "run" / path.relative_to(stopped) for path in stopped.rglob("*")
    )


def test_two_runs_in_one_directory(folder):
    with FileLock(folder / ".lock"):
        (refusal,) = fork(example, *SHORT, "--output-dir", folder, num_processes=1)
    assert "another run is at work here" in refusal


def with_deepspeed():
    class WithDeepSpeed(Accelerator):
        distributed_type = DistributedType.DEEPSPEED

    accelerate_pde.Accelerator = WithDeepSpeed


def test_deepspeed_is_refused(folder):
    refusals = fork(example, *SHORT, "--output-dir", folder, patch=with_deepspeed)
    assert ["ZeRO-3 frees parameters" in refusal for refusal in refusals] == [True, True]


@pytest.fixture
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.usefixtures("_fresh_accelerator")
def test_processes_that_know_nothing_of_each_other(monkeypatch, tmp_path):
    """Started as two, on a machine with an accelerator that accelerate does not use."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    refusal = r"2 processes were started, but each would train alone: is --cpu missing"
    refusal += "|Tried to launch on distributed"  # older versions of accelerate refuse that themselves
    with patch.dict(os.environ), pytest.raises((SystemExit, ValueError), match=refusal):
        accelerate_pde.start(accelerate_pde.parse_arguments(["--output-dir", str(tmp_path)]))


@pytest.mark.slow
def test_accelerate_launch_starts_one_process_with_its_own_cpu_option():
    program = (
        "from accelerate import Accelerator; from processes import check_processes; check_processes(Accelerator())"
    )
    done = launch(program, launcher="accelerate", options=["--cpu"], check=False)
    assert done.returncode != 0
    assert "The launcher was asked for several processes and has started one" in done.stdout


# Trackers, precision -------------------------------------------------------------------------------------------------


class FileTracker(GeneralTracker):
    """One file for each process that gets here."""

    name, requires_logging_directory = "file", False

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    @property
    def tracker(self):
        return self.folder / f"log_{torch.distributed.get_rank()}"

    def store_init_configuration(self, values):
        self.write(values)

    def log(self, values, step=None, **kwargs):
        self.write({"step": step, **values})

    def finish(self):
        self.write("finished")

    def write(self, values):
        with self.tracker.open("a") as file:
            file.write(json.dumps(values) + "\n")


def test_the_main_process_logs(uninterrupted, folder):
    def patch():
        accelerate_pde.Accelerator = lambda **kwargs: Accelerator(**{**kwargs, "log_with": FileTracker(folder)})

    fork(example, *SHORT, "--init", "gradient", "--output-dir", folder, patch=patch)
    (file,) = folder.glob("log_*")
    first, *lines, last = map(json.loads, file.read_text().splitlines())
    assert (file.name, first["pde"], last) == ("log_0", "parabolic", "finished")
    course = trained(folder)[1]
    assert [[line["step"], line["loss"], line["error"]] for line in lines] == course
    # factors of its own change nothing yet in the first step
    assert course[-1][1] != uninterrupted[1][-1][1]
    assert course[0][1] == uninterrupted[1][0][1]


def bfloat16():
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # what `accelerate launch --mixed_precision bf16` does


def test_mixed_precision_is_the_launchers(uninterrupted, folder):
    fork(example, *SHORT, "--output-dir", folder, patch=bfloat16)
    tensors, course = trained(folder)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    losses, expected = (torch.tensor([loss for _, loss, _ in c]) for c in (course, uninterrupted[1]))
    assert_different(losses, expected)
    assert_equal(losses[:1], expected[:1], 3e-2)


def test_tensorboard_is_written_by_the_main_process(folder):
    pytest.importorskip("tensorboardX")
    fork(example, *SHORT, "--log-with", "tensorboard", "--output-dir", folder)
    assert len(list((folder / "logs" / "parabolic").glob("events.*"))) == 1
    assert {path.name for path in (folder / ADAPTER).iterdir()} == ADAPTER_FILES


def test_a_tracker_that_is_not_installed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(accelerate_pde, "get_available_trackers", list)
    with pytest.raises(SystemExit):
        accelerate_pde.parse_arguments(["--log-with", "tensorboard", "--output-dir", str(tmp_path / "run")])
    assert "argument --log-with: 'tensorboard' is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Launchers -----------------------------------------------------------------------------------------------------------


CPU_FILE = ("--config_file", EXAMPLES / "accelerate" / "cpu_2_processes.yaml")


def test_accelerate_launch_with_the_file_for_the_cpu():
    done = launch(CHECK, launcher="accelerate", options=CPU_FILE)
    assert done.stdout.count("Processes: 2 (MULTI_CPU), device cpu:0, mixed precision no") == 1


@pytest.mark.slow
def test_accelerate_launch_of_the_example(uninterrupted, folder):
    done = launch(SCRIPT, *SHORT, "--output-dir", folder, launcher="accelerate", options=CPU_FILE)
    assert done.stdout.count("Processes: 2 (MULTI_CPU), device cpu:0, mixed precision no") == 1
    assert done.stdout.count("LoTRA:   0%") == 1  # one progress bar
    assert_same(trained(folder), uninterrupted, 0)


def dies_once():
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        dies_in_a_step()


@pytest.mark.slow
def test_torchruns_agent_restarts_a_run_that_loses_a_process(uninterrupted, folder):
    def work():
        example(*SHORT, "--output-dir", folder, patch=dies_once)
        return os.environ["TORCHELASTIC_RESTART_COUNT"]

    assert fork_by_torchrun(work, max_restarts=1) == ["1", "1"]
    assert_same(trained(folder), uninterrupted, 0)


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_loses_a_process(uninterrupted, folder):
    with running(SCRIPT, *SHORT, "--output-dir", folder, options=["--max-restarts", "3"]) as job:
        job.wait_for(lambda: list((folder / CHECKPOINTS).glob("step_*")))
        job.worker(1).kill()
        assert job.wait() == 0, job.output()
        log = job.output()
    assert log.count("Processes: 2 (MULTI_CPU)") >= 2
    assert "Goes on after step" in log
    assert_same(trained(folder), uninterrupted, 0)


@pytest.mark.filterwarnings("ignore:.*was trained on other coefficients")  # the base has had three more steps
def test_the_kill_test_counts_adapters_that_should_have_been_refused(base, tmp_path):
    network = new_network(0)
    for name in ("whole", "cut"):
        network.save_pretrained(tmp_path / name)
    expected = (tmp_path / "whole" / kill_recovery.WEIGHTS).read_bytes()
    (tmp_path / "cut" / kill_recovery.WEIGHTS).write_bytes(expected[:-1])
    assert kill_recovery.loads(tmp_path / "whole", base)
    assert kill_recovery.offer(tmp_path, base, expected) == (1, 0)
    new_network(1).save_pretrained(tmp_path / "other")
    (tmp_path / "cut" / kill_recovery.WEIGHTS).unlink()
    assert kill_recovery.offer(tmp_path, base, expected) == (2, 1)


def test_fsdp_without_an_accelerator_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    accelerator = SimpleNamespace(num_processes=2, distributed_type=DistributedType.MULTI_CPU)
    with pytest.raises(
        SystemExit, match="asked for FSDP, and accelerate gives MULTI_CPU here: .*cpu_2_processes.yaml"
    ):
        processes.check_processes(accelerator)


@pytest.mark.parametrize("name", ["cpu_2_processes", "multi_gpu_ddp", "fsdp2", "deepspeed_zero3"])
def test_the_config_files_are_read_as_they_are_meant(name):
    parser = launch_command_parser()
    arguments = ["--config_file", str(EXAMPLES / "accelerate" / f"{name}.yaml"), "script.py"]
    args, _, _ = _validate_launch_command(parser.parse_args(arguments))
    assert (args.num_processes, args.num_machines, args.main_process_port) == (2, 1, 0)
    assert args.multi_gpu == (name in ("cpu_2_processes", "multi_gpu_ddp"))
    assert args.use_fsdp == (name == "fsdp2")
    assert args.use_deepspeed == (name == "deepspeed_zero3")
    if args.use_fsdp:
        assert (args.fsdp_version, args.fsdp_auto_wrap_policy) == (2, "NO_WRAP")
    if args.use_deepspeed:
        assert (args.zero_stage, args.zero3_save_16bit_model, args.gradient_clipping) == (3, True, 1e9)
