"""Pictures of meta-computations: what depends on what across inner steps, how tasks are learned, what they are."""

from diffopt.visual.dot import make_dot, to_svg
from diffopt.visual.plots import plot_adaptation, plot_curves, plot_images
from diffopt.visual.watch import watch

__all__ = ["make_dot", "plot_adaptation", "plot_curves", "plot_images", "to_svg", "watch"]
