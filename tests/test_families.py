"""Adapters for families of tasks, against the dense oracle of the core at each task."""

import copy
import json
import re
import threading
from contextlib import suppress

import pytest
import torch
from accelerate import Accelerator
from adapted_layers import First
from conftest import assert_different, assert_equal
from family_models import LAM, X, at, fill, kan, polynomials
from kan_layers import ChebyKAN
from launching import LIMIT, fork
from layer_table import LAYERS, full_factors, lotra_layers
from peft import PeftModel, get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, adapter_at, at_task, fit_gauss_newton, initialize_lotra_weights
from peft_lotra.adapters.lora import convert_to_lora
from peft_lotra.families.family import Family
from peft_lotra.layers.lotra import adapted_tensors

# c(task) -------------------------------------------------------------------------------------------------------------


def test_one_parameter_gives_chebyshev_polynomials():
    family = Family.of(LAM, 4)
    assert family.size == 5
    assert_equal(family.weights({"lam": 1.37}), polynomials(1.37))
    values = torch.tensor([1.0, 1.2, 1.6], dtype=torch.float64)
    assert_equal(family.weights({"lam": values}), polynomials(values))
    assert_equal(family.weights({"lam": values[:, None]}), polynomials(values))


def test_several_parameters_give_products_up_to_the_total_degree():
    family = Family.of({"lam": (1.0, 1.6), "mu": (0.0, 2.0)}, 2)
    assert family.size == 6
    first, second = polynomials(1.3, degree=2), polynomials(0.4, 0.0, 2.0, degree=2)
    exponents = [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)]
    c = family.weights({"lam": 1.3, "mu": 0.4})
    assert_equal(c, torch.stack([first[i] * second[j] for i, j in exponents]))
    lam = torch.tensor([1.1, 1.3], dtype=torch.float64)
    assert_equal(family.weights({"lam": lam, "mu": 0.4})[1], c)


def test_named_tasks_are_one_hot():
    family = Family.of(["poisson", "heat", "wave"], 4)
    assert family.weights({"task": "heat"}).tolist() == [0, 1, 0]
    assert family.weights({"task": ["wave", "poisson"]}).tolist() == [[0, 0, 1], [1, 0, 0]]


def test_outside_of_the_range_there_is_a_warning_and_no_clamping():
    with pytest.warns(UserWarning, match=re.escape("`lam` is outside of the family's range [1, 1.6]")):
        c = Family.of(LAM, 4).weights({"lam": 1.8})
    assert_equal(c, polynomials(1.8))


# Passes at a task ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_at_one_task_and_at_a_task_per_sample(name):
    row = LAYERS[name]
    layer = row.make().double()
    base = First(layer)
    config = LoTRAConfig(r=1, family=LAM, family_degree=2, coefficients=row.declared, alpha=0.7)
    model = get_peft_model(copy.deepcopy(base), config)
    fill(model)
    base.requires_grad_(False)
    x = (torch.rand(row.sample(torch.float64).shape, dtype=torch.float64) * 1.6 - 0.8).requires_grad_()
    with at_task(model, lam=1.3):
        y = model(x)
    assert_equal(y, at(base, model, polynomials(1.3, degree=2))(x))
    assert_different(y, base(x))
    values = torch.linspace(1, 1.6, len(x), dtype=torch.float64)
    with at_task(model, lam=values):
        y = model(x)
        core = [layer.lotra_core["default"] for layer in adapted_tensors(model).values()]
        gradients = torch.autograd.grad(y.square().sum(), [x, *core])
    single = []
    for k, value in enumerate(values):
        with at_task(model, lam=value):
            single.append(model(x[k : k + 1]))
    single = torch.cat(single)
    assert_equal(y, single)
    for a, e in zip(gradients, torch.autograd.grad(single.square().sum(), [x, *core]), strict=True):
        assert_equal(a, e, 1e-9)


def test_gradients_by_the_task():
    base, model = kan()
    lam = torch.full((8, 1), 1.3, dtype=torch.float64) + torch.linspace(0, 0.2, 8, dtype=torch.float64)[:, None]
    lam.requires_grad_()

    def total(lam):
        with at_task(model, lam=lam):
            return model(X).square().sum()

    assert torch.autograd.gradcheck(total, lam)


