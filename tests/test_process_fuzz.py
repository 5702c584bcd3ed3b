"""Random work of several processes that differs from process to process, and errors at random places.

Every case ends, and is right: the outputs of each process are those of one process alone to 1e-12, or all processes
refuse the same work, or all end with the message of the one that failed.
"""

import copy
import random

import pytest
import torch
import torch.distributed as dist
from adapted_layers import First
from kan_layers import ChebyKAN
from launching import HAS_FSDP2, fork
from layer_table import LAYERS
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel

from peft_lotra import LoTRAConfig, at_task, fit_gauss_newton, initialize_lotra_weights
from peft_lotra.layers.lotra import adapted_tensors
from peft_lotra.testing import assert_close

if HAS_FSDP2:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

pytestmark = [pytest.mark.processes, pytest.mark.slow]
CASES = 40
NAMES = ("default", "one", "two", "__base__")


def make(kind, **fields):
    torch.manual_seed(1)
    row = LAYERS["convolution"]
    base = First(row.make().double()) if kind == "convolution" else ChebyKAN([3, 6, 2]).double()
    declared = row.declared if kind == "convolution" else {}
    config = LoTRAConfig(r=2, coefficients=declared, init_weights=False, **fields)
    model = get_peft_model(base, config)
    for name in () if fields else NAMES[1:3]:
        model.add_adapter(name, config)
    return model.eval()


def wrapped(model, draw):
    """As it is, in DDP, or sharded in one of some ways; all processes draw the same."""
    how = draw.choice(["plain", "ddp", *(["root", "layers", "bases"] if HAS_FSDP2 else [])])
    model = copy.deepcopy(model)
    if how == "ddp":
        return DistributedDataParallel(model)
    if how in ("plain",):
        return model
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in adapted_tensors(model).values():
        if how != "root":
            fully_shard(layer if how == "layers" else layer.get_base_layer(), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def inputs(kind, count):
    return torch.rand(count, 4, 7, 6, dtype=torch.float64) if kind == "convolution" else torch.rand(count, 3).double()


def mixed_batches(same, own):
    """Adapters, batches and their sizes of each process's own."""
    kind = same.choice(["convolution", "chebyshev"])
    single = make(kind)
    model, size = wrapped(single, same), same.choice([None, 4])
    for _ in range(2):
        x = inputs(kind, size or own.randint(1, 6))
        given = own.choice([None, own.choices(NAMES, k=len(x)), [own.choice(NAMES[:3])] * len(x)])
        arguments = {} if given is None else {"adapter_names": given}
        with torch.no_grad():
            yield lambda x=x, a=arguments: model(x, **a), lambda x=x, a=arguments: single(x, **a)


def tasks(same, own):
    """Tasks of each process's own: one for all samples or one for each, some of them equal."""
    kind = same.choice(["convolution", "chebyshev"])
    single = make(kind, family={"lam": (0.0, 1.0)})
    model, size, each = wrapped(single, same), same.choice([None, 4]), same.random() < 0.7
    for _ in range(2):
        x = inputs(kind, size or own.randint(1, 6))
        values = [own.choice([0.1, 0.4, own.random()]) for _ in x]
        lam = torch.tensor(values if each else values[0], dtype=torch.float64)

        def at(net, x=x, lam=lam):
            with torch.no_grad(), at_task(net, lam=lam):
                return net(x)

        yield lambda at=at: at(model), lambda at=at: at(single)


def failing(where, wanted, rank):
    """A function that counts its calls, and raises in one process at one of them."""
    calls = iter(range(10**6))

    def check():
        if next(calls) == where and dist.get_rank() == rank:
            raise wanted(f"out of luck at call {where} in process {rank}")

    return check


def fits(same, own):
    """A fit of unequal parts, whose residual fails at a random call in one process, or in none."""
    where, rank = same.choice([None, same.randint(0, 40)]), same.randrange(dist.get_world_size())
    kind = same.choice([ValueError, RuntimeError, KeyError])
    check = failing(where, kind, rank)
    torch.manual_seed(5)
    x = torch.rand(90, 3).double()
    parts = sorted(same.sample(range(1, 90), dist.get_world_size() - 1))
    part = x.tensor_split(parts)[dist.get_rank()]
    single, model = make("chebyshev"), make("chebyshev")

    def residual(net, batch):
        check()
        return net(batch) - batch[..., :2].sin()

    options = {"iterations": 3, "progressbar": False}

    def together():
        fit_gauss_newton(model, residual, part, across_processes=True, **options)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def alone():
        fit_gauss_newton(
            single, lambda net, batch: net(batch) - batch[..., :2].sin(), x, across_processes=False, **options
        )
        return torch.cat([p.detach().flatten() for p in single.parameters()])

    yield together, alone


def initializations(same, own):
    """Gradients of unequal parts; one process may fail."""
    where, rank = same.choice([None, 0]), same.randrange(dist.get_world_size())
    check, torch_seed = failing(where, RuntimeError, rank), own.randrange(100)
    torch.manual_seed(3)
    base = ChebyKAN([3, 6, 4]).double()
    x = torch.rand(12, 3).double()
    config = LoTRAConfig(r=2)
    torch.manual_seed(torch_seed)
    model, single = get_peft_model(copy.deepcopy(base), config), get_peft_model(copy.deepcopy(base), config)
    count = dist.get_world_size()

    def step(net, rows, weight):
        (weight * net(rows).square().sum()).backward()

    def projections(net):
        factors = [layer.tucker("default").factors["o"].detach() for layer in adapted_tensors(net).values()]
        return torch.cat([(U @ U.mT).flatten() for U in factors])

    def together():
        part = x[dist.get_rank() :: count]
        initialize_lotra_weights(model, lambda: (check(), step(model, part, count)), progressbar=False)
        return projections(model)

    def alone():
        # Without other processes: the gradient of all rows in each of them is the mean of the same.
        initialize_lotra_weights(single, lambda: step(single, x, 1), progressbar=False)
        return projections(single)

    yield together, alone


def fuzz(seed):
    """Outcomes of some cases in this process, as all processes see them."""
    rank, failures = dist.get_rank(), []
    for case in range(CASES):
        same, own = random.Random(1000 * seed + case), random.Random(f"{seed} {case} {rank}")
        torch.manual_seed(100 * seed + 10 * case + rank)
        kind = same.choice([mixed_batches, tasks, fits, initializations])
        for together, alone in kind(same, own):
            try:
                actual, error = together(), None
            except Exception as raised:
                actual, error = None, f"{type(raised).__name__}: {raised}"
            told = [None] * dist.get_world_size()
            dist.all_gather_object(told, error)
            if len({text is None for text in told}) > 1:
                failures.append(f"{kind.__name__} {seed}/{case}: only some processes raise, {told}")
            elif error is None:
                try:
                    assert_close(actual, alone(), 1e-8 if kind is initializations else 1e-9 if kind is fits else 1e-12)
                except AssertionError as wrong:
                    failures.append(f"{kind.__name__} {seed}/{case}: {wrong}")
            elif not clear(told):
                failures.append(f"{kind.__name__} {seed}/{case}: {told}")
    return failures


def clear(told):
    """Whether every process says what is wrong: the same refusal, or the message of the one that failed."""
    lucky = [text for text in told if "out of luck" in text]
    return len(lucky) == len(told) or all("cannot make equally many passes" in text for text in told)


@pytest.mark.parametrize(("processes", "seed"), [(2, 0), (2, 1), (3, 2)])
def test_unequal_work(processes, seed):
    assert sum(fork(fuzz, seed, num_processes=processes), []) == []
