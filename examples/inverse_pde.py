"""Find an unknown coefficient of a PDE from five noisy sensors, with an interval, beside a PINN that trains it.

    python examples/inverse_pde.py
    python examples/inverse_pde.py --pde parabolic --sensors 10 --compared 5

The command trains a base at one coefficient and fits one LoTRA adapter to a range of it, as pde_family.py does (or
loads what an earlier run has left). Then `fit_task` estimates coefficients that the adapter never saw, each from the
values of a few sensors at random places: from the sensors alone, and from the sensors and the equation. The command
counts how many of the true coefficients lie inside of their intervals. For comparison, the base's weights and the
coefficient are trained together, as a physics-informed network (PINN), by Adam and by Levenberg–Marquardt. It writes
the adapter, a table as JSON and a picture.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from command_line import exit_code, new_parser, positive_int, ratio, training_arguments
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pde_family import COEFFICIENTS, DEGREE, RANGES, RANKS, family_points, family_residuals
from pde_least_squares import EQUATIONS, batch, residual_functions
from pde_transfer import trained_base
from pdes import PDE, PDES
from peft import PeftModel, get_peft_model
from pictures import COLOURS, shades
from reporting import write_atomically
from torch import Tensor, nn

from peft_lotra import LoTRAConfig, at_task, fit_gauss_newton, fit_task

TRUTHS = 10  # coefficients to find
REPEATS = 5  # draws of the sensors for each
CALIBRATIONS = 6  # other coefficients, whose solutions say how far off the family is
COLLOCATION = 50  # points of the equation
ADAM_STEPS = 1000
RATES = {"net": 1e-3, "coefficient": 3e-2}
LM_ITERATIONS = 15
WIDTH = 2  # an interval is the estimate ± 2 standard deviations
NOMINAL = math.erf(WIDTH / math.sqrt(2))
SENSORS, EQUATION, ADAM, LM = LABELS = ("family: sensors", "family: sensors and equation", "PINN: Adam", "PINN: LM")


class Sensors(NamedTuple):
    """Places, shape (N, 2), and what is measured there, shape (N, 1)."""

    points: Tensor
    values: Tensor


@dataclass
class Estimate:
    """One estimate of a coefficient, in CPU seconds; a PINN has no standard deviation."""

    truth: float
    value: float
    deviation: float | None
    seconds: float

    @classmethod
    def of(cls, truth: float, fit: Any, seconds: float) -> Estimate:
        return cls(truth, fit.task["parameter"], fit.deviations["parameter"], seconds)

    @property
    def error(self) -> float:
        return abs(self.value - self.truth)

    @property
    def inside(self) -> bool:
        return self.deviation is not None and self.error <= WIDTH * self.deviation

    def __str__(self) -> str:
        if self.deviation is None:
            return f"{self.value:.4f}            error {self.error:.1e}   {self.seconds:5.2f} s"
        text = f"{self.value:.4f} ± {WIDTH * self.deviation:.4f}   error {self.error:.1e}   {self.seconds:5.2f} s"
        return f"{text}   {'inside' if self.inside else 'outside'}"


def timed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    """What the function returns, and its CPU seconds."""
    start = time.process_time()
    result = function(*args, **kwargs)
    return result, time.process_time() - start


def measured(pde: PDE, args: argparse.Namespace, draw: int) -> Sensors:
    """Values at random places, with normal noise. The solutions have the size 1."""
    generator = torch.Generator().manual_seed(args.seed + 1_000_003 * (draw + 1))
    points = pde.sample(generator, interior=args.sensors, per_side=1).interior
    values = pde.exact(points) + args.noise * torch.randn(len(points), 1, generator=generator)
    return Sensors(points.to(args.device), values.to(args.device))


def fitted_family(args: argparse.Namespace, family: type[PDE], load_base: Callable[[], nn.Module]) -> PeftModel:
    """The family adapter, fitted as in pde_family.py unless its file exists."""
    bounds = RANGES[args.pde]
    path = args.output_dir / f"family_{args.pde}_seed{args.seed}_{args.base_steps}steps_{args.iterations}iterations"
    if (path / "adapter_config.json").exists():  # it is written last
        print(f"Family: {path}, fitted by an earlier run.")
        return PeftModel.from_pretrained(load_base(), path)
    config = LoTRAConfig(r=RANKS, coefficients=COEFFICIENTS, family={"parameter": bounds}, family_degree=DEGREE)
    model = get_peft_model(load_base(), config)
    print(f"Family: {family.title}, {family.symbol} in {list(bounds)}")
    result = fit_gauss_newton(
        model,
        family_residuals(model, family),
        family_points(family, bounds, args.seed + 1, args.device, grows_at=0.8 * args.iterations),
        iterations=args.iterations,
        loss_tolerance=0,
    )
    if result.reason == "interrupted":
        raise KeyboardInterrupt
    model.save_pretrained(path)
    return model


@torch.no_grad()
def misfits(model: PeftModel, family: type[PDE], coefficients: list[float], points: Tensor) -> tuple[float, float]:
    """Root mean squares of the family's error and of its equation, at coefficients whose solutions are known."""
    errors, equations = [], []
    for coefficient in coefficients:
        pde = family(coefficient)
        with at_task(model, parameter=coefficient):
            errors.append(model(points) - pde.exact(points))
            equations.append(EQUATIONS[family](pde, model, points))
    return torch.cat(errors).square().mean().sqrt().item(), torch.cat(equations).square().mean().sqrt().item()


