"""One layer's mathematics: values, gradients, merging, dtypes, for every layout, against formulas written by hand."""

import copy
import pickle

import pytest
import torch
from conftest import assert_different, assert_equal, within
from layer_table import LAYERS, MODELS, config, lotra_layers, make, randomize
from peft import get_peft_model
from rounding import rounding_of

from peft_lotra.testing import dense_model

all_cases = pytest.mark.parametrize("name", MODELS)
case_and_dtype = pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name in MODELS for dtype in LAYERS[name].dtypes]
)


def adapted(name, dtype=torch.float64, **kwargs):
    """The base, an adapted copy with a core that is not zero, and an input."""
    base, x = make(name, dtype)
    model = get_peft_model(copy.deepcopy(base), config(name, **kwargs))
    randomize(model)
    return base, model, x


@case_and_dtype
def test_a_fresh_adapter_changes_nothing(name, dtype):
    base, x = make(name, dtype)
    model = get_peft_model(copy.deepcopy(base), config(name))
    assert all(not layer.lotra_core["default"].any() for layer in lotra_layers(model).values())
    assert all(layer.lotra_U1["default"].any() for layer in lotra_layers(model).values())
    assert_equal(model(x), base(x), 0)


@all_cases
def test_init_weights_false_is_not_the_identity(name):
    base, x = make(name)
    model = get_peft_model(copy.deepcopy(base), config(name, init_weights=False))
    assert_different(model(x), base(x))


@all_cases
def test_output_is_that_of_the_dense_formula(name):
    base, model, x = adapted(name, alpha=0.7)
    oracle = dense_model(base, model)
    assert_different(model(x), base(x))
    assert_equal(model(x), oracle(x))


@all_cases
def test_gradients_are_those_of_the_dense_formula(name):
    base, model, x = adapted(name, alpha=0.7)
    for layer in lotra_layers(model).values():
        assert all(factor.requires_grad for factor in layer.tucker("default").tensors())
    factors = [factor for layer in lotra_layers(model).values() for factor in layer.tucker("default").tensors()]
    x.requires_grad_()
    weights = torch.randn(8, 2, dtype=x.dtype)
    actual = torch.autograd.grad((model(x) * weights).sum(), [x, *factors])
    expected = torch.autograd.grad((dense_model(base, model)(x) * weights).sum(), [x, *factors])
    for a, e in zip(actual, expected, strict=True):
        assert e.abs().max() > 0
        assert_equal(a, e)


@all_cases
def test_second_derivatives_are_those_of_the_dense_formula(name):
    """What a physics-informed loss needs: the factors' gradient of a derivative by the input."""
    base, model, x = adapted(name)
    factors = [factor for layer in lotra_layers(model).values() for factor in layer.tucker("default").tensors()]
    x.requires_grad_()

    def gradients(net):
        (slope,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), factors)

    for a, e in zip(gradients(model), gradients(dense_model(base, model)), strict=True):
        assert e.abs().max() > 0
        assert_equal(a, e, 1e-9)


@all_cases
def test_only_the_adapter_is_trained(name):
    _, model, x = adapted(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {key for key in before if ".lotra_" in key}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == trainable


@case_and_dtype
def test_merge_and_unmerge(name, dtype):
    base, model, x = adapted(name, dtype)
    rounding, y = rounding_of(base, model, x), model(x)
    rounding.check(y)
    if dtype in (torch.float32, torch.float64):
        assert_different(y, base(x))
    model.merge_adapter()
    assert all(layer.merged for layer in lotra_layers(model).values())
    rounding.check(model(x))
    with model.disable_adapter():  # unmerges, as in PEFT
        assert_equal(model(x), base(x), 0)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_equal(model(x), y, 0)
    for key, value in base.state_dict().items():
        found = [v for k, v in model.get_base_model().state_dict().items() if k.replace(".base_layer", "") == key]
        assert len(found) == 1
        assert_equal(found[0], value, 0)


@case_and_dtype
def test_merge_and_unload_gives_the_class_of_the_base(name, dtype):
    base, model, x = adapted(name, dtype)
    rounding = rounding_of(base, model, x)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(base)
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]
    assert merged.state_dict().keys() == base.state_dict().keys()
    rounding.check(merged(x))


