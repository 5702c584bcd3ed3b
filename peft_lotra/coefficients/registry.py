"""The registry of KAN layers whose coefficient tensors are known, by qualified class name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

from torch import nn

from .spec import CoefficientSpec, check_descriptions

Descriptions = Mapping[str, str | Mapping[str, Any]]

Described = Descriptions | Callable[[nn.Module], Descriptions]

_REGISTRY: dict[str, tuple[Described, Described]] = {}  # coefficients and matrices


def register_kan_layer(
    layer_class: type[nn.Module] | str,
    coefficients: Described | str,
    matrices: Described | None = None,
) -> None:
    """Make a KAN layer class known, so that `LoTRAConfig()` finds its layers in any model.

    The layout is declared because the shapes do not determine it: `(i d)` and `(d i)` have the same shape, and so do
    the inputs and outputs of a square layer. A subclass counts as its base class unless it is registered itself. If a
    class is registered again, the new description replaces the old one.

    Args:
        layer_class: the class, or its qualified name (`"package.module.Class"`) if it should not be imported.
        coefficients: maps the path of each coefficient parameter to its layout, in the form that
            `LoTRAConfig(coefficients=...)` takes: `{"coef": "i o d"}`. If the description depends on the instance,
            such as the size of a flattened axis, pass a function of the layer that returns the mapping. If the class
            is a copy of a registered class, pass the qualified name of that class, which covers `matrices` too.
        matrices: the layer's other weights, which have no basis, in the same form with an axis d of size 1:
            `{"base_weight": {"layout": "o (i d)", "sizes": {"d": 1}}}`. Only `target_modules="all-linear"` adapts
            them. Linear layers and convolutions inside the layer need not be named.

    Raises:
        TypeError: if an argument or a description has a wrong type.
        ValueError: if a description is malformed, or if `coefficients` names a class that is not registered or comes
            with `matrices`.
    """
    if not isinstance(layer_class, str | type):
        raise TypeError(f"`layer_class` should be a class or its qualified name, but {layer_class!r} is passed")
    name = layer_class if isinstance(layer_class, str) else qualified_name(layer_class)
    if isinstance(coefficients, str):
        if coefficients not in _REGISTRY or matrices is not None:
            what = "and `matrices` is given besides" if coefficients in _REGISTRY else "which is not registered"
            raise ValueError(
                f"`coefficients` names the class {coefficients!r}, {what}: give the name of a registered class alone, "
                f"one of {registered_kan_layers()}, or a mapping from parameters to layouts"
            )
        _REGISTRY[name] = _REGISTRY[coefficients]
        return
    described = coefficients, {} if matrices is None else matrices
    for argument, one in zip(("coefficients", "matrices"), described, strict=True):
        if not callable(one):
            check_descriptions(one, argument)
    _REGISTRY[name] = described


def registered_kan_layers() -> list[str]:
    """The qualified names of all registered classes."""
    return sorted(_REGISTRY)


def known_coefficients(layer: nn.Module) -> list[CoefficientSpec]:
    """The coefficient tensors of `layer` if its class or a base class is registered, otherwise an empty list."""
    name = _registered(layer)
    return [] if name is None else _resolved(layer, name, 0)


def known_matrices(layer: nn.Module) -> list[CoefficientSpec]:
    """The `matrices` of `layer`, as registered for its class or for the class that it is a copy of."""
    name, copied = _registered(layer), copy_of(layer)
    return _resolved(layer, name, 1) if name is not None else copied.matrices if copied is not None else []


class Copy(NamedTuple):
    """The description of a layer whose class has the same name as a registered class.

    Its tensors are empty if the layer lacks one of them, or if it fits several registered classes that differ.
    """

    original: str  # the qualified name of the registered class
    coefficients: list[CoefficientSpec]
    matrices: list[CoefficientSpec]
    problem: str = ""  # why the tensors are empty, if the reason is known


def copy_of(layer: nn.Module) -> Copy | None:
    """The description of a layer as a copy of a registered class that has the same class name and parameters.

    The result is None if the layer's class is registered itself, or if no registered class has its name. It is not
    known whether the copy uses its parameters as the original does.
    """
    name = type(layer).__name__
    originals = [other for other in _REGISTRY if other.rpartition(".")[2] == name]
    if not originals or _registered(layer) is not None:
        return None
    found: list[Copy] = []
    problem = ""
    for original in originals:
        try:
            copied = Copy(original, _resolved(layer, original, 0), _resolved(layer, original, 1))
            other = contradiction(layer, copied.coefficients)
        except Exception as error:  # a function may read attributes that only the original has
            problem = problem or str(error)
            continue
        problem = other or problem
        if copied.coefficients and not other and copied[1:] not in [one[1:] for one in found]:
            found.append(copied)
    if len(found) == 1:
        return found[0]
    if found:
        problem = f"it fits several that differ, {[other.original for other in found]}"
    return Copy(originals[0], [], [], problem)


# Attributes in which layers keep the numbers of their inputs and outputs.
_INPUTS = ("in_features", "input_dim", "inputdim", "in_dim", "n_in", "in_size")
_OUTPUTS = ("out_features", "output_dim", "outdim", "out_dim", "n_out", "out_size")


def contradiction(layer: nn.Module, specs: Iterable[CoefficientSpec]) -> str:
    """How the layer's own attributes contradict the inputs and outputs of its coefficient tensors, or ""."""
    if type(layer).__module__.startswith("torch.nn."):  # its inputs may be basis functions
        return ""
    for spec in specs:
        shape = spec.layout.canonical_shape
        for what, names, size in (("inputs", _INPUTS, shape[0]), ("outputs", _OUTPUTS, shape[1])):
            said = {name: value for name in names if type(value := getattr(layer, name, None)) is int}
            # With positions, inputs may be patches. Inputs may also be counted with their functions.
            if len(shape) == 3 and said and not {size, size * shape[2]} & {*said.values()}:
                return (
                    f"`{spec.parameter}` as {spec.layout.pattern!r} has {size} {what}, and the layer has "
                    f"{', '.join(f'{name}={value}' for name, value in said.items())}"
                )
    return ""


