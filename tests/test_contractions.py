"""Every operation and view that the stand-in answers, in every order, against the dense tensor written by einops."""

import warnings

import einops
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_different, assert_equal, forced_order, tucker
from rounding import Rounding
from torch import nn

from peft_lotra.coefficients import CoefficientSpec
from peft_lotra.standin import Adapted, PerformanceWarning, Update
from peft_lotra.standin.cost import DENSE, ORDERS

N, M, D, G, B = 5, 7, 4, 2, 6  # inputs, outputs, basis, groups, batch
SIZES = {"i": N, "o": M, "d": D, "g": G, "h": 3, "w": 2, "t": 2}


class Layer(nn.Module):
    """y = function(x, weight)."""

    def __init__(self, pattern, function, dtype=torch.float64):
        super().__init__()
        sizes = SIZES | {"d1": 2, "d2": D // 2}
        groups = [part.strip("()").split() for part in _groups(pattern)]
        shape = [torch.Size(sizes[axis] for axis in group).numel() for group in groups]
        self.weight = nn.Parameter(torch.randn(shape, dtype=dtype), requires_grad=False)
        self.function = function
        axes = [axis for group in groups for axis in group]
        self.spec = CoefficientSpec.resolve(
            self, "weight", {"layout": pattern, "sizes": {axis: sizes[axis] for axis in axes}}
        )
        self.kernel = [axis for axis in "gthw" if axis in axes]
        self.basis = " ".join(axis for axis in axes if axis[0] == "d")

    def update(self, r=(2, 3, 2), scaling=0.7):
        """A random update, with as many factors of the kernel's modes as the layout has."""
        dtype = self.weight.dtype
        shapes = [(*r, *(SIZES[axis] for axis in self.kernel)), (N, r[0]), (M, r[1]), (D, r[2])]
        return Update(tucker(*(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)), scaling)

    def dense(self, update):
        kernel = "".join(self.kernel)
        delta = update.scaling * torch.einsum(f"abc{kernel},ia,ob,dc->iod{kernel}", *update.tucker.tensors())
        sizes = {"d1": 2} if "d1" in self.basis else {}
        return einops.rearrange(
            delta, f"i o ({self.basis}) {' '.join(self.kernel)} -> {self.spec.layout.pattern}", **sizes
        )

    def forward(self, x):
        return self.function(x, self.weight)


def _groups(pattern):
    inside, parts = False, [""]
    for character in pattern:
        inside = (inside or character == "(") and character != ")"
        if character == " " and not inside:
            parts.append("")
        else:
            parts[-1] += character
    return parts


FLAT, CUBE, BACK = (B, N * D), (B, N, D), torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])
OPERATIONS = {
    "linear": ("o (i d)", FLAT, F.linear),
    "linear, bias, keywords": ("o (i d)", FLAT, lambda x, w: F.linear(input=x, weight=w, bias=torch.ones(M).to(x))),
    "linear, more axes": ("o (d i)", (2, 3, D * N), F.linear),
    "linear, one sample": ("o (d i)", (D * N,), F.linear),
    "einsum": ("i o d", CUBE, lambda x, w: torch.einsum("bid,iod->bo", x, w)),
    "einsum, weight first": ("i o d", CUBE, lambda x, w: torch.einsum("iod,bid->bo", w, x)),
    "einsum, output first": ("o d i", CUBE, lambda x, w: torch.einsum("bid,odi->ob", x, w)),
    "einsum, a list": ("d o i", CUBE, lambda x, w: torch.einsum("bid,doi->bo", [x, w])),
    "einsum, implicit": ("i d o", CUBE, lambda x, w: torch.einsum("bid,ido", x, w)),
    "einsum, ellipsis": ("d o i", (2, *CUBE), lambda x, w: torch.einsum("...id,doi->...o", x, w)),
    "einsum, ellipsis last": ("d o i", (N, D, 2, 3), lambda x, w: torch.einsum("id...,doi->o...", x, w)),
    "einsum, inputs kept": ("i o d", CUBE, lambda x, w: torch.einsum("ijk,jlk->ijl", x, w)),
    "einsum, groups kept": ("g i o d", (B, G, N, D), lambda x, w: torch.einsum("bgid,giod->bgo", x, w)),
    "einops.einsum": ("i o d", CUBE, lambda x, w: einops.einsum(x, w, "b i d, i o d -> b o")),
    "einops.einsum, weight first": ("i o d", CUBE, lambda x, w: einops.einsum(w, x, "i o d, b i d -> b o")),
    "einops.rearrange": ("i o d", FLAT, lambda x, w: x @ einops.rearrange(w, "i o d -> (i d) o")),
    "@": ("(i d) o", FLAT, lambda x, w: x @ w),
    "@, weight first": ("o (i d)", (N * D, B), lambda x, w: w @ x),
    "@, weight first, one sample": ("o (i d)", (N * D,), lambda x, w: w @ x),
    "matmul": ("(d i) o", (3, *FLAT), lambda x, w: torch.matmul(x, other=w)),
    "mv": ("o (i d)", (N * D,), lambda x, w: torch.mv(w, vec=x)),
    "mm": ("(i d) o", FLAT, lambda x, w: x.mm(w)),
    "addmm": ("(i d) o", FLAT, lambda x, w: torch.addmm(torch.ones(M).to(x), x, w)),
    "addmm, a method": ("(i d) o", FLAT, lambda x, w: torch.ones(B, M).to(x).addmm(x, mat2=w)),
    "bmm": ("g (i d) o", (G, *FLAT), lambda x, w: torch.bmm(x, w)),
    "bmm, weight first": ("g o (i d)", (G, N * D, B), lambda x, w: torch.bmm(w, x)),
    "baddbmm": ("g (i d) o", (G, *FLAT), lambda x, w: torch.baddbmm(torch.ones(1, 1, M).to(x), x, w)),
    "baddbmm, a method": ("g (i d) o", (G, *FLAT), lambda x, w: torch.ones(G, B, M).to(x).baddbmm(x, batch2=w)),
    "einsum, a scale": ("i o d", CUBE, lambda x, w: torch.einsum("bid,i,iod->bo", x, torch.arange(N).to(x), w)),
    "einsum, two bases": ("i o d", CUBE, lambda x, w: torch.einsum("iod,bi,bid->bo", w, x[..., 0], x)),
    "index_select": ("i o d", CUBE, lambda x, w: torch.einsum("bid,iod->bo", x, w.index_select(0, BACK[:N]))),
    "index_select, twice": ("i o d", CUBE, lambda x, w: torch.einsum("bid,iod->bo", x, w[:, :, BACK[:D]][BACK[:N]])),
    "an index, outputs": ("o (i d)", FLAT, lambda x, w: F.linear(x, w[torch.tensor([2, 0, 0, 1])])),
    "tensordot": ("i o d", CUBE, lambda x, w: torch.tensordot(x, w, dims=([1, 2], [0, 2]))),
    "tensordot, weight first": ("o d i", (D, N, B), lambda x, w: torch.tensordot(w, x, 2)),
    "conv1d": ("o (i d) w", (B, N * D, 8), lambda x, w: F.conv1d(x, w, torch.ones(M).to(x), stride=2)),
    "conv2d": ("o (d i) h w", (B, D * N, 6, 5), lambda x, w: F.conv2d(x, w, padding=1, dilation=2)),
    "conv2d, no batch": ("o (i d) h w", (D * N, 6, 5), lambda x, w: F.conv2d(x, w, padding=(1, 0))),
    "conv3d": ("o (i d) t h w", (2, N * D, 3, 4, 4), lambda x, w: F.conv3d(x, w)),
    "conv2d, groups": ("(g o) (i d) h w", (B, G * N * D, 6, 5), lambda x, w: F.conv2d(x, w, groups=G)),
    "conv2d, one group": ("g o (i d) h w", (B, N * D, 6, 5), lambda x, w: F.conv2d(x, w[1]) + F.conv2d(x, w[0])),
    "(x * w).sum": ("o i d", (B, 1, N, D), lambda x, w: (x * w).sum((-2, -1))),
    "(w * x).sum, keepdim": ("i o d", (B, N, 1, D), lambda x, w: torch.sum(w * x, (1, 3), keepdim=True)),
    "(x * w).sum, inputs kept": ("i o d", (B, N, 1, D), lambda x, w: (x * w).sum(-1)),
    "a number": ("o (i d)", FLAT, lambda x, w: F.linear(x, 2 * (w * 0.3) / 0.7)),
}


