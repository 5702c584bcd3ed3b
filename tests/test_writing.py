"""What is written to an adapted layer reaches its base layer or is refused; nothing is lost."""

import pytest
import torch
from conftest import assert_different, assert_equal
from kan_layers import ChebyKANLayer, KANLinear, chebyshev
from layer_table import LAYERS
from peft import get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig

X = torch.linspace(-0.9, 0.9, 20).reshape(5, 4)


class Layer(nn.Module):
    """y = gain · Σ_id T_d(x[i]) · coef[i, o, d]; `use` sees the layer first."""

    sharpness = 1.0

    def __init__(self, use=lambda layer: None):
        super().__init__()
        self.coef = nn.Parameter(torch.randn(4, 3, 5))
        self.gain = 1.0
        self.activation = nn.Tanh()
        self.register_buffer("shift", torch.zeros(3))
        self.use = use

    def forward(self, x):
        self.use(self)
        basis = chebyshev(self.activation(self.sharpness * x), 4)
        return self.gain * torch.einsum("bid,iod->bo", basis, self.coef) + self.shift


def adapt(layer, **kwargs):
    model = get_peft_model(nn.Sequential(layer), LoTRAConfig(r=2, init_weights=False, **kwargs))
    return model, model.base_model.model[0]


SETTINGS = {"gain": 10.0, "sharpness": 0.5, "activation": nn.Sigmoid(), "shift": torch.ones(3), "use": lambda layer: 1}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_reach_the_base_layer(name):
    model, layer = adapt(Layer(), coefficients={"coef": "i o d"})
    y = model(X)
    setattr(layer, name, SETTINGS[name])
    assert getattr(layer.base_layer, name) is getattr(layer, name) is SETTINGS[name]
    if name != "use":
        assert_different(model(X), y)
    z = model(X)
    assert_equal(model.merge_and_unload()(X), z)


def test_settings_of_pykan_reach_its_layer():
    layer = LAYERS["pykan"].make()
    _, wrapped = adapt(layer)
    wrapped.k = 2
    assert layer.k == wrapped.k == 2
    wrapped.mask.data[0] = 0
    assert not layer.mask[0].any()


def test_what_others_hang_on_a_wrapper_stays_there():
    model, layer = adapt(Layer(), coefficients={"coef": "i o d"})
    layer.noted_by_a_framework = 1
    layer._noted_by_a_framework = 2
    assert not hasattr(layer.base_layer, "noted_by_a_framework")
    assert not hasattr(layer.base_layer, "_noted_by_a_framework")
    model.eval()
    assert layer.training is layer.base_layer.training is False


def written(layer, name):
    tensor = getattr(layer, name)
    return {
        "data": lambda: tensor.data.mul_(0),
        "in place": lambda: tensor.mul_(0),
        "init": lambda: nn.init.zeros_(tensor),
        "init normal": lambda: nn.init.normal_(tensor),
        "detached": lambda: tensor.detach().clamp_(0),
        "a row": lambda: tensor.__setitem__(0, 0),
        "a row of data": lambda: tensor.data.__setitem__(0, 0),
        "a view": lambda: tensor[0].zero_(),
        "out": lambda: torch.zeros(tensor.shape, out=tensor),
        "data replaced": lambda: setattr(tensor, "data", torch.zeros(tensor.shape)),
        "multiplied": lambda: tensor.data.__imul__(2),
        "copied": lambda: tensor.copy_(torch.zeros(tensor.shape)),
    }


WAYS = list(written(Layer(), "coef"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["spline_weight", "spline_scaler"])
def test_writing_to_adapted_coefficients_is_refused(name, way):
    model, layer = adapt(KANLinear(4, 3))
    y = model(X)
    with torch.no_grad(), pytest.raises(RuntimeError, match="would write to adapted coefficients"):
        written(layer, name)[way]()
    with pytest.raises(AttributeError, match=f"`{name}` of a KANLinear is under a LoTRA adapter"):
        setattr(layer, name, nn.Parameter(torch.zeros(1)))
    assert_equal(model(X), y, 0)
    with torch.no_grad(), model.disable_adapter():  # then the layer's own tensors are seen
        written(layer, name)[way]()
        assert_different(getattr(layer.base_layer, name), getattr(KANLinear(4, 3), name))
    assert_different(model(X), y)


@pytest.mark.parametrize("way", ["data", "in place", "init", "a row of data", "data replaced"])
def test_writing_in_a_forward_pass_is_refused(way):
    def use(layer):
        with torch.no_grad():
            written(layer, "coef")[way]()

    base = Layer(use)
    before = base.coef.clone()
    model, _ = adapt(base, coefficients={"coef": "i o d"})
    with pytest.raises(TypeError, match="would write to adapted coefficients"):
        model(X)
    assert_equal(base.coef, before, 0)
    with model.disable_adapter():
        model(X)
    assert_different(base.coef, before)


@pytest.mark.parametrize("way", ["data", "in place", "a row of data"])
def test_writing_to_a_scale_in_a_forward_pass_is_refused(way):
    class Scaled(KANLinear):
        def forward(self, x):
            with torch.no_grad():
                written(self, "spline_scaler")[way]()
            return super().forward(x)

    model, _ = adapt(
        Scaled(4, 3),
        coefficients={"spline_weight": {"layout": "o i d", "scale": "spline_scaler", "scale_layout": "o i"}},
    )
    with pytest.raises(TypeError, match="would write"):
        model(X)


def test_what_is_read_is_a_tensor_like_any_other():
    model, layer = adapt(ChebyKANLayer(4, 3, 2))
    values = layer.cheby_coeffs
    expected = layer.base_layer.cheby_coeffs + layer.get_delta_weight("default")
    assert_equal(values, expected, 0)
    copy = values.detach().clone()
    copy.zero_()
    assert type(copy) is type(values * 2) is type(values.sum()) is torch.Tensor
    assert_equal(layer.cheby_coeffs, expected, 0)
    (values.square().sum()).backward()
    assert all(factor.grad.any() for factor in layer.tucker("default").tensors())
    assert values.detach().numpy().shape == (4, 3, 3)


def test_methods_of_the_base_layer_write_to_the_base():
    class Rewriting(Layer):
        def twice(self):
            self.coef.data *= 2

    model, layer = adapt(Rewriting(), coefficients={"coef": "i o d"})
    before = layer.base_layer.coef.clone()
    with pytest.raises(TypeError, match="would write to adapted coefficients"):
        layer.twice()
    assert_equal(layer.base_layer.coef, before, 0)
    layer.base_layer.twice()
    assert_equal(layer.base_layer.coef, 2 * before, 0)
