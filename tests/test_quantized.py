"""Linear layers with quantized weights: the adapter beside them, in fp32, and what is refused."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_lotra import LoTRAConfig, at_task, fit_gauss_newton
from peft_lotra.coefficients import CoefficientSpec
from peft_lotra.layers.lotra import adapted_tensors
from peft_lotra.testing import assert_close, assert_differs

pytestmark = pytest.mark.usefixtures("fp32")

KAN = {"spline_linear.weight": {"layout": "o (i d)", "sizes": {"d": 6}}}


class _Dequantized(torch.autograd.Function):
    """x Wᵀ as bitsandbytes computes it: plain tensors only, and gradients by x alone."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.saved_tensors[0], None


class Linear8bit(nn.Linear):
    """As Linear8bitLt: int8 numbers of the weight's own shape, and a scale for each output."""

    def quantize(self):
        values = self.weight.detach()
        self.scale = values.abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((values / self.scale).round().to(torch.int8), requires_grad=False)
        return self

    def dequantized(self):
        return self.weight.float() * self.scale

    def forward(self, x):
        y = _Dequantized.apply(x, self.dequantized())
        return y if self.bias is None else y + self.bias


class Linear4bit(Linear8bit):
    """As Linear4bit: two numbers in each entry of uint8, in one column."""

    def quantize(self):
        values = self.weight.detach()
        self.scale = values.abs().amax() / 7
        nibbles = ((values / self.scale).round() + 8).to(torch.uint8).reshape(-1, 2)
        self.weight = nn.Parameter((nibbles[:, 0] * 16 + nibbles[:, 1])[:, None], requires_grad=False)
        return self

    def dequantized(self):
        packed = self.weight[:, 0]
        nibbles = torch.stack([packed // 16, packed % 16], dim=1)
        return (nibbles.float() - 8).reshape(self.out_features, self.in_features) * self.scale


class LinearFP8(Linear8bit):
    """As fp8 layers of transformers: numbers in fp8, and one scale."""

    def quantize(self):
        values = self.weight.detach()
        self.scale = values.abs().amax() / 448
        self.weight = nn.Parameter((values / self.scale).to(torch.float8_e4m3fn), requires_grad=False)
        return self


class KANLayer(nn.Module):
    """spline_linear(gaussians(x)) + base_linear(silu(x))."""

    def __init__(self, n, m, linear):
        super().__init__()
        self.register_buffer("grid", torch.linspace(-2, 2, 6))
        self.spline_linear = linear(6 * n, m, bias=False)
        self.base_linear = linear(n, m)

    def forward(self, x):
        return self.spline_linear(torch.exp(-((x[..., None] - self.grid) ** 2)).flatten(-2)) + self.base_linear(
            F.silu(x)
        )


@pytest.fixture(params=[Linear8bit, Linear4bit, LinearFP8])
def net(request):
    torch.manual_seed(0)
    net = nn.Sequential(KANLayer(4, 8, request.param), KANLayer(8, 2, request.param))
    for module in net.modules():
        if isinstance(module, Linear8bit):
            module.quantize()
    return net


def dense(net, model):
    """The network with the dequantized weights, and the updates added to them."""
    oracle = copy.deepcopy(net)
    for name, module in net.named_modules():
        if isinstance(module, Linear8bit):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.load_state_dict(
                {"weight": module.dequantized()} | ({} if module.bias is None else {"bias": module.bias})
            )
            oracle.set_submodule(name, linear)
    for name, layer in adapted_tensors(model).items():
        weight = oracle.get_parameter(name)
        weight.data += layer.get_delta_weight("default").detach()
    return oracle


X = torch.linspace(-1, 1, 28, dtype=torch.float32).reshape(7, 4)
CONFIGS = {"a KAN": {"coefficients": KAN}, "all linear layers": {"coefficients": KAN, "target_modules": "all-linear"}}


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_outputs_and_gradients_are_those_of_the_dequantized_sum(net, fields):
    model = get_peft_model(copy.deepcopy(net), LoTRAConfig(r=2, init_weights=False, **fields))
    assert len(adapted_tensors(model)) == (2 if len(fields) == 1 else 4)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    oracle = dense(net, model)
    x, z = X.clone().requires_grad_(), X.clone().requires_grad_()
    assert_close(model(x), oracle(z), 1e-5)
    assert_differs(model(x), net(x))
    model(x).square().sum().backward()
    oracle(z).square().sum().backward()
    assert_close(x.grad, z.grad, 1e-5)
    for name, layer in adapted_tensors(model).items():
        G = oracle.get_parameter(name).grad  # ∂/∂A, from which those of core and factors follow
        trained = [p for p in layer.parameters_of("default").values()]
        delta = layer.get_delta_weight("default")
        expected = torch.autograd.grad(delta, trained, G)
        for p, gradient in zip(trained, expected, strict=True):
            assert_close(p.grad, gradient, 1e-5)


def test_adapters_are_switched_saved_loaded_and_copied(net, tmp_path):
    model = get_peft_model(copy.deepcopy(net), LoTRAConfig(r=2, init_weights=False, coefficients=KAN))
    y = model(X)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)(X), y)
    assert torch.equal(copy.deepcopy(model)(X), y)
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(X), y)
    with model.disable_adapter():
        assert torch.equal(model(X), net(X))
    model.add_adapter("other", LoTRAConfig(r=2, init_weights=False, coefficients=KAN))
    names = ["default", "other", "__base__", "default", "other", "default", "other"]
    mixed = model.eval()(X, adapter_names=names)
    for name in ("default", "other"):
        model.set_adapter(name)
        rows = [k for k, own in enumerate(names) if own == name]
        assert_close(mixed[rows], model(X[rows]), 1e-5)
    base = model.unload()
    assert torch.equal(base(X), net(X))
    assert not any(module._forward_hooks for module in base.modules())


