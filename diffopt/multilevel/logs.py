"""Where the numbers of a training run go."""

import os
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["log_to_tensorboard"]


def log_to_tensorboard(folder: str | os.PathLike) -> Callable[[int, Mapping[str, float]], None]:
    """Make a `log` for `train` that writes scalars for TensorBoard.

    Args:
        folder: Where TensorBoard looks.

    Returns:
        `(update, values) -> None`.

    Raises:
        ImportError: If TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("log_to_tensorboard needs TensorBoard: pip install tensorboard") from error
    writer: Any = SummaryWriter(os.fspath(folder))

    def log(update: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, update)
        writer.flush()

    return log
