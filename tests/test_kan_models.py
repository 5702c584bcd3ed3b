"""Models of KAN libraries, adapted, saved, loaded, merged: as PyPI has them, or ours that are as those on git."""

import copy
import sys
from collections import OrderedDict

import matplotlib
import pytest
import torch
from conftest import assert_different, assert_equal
from convkan.kanresnet import BasicBlock
from inkan import KANNetwork
from kan import KAN as PyKAN
from kan_layers import ChebyKANLayer, FastKANLayer
from kan_models import VGGKAGN, ResKAGNet
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from peft_lotra import LoTRAConfig, infer_coefficients
from peft_lotra.inference.probe import Probe
from peft_lotra.layers.lotra import adapted_tensors


def adapt_save_load_merge(make, x, tmp_path, **kwargs):
    """Each way to the adapted model gives the same output; returns it beside its base.

    The base is built anew each time, for kan_gpt's blocks hold closures over themselves: a deep copy would run the
    layers of the original.
    """
    x = x.double() if x.is_floating_point() else x
    state = nn.Module.double(make()).state_dict()

    def base():
        model = nn.Module.double(make()).eval()
        model.load_state_dict(state)
        return model

    torch.manual_seed(1)
    model = get_peft_model(base(), LoTRAConfig(r=2, init_weights=False, **kwargs))
    with torch.no_grad():
        plain, y = base()(x), model(x)
        assert_different(y, plain)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base(), tmp_path)
        torch.manual_seed(2)
        for key, value in get_peft_model_state_dict(model).items():
            assert_equal(get_peft_model_state_dict(loaded)[key], value, 0)
        assert_equal(loaded(x), y)
        assert_equal(loaded.merge_and_unload()(x), y)
        with model.disable_adapter():
            assert_equal(model(x), plain)
    return model, base()


def test_inkan_network(tmp_path):
    model, base = adapt_save_load_merge(lambda: KANNetwork([3, 6, 2], compile_basis=False), torch.rand(9, 3), tmp_path)
    assert len(adapted_tensors(model)) == 2
    merged = model.merge_and_unload()
    assert_different(merged.layers[0].weight[:, : 3 * 8], base.layers[0].weight[:, : 3 * 8])
    assert_equal(merged.layers[0].weight[:, 3 * 8 :], base.layers[0].weight[:, 3 * 8 :], 0)


# convkan's own block hands `bias=False` to its layer, which warns that it has none.
@pytest.mark.filterwarnings("ignore:Bias is not used in ConvKAN layer")
def test_convkan_residual_block(tmp_path):
    """ResNet-KAN: batch norms around convolutional KAN layers."""
    model, _ = adapt_save_load_merge(
        lambda: nn.Sequential(BasicBlock(4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        torch.rand(2, 4, 8, 8),
        tmp_path,
    )
    assert len(adapted_tensors(model)) == 2


def test_kan_gpt(tmp_path):
    """Transformer-KAN: a GPT whose linear layers are copies of efficient-kan's."""
    library = pytest.importorskip("kan_gpt.model")
    config = library.GPT.get_default_config()
    config.model_type, config.n_layer, config.n_head, config.n_embd = None, 1, 2, 8
    config.vocab_size, config.block_size = 11, 6

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.gpt = library.GPT(config)

        def forward(self, tokens):
            return self.gpt(tokens)[0]

    tokens = torch.randint(11, (2, 6))
    model, _ = adapt_save_load_merge(Logits, tokens, tmp_path)
    assert len(adapted_tensors(model)) == 5  # attention in and out, two of the MLP, the head
    _, loss = model.get_base_model().gpt(tokens, tokens)
    loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def images(size=16):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:Importing from timm.models:FutureWarning")
def test_vision_kan(tmp_path):
    """A ViT whose blocks have two FasterKAN layers each in the place of the MLP."""
    library = pytest.importorskip("VisionKAN.models_kan")

    def make():
        sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
        return library.VisionKAN(**sizes, hdim_kan=6, num_classes=5)

    model, base = adapt_save_load_merge(make, images(), tmp_path)
    assert len(adapted_tensors(model)) == 4
    found = infer_coefficients(base.float(), images())
    assert [entry["layout"] for entry in found.values()] == ["o (i d)"] * 4


@pytest.mark.parametrize(
    ("make", "count"),
    [(lambda: ResKAGNet((4, 6), 1, classes=5), 6), (lambda: VGGKAGN((4, "M", 6, 6, "M"), classes=5), 3)],
    ids=["ResKAGNet", "VGG-KAGN"],
)
def test_networks_of_kan_convolutions(make, count, tmp_path):
    """torch-conv-kan's: blocks around layers with a norm and an activation in them."""
    coefficients = infer_coefficients(make(), images())
    assert len(coefficients) == count
    layouts = {entry["layout"] for entry in coefficients.values()}
    assert layouts - {"g1 o (d i) g2 g3"} == {"g o (d i) h w"}  # of kernels of size 1
    model, _ = adapt_save_load_merge(make, images(), tmp_path, coefficients=coefficients)
    assert len(adapted_tensors(model)) == count


def test_inference_visits_a_tensor_of_residual_blocks_once(monkeypatch):
    """From one tensor, 2 to the number of blocks ways lead back to the images."""
    counts, original = [], Probe._input_of

    def counted(self, sides):
        counts.append(1)
        return original(self, sides)

    monkeypatch.setattr(Probe, "_input_of", counted)
    model = ResKAGNet((2, 2), 3, classes=5)
    assert len(infer_coefficients(model, images())) == 13
    assert len(counts) < 300


def plain_model():
    layers = [nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, groups=2)]
    backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(OrderedDict(backbone=backbone, head=FastKANLayer(8, 5)))


def timm_model():
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=3)
    model.head = FastKANLayer(12, 5)
    return model