def _registered(layer: nn.Module) -> str | None:
    """The name under which the layer's class, or the nearest base class, is registered."""
    names = map(qualified_name, type(layer).__mro__)
    return next((name for name in names if name in _REGISTRY), None)


def _resolved(layer: nn.Module, registered: str, which: int) -> list[CoefficientSpec]:
    described = _REGISTRY[registered][which]
    descriptions = described(layer) if callable(described) else described
    return [CoefficientSpec.resolve(layer, path, text) for path, text in descriptions.items()]


def qualified_name(cls: type) -> str:
    """The module and name of a class, such as "kan.KANLayer.KANLayer"."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _described(
    parameter: str, layout: str, scale: str | None = None, scale_layout: str = "o i", **sizes: str | int
) -> Callable[[Any], Descriptions]:
    """The description of one parameter. Layers have its scale only if an option is on.

    Args:
        parameter, layout, scale, scale_layout: the fields of a description.
        sizes: by axis, a size, or the attribute of the layer that holds it, or something that long; by several axes,
            such as `hw`, an attribute that holds them all.
    """

    def describe(layer: Any) -> Descriptions:
        description: dict[str, Any] = {"layout": layout, "sizes": {}}
        for axes, path in sizes.items():
            value: Any = attrgetter(path)(layer) if isinstance(path, str) else path
            if len(axes) == 1:
                value = [value if isinstance(value, int) else len(value)]
            description["sizes"].update(zip(axes, value, strict=True))
        if scale is not None:
            owner, _, name = scale.rpartition(".")
            if hasattr(layer.get_submodule(owner), name):
                description |= {"scale": scale, "scale_layout": scale_layout}
        return {parameter: description}

    return describe


def _kanditioned(layer: Any) -> Descriptions:
    return dict.fromkeys(["kan_weight"] if hasattr(layer, "kan_weight") else ["r_weight", "l_weight"], "i d o")


def _inkan(layer: Any) -> Descriptions:
    if layer.dim == 2:  # its functions take two inputs at once, so there is no input mode
        return {}
    coefficients = f":, :{layer.in_features * layer.n_bases}"  # the residual weights follow
    return {"weight": {"layout": "o (i d)", "sizes": {"d": layer.n_bases}, "slice": coefficients}}


# pykan multiplies the functions of every edge by these scales.
_EDGE_SCALE = {"layout": "(i d) o", "sizes": {"d": 1}}
_EFFICIENT = _described("spline_weight", "o i d", "spline_scaler"), _described("base_weight", "o (i d)", d=1)
_FAST = _described("spline_linear.weight", "o (i d)", d="rbf.num_grids")
# Coefficients, or coefficients and matrices. Most packages on PyPI are described as `infer_coefficients` found them.
# NaiveFourierKANLayer is not registered: two public layers with this name have the same parameters but different
# layouts, and copies are recognized by name.
_LAYERS: dict[str, Any] = {
    "kan.KANLayer.KANLayer": ({"coef": "i o d"}, {"scale_base": _EDGE_SCALE, "scale_sp": _EDGE_SCALE}),  # pykan
    "efficient_kan.kan.KANLinear": _EFFICIENT,
    "kan_gpt.efficient_kan.model.KANLinear": _EFFICIENT,
    "VisionKAN.ekan.KANLinear": _EFFICIENT,
    "qkan.kan.KANLinear": _EFFICIENT,
    "ikan.KAN.KANLinear": _EFFICIENT,
    "timekan.layers.spline.Spline": _EFFICIENT,
    "fastkan.fastkan.FastKANLayer": _FAST,
    "ChebyKANLayer.ChebyKANLayer": {"cheby_coeffs": "i o d"},
    # The layer flattens each pixel's patch into the inputs of the inner layer.
    "convkan.convkan_layer.ConvKAN": (
        _described(
            "kan_layer.spline_weight", "g o (i h w) d", "kan_layer.spline_scaler", "g o (i h w)", hw="kernel_size"
        ),
        _described("kan_layer.base_weight", "g o (i h w d)", hw="kernel_size", d=1),
    ),
    "inkan.layer.KANLayer": _inkan,
    "microkan.KANLayer.KANLayer": {"coef": "i o d"},
    "seqkan.kan.KANLayer.KANLayer": {"coef": "i o d"},
    "yms_kan.KANLayer.KANLayer": {"coef": "i o d"},
    "kan_gpt.kan.KANLayer.KANLayer": _described("coef", "(o i) d", i="in_dim"),  # an old pykan
    "VisionKAN.fasterkan.FasterKANLayer": _described("spline_linear.weight", "o (i d)", d="rbf.grid"),
    "cvkan.models.FastKAN.FastKANLayer": _FAST,
    "cvkan.models.CVKAN.CVKANLayer": dict.fromkeys(["realweights", "complexweights"], "i o d1 d2"),
    "qkan.fourier_kan.FourierKANLinear": _described("fourier_weight", "o i d", "fourier_scaler"),
    "ConvKAN3D.ConvKAN3D.effConvKAN3D": _described(
        "linear.spline_weight", "o (i t h w) d", "linear.spline_scaler", "o (i t h w)", thw="kernel_size"
    ),
    "flashkan.layer.KANLayer": {"spline_weight": "o i d"},
    "kan.layers.KANLayer": {"coeff": "o i d"},  # kolmarn
    "kan_mlp_hybrid.layers.kan_layer.SimpleKANLayer": {"spline_coefs": "o i d"},
    "deepkan.deepkan.SplineLinearLayer": _described("spline_weights", "o i d", "spline_scales"),
    "deepkan.deepkan.ChebyshevKANLayer": {"cheby_coeffs": "i o d"},
    "deepkan.deepkan.RBFKANLayer": _described("rbf_linear.spline_weight", "(i d) o", d="rbf_linear.num_grids"),
    "mlp_kan.kan_layer.KANInterpoLayer": {"Y": "i o d"},
    "ikan.ChebyKAN.ChebyKANLinear": {"cheby_coeffs": "o i d"},
    "ikan.FourierKAN.FourierKANLinear": {"fourier_coeffs": "d1 o i d2"},
    "ikan.JacobiKAN.JacobiKANLinear": {"jacobi_coeffs": "o i d"},
    "ikan.TaylorKAN.TaylorKANLinear": {"taylor_coeffs": "o i d"},
    "timekan.layers.chebyshev.Chebyshev": {"cheby_coeffs": "i o d"},
    "timekan.layers.fourier.Fourier": {"fouriercoeffs": "d1 o i d2"},
    "tabkan.chebyshev.model.ChebyKANLayer": {"cheby_coeffs": "i o d"},
    "KANditioned.kan_layer.KANLayer": _kanditioned,
}
for _name, _pair in _LAYERS.items():
    register_kan_layer(_name, *(_pair if isinstance(_pair, tuple) else (_pair,)))
