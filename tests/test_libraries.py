"""KAN layers and models of libraries that PyPI has, as they are: through the harness, and inside their containers."""

import copy

import matplotlib
import pytest
import torch
from conftest import assert_different, assert_equal
from convkan import ConvKAN
from convkan.kanresnet import BasicBlock
from inkan import KANLayer as InKANLayer
from inkan import KANNetwork
from kan import KAN as PyKAN
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from peft_lotra import LoTRAConfig
from peft_lotra.layer import adapted_tensors
from peft_lotra.testing import KANLayerTests


@pytest.mark.parametrize("options", [{}, {"groups": 2, "stride": 2, "kernel_size": (3, 2)}])
class TestConvKAN(KANLayerTests):
    """Coefficients and their scale belong to an inner layer, the patches flattened into its inputs."""

    @pytest.fixture(autouse=True)
    def _options(self, options):
        self.options = options

    def make_layer(self):
        return ConvKAN(4, 6, padding=1, **self.options)

    def make_sample(self):
        return torch.rand(2, 4, 5, 6) * 1.8 - 0.9


@pytest.mark.parametrize("contraction", ["dense", "direct"])
class TestInKAN(KANLayerTests):
    """Coefficients and residual weights in one parameter, contracted as a matrix or looked up as an embedding."""

    @pytest.fixture(autouse=True)
    def _contraction(self, contraction):
        self.contraction = contraction

    def make_layer(self):
        return InKANLayer(3, 4, contraction=self.contraction, compile_basis=False)

    def make_sample(self):
        return torch.rand(9, 3) * 1.8 - 0.9


def adapt_save_load_merge(make, x, tmp_path, **kwargs):
    """Each way to the adapted model gives the same output; returns it beside its base.

    The base is built anew each time, for kan_gpt's blocks hold closures over themselves: a deep copy would run the
    layers of the original.
    """
    state = make().state_dict()

    def base():
        model = make().eval()
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
    assert_equal(fine(x), merged.refine(12)(x), 1e-4)
    (tmp_path / "model").mkdir()  # where pykan keeps its history
    pruned = merged.prune(node_th=0, edge_th=0)
    assert_equal(pruned(x), y)


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
