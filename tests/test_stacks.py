"""One parameter for each basis function: several parameters together are one coefficient tensor."""

import copy

import pytest
import torch
from odd_layers import DegreesKANLayer, FrequenciesKANLayer, PowersKANLayer
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_lotra import LoTRAConfig, at_task, infer_coefficients, register_kan_layer, verify_coefficients
from peft_lotra.analysis import coefficient_updates
from peft_lotra.coefficients import registry
from peft_lotra.testing import assert_close, assert_differs
from peft_lotra.testing.oracle import dense_model

STACKED = {"c.*": "d | o i"}


class PairsKANLayer(nn.Module):
    """Two functions of each input, cos and sin of k x, in each parameter."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.c = nn.ParameterList([nn.Parameter(torch.randn(m, n, 2) / n) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        waves = [torch.stack([(k * x).cos(), (k * x).sin()], dim=-1) for k in (1, 2, 3)]
        return sum(torch.einsum("bid,oid->bo", wave, c) for wave, c in zip(waves, self.c, strict=True))


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(DegreesKANLayer(3, 5), nn.Sequential(DegreesKANLayer(5, 4))).double()


def adapted(net: nn.Module, **fields) -> PeftModel:
    fields = {"r": [2, 3, 2], "coefficients": STACKED, "init_weights": False} | fields
    return get_peft_model(copy.deepcopy(net), LoTRAConfig(**fields))


def by_hand(net: nn.Sequential, model: PeftModel, name: str = "default") -> nn.Sequential:
    """The network with A + Δ, Δ by a sum over all ranks."""
    dense = copy.deepcopy(net)
    layers = [model.base_model.model[0], model.base_model.model[1][0]]
    for layer, own in zip(layers, [dense[0], dense[1][0]], strict=True):
        core, U = layer.lotra_core[name], layer.tucker(name).factors
        m, n = own.c[0].shape
        whole = {"i": torch.eye(n), "o": torch.eye(m), "d": torch.eye(len(own.c))}
        Ui, Uo, Ud = (U.get(mode, whole[mode].to(core)) for mode in "iod")
        for d, c in enumerate(own.c):
            delta = sum(
                core[a, b, e] * Ud[d, e] * torch.outer(Uo[:, b], Ui[:, a])
                for a in range(core.shape[0])
                for b in range(core.shape[1])
                for e in range(core.shape[2])
            )
            c.data = c.data + layer.scaling[name] * delta.detach()
    return dense


X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3)


@pytest.mark.parametrize("ranks", [[2, 3, 2], [2, 3, None], [None, 2, 2]])
def test_outputs_and_gradients_are_those_of_the_dense_sum(net, ranks):
    model = adapted(net, r=ranks, alpha=0.7)
    dense = by_hand(net, model)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    assert_close(model(x), dense(y))
    assert_differs(model(x), net(x))
    (one,), (two,) = (torch.autograd.grad(f(z).sin().sum(), z, create_graph=True) for f, z in ((model, x), (dense, y)))
    assert_close(one, two)
    for a in (one, two):
        a.square().sum().backward()
    assert_close(x.grad, y.grad)
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_gradients_by_the_factors_are_those_of_finite_differences(net):
    model = adapted(net)
    trained = [p for p in model.parameters() if p.requires_grad]
    model(X).square().sum().backward()
    for p in trained:
        direction = torch.randn_like(p)
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                p.add_(step * direction)
                values.append(model(X).square().sum())
                p.sub_(step * direction)
        assert_close((p.grad * direction).sum(), (values[0] - values[1]) / 2e-6, 1e-6)


def test_merge_unmerge_save_and_load(net, tmp_path):
    model = adapted(net)
    expected, before = model(X), copy.deepcopy(net.state_dict())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)
    assert torch.equal(loaded(X), expected)
    assert loaded.peft_config["default"].coefficients["1.0.c.*"]["layout"] == "d | o i"
    model.merge_adapter()
    assert_close(model(X), expected)
    model.unmerge_adapter()
    assert torch.equal(model(X), expected)
    base = model.unload()
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    merged = loaded.merge_and_unload()
    assert_close(merged(X), expected)
    assert list(merged.state_dict()) == list(before)


def test_other_adapters_and_mixed_batches(net):
    model = adapted(net)
    model.add_adapter("other", LoTRAConfig(r=2, coefficients=STACKED, init_weights=False))
    names = ["default", "other", "__base__", "default"] * 2
    y = model.eval()(X, adapter_names=names)
    expected = [by_hand(net, model, name) if name != "__base__" else net for name in names]
    assert_close(y, torch.stack([dense(x[None])[0] for dense, x in zip(expected, X, strict=True)]))


def test_families_have_a_task_for_each_sample(net):
    model = adapted(net, family={"lam": (0, 1)}, family_degree=1)
    lam = torch.linspace(0, 1, len(X), dtype=torch.float64)
    with at_task(model, lam=lam):
        y = model(X)
    for k, value in enumerate(lam):
        with at_task(model, lam=value.item()):
            assert_close(y[k], model(X[k : k + 1])[0])
    assert_differs(y[0], y[1])


def test_the_layer_shows_adapted_coefficients():
    torch.manual_seed(0)
    net = nn.Sequential(PowersKANLayer(3, 2)).double()
    model = adapted(net, r=2, coefficients={"p*": "d | i o"})
    layer = model.base_model.model[0]
    delta = layer.get_delta_weight("default")
    assert delta.shape == (3, 3, 2)
    assert_close(layer.p9, net[0].p9 + delta[1])
    with pytest.raises(RuntimeError, match="holds its adapted coefficients `c"):
        adapted(nn.Sequential(DegreesKANLayer(3, 2)), r=2).base_model.model[0].c  # noqa: B018


def test_a_registered_class(net, monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    register_kan_layer(DegreesKANLayer, STACKED)
    model = get_peft_model(copy.deepcopy(net), LoTRAConfig(r=2, target_modules=["1.0"]))
    assert model.targeted_module_names == ["1.0"]
    assert model.base_model.model[1][0].spec.layout.canonical_shape == (5, 4, 4)


def test_inference_finds_them_and_verification_checks_them():
    torch.manual_seed(0)
    net = nn.Sequential(DegreesKANLayer(3, 4), FrequenciesKANLayer(4, 5), PowersKANLayer(5, 2))
    x = torch.randn(32, 3)
    found = infer_coefficients(net, x)
    assert {key: d["layout"] for key, d in found.items()} == {
        "0.c.*": "d | o i", "1.waves.*.weight": "d | o i", "2.p*": "d | i o"
    }  # fmt: skip
    verify_coefficients(net, x, coefficients=found)
    verify_coefficients(net, x, coefficients={"c.*": "d | o i", "waves.*.weight": "d | o i", "p*": "d | i o"})
    model = get_peft_model(net, LoTRAConfig(r=2, coefficients=found))
    assert model.targeted_module_names == ["0", "1", "2"]


def test_a_wrong_layout_that_fits_is_found():
    torch.manual_seed(0)
    net = nn.Sequential(DegreesKANLayer(4, 4))
    with pytest.raises(ValueError, match="declared is 'd | i o'.*found 'd | o i'"):
        verify_coefficients(net, torch.randn(32, 4), coefficients={"c.*": "d | i o"})


def test_layers_of_one_function_are_not_stacked():
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(head(x) for head in self.heads)

    with pytest.raises(ValueError, match="no KAN coefficient tensor"):
        infer_coefficients(nn.Sequential(Heads()), torch.randn(32, 4))


def test_updates_of_finetuned_networks(net):
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].c[2] += 1
    updates = coefficient_updates(net, other, STACKED)
    assert_close(updates["0.c.*"][:, :, 2], torch.ones(3, 5, dtype=torch.float64))
    assert not updates["0.c.*"][:, :, 1].any()
    assert not updates["1.0.c.*"].any()


@pytest.mark.parametrize(
    ("coefficients", "text"),
    [
        ({"c.*": "d o i"}, "has 3 axes, the tensor has shape"),
        ({"0.c.1": "d | o i"}, r"begins with 'd \|' is for several parameters"),
        ({"b.*": "d | o i"}, r"names \['b.\*'\], which match no parameter"),
        ({"c.*": "o | d i"}, "has unknown axes"),
        ({"c.*": {"layout": "d | o i", "slice": ":2"}}, "a description has one of `slice`, `scale`, a star"),
        ({"c.*": "d | (o i)*"}, "a description has one of `slice`"),
    ],
)
def test_descriptions_that_do_not_fit(net, coefficients, text):
    with pytest.raises((ValueError, TypeError), match=text):
        get_peft_model(net, LoTRAConfig(r=2, coefficients=coefficients))
    assert not any("lotra" in name for name, _ in net.named_modules())


def test_shapes_that_differ(net):
    net[0].c[1] = nn.Parameter(torch.zeros(5, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="means parameters of several shapes"):
        get_peft_model(net, LoTRAConfig(r=2, coefficients=STACKED))


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="before torch 2.13, adapted layers are not traced")
def test_exported_and_checkpointed(net):
    model = adapted(net)
    expected = model(X)
    program = torch.export.export(model.get_base_model().eval(), (X,))
    assert_close(program.module()(X), expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    results = model(X), checkpoint(model, X, use_reentrant=False)
    one, two = (torch.autograd.grad(y.sin().sum(), trained) for y in results)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < (2, 13), reason="before torch 2.13, adapted layers are not traced")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled(net):
    model = adapted(net)
    assert_close(torch.compile(model)(X), model(X))


def test_several_functions_in_each_parameter():
    torch.manual_seed(0)
    net = nn.Sequential(PairsKANLayer(3, 4)).double()
    model = adapted(net, coefficients={"c.*": "d | o i d2"})
    layer = model.base_model.model[0]
    assert layer.spec.layout.canonical_shape == (3, 4, 6)
    assert_close(model(X), dense_model(net, model)(X))
    expected = model(X)
    delta = layer.get_delta_weight("default")
    for c, own in zip(net[0].c, delta, strict=True):
        c.data += own.detach()
    assert_close(expected, net(X))
    assert_close(model.merge_and_unload()(X), expected)


def test_alike_layers_are_tested_one_by_one():
    torch.manual_seed(0)
    net = nn.Sequential(DegreesKANLayer(4, 4), DegreesKANLayer(4, 4))
    report = str(infer_coefficients(net, torch.randn(32, 4)))
    assert report.count("'d | o i'") == report.count("; inferred, ") == 2
