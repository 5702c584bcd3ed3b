"""P, the number of polynomials of a family, and the products that c consists of."""

import itertools
import math
import re
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import assert_equal

from peft_lotra import LoTRAConfig
from peft_lotra.families.family import Family, _places


def ranges(k):
    return {f"p{j:02}": (-1.0, 1.0 + j) for j in range(k)}


def by_numpy(family, task):
    """{e: Π T_e_j(x_j)} over all exponents, of which those of a too high total degree are left out."""
    found = {}
    x = [np.asarray(2 * (task[name] - a) / (b - a) - 1) for name, (a, b) in family.ranges.items()]
    tables = [np.polynomial.chebyshev.chebvander(v, family.degree).reshape(*v.shape, -1) for v in x]
    for e in itertools.product(range(family.degree + 1), repeat=len(tables)):
        if sum(e) <= family.degree:
            found[e] = np.prod([T[..., j] for T, j in zip(tables, e, strict=True)], axis=0)
    return found


@pytest.mark.parametrize(("k", "degree"), [(1, 1), (1, 4), (2, 3), (3, 2), (3, 5), (5, 1), (4, 4)])
def test_the_products_are_those_of_numpy(k, degree):
    family = Family.of(ranges(k), degree)
    exponents = [e for e in itertools.product(range(degree + 1), repeat=k) if sum(e) <= degree]
    exponents.sort(key=lambda e: (sum(e), [-j for j in e]))
    assert len(exponents) == family.size == math.comb(k + degree, degree)
    generator = np.random.default_rng(0)
    for shape in ((), (7,)):
        task = {name: torch.tensor(generator.uniform(a, b, shape)) for name, (a, b) in family.ranges.items()}
        wanted = by_numpy(family, task)
        assert_equal(family.weights(task), torch.tensor(np.stack([wanted[e] for e in exponents], -1)))


def test_derivatives_of_the_products():
    family = Family.of(ranges(3), 4)
    task = torch.tensor([0.3, -0.2, 1.1], dtype=torch.float64, requires_grad=True)

    def c(task):
        return family.weights(dict(zip(family.ranges, task, strict=True)))

    assert torch.autograd.gradcheck(c, task)
    assert torch.autograd.gradgradcheck(c, task)
    assert_equal(torch.func.jacfwd(c)(task.detach()), torch.func.jacrev(c)(task.detach()))


@pytest.mark.parametrize(("k", "degree"), [(24, 4), (40, 3), (200, 2), (5_000, 1)])
def test_many_parameters_take_room_in_proportion_to_the_number_of_products(k, degree):
    """Enumerating (degree + 1)^k would never end."""
    family = Family.of(ranges(k), degree)
    task = dict.fromkeys(family.ranges, 0.25)
    tracemalloc.start()
    family.weights(task)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2000 * family.size
    tracemalloc.start()
    c = family.weights(task)
    again = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert again < most
    assert c.shape == (math.comb(k + degree, degree),)
    assert c.isfinite().all()


def test_products_are_enumerated_once():
    assert _places(12, 4) is _places(12, 4)


@pytest.mark.parametrize(("k", "degree", "P"), [(40, 4, 135_751), (100_000, 1, 100_001), (1, 100_000, 100_001)])
def test_a_family_of_too_many_products_is_refused(k, degree, P):
    message = f"`family` has {k} parameters, which with `family_degree`={degree} makes {P:,} polynomials"
    with pytest.raises(ValueError, match=re.escape(message) + ".*100,000.*lower"):
        LoTRAConfig(r=2, family=ranges(k), family_degree=degree)
    names = [str(j) for j in range(100_001)]
    with pytest.raises(ValueError, match=r"`family` has 100,001 tasks.*100,000"):
        LoTRAConfig(r=2, family=names)
    assert LoTRAConfig(r=2, family=names[:-1]).terms == 100_000
