"""Gradient-aligned initialisation, against gradients of the plain base and full singular value decompositions."""

import copy

import pytest
import torch
from conftest import assert_different, assert_equal, parts
from kan_layers import BatchNormKANLayer, ChebyKAN, ChebyKANLayer
from launching import fork
from layer_table import MODELS, config, lotra_layers, make, randomize
from peft import get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, initialize_lotra_weights
from peft_lotra.coefficients import CoefficientSpec

FACTORS = ("lotra_U1", "lotra_U2", "lotra_U3")


def loss_of(model, x):
    return (model(x) - torch.sin(3 * x[:, :2])).square().mean()


def initialize(model, x, **kwargs):
    initialize_lotra_weights(model, lambda: loss_of(model, x).backward(), progressbar=False, **kwargs)


def oracle_gradients(base, model, x):
    """∂L/∂A of the plain base by layer; A is the product with the scale."""
    gradients = {}
    for path, adapted in lotra_layers(model).items():
        plain = copy.deepcopy(base)
        layer, spec = plain.get_submodule(path), adapted.spec
        owner, _, attribute = spec.parameter.rpartition(".")
        owner = layer.get_submodule(owner)
        coefficients = getattr(owner, attribute).detach()
        if spec.scale is not None:
            coefficients = coefficients * getattr(layer, spec.scale).detach().unsqueeze(-1)
            getattr(layer, spec.scale).data.fill_(1)
        coefficients.requires_grad_()
        del owner._parameters[attribute]
        setattr(owner, attribute, coefficients)
        (gradients[path],) = torch.autograd.grad(loss_of(plain, x), coefficients)
    return gradients


def canonical(layer, gradient):
    return CoefficientSpec.to_canonical(layer.spec, gradient)


def assert_same_span(vectors, expected):
    assert_equal(vectors.T @ vectors, torch.eye(vectors.shape[1], dtype=vectors.dtype))
    assert_equal(vectors @ vectors.T, expected @ expected.T, 1e-8)


@pytest.mark.parametrize("method", ["gradient", "gradient_hosvd"])
@pytest.mark.parametrize("name", MODELS)
def test_factors_are_the_leading_singular_vectors(name, method):
    base, _ = make(name)
    x = torch.rand(16, 3, dtype=torch.float64) * 1.8 - 0.9
    model = get_peft_model(copy.deepcopy(base), config(name))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    initialize(model, x, method=method)
    gradients = oracle_gradients(base, model, x)
    assert gradients.keys() == lotra_layers(model).keys()
    for path, layer in lotra_layers(model).items():
        gradient = canonical(layer, gradients[path])
        for mode, factor in enumerate(FACTORS):
            vectors = parts(layer.tucker("default"))[mode + 1]
            if vectors is None:  # a whole mode
                continue
            old = before[f"base_model.model.{path}.{factor}.default"]
            if method == "gradient" and factor != "lotra_U2":
                assert_equal(vectors, old, 0)
                continue
            assert_different(vectors, old)
            u, values, _ = torch.linalg.svd(gradient.movedim(mode, 0).flatten(1), full_matrices=False)
            rank = vectors.shape[1]
            assert values[rank - 1] > 1e-4 * values[0]  # the test would say nothing of directions that do not exist
            assert_same_span(vectors, u[:, :rank])
    assert_equal(model(x), base(x), 0)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert all(".lotra_U" in key for key in changed)


def test_one_sample_and_rank_one_is_the_rule_of_the_source():
    """U2 = v/‖v‖ with v the gradient of the loss by the layer's output."""
    base = nn.Sequential(ChebyKANLayer(3, 4, 3)).double()
    x, v = torch.rand(1, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    model = get_peft_model(base, LoTRAConfig(r=1))
    initialize_lotra_weights(model, lambda: (model(x) @ v).sum().backward(), progressbar=False)
    u = lotra_layers(model)["0"].lotra_U2["default"].squeeze(1)
    assert_equal(u * torch.sign(u @ v), v / v.norm())


def test_losses_add_up():
    base, x = make("ChebyKAN")
    both = get_peft_model(copy.deepcopy(base), config("ChebyKAN"))

    def train_step():
        (loss_of(both, x[:3]) * 3 / 8).backward()
        (loss_of(both, x[3:]) * 5 / 8).backward()

    initialize_lotra_weights(both, train_step, progressbar=False)
    whole = get_peft_model(copy.deepcopy(base), config("ChebyKAN"))
    initialize(whole, x)
    a, b = (lotra_layers(model)["layers.0"].lotra_U2["default"].detach() for model in (both, whole))
    assert_same_span(a, b)


def test_other_active_adapters_count():
    """The second adapter is aligned with the gradient at base + first adapter."""
    base, x = make("ChebyKAN")
    model = get_peft_model(copy.deepcopy(base), config("ChebyKAN"))
    randomize(model)
    model.add_adapter("second", config("ChebyKAN"))
    model.base_model.set_adapter(["default", "second"])
    y = model(x)
    initialize(model, x, adapter_name="second")
    assert_equal(model(x), y, 0)
    merged = copy.deepcopy(model)
    merged.base_model.set_adapter(["default"])
    gradients = oracle_gradients(merged.merge_and_unload(), model, x)
    layer = lotra_layers(model)["layers.0"]
    u = torch.linalg.svd(canonical(layer, gradients["layers.0"]).movedim(1, 0).flatten(1))[0]
    assert_same_span(layer.lotra_U2["second"].detach(), u[:, :2])


def test_missing_directions_are_filled():
    """One sample and an affine head give a gradient whose unfolding has rank 1."""
    base = nn.Sequential(ChebyKANLayer(3, 6, 3)).double()
    x = torch.rand(1, 3, dtype=torch.float64)
    model = get_peft_model(base, LoTRAConfig(r=(2, 4, 2)))
    initialize_lotra_weights(model, lambda: model(x).sum().backward(), progressbar=False)
    u = lotra_layers(model)["0"].lotra_U2["default"].detach()
    assert_equal(u.T @ u, torch.eye(4, dtype=u.dtype))
    assert_equal(u[:, 0].abs(), torch.full((6,), 6**-0.5, dtype=u.dtype))


class _Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.kan, self.dropout, self.head = BatchNormKANLayer(3, 4, 3), nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.dropout(self.kan(x)))


