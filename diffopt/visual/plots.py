"""Plots of what is learned within tasks: losses over inner steps, curves task by task, grids of images."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_adaptation", "plot_curves", "plot_images"]


def plot_adaptation(
    losses: Mapping[str, Tensor], *, axes: "Axes | None" = None, log: bool = False, label: str = "loss"
) -> "Figure":
    """Plot the loss, or another figure, over the inner steps of each method: the mean over tasks.

    Args:
        losses: From the name of a method to its values, shape `(steps,)`, or `(tasks, steps)`, of which the band from
            the 10th to the 90th percentile is shaded; of an `adapt` under `vmap`, its ``losses``. Step 0 comes first.
        axes: Where to draw; by default on a new figure.
        log: Whether the vertical axis is logarithmic.
        label: What it shows.

    Returns:
        The figure: `figure.savefig(path)` stores it.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If the values are no tensors.
        ValueError: If they have other shapes, or there are none.

    Example:
        >>> figure = plot_adaptation({"MAML": torch.tensor([[2.0, 1.0, 0.5], [4.0, 1.0, 0.7]])})
        >>> [round(y, 2) for y in figure.axes[0].lines[0].get_ydata().tolist()]
        [3.0, 1.0, 0.6]
    """
    columns = {name: _values(value, f"losses[{name!r}]", (1, 2)) for name, value in losses.items()}
    if not columns:
        raise ValueError('`losses` must have an entry a method, as in {"MAML": losses}; got none.')
    if axes is None:
        axes = _figure(5.0, 3.2).subplots()
    for name, values in columns.items():
        rows = values.reshape(-1, values.shape[-1])
        steps = range(rows.shape[1])
        (line,) = axes.plot(steps, rows.mean(0).numpy(), ".-", label=name)
        if len(rows) > 1:
            low, high = rows.quantile(torch.tensor([0.1, 0.9], dtype=rows.dtype), dim=0).numpy()
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="inner steps", ylabel=label, yscale="log" if log else "linear")
    axes.locator_params(axis="x", integer=True)
    axes.legend()
    figure: Any = axes.get_figure()
    return figure


def plot_curves(
    x: Tensor, curves: Mapping[str, Tensor], *, points: tuple[Tensor, Tensor] | None = None, columns: int = 4
) -> "Figure":
    """Plot functions of one number in a grid with a panel a task, as the truth, before and after adaptation.

    Args:
        x: Where the functions are taken, shape `(n,)`, or `(tasks, n)`.
        curves: From a name to values, shape `(tasks, n)`.
        points: The data of each task, x and y of shape `(tasks, shots)`, as dots.
        columns: The most panels in a row.

    Returns:
        The figure: `figure.savefig(path)` stores it.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If something is no tensor.
        ValueError: If shapes disagree, or there are no curves.

    Example:
        >>> x = torch.linspace(0.0, 1.0, 5)
        >>> figure = plot_curves(x, {"truth": torch.stack([x, x**2]), "adapted": torch.stack([0.9 * x, x])})
        >>> len(figure.axes)
        2
    """
    if not curves:
        raise ValueError('`curves` must have an entry a function, as in {"truth": y}; got none.')
    values = {name: _values(y, f"curves[{name!r}]", (2,)) for name, y in curves.items()}
    shape = next(iter(values.values())).shape
    places = _values(x, "x", (1, 2))
    places = places.expand(shape) if places.shape in (shape, shape[-1:]) else places
    dots = () if points is None else tuple(_values(p, f"points[{i}]", (2,)) for i, p in enumerate(points))
    for name, y in [("x", places), *values.items()]:
        if y.shape != shape:
            raise ValueError(f"all functions must have shape {tuple(shape)}, (tasks, n); got {tuple(y.shape)}: {name}.")
    if dots and (len(dots) != 2 or dots[0].shape != dots[1].shape or len(dots[0]) != shape[0]):
        raise ValueError(
            f"`points` must be x and y of shape ({shape[0]}, shots); got {[tuple(d.shape) for d in dots]}."
        )
    panels = _panels(shape[0], columns)
    for task, axes in enumerate(panels):
        for name, y in values.items():
            axes.plot(places[task].numpy(), y[task].numpy(), label=name)
        if dots:
            axes.plot(dots[0][task].numpy(), dots[1][task].numpy(), "k.")
    panels[0].legend(fontsize="small")
    return panels[0].get_figure()


def plot_images(images: Tensor, labels: Tensor | None = None) -> "Figure":
    """Show the images of tasks in a grid, a row a task.

    Args:
        images: Shape `(tasks, images, height, width)`.
        labels: Shape `(tasks, images)`, numbers to write above.

    Returns:
        The figure: `figure.savefig(path)` stores it.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If something is no tensor.
        ValueError: If shapes are others, or there are no images.

    Example:
        >>> len(plot_images(torch.rand(2, 3, 8, 8), torch.tensor([[0, 1, 2], [2, 0, 1]])).axes)
        6
    """
    pixels = _values(images, "images", (4,))
    names = None if labels is None else _values(labels, "labels", (2,))
    if names is not None and names.shape != pixels.shape[:2]:
        raise ValueError(f"`labels` must have shape {tuple(pixels.shape[:2])}; got {tuple(names.shape)}.")
    tasks, count = pixels.shape[:2]
    panels = _figure(0.9 * count, (0.9 if names is None else 1.1) * tasks).subplots(tasks, count, squeeze=False)
    for task in range(tasks):
        for i in range(count):
            panels[task, i].imshow(pixels[task, i].numpy(), cmap="gray")
            panels[task, i].axis("off")
            if names is not None:
                panels[task, i].set_title(f"{names[task, i].item():g}", fontsize="small")
    return panels[0, 0].get_figure()


def _values(value: Any, name: str, ndims: tuple[int, ...]) -> Tensor:
    """The values of a tensor on the CPU, in a dtype that NumPy has."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a tensor; got {type(value).__name__}. Use torch.as_tensor.")
    if value.ndim not in ndims or not value.numel():
        wanted = " or ".join(str(n) for n in ndims)
        raise ValueError(f"`{name}` must have {wanted} dimensions and be not empty; got shape {tuple(value.shape)}.")
    return value.detach().cpu().to(torch.float64)


def _panels(count: int, columns: int) -> list[Any]:
    """Axes for so many panels, those that are left in the last row taken away."""
    if not isinstance(columns, int) or isinstance(columns, bool) or columns < 1:
        raise ValueError(f"`columns` must be a positive int; got {columns!r}.")
    width, height = min(count, columns), -(-count // columns)
    figure = _figure(2.4 * width, 1.9 * height)
    found = figure.subplots(height, width, squeeze=False, sharex=True, sharey=True).flatten().tolist()
    for axes in found[count:]:
        figure.delaxes(axes)
    return found[:count]


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'diffopt[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")
