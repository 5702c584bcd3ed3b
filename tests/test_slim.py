"""KANs whose coefficients are Tucker factors alone."""

import copy
import io
import re

import pytest
import torch
from conftest import FULLGRAPH, assert_different, assert_equal, assert_mean
from kan_layers import KAN, ChebyKAN, ConvKANLayer, FastKAN, PackedKANLayer, TwoTensorKANLayer
from layer_table import LAYERS, MODELS, lotra_layers, make
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_lotra import LoTRAConfig, slim_kan
from peft_lotra.analysis import effective_coefficients
from peft_lotra.testing import dense_model
from peft_lotra.tucker.decomposition import decompose


def zeroed(name, base):
    """A copy of a model with coefficients zero."""
    model = copy.deepcopy(base)
    for key in effective_coefficients(base, LAYERS[name].coefficients(3)):
        model.get_parameter(key).data.zero_()
    return model


def dense_parameters(model):
    """The coefficient parameters of a PEFT model by name."""
    layers = lotra_layers(model)
    return {name: layer._stored(layer.spec.parameter) for name, layer in layers.items()}


def assert_empty(model):
    for parameter in dense_parameters(model).values():
        assert parameter.untyped_storage().nbytes() == parameter.element_size()
        assert not parameter.requires_grad
        assert not parameter.any()