def of_sensors(net: Callable[..., Tensor], sensors: Sensors) -> Tensor:
    return net(sensors.points) - sensors.values


def fit_with_equation(
    model: PeftModel, family: type[PDE], sensors: Sensors, points: Tensor, noise: float, misfit: float
) -> Any:
    """`fit_task` with the residuals of the sensors and of the equation at points.

    The family solves the equation at every coefficient, so that these residuals say next to nothing of it. They show
    how several kinds of residuals are given, with a noise for each.

    Args:
        noise: the standard deviation of the sensors.
        misfit: the root mean square of the equation's residuals in the family.
    """

    def residuals(net: Any, sensors: Sensors) -> tuple[Tensor, Tensor]:
        return of_sensors(net, sensors), EQUATIONS[family](family(net.task["parameter"]), net, points)

    # The misfit is a smooth function: all points together say no more of the coefficient than one.
    return fit_task(model, None, residuals, sensors, noise=[noise, misfit * math.sqrt(len(points))])


class Inverse(nn.Module):
    """A network and the coefficient of its equation, both trainable; called without points, the coefficient."""

    def __init__(self, net: nn.Module, coefficient: float) -> None:
        super().__init__()
        self.net, like = net, next(net.parameters())
        self.coefficient = nn.Parameter(like.new_tensor(coefficient))

    def forward(self, points: Tensor | None = None) -> Tensor:
        return self.coefficient if points is None else self.net(points)


def pinn_by_adam(base: nn.Module, family: type[PDE], sensors: Sensors, seed: int) -> float:
    """min over weights and coefficient of the PDE's loss + condition_weight · mean((u − values)²), on fresh points."""
    model = Inverse(base, family.base_parameter)
    generator = torch.Generator().manual_seed(seed)
    groups = [
        {"params": list(model.net.parameters()), "lr": RATES["net"]},
        {"params": [model.coefficient], "lr": RATES["coefficient"]},
    ]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ADAM_STEPS)
    for _ in range(ADAM_STEPS):
        pde = family(model.coefficient)
        optimizer.zero_grad()
        loss = pde.loss(model.net, pde.sample(generator, sensors.points.device))
        (loss + pde.condition_weight * of_sensors(model.net, sensors).square().mean()).backward()
        optimizer.step()
        schedule.step()
    return model.coefficient.item()


def pinn_by_lm(base: nn.Module, family: type[PDE], sensors: Sensors, seed: int) -> float:
    """The same loss by Gauss–Newton with Levenberg–Marquardt damping."""
    model, pde = Inverse(base, family.base_parameter), family(family.base_parameter)

    def at(name: str) -> Callable[[Any, Tensor], Tensor]:
        return lambda net, points: residual_functions(family(net()))[name](net, points)

    functions: dict[str, Callable[[Any, Any], Tensor]] = {name: at(name) for name in residual_functions(pde)}
    functions["sensors"] = lambda net, part: math.sqrt(pde.condition_weight) * of_sensors(net, Sensors(*part))

    def fresh(iteration: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed + 1_000_003 * iteration)
        points = pde.sample(generator, sensors.points.device, interior=1000, per_side=80)
        return batch(pde, points) | {"sensors": tuple(sensors)}

    result = fit_gauss_newton(model, functions, fresh, iterations=LM_ITERATIONS, loss_tolerance=0, progressbar=False)
    if result.reason == "interrupted":
        raise KeyboardInterrupt
    return model.coefficient.item()