def test_what_inference_mode_made_first_is_no_hindrance_to_gradients_by_the_task():
    _, model = kan(family={"lam": (1.0, 1.6), "mu": (0.1, 0.7)}, family_degree=3)  # products of its own
    fill(model)
    with torch.inference_mode(), at_task(model, lam=1.2, mu=0.3):
        expected = model(X)
    lam = torch.tensor(1.2, requires_grad=True)
    with at_task(model, lam=lam, mu=0.3):
        y = model(X)
    assert_equal(y.detach(), expected)
    assert torch.autograd.grad(y.sum(), lam)[0]


def test_vmap_over_samples_with_their_own_tasks():
    base, model = kan()
    lam = torch.linspace(1, 1.6, 8, dtype=torch.float64)

    def one(x, value):
        with at_task(model, lam=value):
            return model(x[None])[0]

    expected = torch.cat([one(x, value)[None] for x, value in zip(X, lam, strict=True)])
    assert_equal(torch.func.vmap(one)(X, lam), expected)
    slopes = torch.func.vmap(torch.func.jacrev(one, argnums=1))(X, lam)
    with at_task(model, lam=lam.requires_grad_()):
        y = model(X)
    assert_equal(slopes[:, 1], torch.autograd.grad(y[:, 1].sum(), lam)[0])


@pytest.mark.filterwarnings("ignore:.*fitted by heart:UserWarning")  # eight points
def test_a_residual_with_a_task_for_every_sample():
    base, model = kan(freeze_factors=True)
    lam = torch.linspace(1, 1.6, 8, dtype=torch.float64)

    def residual(net, batch):
        x, value = batch
        with at_task(model, lam=value):
            return net(x) - torch.sin(x[..., :1] * value[..., None] if value.dim() else x[..., :1] * value)

    result = fit_gauss_newton(model, residual, (X, lam), iterations=5, progressbar=False)
    assert result.losses[-1] < 0.5 * result.losses[0]


@pytest.mark.slow
def test_compiled():
    base, model = kan()
    compiled = torch.compile(model, backend="eager")
    for value in (1.1, 1.5):
        with at_task(compiled, lam=value):
            assert_equal(compiled(X), at(base, model, polynomials(value))(X))


@pytest.mark.skipif(torch.__version__ < (2, 8), reason="before torch 2.8, a checkpoint cannot be told its context")
def test_checkpointed_with_the_backward_pass_at_the_task():
    base, model = kan()
    with at_task(model, lam=1.3):
        expected = torch.autograd.grad(model(X).square().sum(), lotra_layers(model)["layers.0"].lotra_core["default"])
        y = torch.utils.checkpoint.checkpoint(model, X, use_reentrant=False)
        actual = torch.autograd.grad(y.square().sum(), lotra_layers(model)["layers.0"].lotra_core["default"])
    assert_equal(actual[0], expected[0])


def test_threads_and_nested_calls_have_tasks_of_their_own():
    base, model = kan()
    values = [1.0, 1.2, 1.4, 1.6]
    expected = [at(base, model, polynomials(value))(X) for value in values]
    found, barrier = {}, threading.Barrier(len(values))

    def work(k):
        for _ in range(20):
            with at_task(model, lam=values[k]):
                barrier.wait(LIMIT)
                found.setdefault(k, []).append(model(X).detach())

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(values))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, results in found.items():
        for y in results:
            assert_equal(y, expected[k])
    with at_task(model, lam=1.0):
        with suppress(KeyError), at_task(model, lam=1.6):
            assert_equal(model(X), expected[3])
            raise KeyError
        assert_equal(model(X), expected[0])


def test_named_tasks_per_sample():
    base, model = kan(family=["a", "b"])
    names = ["a", "b", "b", "a", "a", "b", "a", "b"]
    with at_task(model, task=names):
        y = model(X)
    for task, c in {"a": [1.0, 0.0], "b": [0.0, 1.0]}.items():
        rows = [name == task for name in names]
        assert_equal(y[rows], at(base, model, torch.tensor(c, dtype=torch.float64))(X)[rows])


