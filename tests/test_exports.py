"""What leaves Python: torch.export with an open batch, and from its program ONNX and AOTInductor, equal to eager."""

import copy
import shutil

import pytest
import torch
from kan_layers import ChebyKAN, FastKAN
from peft import get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, at_task
from peft_lotra.testing import assert_close, assert_differs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("fp32"),
    pytest.mark.skipif(torch.__version__ < (2, 13), reason="before torch 2.13, adapted layers are not traced"),
    pytest.mark.filterwarnings("ignore"),  # those of the exporters
]


class At(nn.Module):
    """A family whose task, or code, is an input."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x, value):
        with at_task(self.model, **{self.name: value}):
            return self.model(x)


def adapted(kan, **fields):
    torch.manual_seed(0)
    return get_peft_model(kan([3, 6, 2]), LoTRAConfig(r=(2, 3, 2), init_weights=False, **fields)).eval()


X = torch.linspace(-0.9, 0.9, 24, dtype=torch.float32).reshape(8, 3)


def cases(kan):
    """What is exported, and its inputs beside x; those with a first axis have a value for each sample."""
    model = adapted(kan)
    lam, code = {"family": {"lam": (0, 1)}}, {"family": list("abc"), "family_code": 2}
    return {
        "merged": (copy.deepcopy(model).merge_and_unload(), ()),
        "adapted": (model.get_base_model(), ()),
        "family, one task": (At(adapted(kan, **lam), "lam"), (torch.tensor(0.4),)),
        "family, a task for each sample": (At(adapted(kan, **lam), "lam"), (torch.linspace(0, 1, 8),)),
        "family, one code": (At(adapted(kan, **code), "code"), (torch.tensor([0.3, -0.2]),)),
        "family, a code for each sample": (At(adapted(kan, **code), "code"), (torch.linspace(-1, 1, 16).view(8, 2),)),
    }


def exported(name, kan, strict=True):
    """The model, its program, and inputs of two sizes of the batch."""
    model, values = cases(kan)[name]
    batch = torch.export.Dim("batch", min=2, max=1000)
    each = "each" in name
    sizes = ({0: batch}, *[{0: batch} if each else None for _ in values])
    values = tuple([value.float() for value in values])
    program = torch.export.export(model, (X, *values), dynamic_shapes=sizes, strict=strict)
    few = (X[:3].flip(0), *[value[:3] * 0.9 if each else value * 0.9 for value in values])
    return model, program, [(X, *values), few]


NAMES = [*cases(ChebyKAN)]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_programs_have_an_open_batch(name, strict):
    if "each" in name and not strict:
        pytest.skip("a limit that `limits.md` names")
    model, program, inputs = exported(name, ChebyKAN, strict)
    for given in inputs:
        assert_close(program.module()(*given), model(*given), 1e-5)
    assert_differs(model(*inputs[0])[:3], model(*inputs[1]))


@pytest.mark.parametrize("kan", [ChebyKAN, FastKAN])
@pytest.mark.parametrize("name", NAMES)
def test_onnx(name, kan, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, program, inputs = exported(name, kan)
    torch.onnx.export(program, dynamo=True, verbose=False).save(str(tmp_path / "model.onnx"))
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    for given in inputs:
        named = zip([one.name for one in session.get_inputs()], [value.numpy() for value in given], strict=True)
        assert_close(torch.from_numpy(session.run(None, dict(named))[0]), model(*given).detach(), 1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
@pytest.mark.parametrize("name", ["family, a code for each sample"])
def test_aot_inductor(name, tmp_path):
    model, program, inputs = exported(name, ChebyKAN)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    for given in inputs:
        assert_close(compiled(*given), model(*given).detach(), 1e-5)
