"""Three faces of optimization on real digits: an implicit derivative, an unrolled one, and none at all.

Runs `data_cleaning.py`, `few_shot.py` and `threshold_tuning.py` on three seeds in less than a minute on one core,
prints one table and saves one picture.

Run it: python examples/demo.py [--quiet] [--picture PATH]
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import data_cleaning
import few_shot
import matplotlib
import threshold_tuning
import torch

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#2a6f97", "#e07a1f", "#8a8a8a"


def table(cleaning: data_cleaning.Result, shots: few_shot.Result, tuning: threshold_tuning.Result) -> str:
    """One row a number, one column a seed, and their mean."""
    k = few_shot.INNER_STEPS
    maml, baseline = 100 * shots.maml, 100 * shots.baseline
    sections = {
        "Data cleaning (implicit: custom_root, conjugate gradients)": {
            "validation loss at the first step": cleaning.losses[:, 0],
            "validation loss at the last step": cleaning.losses[:, -1],
            "AUC of the weights for right labels": torch.tensor(cleaning.auc),
            **{f"test error (%): {name}": 100 * error for name, error in cleaning.errors.items()},
        },
        "Few-shot adaptation (unrolled: vmap of grad through sgd)": {
            "accuracy (%): MAML, before adaptation": maml[:, 0],
            f"accuracy (%): MAML, after {k} steps": maml[:, k],
            f"accuracy (%): pre-trained, after {k} steps": baseline[:, k],
            "margin (points)": maml[:, k] - baseline[:, k],
        },
        "Threshold tuning (zero-order: vmap of CMA-ES on the F1 score)": {
            f"{part} F1 (%): {name}": 100 * score
            for part, scores in (("validation", tuning.valid), ("test", tuning.test))
            for name, score in scores.items()
        },
    }
    seeds = range(len(cleaning.auc))
    lines = [f"{'':46s}" + "".join(f"{f'seed {i}':>9s}" for i in seeds) + f"{'mean':>9s}"]
    for title, rows in sections.items():
        lines += ["", title]
        for name, values in rows.items():
            digits = 1 if "%" in name or "points" in name else 3
            lines.append(f"  {name:44s}" + "".join(f"{v:9.{digits}f}" for v in [*values, values.mean()]))
    return "\n".join(lines)


def picture(
    cleaning: data_cleaning.Result, shots: few_shot.Result, tuning: threshold_tuning.Result, path: Path
) -> None:
    """Draw the outer loss, the learned weights, the accuracy against inner steps, and F1 against evaluations."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 7.2), layout="constrained")
    draw_cleaning(cleaning, *axes[0])
    draw_few_shot(shots, axes[1, 0])
    draw_tuning(tuning, axes[1, 1])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_cleaning(cleaning: data_cleaning.Result, left: Axes, right: Axes) -> None:
    """Draw the outer loss, and the learned weights."""
    left.plot(cleaning.losses.T.numpy(), color=BLUE, lw=1.5)
    left.set(title="Data cleaning: outer loss, a line a seed", xlabel="outer step")
    left.set(ylabel="loss on clean validation digits", ylim=(0, None))
    groups = [cleaning.weights[cleaning.wrong == wrong].numpy() for wrong in (True, False)]
    right.hist(groups, torch.linspace(0, 1, 21).tolist(), color=[ORANGE, BLUE], label=["wrong label", "right label"])
    right.set(title="Data cleaning: learned weights", xlabel="weight of a training example")
    right.set(ylabel="examples, all seeds (log scale)", yscale="log")
    right.legend(frameon=False, loc="upper center")


def draw_few_shot(shots: few_shot.Result, axis: Axes) -> None:
    """Draw the accuracy after each inner step."""
    for accuracy, color, name in ((shots.maml, BLUE, "MAML"), (shots.baseline, GREY, "pre-trained, new head")):
        draw_band(axis, range(accuracy.shape[1]), 100 * accuracy, color, name, marker="o")
    axis.axvline(few_shot.INNER_STEPS, color="black", lw=0.8, ls=":")
    axis.text(few_shot.INNER_STEPS + 0.1, 30, "trained for\nthree steps", fontsize=9)
    axis.set(title="Few-shot: new names for ten digits", xlabel="inner step", ylabel="accuracy on unseen tasks (%)")
    axis.set_ylim(0, 100)
    axis.legend(frameon=False, loc="lower right")


def draw_tuning(tuning: threshold_tuning.Result, axis: Axes) -> None:
    """Draw what the best reading so far gains in F1 after each evaluation."""
    for name, color in (("random search", GREY), ("CMA-ES", BLUE)):
        curve = 100 * (tuning.curves[name] - tuning.valid["as trained"][:, None])
        draw_band(axis, [threshold_tuning.MEMBERS * (t + 1) for t in range(curve.shape[1])], curve, color, name)
    axis.set(title="Threshold tuning: a metric without gradient", xlabel="evaluations of the metric")
    axis.set(ylabel="gain in validation F1 (points)")
    axis.set_ylim(0, None)
    axis.legend(frameon=False, loc="lower right")


def draw_band(axis: Axes, x: Sequence[int], values: torch.Tensor, color: str, name: str, *, marker: str = "") -> None:
    """Draw the mean over seeds, and their range."""
    axis.fill_between(x, values.amin(0).numpy(), values.amax(0).numpy(), color=color, alpha=0.25, lw=0)
    axis.plot(x, values.mean(0).numpy(), marker=marker, color=color, label=name)


def main() -> None:
    """Run all three, print the table, save the picture."""
    parser = argparse.ArgumentParser(description="Run three examples on real digits.")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--picture", type=Path, default=Path("build/demo.png"), help="where to save the picture")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small: a second thread only waits
    start = time.perf_counter()
    cleaning = data_cleaning.run(quiet=options.quiet)
    shots = few_shot.run(quiet=options.quiet)
    tuning = threshold_tuning.run(quiet=options.quiet)
    print(table(cleaning, shots, tuning))
    picture(cleaning, shots, tuning, options.picture)
    print(f"\n{time.perf_counter() - start:.0f} seconds; picture saved as {options.picture}")


if __name__ == "__main__":
    main()