@all_cases
def test_unload_gives_the_base_back(name):
    base, model, x = adapted(name)
    assert_different(model(x), base(x))
    unloaded = model.unload()
    assert [type(module) for module in unloaded.modules()] == [type(module) for module in base.modules()]
    assert_equal(unloaded(x), base(x), 0)


@all_cases
def test_active_adapters_add_up(name):
    base, model, x = adapted(name)
    model.add_adapter("other", config(name, r=1, alpha=0.5))
    randomize(model, "other")
    single = model(x)
    model.base_model.set_adapter(["default", "other"])
    assert_different(model(x), single)
    assert_equal(model(x), dense_model(base, model)(x))
    # one merged, the other not: both still count
    both = model(x)
    model.merge_adapter(["other"])
    assert_equal(model(x), both)
    model.unmerge_adapter()
    assert_equal(model(x), both)


@all_cases
def test_adapter_dtype_and_shapes(name):
    _, model, _ = adapted(name)
    for layer in lotra_layers(model).values():
        n, m, n_d = layer.spec.layout.canonical_shape
        ranks = [size if r is None else r for r, size in zip(layer.r["default"], (n, m, n_d), strict=True)]
        core, *factors = (tuple(f.shape) for f in layer.tucker("default").tensors())
        assert core == tuple(ranks)
        assert factors == [(size, r) for size, r in zip((n, m, n_d), layer.r["default"], strict=True) if r is not None]
        assert (layer.in_features, layer.out_features) == (n, m)
        assert all(f.dtype == torch.float64 for f in layer.tucker("default").tensors())


def test_adapters_of_16_bit_bases_are_kept_in_fp32_unless_told_otherwise():
    for autocast, expected in [(True, torch.float32), (False, torch.bfloat16)]:
        base, x = make("ChebyKAN", torch.bfloat16)
        model = get_peft_model(copy.deepcopy(base), config("ChebyKAN"), autocast_adapter_dtype=autocast)
        randomize(model)
        layer = next(iter(lotra_layers(model).values()))
        assert {f.dtype for f in layer.tucker("default").tensors()} == {expected}
        y = model(x)
        assert y.dtype == torch.bfloat16
        assert_different(y, base(x))
        rounding_of(base, model, x).check(y)


@all_cases
def test_deepcopy_and_pickle(name):
    if name == "pykan":
        pytest.skip("MultKAN holds lambdas and cannot be pickled, adapted or not")
    _, model, x = adapted(name)
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(twin(x), y, 0)
        randomize(twin)
        assert_different(twin(x), y)
    assert_equal(model(x), y, 0)


def test_deepcopy_of_pykan():
    _, model, x = adapted("pykan")
    assert_equal(copy.deepcopy(model)(x), model(x), 0)