def run(args: argparse.Namespace) -> None:
    family = PDES[args.pde]
    low, high = RANGES[args.pde]
    source = family(family.base_parameter)
    grid = source.grid().to(args.device)
    start = time.process_time()
    load_base = trained_base(args, source, grid)
    model = fitted_family(args, family, load_base).requires_grad_(False)
    offline = time.process_time() - start
    known = torch.linspace(low, high, CALIBRATIONS).tolist()
    misfit, of_equation = misfits(model, family, known, grid)
    noise = math.hypot(args.noise, misfit)
    warnings.filterwarnings("ignore", ".*is outside of the family's range")  # an estimate may be
    print(
        f"\n{args.sensors} sensors at random places, noise {args.noise:g}. The family's misfit is {misfit:.1e}, "
        f"that of its equation\n{of_equation:.1e} (root mean squares at {CALIBRATIONS} other {family.symbol}).\n"
    )

    generator = torch.Generator().manual_seed(args.seed + 2)
    points = source.sample(generator, args.device, COLLOCATION).interior
    truths = [round(low + (high - low) * (k + 0.5) / TRUTHS, 4) for k in range(TRUTHS)]
    every = max(1, TRUTHS // args.compared)
    compared = truths[every // 2 :: every][: args.compared]
    estimates: dict[str, list[Estimate]] = {label: [] for label in LABELS}

    def add(label: str, estimate: Estimate) -> None:
        estimates[label].append(estimate)
        print(f"{family.symbol} = {estimate.truth:<8g}{label:30}{estimate}", flush=True)

    fits = []
    for k, truth in enumerate(truths):
        sensors = measured(family(truth), args, k)
        fit, seconds = timed(fit_task, model, None, of_sensors, sensors, noise=noise)
        fits.append((family(truth), sensors, fit))
        add(SENSORS, Estimate.of(truth, fit, seconds))
        add(
            EQUATION, Estimate.of(truth, *timed(fit_with_equation, model, family, sensors, points, noise, of_equation))
        )
        for label, pinn in ((ADAM, pinn_by_adam), (LM, pinn_by_lm)) if truth in compared else ():
            value, seconds = timed(pinn, load_base(), family, sensors, args.seed + 3)
            add(label, Estimate(truth, value, None, seconds))
    further = []
    for k in range(TRUTHS, TRUTHS * REPEATS):
        truth = truths[k % TRUTHS]
        sensors = measured(family(truth), args, k)
        further.append(Estimate.of(truth, *timed(fit_task, model, None, of_sensors, sensors, noise=noise)))
    estimates[SENSORS] += further
    report(args, family, estimates, offline, draw(args, family, estimates, *fits[TRUTHS // 2]))


def report(
    args: argparse.Namespace,
    family: type[PDE],
    estimates: dict[str, list[Estimate]],
    offline: float,
    figure: Figure,
) -> None:
    print(f"\nMedians; {offline:.0f} CPU s of this run went to the base and the family:")
    for label, found in estimates.items():
        text = f"error {median(e.error for e in found):.1e} in {median(e.seconds for e in found):.2f} CPU s; "
        if label in (SENSORS, EQUATION):
            inside = sum(e.inside for e in found)
            text += f"{inside} of {len(found)} true {family.symbol} inside (nominal {NOMINAL:.1%})"
        else:
            text += "errors " + ", ".join(f"{e.error:.1e}" for e in found) + "; no interval"
        print(f"  {label:30}{text}")
    rows = {label: [asdict(e) | {"inside": e.inside} for e in found] for label, found in estimates.items()}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    record = {"settings": settings, "offline_seconds": offline, "estimates": rows}
    name = args.output_dir / f"{args.pde}_inverse"
    write_atomically(name.with_suffix(".json"), lambda p: p.write_text(json.dumps(record) + "\n"))
    write_atomically(name.with_suffix(".png"), lambda p: figure.savefig(p, dpi=120, format="png"))
    print(f"Written: {name}.png, .json, and the family's adapter")


def draw(
    args: argparse.Namespace,
    family: type[PDE],
    estimates: dict[str, list[Estimate]],
    pde: PDE,
    sensors: Sensors,
    fit: Any,
) -> Figure:
    """The errors of the estimates over the truth; one solution through each of its sensors, with its band."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplot_mosaic([["estimates", "solution"], ["estimates", "difference"]], height_ratios=[2, 1])
    draw_estimates(axes["estimates"], args, family, estimates)
    low, high = family.lower[1], family.upper[1]
    along = torch.linspace(low, high, 200, device=sensors.points.device)
    colours = shades(len(sensors.points))
    for k, (point, value) in enumerate(zip(sensors.points, sensors.values, strict=True)):
        line = torch.stack([point[0].expand(len(along)), along], dim=1)
        mean, std = (part.cpu() for part in fit.predict(line))
        exact, at_sensor = pde.exact(line).cpu(), pde.exact(point[None]).cpu()
        for name, less, less_there in (("solution", 0, 0), ("difference", exact, at_sensor)):
            x, y = along.cpu(), (mean - less).squeeze(1)
            bars = WIDTH * std.squeeze(1)
            label = "" if k else f"predicted, ± {WIDTH} standard deviations"
            axes[name].plot(x, y, color=colours[k], lw=1.2, label=label)
            axes[name].fill_between(x, y - bars, y + bars, color=colours[k], alpha=0.15, lw=0)
            there = (value.cpu() - less_there).squeeze()
            label = "" if k else "sensor"
            axes[name].plot(point[1].cpu(), there, "o", color=colours[k], mec="k", zorder=3, label=label)
    other, axis = family.axes
    axes["solution"].set(title=f"{family.title}, {family.symbol} = {pde.parameter:g}, at each sensor's {other}")
    axes["solution"].set(ylabel="u")
    axes["solution"].legend(fontsize="small")
    axes["difference"].set(xlabel=axis, ylabel="u − exact")
    for own in axes.values():
        own.grid(alpha=0.3)
    return figure


def draw_estimates(
    axes: Axes, args: argparse.Namespace, family: type[PDE], estimates: dict[str, list[Estimate]]
) -> None:
    """Estimate − truth over the truth. A PINN that is out of the picture is at its edge, with its estimate."""
    low, high = RANGES[args.pde]
    aside = (high - low) / TRUTHS / (REPEATS + 1)  # from draw to draw
    for some, first, color, label in (
        (estimates[SENSORS][TRUTHS:], 1, "0.75", f"{REPEATS - 1} more draws of sensors, moved aside"),
        (estimates[SENSORS][:TRUTHS], 0, COLOURS["family"], SENSORS),
    ):
        x = [e.truth + aside * (first + i // TRUTHS) for i, e in enumerate(some)]
        bars = [WIDTH * (e.deviation or 0) for e in some]
        axes.errorbar(x, [e.value - e.truth for e in some], bars, fmt="o", ms=3, lw=1.2, color=color, label=label)
    edge = max(map(abs, axes.get_ylim()))
    axes.set_ylim(-1.1 * edge, 1.4 * edge)  # with room for the legend
    for label, marker, fill in ((ADAM, "v", "none"), (LM, "^", COLOURS["full"])):
        some = estimates[label]
        y = [min(max(e.value - e.truth, -edge), edge) for e in some]
        axes.plot([e.truth for e in some], y, marker, color=COLOURS["full"], mfc=fill, label=label, zorder=3)
        for e, place in zip(some, y, strict=True):
            if abs(place) == edge:
                beside = (-6, -4) if label == ADAM else (6, -4)
                side = "right" if label == ADAM else "left"
                axes.annotate(f"{e.value:.2f}", (e.truth, place), beside, textcoords="offset points", ha=side)
    axes.axhline(0, color="0.4", lw=0.8)
    symbol = family.symbol
    axes.set(title=f"{symbol} from {args.sensors} sensors, noise {args.noise:g}", xlabel=f"true {symbol}")
    axes.set(ylabel=f"estimate − true {symbol}, ± {WIDTH} standard deviations", xlim=(low, high))
    axes.legend(fontsize="small", ncols=2, loc="upper center")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--pde", choices=list(RANGES), default="hyperbolic", help="family of PDEs")
    add("--sensors", type=positive_int, default=5, help="at random places")
    add("--noise", type=ratio, default=0.01, help="standard deviation of the sensors; the solutions have the size 1")
    add("--iterations", type=positive_int, default=30, help="of the fit to the whole family")
    add("--base-steps", type=positive_int, default=400, help="Adam steps of the base")
    add("--compared", type=positive_int, default=1, help="coefficients that a PINN finds, too")
    return training_arguments(parser, argv, "inverse_pde", kan="chebyshev")


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    return exit_code(lambda: run(args), f"The base and the family, if fitted, are kept in {args.output_dir}.")


if __name__ == "__main__":
    sys.exit(main())