def test_whole_modes_and_positions():
    base, model = kan(r=(None, 2, None))
    with at_task(model, lam=1.3):
        assert_equal(model(X), at(base, model, polynomials(1.3))(X))
    row = LAYERS["convolution"]
    plain = First(row.make().double())
    conv = get_peft_model(copy.deepcopy(plain), LoTRAConfig(r=(2, 2, None, 3), family=LAM, coefficients=row.declared))
    fill(conv)
    (layer,) = adapted_tensors(conv).values()
    assert layer.lotra_core["default"].shape[-2:] == (3, 5)
    x = row.sample(torch.float64)
    with at_task(conv, lam=1.2):
        y = conv(x)
    core = layer.tucker("default").core.detach()
    c = polynomials(1.2)
    one = get_peft_model(copy.deepcopy(plain), LoTRAConfig(r=(2, 2, None, 3), coefficients=row.declared))
    (other,) = adapted_tensors(one).values()
    other.set_tucker("default", layer.tucker("default")._replace(core=core @ c))
    assert_equal(y, one(x))


# Processes -----------------------------------------------------------------------------------------------------------


def convolutions():
    """Layers that run once for each distinct task."""
    row = LAYERS["convolution"]
    torch.manual_seed(1)
    model = get_peft_model(First(row.make().double()), LoTRAConfig(r=2, family=LAM, coefficients=row.declared))
    fill(model)
    return model