def test_autocast():
    base, model, x = adapted("fast-kan", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, rounding = model(x), rounding_of(base, model, x, dtype=torch.bfloat16)
    assert_different(y.float(), base(x))
    rounding.check(y)


def test_a_zero_scale_survives_merging():
    """efficient-kan's scaler may be zero on pruned edges; merging revives them by the update, unmerging restores."""
    base, x = make("efficient-kan")
    base.layers[0].spline_scaler.data[1] = 0
    model = get_peft_model(copy.deepcopy(base), config("efficient-kan"))
    randomize(model)
    y = model(x)
    model.merge_adapter()
    assert_equal(model(x), y)
    model.unmerge_adapter()
    assert_equal(model.unload()(x), base(x), 0)


def test_the_update_has_the_rank_asked_for_on_effective_coefficients():
    """Not on the stored parameter, which the scaler would give full rank."""
    base, model, _ = adapted("efficient-kan", r=1)
    merged = model.merge_and_unload()
    change = merged.layers[0].scaled_spline_weight - base.layers[0].scaled_spline_weight
    for mode in range(3):
        singular = torch.linalg.svdvals(change.movedim(mode, 0).flatten(1))
        assert singular[0] > 1e-2
        assert (singular[1:] < within(1e-12)).all()
    assert (merged.layers[0].spline_scaler == 1).all()


def test_a_parameter_shared_with_the_outside_of_forward_is_untouched():
    """After forward, also one that raises, the layer has its own parameter again."""
    _, model, x = adapted("ChebyKAN")
    layer = next(iter(lotra_layers(model).values()))
    parameter = layer.base_layer._parameters["cheby_coeffs"]
    model(x)
    with pytest.raises(TypeError, match="tanh"):
        model(None)
    assert layer.base_layer.cheby_coeffs is parameter
    with model.disable_adapter():
        assert layer.cheby_coeffs is parameter


def test_unknown_attributes_come_from_the_base_layer():
    _, model, x = adapted("efficient-kan")
    layer = lotra_layers(model)["layers.0"]
    assert layer.grid_size == 5
    assert layer.b_splines(x).shape == (8, 3, 8)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        layer.nothing  # noqa: B018
    assert not hasattr(layer, "_hf_hook")


@pytest.mark.parametrize(("name", "method"), [("efficient-kan", "update_grid"), ("pykan", "update_grid_from_samples")])
def test_rewriting_coefficients_under_an_adapter_is_refused(name, method):
    _, model, x = adapted(name)
    layer = next(iter(lotra_layers(model).values()))
    before = model(x)
    with pytest.raises(
        RuntimeError, match=f"`{method}` would rewrite coefficients under a LoTRA adapter.*merge_and_unl"
    ):
        getattr(layer, method)(x)
    assert_equal(model(x), before, 0)
    merged = model.merge_and_unload()
    getattr(merged.get_submodule("layers.0" if name == "efficient-kan" else "act_fun.0"), method)(x)


@pytest.mark.parametrize("ranks", [(0, 1, 1), (1, 1, 9), (4, 1, 1)])
def test_update_layer_refuses_ranks_outside_the_modes(ranks):
    _, model, _ = adapted("efficient-kan")
    layer = lotra_layers(model)["layers.0"]
    with pytest.raises(ValueError, match=r"up to the modes \(3, 5, 8\) of spline_weight"):
        layer.update_layer("other", ranks)
    assert "other" not in layer.lotra_core
    assert "other" not in layer.r


def test_methods_and_readers_of_the_layer_see_the_adapted_coefficients():
    """efficient-kan's regularisation loss, pykan's: what is trained is what is regularised."""
    base, model, _ = adapted("efficient-kan, no scaler")
    assert_different(model.regularization_loss(), base.regularization_loss())
    layer = lotra_layers(model)["layers.0"]
    layer.lotra_core["default"].grad = None
    loss = model.regularization_loss()
    loss.backward()
    assert layer.lotra_core["default"].grad.any()
    assert_different(layer.spline_weight, base.layers[0].spline_weight)
    with model.disable_adapter():
        assert_equal(model.regularization_loss(), base.regularization_loss(), 0)
        assert_equal(layer.spline_weight, base.layers[0].spline_weight, 0)
    assert_equal(model.merge_and_unload().regularization_loss(), loss)


def test_multkan_goes_on_working_around_adapted_layers():
    base, model, x = adapted("pykan")
    kan = model.get_base_model()
    model(x)
    base(x)
    arguments = ("edge_forward_spline_n", 1.0, 2.0, 1.0, 1.0)
    regularisation = kan.get_reg(*arguments)
    assert_different(regularisation, base.get_reg(*arguments))
    core = lotra_layers(model)["act_fun.0"].lotra_core["default"]
    assert torch.autograd.grad(regularisation, core)[0].any()
    kan.attribute()
    kan.prune_edge(log_history=False)  # masks edges in place
    masked = model(x)
    assert_equal(model.merge_and_unload()(x), masked)