@pytest.mark.parametrize("fails", [False, True])
def test_everything_else_is_as_before(fails):
    model = get_peft_model(_Noisy(), LoTRAConfig(r=2, modules_to_save=["head"])).train()
    x = torch.randn(8, 3)
    loss_of(model, x).backward()
    model.base_model.model.kan.eval()

    def snapshot():
        gradients = {key: None if p.grad is None else p.grad.clone() for key, p in model.named_parameters()}
        return (
            {key: value.clone() for key, value in model.state_dict(keep_vars=False).items() if "lotra_U2" not in key},
            gradients,
            {key: p.requires_grad for key, p in model.named_parameters()},
            [module.training for module in model.modules()],
            [vars(module).keys() - {"_disable_adapters"} for module in model.modules()],
            torch.get_rng_state(),
        )

    def train_step():
        model.train()
        loss_of(model, x).backward()
        if fails:
            raise RuntimeError("on purpose")

    before = snapshot()
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            initialize_lotra_weights(model, train_step, progressbar=False)
    else:
        initialize_lotra_weights(model, train_step, progressbar=False)
    after = snapshot()
    for one, two in zip(before[:2], after[:2], strict=True):
        assert one.keys() == two.keys()
        assert all(v is two[k] is None if v is None else torch.equal(v, two[k]) for k, v in one.items())
    assert before[2:5] == after[2:5]
    assert torch.equal(before[5], after[5])


def failing_models():
    base, x = make("ChebyKAN")

    def fresh():
        return get_peft_model(copy.deepcopy(base), config("ChebyKAN"))

    trained, merged = fresh(), fresh()
    randomize(trained)
    merged.merge_adapter()
    return {
        "no adapter": (fresh(), {"adapter_name": "other"}, r"`adapter_name` 'other'.*\['default'\]"),
        "method": (fresh(), {"method": "svd"}, "`method` should be one of .*gradient_hosvd.*, got 'svd'"),
        "trained": (trained, {}, "core that is not zero at .*: it has been trained"),
        "merged": (merged, {}, "has merged adapters: call `unmerge_adapter"),
        "nothing": (fresh(), {"step": lambda model: None}, "gave no gradient.*should call `backward"),
        "a loss": (
            fresh(),
            {"step": lambda model: loss_of(model, x)},
            "should call `backward.*, not return",
        ),
        "nan": (fresh(), {"step": lambda model: (model(x) * torch.nan).sum().backward()}, "is not finite"),
    }


@pytest.mark.parametrize("kind", ["no adapter", "method", "trained", "merged", "nothing", "a loss", "nan"])
def test_errors_change_nothing(kind):
    model, kwargs, message = failing_models()[kind]
    step = kwargs.pop("step", lambda model: None)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        initialize_lotra_weights(model, lambda: step(model), progressbar=False, **kwargs)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_train_step_takes_nothing_and_may_return_what_it_likes():
    base, x = make("ChebyKAN")
    model = get_peft_model(base, config("ChebyKAN"))
    with pytest.raises(TypeError, match=r"`train_step` should be a function without arguments.*takes the arguments"):
        initialize_lotra_weights(model, lambda model: loss_of(model, x).backward())
    with pytest.raises(TypeError, match=r"`train_step` should be a function without arguments.*passed is tensor"):
        initialize_lotra_weights(model, loss_of(model, x))

    def train_step(batch=x):
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    before = lotra_layers(model)["layers.0"].lotra_U2["default"].clone()
    initialize_lotra_weights(model, train_step, progressbar=False)
    assert_different(lotra_layers(model)["layers.0"].lotra_U2["default"], before)


def initialized_by_rank():
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    base = ChebyKAN([3, 5, 2]).double()
    torch.manual_seed(rank)  # nothing but the broadcast makes the processes agree
    model = get_peft_model(base, LoTRAConfig(r=(2, 4, 2)))
    x = torch.linspace(-0.9, 0.9, 24, dtype=torch.float64).reshape(8, 3)
    initialize(model, x[4 * rank : 4 * rank + 4])
    return [layer.tucker("default").map(torch.Tensor.detach).tensors() for layer in lotra_layers(model).values()]


@pytest.mark.processes
def test_processes_average_and_agree():
    first, second = fork(initialized_by_rank)
    torch.manual_seed(0)
    model = get_peft_model(ChebyKAN([3, 5, 2]).double(), LoTRAConfig(r=(2, 4, 2)))
    initialize(model, torch.linspace(-0.9, 0.9, 24, dtype=torch.float64).reshape(8, 3))
    for a, b in zip(sum(first, []), sum(second, []), strict=True):
        assert_equal(a, b, 0)
    assert_same_span(first[0][2], lotra_layers(model)["layers.0"].lotra_U2["default"].detach())