@pytest.mark.parametrize("name", MODELS)
def test_the_coefficients_are_the_factors(name, tmp_path):
    base, x = make(name)
    pristine = copy.deepcopy(base)
    with torch.no_grad():  # pykan keeps activations, and with a graph they cannot be copied
        model = slim_kan(base, r=(2, 2, 3), coefficients=dict(LAYERS[name].coefficients(3)))
        assert_empty(model)
        y, zero = model(x), zeroed(name, pristine)
        assert_different(y, zero(x))
        assert_equal(y, dense_model(zeroed(name, pristine), model)(x))
        with model.disable_adapter():
            assert_equal(model(x), zero(x))

        model.save_pretrained(tmp_path)
        assert all(".lotra_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
        torch.manual_seed(5)
        loaded = PeftModel.from_pretrained(copy.deepcopy(pristine), tmp_path)
        assert_empty(loaded)
        assert_equal(loaded(x), y, 0)

        model.merge_adapter(safe_merge=True)
        assert_equal(model(x), y)
        model.unmerge_adapter()
        assert_empty(model)
        assert_equal(model(x), y, 0)
        merged = model.merge_and_unload()
        assert [type(module) for module in merged.modules()] == [type(module) for module in pristine.modules()]
        assert_equal(merged(x), y)
        merged.load_state_dict(pristine.state_dict())  # dense tensors, which can be written to
        assert_equal(merged(x), pristine(x), 0)


def test_load_without_memory(tmp_path):
    model, x = slim_kan(ChebyKAN([3, 4, 2]), r=2), torch.randn(5, 3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(ChebyKAN([3, 4, 2]), tmp_path, low_cpu_mem_usage=True, is_trainable=True)
    assert_empty(loaded)
    assert_equal(loaded(x), model(x), 0)
    loaded(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in loaded.parameters() if p.requires_grad)


@pytest.mark.parametrize("alpha", [1.0, -0.5])
@pytest.mark.parametrize("ranks", [(2, 3, 2), (8, 8, 4)])
def test_variance_is_that_of_the_layers_own_initialisation(ranks, alpha):
    """E A[i, o, d]² = mean over i, o of the own A[i, o, d]², over many draws."""
    own = ChebyKAN([8, 8])
    coefficients = own.layers[0].cheby_coeffs
    coefficients.data *= torch.tensor([1, 1 / 2, 1 / 4, 0])
    expected = coefficients.detach().square().mean((0, 1))
    model = slim_kan(own, r=ranks, alpha=alpha)
    (layer,) = lotra_layers(model).values()
    squares = []
    for _ in range(1000):
        layer.reset_lotra_parameters("default")
        squares.append(layer.get_delta_weight("default").detach().square().mean((0, 1)))
    assert expected[3] == 0
    assert_mean(squares, expected)


@pytest.mark.parametrize(
    ("base", "layouts"),
    [
        (KAN([6, 6, 4]), {}),
        (nn.Sequential(ConvKANLayer(6, 6)), {"spline_conv.weight": {"layout": "o (i d) h w", "sizes": {"d": 4}}}),
    ],
)
def test_variance_with_scale_and_kernel_axes(base, layouts):
    own = effective_coefficients(base, layouts)
    model = slim_kan(copy.deepcopy(base), r=(3, 2, 2), coefficients=layouts)
    for coefficients, layer in zip(own.values(), lotra_layers(model).values(), strict=True):
        energies = []
        for _ in range(300):
            layer.reset_lotra_parameters("default")
            energies.append(layer.get_delta_weight("default").detach().square().sum())
        assert_mean(energies, coefficients.square().sum())


def test_compression_of_a_trained_kan():
    base, x = ChebyKAN([6, 7, 5]), torch.randn(9, 6)
    before = effective_coefficients(base)
    dense = copy.deepcopy(base)
    model = slim_kan(base, init="hosvd", r=(3, 4, 2), alpha=2.0)
    assert_empty(model)
    after = effective_coefficients(model.merge_and_unload())
    for name, own in before.items():
        assert_equal(after[name], decompose(own, (3, 4, 2)).dense())
    assert_different(base(x), dense(x))
    dense, x = dense.double(), x.double()
    full = slim_kan(copy.deepcopy(dense), init="hosvd", rank_pattern={n: a.shape[:3] for n, a in before.items()})
    assert_equal(full(x), dense(x))


def test_training_from_scratch():
    model, x = slim_kan(ChebyKAN([2, 8, 1]), r=3), torch.rand(64, 2) * 2 - 1
    y = torch.sin(3 * x[:, :1]) * x[:, 1:]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        losses.append(nn.functional.mse_loss(model(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]
    assert_empty(model)


def test_copies_and_casts_stay_empty():
    model, x = slim_kan(FastKAN([3, 4, 2]), r=2), torch.randn(5, 3)
    y = model(x).detach()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert_empty(twin)
        assert_equal(twin(x), y, 0)
    assert_different(model.float()(x.float()), torch.zeros_like(y).float())
    assert_empty(model)
    model.merge_adapter()
    twin = copy.deepcopy(model).double()
    assert (twin(x) - y).abs().max() < 1e-3 * y.abs().max()  # it has been fp32 in between


def test_compile():
    model, x = slim_kan(ChebyKAN([3, 4, 2]), r=2), torch.randn(5, 3)
    assert_equal(torch.compile(model, backend="eager", fullgraph=FULLGRAPH)(x), model(x))
    assert_empty(model)


def test_distributed_data_parallel():
    """Even a single process is told to write the parameters that it has broadcast."""
    model, x = slim_kan(ChebyKAN([3, 4, 2]), r=2), torch.randn(5, 3)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        assert_equal(parallel(x), model(x), 0)
        assert_empty(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(assign):
    model, other, x = slim_kan(ChebyKAN([3, 4, 2]), r=2), slim_kan(ChebyKAN([3, 4, 2]), r=2), torch.randn(5, 3)
    state = copy.deepcopy(model.state_dict())
    assert_different(other(x), model(x))
    other.load_state_dict(state, assign=assign)
    assert_equal(other(x), model(x), 0)
    assert_empty(other)
    state["base_model.model.layers.1.base_layer.cheby_coeffs"] = torch.ones(4, 2, 4)
    with pytest.raises(RuntimeError, match="layers.1.base_layer.cheby_coeffs is not zero in the state dict"):
        other.load_state_dict(state, assign=assign)
    assert_empty(other)


def test_unload_gives_a_kan_of_zero_coefficients():
    base = ChebyKAN([3, 4, 2])
    state = copy.deepcopy(base.state_dict())
    unloaded = slim_kan(base, r=2).unload()
    assert not any(parameter.any() for parameter in unloaded.parameters())
    unloaded.load_state_dict(state)
    assert all(a.any() for a in effective_coefficients(unloaded).values())


def test_several_tensors_and_several_adapters(tmp_path):
    layouts = {"rbf_weight": {"layout": "(i d) o", "sizes": {"d": 5}}, "cheby_weight": "i o d"}
    base, x = nn.Sequential(TwoTensorKANLayer(3, 4), TwoTensorKANLayer(4, 2)), torch.randn(5, 3)
    pristine = copy.deepcopy(base)
    model = slim_kan(base, r=2, coefficients=layouts)
    assert_empty(model)
    first = model(x)
    model.add_adapter("second", LoTRAConfig(r=1, slim=True, coefficients=layouts))
    assert_equal(model(x), first, 0)
    model.set_adapter("second")
    assert_different(model(x), first)
    model.set_adapter("default")
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(pristine, tmp_path)
    assert_equal(loaded(x), first, 0)
    assert_equal(loaded.merge_and_unload()(x), first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": "svd"}, "`init` should be 'random' or 'hosvd' but the value passed is 'svd'"),
        ({"r": 9}, "`r`=9 is above the modes"),
        ({"r": 1, "alpha": 0.0}, "`slim`=True with `alpha` 0 for layers.0.cheby_coeffs"),
    ],
)
def test_errors_leave_the_model_alone(arguments, message):
    base, x = ChebyKAN([3, 4, 2]), torch.randn(5, 3)
    y = base(x)
    with pytest.raises(ValueError, match=re.escape(message)):
        slim_kan(base, **arguments)
    assert_equal(base(x), y, 0)
    assert not lotra_layers(base)


def test_errors_of_coefficients():
    zero, broken = ChebyKAN([3, 2]), ChebyKAN([3, 2])
    zero.layers[0].cheby_coeffs.data.zero_()
    broken.layers[0].cheby_coeffs.data[0] = torch.nan
    packed = {"weight": {"layout": "o (i d)", "sizes": {"d": 6}, "slice": ":, :18"}}
    for model, kwargs, message in (
        (zero, {}, "layers.0.cheby_coeffs is zero, so there is no variance to start from"),
        (broken, {}, "layers.0.cheby_coeffs has NaN or infinity"),
        (nn.Sequential(PackedKANLayer(3, 2)), {"coefficients": packed}, "`slim`=True: 0.weight holds more than"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            slim_kan(model, r=1, **kwargs)
        assert not lotra_layers(model)
    with pytest.raises(ValueError, match="`slim` should be True or False but the value passed is 1"):
        LoTRAConfig(slim=1)


@pytest.mark.parametrize("slim", [False, True])
def test_slim_and_other_adapters_do_not_mix(slim):
    model, x = get_peft_model(ChebyKAN([3, 4, 2]), LoTRAConfig(r=1, slim=slim)), torch.randn(5, 3)
    y = model(x)
    message = f"`slim`={not slim}, but layers.0.cheby_coeffs has an adapter with `slim`={slim}"
    with pytest.raises(ValueError, match=message):
        model.add_adapter("other", LoTRAConfig(r=1, slim=not slim))
    assert list(model.peft_config) == ["default"]
    assert_equal(model(x), y, 0)
