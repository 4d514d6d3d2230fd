"""Names for the types that appear in public signatures."""

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

__all__ = ["Numeric", "Schedule", "Shape", "Tree"]

Tree: TypeAlias = Any
"""Any optree pytree whose leaves are tensors."""

Numeric: TypeAlias = float | Tensor
"""A number, or a 0-d tensor that may carry gradient and be vmapped, as every hyperparameter may be."""

Schedule: TypeAlias = Callable[[Tensor], Numeric]
"""A hyperparameter as a function of the step count (an int64 0-d tensor)."""

Shape: TypeAlias = tuple[int, ...]
"""The shape of a tensor."""