def _check(layer, x, updates, second=True):
    """Values, gradients and second derivatives are those of the dense tensor."""
    oracle = layer.function(x, layer.weight + sum(layer.dense(update) for update in updates))
    with Adapted(layer, layer.spec, tuple(updates)):
        y = layer(x)
    assert_different(y, layer(x))
    assert_equal(y, oracle)
    factors = [factor for update in updates for factor in update.tucker.tensors()]
    inputs = [x] * x.requires_grad + factors
    weights = torch.randn_like(y)
    actual, expected = (torch.autograd.grad((z * weights).sum(), inputs, create_graph=True) for z in (y, oracle))
    for a, e in zip(actual, expected, strict=True):
        assert e.abs().max() > 0
        assert_equal(a, e)
    if not second:
        return
    slopes = [torch.autograd.grad((z.square()).sum(), inputs[0], create_graph=True)[0] for z in (y, oracle)]
    actual, expected = (torch.autograd.grad(slope.square().sum(), factors) for slope in slopes)
    for a, e in zip(actual, expected, strict=True):
        assert e.abs().max() > 0
        assert_equal(a, e)


@pytest.mark.parametrize("order", [*ORDERS, DENSE])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name, order):
    pattern, shape, function = OPERATIONS[name]
    layer = Layer(pattern, function)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with forced_order(order) as taken:
        _check(layer, x, [layer.update()])
    assert taken.times or order  # no operation of the table is answered densely


