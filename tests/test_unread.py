"""An adapter that has no effect is an error: layers that do not read what stands for their coefficients."""

import pytest
import torch
import torch.nn.functional as F
from conftest import FULLGRAPH, assert_different, assert_equal
from kan_layers import ChebyKANLayer, FastKANLayer, KANLinear, chebyshev
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune

from peft_lotra import LoTRAConfig, infer_coefficients

X = torch.linspace(-0.9, 0.9, 20).reshape(5, 4)
COEFFICIENTS = {"coef": "i o d"}


class Layer(nn.Module):
    """y[b, o] = Σ_id T_d(x[b, i]) · coef[i, o, d]; `read` says how coef is got at."""

    def __init__(self, read=lambda layer: layer.coef):
        super().__init__()
        self.coef = nn.Parameter(torch.randn(4, 3, 5))
        self.read = read
        self.kept = None

    def forward(self, x):
        return torch.einsum("bid,iod->bo", chebyshev(x, 4), self.read(self))


def kept(layer):
    """Coefficients that are computed once."""
    if layer.training or layer.kept is None:
        layer.kept = 1 * layer.coef
    return layer.kept


class Lazy(Layer):
    def forward(self, x):
        return (super(Lazy, self).forward(row[None]) for row in x)


class Alias(Layer):
    """As qkan's QKANLayer, which keeps the parameter under a second name."""

    def __init__(self):
        super().__init__(lambda layer: layer.names["theta"])
        self.names = {"theta": self.coef}


PAST = {
    "its dictionary": lambda: Layer(lambda layer: layer._parameters["coef"]),
    "named_parameters": lambda: Layer(lambda layer: dict(layer.named_parameters())["coef"]),
    "parameters": lambda: Layer(lambda layer: next(layer.parameters())),
    "state_dict": lambda: Layer(lambda layer: layer.state_dict(keep_vars=True)["coef"]),
    "the shape alone": lambda: Layer(lambda layer: torch.ones(layer.coef.shape)),
    "a view that is dropped": lambda: Layer(lambda layer: (layer.coef.flatten(), torch.ones(4, 3, 5))[1]),
    "an alias": Alias,
    "a generator": Lazy,
}


def adapt(layer, **kwargs):
    return get_peft_model(nn.Sequential(layer), LoTRAConfig(r=2, init_weights=False, **kwargs))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", PAST)
def test_a_pass_that_does_not_use_the_coefficients_is_an_error(name, mixed, training):
    model = adapt(PAST[name](), coefficients=COEFFICIENTS).train(training and not mixed)
    kwargs = {"adapter_names": ["default"] * 4 + ["__base__"]} if mixed else {}
    with pytest.raises(
        RuntimeError, match=r"of (Layer|Lazy|Alias) did not use `coef`.*verify_coefficients.*allow_unread"
    ):
        model(X, **kwargs)
    with model.disable_adapter():  # then there is nothing to use
        model(X)
    if not mixed:
        model.merge_adapter()
        model(X)


def test_a_pass_that_uses_them_is_none():
    assert_different(adapt(Layer(), coefficients=COEFFICIENTS)(X), torch.zeros(5, 3))


@pytest.mark.skipif(not FULLGRAPH, reason="older versions of torch run these layers between graphs")
def test_a_compiled_pass_that_does_not_use_the_coefficients_is_an_error():
    model = adapt(PAST["its dictionary"](), coefficients=COEFFICIENTS)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="did not use `coef`"):
        torch.compile(model, backend="eager")(X)


def test_coefficients_that_a_layer_keeps_in_eval_mode_are_an_error():
    model = adapt(Layer(kept), coefficients=COEFFICIENTS)
    y = model(X)
    model.eval()
    with pytest.raises(RuntimeError, match="keeps a copy"):
        model(X)
    assert_different(y, torch.zeros(5, 3))


@pytest.mark.filterwarnings("ignore:.*was trained on other coefficients")
def test_a_layer_with_branches_says_so(tmp_path):
    """The config is saved, so that the adapter loads as it was."""
    branch = Layer(lambda layer: layer.coef if layer.training else torch.zeros(4, 3, 5))
    model = adapt(branch, coefficients=COEFFICIENTS, allow_unread=True)
    assert_different(model(X), torch.zeros(5, 3))
    assert_equal(model.eval()(X), torch.zeros(5, 3))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(nn.Sequential(Layer(branch.read)), tmp_path).eval()
    assert_equal(loaded(X), torch.zeros(5, 3))