def gradients(net, model, x, lam):
    """Of three steps of Adam."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=1e-2)
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        with at_task(model, lam=lam):
            net(x).square().mean().backward()
        found += [p.grad.clone() for p in trainable]
        optimizer.step()
    return found


def gradients_of_halves(model, x, lam):
    rank = Accelerator(cpu=True).process_index
    x, lam = (tensor.chunk(2)[rank] if tensor.dim() else tensor for tensor in (x, lam))
    return gradients(nn.parallel.DistributedDataParallel(model), model, x, lam)


@pytest.mark.processes
@pytest.mark.parametrize("make", [lambda: kan()[1], convolutions], ids=["ChebyKAN", "convolutions"])
@pytest.mark.parametrize("tasks", ["one task", "tasks"])
def test_two_processes_train_as_one(make, tasks):
    """The tasks of the second process are all the same: it runs some layers less often than the first."""
    x = X if make is not convolutions else torch.rand(8, 4, 7, 6, dtype=torch.float64)
    lam = torch.tensor(1.3 if tasks == "one task" else [1.0, 1.1, 1.2, 1.3, *[1.6] * 4], dtype=torch.float64)
    expected = gradients(model := make(), model, x, lam)
    other = gradients(model := make(), model, x, torch.tensor(1.45, dtype=torch.float64))
    for found in fork(gradients_of_halves, make(), x, lam):
        for actual, wanted, elsewhere in zip(found, expected, other, strict=True):
            assert_different(wanted, elsewhere)
            assert_equal(actual, wanted, 1e-9)


# Files and settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [LAM, {"lam": (1, 2), "mu": (0, 1)}, ["a", "b"]])
def test_saved_and_loaded(family, tmp_path):
    base, model = kan(family=family, family_degree=2)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["family_degree"] == 2
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    task = {"task": "b"} if isinstance(family, list) else {"lam": 1.3, "mu": 0.2} if len(family) > 1 else {"lam": 1.3}
    with at_task(model, **task):
        y = model(X)
    with at_task(loaded, **task):
        assert_equal(loaded(X), y, 0)
    assert_different(y, base(X))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["family_degree" if isinstance(family, dict) else "family"] = 3 if isinstance(family, dict) else ["b", "a"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="digest|does not belong|expected"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


def test_a_fresh_family_changes_nothing_and_takes_gradients():
    base, model = kan()
    fresh = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2, family=LAM))
    with at_task(fresh, lam=1.3):
        assert_equal(fresh(X), base(X), 0)

    def train_step():
        for lam in (1.0, 1.6):
            with at_task(fresh, lam=lam):
                fresh(X).square().mean().backward()

    initialize_lotra_weights(fresh, train_step, method="gradient_hosvd", progressbar=False)


def test_budgets_count_all_terms():
    torch.manual_seed(1)
    base = ChebyKAN([8, 16, 8])
    model = get_peft_model(base, LoTRAConfig(compression_ratio=0.5, family=LAM))
    total = 2 * 8 * 16 * 4
    trained = model.get_nb_trainable_parameters()[0]
    assert 0.3 * total < trained <= 0.5 * total
    assert all(layer.lotra_core["default"].shape[-1] == 5 for layer in lotra_layers(model).values())
    assert len(full_factors(lotra_layers(model)["layers.0"])) == 4


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"family": "lam"}, TypeError, "`family` should map names of parameters to ranges"),
        ({"family": {}}, TypeError, "`family` should map names"),
        ({"family": {"lam": 3}}, TypeError, "`family` should map names"),
        (
            {"family": {"lam": (2, 1)}},
            ValueError,
            "`family` gives 'lam' the range (2, 1), whose ends are not in order",
        ),
        ({"family": ["a", "a"]}, ValueError, "`family` names a task twice"),
        ({"family": LAM, "family_degree": 0}, ValueError, "`family_degree` should be a positive integer"),
    ],
)
def test_errors_of_settings(kwargs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        LoTRAConfig(r=2, **kwargs)


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        ({}, TypeError, "a task of this family is given by ['lam'], but [] is passed"),
        ({"mu": 1.0}, TypeError, "a task of this family is given by ['lam'], but ['mu'] is passed"),
        ({"lam": "high"}, TypeError, "`lam` should be a number or a tensor"),
        ({"lam": torch.ones(2, 2)}, ValueError, "`lam` should have the shape (), (batch,) or (batch, 1)"),
    ],
)
def test_errors_of_tasks(task, error, message):
    _, model = kan()
    with pytest.raises(error, match=re.escape(message)), at_task(model, **task):
        pass


def test_further_errors():
    base, model = kan()
    with pytest.raises(RuntimeError, match="'default' is for a family of tasks, and this pass is at none of them"):
        model(X)
    with pytest.raises(TypeError, match="`model` should be a PeftModel"), at_task(base, lam=1.0):
        pass
    plain = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2))
    with pytest.raises(ValueError, match="has no adapter for a family"), at_task(plain, lam=1.0):
        pass
    with pytest.raises(ValueError, match="`family` 'default' is an adapter for one task"):
        adapter_at(plain, "new", lam=1.0)
    with pytest.raises(ValueError, match="`train` should be 'core' or 'all'"):
        adapter_at(model, "new", lam=1.3, train="factors")
    with pytest.raises(ValueError, match="an adapter is for one task, but a task for each of 2 samples"):
        adapter_at(model, "new", lam=torch.tensor([1.0, 1.2]))
    with pytest.raises(ValueError, match="combine those of `adapter_at`"):
        model.add_weighted_adapter(["default"], [1.0], "sum", "cat")
    with pytest.raises(ValueError, match="cannot be converted to LoRA: it is for a family"):
        convert_to_lora(model)
    _, named = kan(family=["a", "b"])
    with pytest.raises(ValueError, match=re.escape("`task` 'c' is not one of the family's tasks ['a', 'b']")):
        with at_task(named, task="c"):
            pass
    with (
        at_task(model, lam=torch.linspace(1, 1.6, 5)),
        pytest.raises(ValueError, match="a task for each of 5 samples"),
    ):
        model(X)


def test_a_wrapped_model_is_looked_into():
    model = get_peft_model(ChebyKAN([3, 2]), LoTRAConfig(r=2, family={"lam": (0, 1)}, init_weights=False))
    wrapped = nn.Module()
    wrapped.module = model
    with at_task(model, lam=0.5):
        expected = model(torch.ones(2, 3))
    with at_task(wrapped, lam=0.5):
        assert torch.equal(model(torch.ones(2, 3)), expected)