def test_a_task_for_each_sample(net):
    fields = {"family": {"lam": (0, 1)}, "family_degree": 1}
    model = get_peft_model(net, LoTRAConfig(r=2, init_weights=False, coefficients=KAN, **fields))
    lam = torch.linspace(0, 1, len(X))
    with at_task(model, lam=lam):
        y = model(X)
    for k in range(len(X)):
        with at_task(model, lam=lam[k].item()):
            assert_close(y[k], model(X[k : k + 1])[0], 1e-5)


def test_it_is_trained(net):
    model = get_peft_model(net, LoTRAConfig(r=2, coefficients=KAN))
    target = torch.stack([X.sum(1), X.prod(1)], dim=1)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(model(X), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_merging_is_refused_before_anything_changes(net):
    model = get_peft_model(net, LoTRAConfig(r=2, init_weights=False, coefficients=KAN))
    y, before = model(X), copy.deepcopy(model.state_dict())
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_adapter(safe_merge=True)):
        with pytest.raises(RuntimeError, match="`spline_linear.weight` of a Linear.* is quantized"):
            merge()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(X), y)


def test_packed_weights_are_refused():
    class Packed(nn.Module):
        """As torch's DynamicQuantizedLinear, whose `weight` is a method."""

        def weight(self):
            return torch.zeros(8, 24)

    net = nn.Sequential(KANLayer(4, 8, nn.Linear))
    net[0].spline_linear = Packed()
    with pytest.raises(ValueError, match="match no parameter of this model"):
        get_peft_model(net, LoTRAConfig(coefficients=KAN))
    with pytest.raises(ValueError, match="`spline_linear.weight` is packed by torch's quantization of a Packed"):
        CoefficientSpec.resolve(net[0], "spline_linear.weight", KAN["spline_linear.weight"])


def test_second_order_fits_are_refused_where_a_layer_has_first_order_gradients_only(net):
    model = get_peft_model(net, LoTRAConfig(r=2, coefficients=KAN))
    target = torch.stack([X.sum(1), X.prod(1)], dim=1)

    def residual(model, data):
        return model(data["x"]) - data["y"]

    with pytest.raises(ValueError, match="_Dequantized, a torch.autograd.Function without `setup_context`"):
        fit_gauss_newton(model, residual, {"x": X, "y": target}, iterations=20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchao(dtype):
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    net = nn.Sequential(KANLayer(4, 32, nn.Linear), KANLayer(32, 2, nn.Linear)).to(dtype)
    torchao.quantize_(net, torchao.Int8WeightOnlyConfig())
    model = get_peft_model(copy.deepcopy(net), LoTRAConfig(r=2, init_weights=False, coefficients=KAN))
    oracle = copy.deepcopy(net)
    for name, layer in adapted_tensors(model).items():
        owner = oracle.get_submodule(name.rpartition(".")[0])
        update = layer.get_delta_weight("default").detach()
        owner.weight = nn.Parameter((owner.weight.dequantize().float() + update).to(dtype))
    x = X.to(dtype)
    assert_close(model(x), oracle(x), 1e-5 if dtype == torch.float32 else 0.05)
    model(x).float().square().sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    with pytest.raises(RuntimeError, match="is quantized"):
        model.merge_and_unload()


def test_a_checkpoint_repeats_the_pass(net):
    model = get_peft_model(net, LoTRAConfig(r=2, init_weights=False, coefficients=KAN))
    trained = [p for p in model.parameters() if p.requires_grad]
    found = [
        torch.autograd.grad(y.sin().sum(), trained) for y in (model(X), checkpoint(model, X, use_reentrant=False))
    ]
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