@pytest.mark.parametrize(
    ("layer", "parametrization"),
    [
        (KANLinear, "weight_norm"),
        (KANLinear, "spectral_norm"),
        (ChebyKANLayer, "weight_norm"),
        (ChebyKANLayer, "orthogonal"),
        (FastKANLayer, "spectral_norm"),
        (FastKANLayer, "orthogonal"),
    ],
)
def test_a_parametrization_after_the_adapter_is_an_error(layer, parametrization):
    model = adapt(layer(4, 3, *[2] * (layer is ChebyKANLayer)))
    y = model(X)
    base = model.base_model.model[0].base_layer
    owner = base.spline_linear if layer is FastKANLayer else base
    name = {KANLinear: "spline_weight", ChebyKANLayer: "cheby_coeffs", FastKANLayer: "weight"}[layer]
    getattr(parametrizations, parametrization)(owner, name)
    with pytest.raises(RuntimeError, match=rf"did not use `(spline_linear\.)?{name}`"):
        model(X)
    assert_different(y, torch.zeros(5, 3))


COMPUTED = {
    "weight_norm": (parametrizations.weight_norm, torch.nn.utils.parametrize.remove_parametrizations),
    "spectral_norm": (parametrizations.spectral_norm, torch.nn.utils.parametrize.remove_parametrizations),
    "pruning": (lambda owner, name: prune.l1_unstructured(owner, name, 0.3), prune.remove),
}


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("layer", [KANLinear, FastKANLayer])
def test_coefficients_that_are_computed_before_are_refused_with_the_way_out(layer, name):
    base = layer(4, 3).eval()  # in training, spectral_norm goes on changing
    owner, parameter = (base.spline_linear, "weight") if layer is FastKANLayer else (base, "spline_weight")
    compute, remove = COMPUTED[name]
    compute(owner, parameter)
    y = base(X)
    with pytest.raises(ValueError, match=rf"{parameter}` of the KAN layer 0 .* is computed from other tensors"):
        adapt(base)
    remove(owner, parameter)
    assert_equal(base(X), y)
    assert_different(adapt(base)(X), y)


def test_a_scale_that_is_computed_is_refused():
    """The stand-in for it could not be seen, and the scale would count twice."""
    layer = KANLinear(4, 3)
    parametrizations.weight_norm(layer, "spline_scaler")
    with pytest.raises(ValueError, match="`spline_scaler` of the KAN layer 0"):
        adapt(layer)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_coefficients_that_lora_wraps_are_refused():
    model = get_peft_model(nn.Sequential(FastKANLayer(4, 3)), LoraConfig(target_modules=["spline_linear"]))
    with pytest.raises(ValueError, match=r"`spline_linear\.weight` .* another adapter"):
        adapt(model.base_model.model[0])


class Parent(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.l = FastKANLayer(4, 3)
        self.use = use

    def forward(self, x):
        return self.use(self.l, self.l.rbf(self.l.layernorm(x)).flatten(1))


@pytest.mark.parametrize(
    "use",
    [
        lambda layer, basis: F.linear(basis, layer.spline_linear.weight),
        lambda layer, basis: layer.spline_linear(basis),
    ],
)
def test_a_parent_that_goes_past_the_layer_is_told(use):
    base = Parent(use)
    y = base(X)
    model = get_peft_model(base, LoTRAConfig(r=2, init_weights=False))
    with pytest.raises(RuntimeError, match=r"`spline_linear` of a FastKANLayer holds its adapted coefficients"):
        model(X)
    with model.disable_adapter():
        assert_equal(model(X), y)
    inner = {"spline_linear.weight": {"layout": "o (i d)", "sizes": {"d": 8}, "layer": "l.spline_linear"}}
    assert_different(get_peft_model(Parent(use), LoTRAConfig(r=2, coefficients=inner))(X), torch.zeros(5, 3))


def test_what_lies_in_the_layer_is_seen_where_no_adapter_acts():
    model = adapt(FastKANLayer(4, 3))
    layer = model.base_model.model[0]
    with pytest.raises(RuntimeError, match=r"read `base_layer\.spline_linear` if the base is meant"):
        _ = layer.spline_linear
    assert layer.base_layer.spline_linear.weight.shape == (3, 32)
    assert layer.layernorm is layer.base_layer.layernorm
    with model.disable_adapter():
        assert layer.spline_linear is layer.base_layer.spline_linear


class ChebyKANAlias(ChebyKANLayer):
    def __init__(self, n, m, degree):
        super().__init__(n, m, degree)
        self.names = [self.cheby_coeffs]

    def forward(self, x):
        return torch.einsum("bid,iod->bo", chebyshev(x, 2), self.names[0])


def test_registered_layers_are_run_once_by_infer_coefficients():
    model = nn.Sequential(ChebyKANLayer(4, 3, 2), ChebyKANAlias(3, 3, 2))
    found = infer_coefficients(model, X)
    assert list(found) == ["0.cheby_coeffs"]
    assert "registered, but a pass of the layer does not use it" in str(found)