def torchvision_model():
    models = pytest.importorskip("torchvision.models")
    model = models.shufflenet_v2_x0_5(weights=None)
    model.fc = ChebyKANLayer(1024, 5, 3)
    return model


@pytest.mark.parametrize(
    ("make", "head"),
    [
        pytest.param(plain_model, "head", id="plain"),
        pytest.param(timm_model, "head", id="timm", marks=pytest.mark.slow),
        pytest.param(torchvision_model, "fc", id="torchvision", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("fp32")
def test_kan_head_on_a_backbone(make, head, tmp_path):
    """The head of a registered class is found; the backbone, of torch's layers, has nothing for inference."""
    model, base = adapt_save_load_merge(make, images(32 if head == "fc" else 16), tmp_path)
    assert [name.split(".")[0] for name in adapted_tensors(model)] == [head]
    (found,) = infer_coefficients(base.float(), images(32 if head == "fc" else 16))
    assert found.startswith(head)


def test_multkan_around_adapted_layers(tmp_path, monkeypatch):
    """pykan's network reads attributes of its layers: to plot, to refine grids, to prune."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    x = torch.rand(64, 2) * 2 - 1
    base = PyKAN(width=[2, 3, 1], grid=4, k=3, auto_save=False, seed=1)
    model = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, init_weights=False))
    kan = model.get_base_model()
    y = model(x)
    assert_different(y, base(x))
    kan.plot(folder=str(tmp_path / "figures"))
    assert list((tmp_path / "figures").glob("*.png"))
    kan.save_act = True
    model(x)
    fine = kan.refine(12)  # fits the splines of a new network to the adapted ones
    assert not adapted_tensors(fine)
    with pytest.raises(RuntimeError, match=r"Missing key.*act_fun.0.coef"):  # copies a state dict into a plain network
        kan.prune()
    assert_equal(model(x), y, 0)
    merged = model.merge_and_unload()
    merged.auto_save = False
    assert_equal(merged(x), y)
    assert_equal(fine(x), merged.refine(12)(x))
    (tmp_path / "model").mkdir()  # where pykan keeps its history
    pruned = merged.prune(node_th=0, edge_th=0)
    assert_equal(pruned(x), y)
    merged.fix_symbolic(0, 0, 0, "sin", verbose=False)
    merged.auto_symbolic(lib=["x", "x^2"], verbose=0)
    if sys.version_info < (3, 13):  # pykan makes local variables by `exec`, which later versions do not have
        (formula,), variables = merged.symbolic_formula()
        assert "sin" in str(formula)
        assert len(variables) == 2


def test_multkan_fits_an_adapter_by_its_own_method():
    """Its updates of the grid are refused, and the error names the way; without them the factors are fitted."""
    torch.manual_seed(0)
    x = torch.rand(64, 2) * 2 - 1
    y = torch.sin(3 * x[:, :1]) + x[:, 1:] ** 2
    data = {"train_input": x, "train_label": y, "test_input": x, "test_label": y}
    model = get_peft_model(PyKAN(width=[2, 3, 1], grid=4, k=3, auto_save=False, seed=1), LoTRAConfig(r=1))
    kan, before = model.get_base_model(), {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"or leave it out, as pykan's `fit\(dataset, update_grid=False\)` does"):
        kan.fit(data, steps=2)
    loss = (model(x) - y).square().mean().item()
    kan.fit(data, steps=5, update_grid=False)
    assert (model(x) - y).square().mean().item() < 0.5 * loss
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lotra_" in name for name in changed)
