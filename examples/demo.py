"""Both faces of differentiable optimization on real digits: an implicit and an unrolled derivative.

Runs `data_cleaning.py` and `few_shot.py` on three seeds in about half a minute on one core, prints one table and
saves one picture.

Run it: python examples/demo.py [--quiet] [--picture PATH]
"""

import argparse
import time
from pathlib import Path

import data_cleaning
import few_shot
import matplotlib
import torch

matplotlib.use("agg")
import matplotlib.pyplot as plt

BLUE, ORANGE, GREY = "#2a6f97", "#e07a1f", "#8a8a8a"


def table(cleaning: data_cleaning.Result, shots: few_shot.Result) -> str:
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
    }
    seeds = range(len(cleaning.auc))
    lines = [f"{'':44s}" + "".join(f"{f'seed {i}':>9s}" for i in seeds) + f"{'mean':>9s}"]
    for title, rows in sections.items():
        lines += ["", title]
        for name, values in rows.items():
            digits = 1 if "%" in name or "points" in name else 3
            lines.append(f"  {name:42s}" + "".join(f"{v:9.{digits}f}" for v in [*values, values.mean()]))
    return "\n".join(lines)


def picture(cleaning: data_cleaning.Result, shots: few_shot.Result, path: Path) -> None:
    """Draw the outer loss, the learned weights, and the accuracy against inner steps."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.5, 3.8), layout="constrained")

    left.plot(cleaning.losses.T.numpy(), color=BLUE, lw=1.5)
    left.set(title="Data cleaning: outer loss, a line a seed", xlabel="outer step")
    left.set(ylabel="loss on clean validation digits", ylim=(0, None))

    groups = [cleaning.weights[cleaning.wrong == wrong].numpy() for wrong in (True, False)]
    middle.hist(groups, torch.linspace(0, 1, 21).numpy(), color=[ORANGE, BLUE], label=["wrong label", "right label"])
    middle.set(title="Data cleaning: learned weights", xlabel="weight of a training example")
    middle.set(ylabel="examples, all seeds (log scale)", yscale="log")
    middle.legend(frameon=False, loc="upper center")

    for accuracy, color, name in ((shots.maml, BLUE, "MAML"), (shots.baseline, GREY, "pre-trained, new head")):
        values = 100 * accuracy
        steps = range(values.shape[1])
        right.fill_between(steps, values.amin(0), values.amax(0), color=color, alpha=0.25, lw=0)
        right.plot(steps, values.mean(0), "o-", color=color, label=name)
    right.axvline(few_shot.INNER_STEPS, color="black", lw=0.8, ls=":")
    right.text(few_shot.INNER_STEPS + 0.1, 30, "trained for\nthree steps", fontsize=9)
    right.set(title="Few-shot: new names for ten digits", xlabel="inner step", ylabel="accuracy on unseen tasks (%)")
    right.set_ylim(0, 100)
    right.legend(frameon=False, loc="lower right")

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Run both, print the table, save the picture."""
    parser = argparse.ArgumentParser(description="Run both examples on real digits.")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--picture", type=Path, default=Path("build/demo.png"), help="where to save the picture")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small: a second thread only waits
    start = time.perf_counter()
    cleaning = data_cleaning.run(quiet=options.quiet)
    shots = few_shot.run(quiet=options.quiet)
    print(table(cleaning, shots))
    picture(cleaning, shots, options.picture)
    print(f"\n{time.perf_counter() - start:.0f} seconds; picture saved as {options.picture}")


if __name__ == "__main__":
    main()