@pytest.mark.parametrize("order", ["", "di"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_with_several_updates(name, order):
    pattern, shape, function = OPERATIONS[name]
    layer = Layer(pattern, function)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with forced_order(order):
        _check(layer, x, [layer.update(), layer.update((1, 1, 1), 1.0), layer.update((2, 2, 3))])


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_in_fp32(name):
    pattern, shape, function = OPERATIONS[name]
    layer = Layer(pattern, function, torch.float32)
    _check_rounding(layer, torch.randn(shape, dtype=torch.float32, requires_grad=True))


def _check_rounding(layer, x):
    """Values and gradients are as near to those in fp64 as those of the dense tensor are."""
    update = layer.update()
    tensors = [x, *update.tucker.tensors()]

    def with_gradients(y, tensors):
        return [y, *torch.autograd.grad(y.square().sum(), tensors)]

    def formula(weight, x, *factors):
        dense = layer.dense(update._replace(tucker=tucker(*factors)))
        return with_gradients(layer.function(x, weight + dense), [x, *factors])

    with Adapted(layer, layer.spec, (update,)):
        actual = with_gradients(layer(x), tensors)
    Rounding(formula, [layer.weight.detach(), *tensors], torch.float32).check(*actual)


INDICES = torch.tensor([[3, 0, 3], [19, 7, 1]])


def test_a_product_promotes_dtypes():
    layer = Layer("o i d", lambda x, w: (x * w).sum((-2, -1)), torch.float32)
    with forced_order("") as taken:
        _check_rounding(layer, torch.randn(B, 1, N, D, requires_grad=True))
    assert taken.times == 1


def test_a_view_may_change_the_dtype():
    layer = Layer("o (i d)", lambda x, w: F.linear(x, w.to(torch.float32).to("cpu").to(x)))
    with forced_order("") as taken:
        _check_rounding(layer, torch.randn(FLAT, requires_grad=True))
    assert taken.times == 1


LOOKUPS = {
    "embedding": lambda x, w: F.embedding(x, w),
    "embedding, a slice": lambda x, w: F.embedding(x % 8, w[:8]),
    "embedding_bag, mean": lambda x, w: F.embedding_bag(x, w),
    "embedding_bag, weighted": lambda x, w: F.embedding_bag(
        x, w, mode="sum", per_sample_weights=torch.arange(6.0).view(2, 3).to(w.dtype)
    ),
    "embedding_bag, offsets": lambda x, w: F.embedding_bag(x[0], w, torch.tensor([0, 2]), padding_idx=3),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookup(name):
    layer = Layer("(i d) o", LOOKUPS[name])
    with forced_order("") as taken:
        # torch has no second derivative of embedding_bag
        _check(layer, INDICES, [layer.update()], second="bag" not in name)
    assert taken.times == 1


# Chains of views, each of which ends as the matrix "o (i d)".
VIEWS = {
    "view": ("o i d", lambda w: w.view(M, -1)),
    "flatten": ("o d i", lambda w: w.flatten(1).unflatten(1, (D, N)).transpose(1, 2).flatten(1)),
    "permute": ("i o d", lambda w: w.permute(1, 0, 2).reshape(M, N * D)),
    "permute, a tuple": ("i o d", lambda w: torch.permute(w, (1, 0, 2)).contiguous().view(M, N * D)),
    "transpose": ("d o i", lambda w: w.transpose(0, -1).swapaxes(0, 1).reshape(M, -1)),
    "movedim": ("i d o", lambda w: w.movedim(-1, 0).reshape(M, -1)),
    "t": ("(i d) o", lambda w: w.t()),
    "T": ("(i d) o", lambda w: w.T),
    "mT": ("(i d) o", lambda w: w.mT),
    "as another": (
        "o i d",
        lambda w: (
            w.expand_as(w).view_as(w).type_as(w).reshape_as(torch.empty(M, N * D)).expand_as(torch.empty(M, N * D))
        ),
    ),
    "unsqueeze": ("o (i d)", lambda w: w.unsqueeze(1).squeeze(1)[None].squeeze()),
    "expand": ("o (i d)", lambda w: w.expand(3, -1, -1).select(0, 2)),
    "to": ("o (i d)", lambda w: w.to(torch.float64).to("cpu").double().to(w).clone()),
    "slices": ("o i d", lambda w: w[:, :, ...][:, None].squeeze(1).narrow(0, 0, M).reshape(M, -1)),
    "an atom cut in two": ("o (i d)", lambda w: w.view(M, N, 2, D // 2).permute(0, 1, 2, 3).flatten(1)),
    "type": ("o i d", lambda w: w.type(torch.float64).view(*w.shape[:1], w.size(1) * w.size(2))),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views(name):
    pattern, chain = VIEWS[name]
    layer = Layer(pattern, lambda x, w: F.linear(x, chain(w)))
    x = torch.randn(FLAT, dtype=torch.float64, requires_grad=True)
    with forced_order("") as taken:
        _check(layer, x, [layer.update()])
    assert taken.times == 1


# Parts of the weight "d1 o i d2", each contracted with its part of x.
PARTS = {
    "slices": lambda w: (w[0:1].squeeze(0), w[1:].squeeze(0)),
    "indices": lambda w: (w[0], w[-1]),
    "select": lambda w: (w.select(0, 0), torch.select(w, dim=0, index=1)),
    "unbind": lambda w: w.unbind(0),
    "iteration": lambda w: tuple(w),
    "chunk": lambda w: [part.flatten(0, 1) for part in w.chunk(2)],
    "split": lambda w: [part[0] for part in torch.split(w, [1, 1], dim=0)],
    "steps": lambda w: (w[::2][0], w[1::2][0]),
    "rows": lambda w: [w.view(2, -1)[k].view(w.shape[1:]) for k in range(2)],
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("outputs", ["all", "some"])
def test_parts(name, outputs):
    rows = slice(None) if outputs == "all" else slice(2, 6, 3)

    def function(x, w):
        cosines, sines = PARTS[name](w)
        return torch.einsum("bid,oid->bo", x[0], cosines[rows]) + torch.einsum("bid,oid->bo", x[1], sines[rows, :])

    layer = Layer("d1 o i d2", function)
    x = torch.randn(2, B, N, D // 2, dtype=torch.float64, requires_grad=True)
    with forced_order("") as taken:
        _check(layer, x, [layer.update()])
    assert taken.times == 2


def test_one_output_of_many():
    layer = Layer("o i d", lambda x, w: torch.einsum("bid,id->b", x, w[3]))
    x = torch.randn(CUBE, dtype=torch.float64, requires_grad=True)
    with pytest.warns(PerformanceWarning, match="Layer calls `einsum`"):
        _check(layer, x, [layer.update()])


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (lambda x, w: F.linear(x, w.abs()), "abs"),
        (lambda x, w: F.linear(x, torch.cat([w, 2 * w])), "cat"),
        (lambda x, w: F.linear(x, F.normalize(w)), "normalize"),
        (lambda x, w: F.linear(x, w + 1), "add"),
        (lambda x, w: F.linear(x, 1 - w), "rsub"),
        (lambda x, w: F.linear(x, w * torch.arange(M).to(x)[:, None]), "linear"),
        (lambda x, w: F.linear(x[:, :M], w.T), "linear"),
        (lambda x, w: torch.addmm(x[:, :M], x, w.T, alpha=2), "addmm"),
        (lambda x, w: F.linear(x, w[torch.arange(M)[None]][0]), "getitem"),
        (lambda x, w: F.linear(x, w[:, torch.arange(N * D)]), "getitem"),
        (lambda x, w: F.bilinear(x, x[:, :1], w[:, :, None]), "bilinear"),
        (lambda x, w: torch.einsum("bk,ok,o->bo", x, w, torch.ones(M).to(x)), "einsum"),
        (lambda x, w: torch.einsum("bo,ok->bo", x[:, :M], w), "einsum"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_else_is_dense_exact_and_warned_of_once(function, operation):
    layer = Layer("o (i d)", function)
    x = torch.randn(FLAT, dtype=torch.float64, requires_grad=True)
    update = layer.update()
    with pytest.warns(PerformanceWarning, match=rf"Layer calls `_*{operation}_*` on its coefficients.*exact"):
        with Adapted(layer, layer.spec, (update,)):
            layer(x)
    _check(layer, x, [update])  # warnings are errors here


def test_a_quiet_stand_in_does_not_warn():
    layer = Layer("o (i d)", lambda x, w: w.abs().sum())
    with Adapted(layer, layer.spec, (layer.update(),), quiet=True):
        layer(None)


def test_the_dense_product_with_a_batch_is_not_warned_of():
    """The layer itself forms batch × A."""
    layer = Layer("o i d", lambda x, w: (x * w).exp().sum((-2, -1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _check(layer, torch.randn(B, 1, N, D, dtype=torch.float64, requires_grad=True), [layer.update()])


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: w.mul_(2),
        lambda x, w: w.__setitem__(0, 1.0),
        lambda x, w: torch.add(x, 1, out=w),
        lambda x, w: nn.init.zeros_(w),
    ],
)
def test_writing_to_the_coefficients_is_refused(function):
    layer = Layer("o (i d)", function)
    with Adapted(layer, layer.spec, (layer.update(),)), pytest.raises(TypeError, match="would write to adapted coeff"):
        layer(torch.ones(M, N * D, dtype=torch.float64))


def test_questions_about_the_coefficients_are_not_dense():
    def function(x, w):
        assert (w.shape, w.size(0), w.dim(), w.ndim, len(w)) == ((M, N * D), M, 2, 2, M)
        assert (w.dtype, w.device, w.is_cuda, w.numel()) == (x.dtype, x.device, False, M * N * D)
        assert w.requires_grad
        assert w.stride() == (N * D, 1)
        assert w.is_contiguous()
        assert torch.zeros_like(w).shape == w.new_zeros(M, N * D).shape
        assert "StandIn" in repr(w)
        return x.view_as(w)

    layer = Layer("o (i d)", function)
    with Adapted(layer, layer.spec, (layer.update(),)):
        layer(torch.ones(M * N * D, dtype=torch.float64))


def test_what_is_packed_beside_the_coefficients():
    """inkan's second mode: rows of the table are looked up, the rest is a residual of its own."""
    packed = nn.Parameter(torch.randn(M, N * D + N, dtype=torch.float64), requires_grad=False)

    def function(x, w):
        beside = w[:, N * D :]
        assert type(beside) is torch.Tensor
        looked_up = F.embedding(INDICES, w[:, : N * D].t()).sum(1)
        return looked_up.sum() + F.linear(x[:, : N * D], w[:, : N * D]) + F.linear(x, w) + F.linear(x[:, :N], beside)

    layer = Layer("o (i d)", function)
    layer.weight = packed
    layer.spec = CoefficientSpec.resolve(
        layer, "weight", {"layout": "o (i d)", "sizes": {"d": D}, "slice": f":, :{N * D}"}
    )
    inner = layer.dense
    layer.dense = lambda update: F.pad(inner(update), (0, N))
    x = torch.randn(B, N * D + N, dtype=torch.float64, requires_grad=True)
    _check(layer, x, [layer.update(), layer.update((1, 2, 1))])


def test_outputs_that_are_packed_beside_something_else():
    """No layer keeps its coefficients so; there is no factorised form."""
    layer = Layer("o (i d)", F.linear)
    layer.weight = nn.Parameter(torch.randn(M + 2, N * D, dtype=torch.float64), requires_grad=False)
    layer.spec = CoefficientSpec.resolve(
        layer, "weight", {"layout": "o (i d)", "sizes": {"d": D}, "slice": f"1:{M + 1}"}
    )
    inner = layer.dense
    layer.dense = lambda update: F.pad(inner(update), (0, 0, 1, 1))
    x = torch.randn(FLAT, dtype=torch.float64, requires_grad=True)
    with pytest.warns(PerformanceWarning, match="Layer calls `linear`"):
        _check(layer, x, [layer.update()])
