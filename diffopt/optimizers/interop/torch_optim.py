"""Transformations as `torch.optim.Optimizer`, for training loops that exist already."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt import tree
from diffopt.optimizers.interop.recipe import build, check_options, read_recipe
from diffopt.optimizers.interop.second_gradient import second_gradient
from diffopt.optimizers.interop.slots import Layout, check_separable, find_layout, keeps_params, place, unaliased
from diffopt.transforms import GradientTransformation, step
from diffopt.typing import Tree

__all__ = ["TorchOptimizer", "to_torch"]


def to_torch(
    optimizer: GradientTransformation | Callable[..., GradientTransformation],
    params: Iterable[Any],
    /,
    **hyperparameters: Any,
) -> "TorchOptimizer":
    """Make a `torch.optim.Optimizer` of a transformation, which steps parameters in place by their ``grad``.

    Given a factory such as `adam`, its hyperparameters are the options of the parameter groups, under its own names but
    for the learning rate, which is ``lr``: `torch.optim.lr_scheduler` and whoever else writes into a group changes the
    next step. (CyclicLR and OneCycleLR look for ``momentum`` or ``betas`` to cycle too. They find sgd's and rmsprop's
    momentum; elsewhere they need ``cycle_momentum=False``.) Functions, trees and transformations among the
    hyperparameters are the same for all groups, and not in the groups; a ready transformation has none in them.

    Each group steps by itself, and the transformation sees it as the list of its parameters: what it computes over all
    leaves, such as a global norm, is over the group. Parameters whose ``grad`` is None do not step, and their state,
    count included, stays. A state begins at a parameter's first gradient.

    Nothing here is differentiable; for that use `diffopt.step`.

    Args:
        optimizer: A factory, such as `adam`; or a ready transformation.
        params: As for `torch.optim.Optimizer`: real floating-point tensors, pairs of a name and a tensor, or groups,
            dicts with ``"params"`` and hyperparameters of their own.
        **hyperparameters: The factory's arguments by name, with ``lr`` for ``learning_rate``.

    Returns:
        The optimizer.

    Raises:
        TypeError: If a hyperparameter is unknown or not one that a group can hold, or a parameter is not a
            floating-point tensor.
        ValueError: If a hyperparameter is missing or out of range, or there are no parameters.

    Example:
        >>> from diffopt.optimizers import adamw
        >>> model = torch.nn.Linear(2, 1)
        >>> groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}]
        >>> optimizer = to_torch(adamw, groups, lr=1e-3, weight_decay=0.1)
        >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        >>> model(torch.ones(1, 2)).square().sum().backward()
        >>> optimizer.step()
        >>> scheduler.step()
        >>> [round(group["lr"], 6) for group in optimizer.param_groups]
        [0.000976, 0.000976]
    """
    return TorchOptimizer(optimizer, params, **hyperparameters)


class TorchOptimizer(torch.optim.Optimizer):
    """What `to_torch` makes: a `torch.optim.Optimizer` whose state is that of a transformation, in plain dicts.

    ``state[parameter]`` goes from paths in the transformation's state to tensors; `state_dict` holds nothing that
    ``torch.load(..., weights_only=True)`` refuses.

    Example:
        >>> from diffopt.optimizers import adam
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = TorchOptimizer(adam, [weight], lr=0.1)
        >>> weight.grad = torch.ones(1)
        >>> optimizer.step()
        >>> sorted(optimizer.state[weight])
        ['[0].count', '[0].mu', '[0].nu']
    """

    def __init__(
        self,
        optimizer: GradientTransformation | Callable[..., GradientTransformation],
        params: Iterable[Any],
        /,
        **hyperparameters: Any,
    ) -> None:
        self._recipe, defaults = read_recipe(optimizer, hyperparameters)
        self._forget()
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **extra: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step all parameters that have a gradient.

        Args:
            closure: Clears the gradients, computes the loss, calls backward and returns the loss. Its loss is the
                ``value`` that `scale_by_polyak` asks for, and a second call of it gives the gradient that `sam` does.
            **extra: What else the transformation asks for, as in `diffopt.step`.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: If a gradient is sparse; if the parameters of a group step apart and the transformation computes
                over all of them; or as the transformation raises.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            value = loss.detach() if isinstance(loss, Tensor) else loss
            extra = ({} if value is None else {"value": value}) | extra
        batches = [(index, members) for index in range(len(self.param_groups)) for members in self._batches(index)]
        for index, members in batches:
            params = [self.param_groups[index]["params"][i] for i in members]
            second = {"grad_fn": second_gradient(closure, params, alone=len(batches) == 1)}
            self._step_batch(index, members, second | extra)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in `torch.optim.Optimizer`.

        Args:
            param_group: ``"params"`` and hyperparameters.

        Raises:
            TypeError: If a hyperparameter is unknown, or a parameter is not a floating-point tensor.
            ValueError: If a hyperparameter is missing or out of range, or a parameter is in another group.
        """
        group = _Group(param_group) if isinstance(param_group, dict) else param_group
        if isinstance(group, dict):
            check_options(self._recipe, group)
        super().add_param_group(group)
        try:
            for i, param in enumerate(group["params"]):
                if not param.is_floating_point():
                    raise TypeError(f"Parameter {i} must be of a real floating-point dtype; got {param.dtype}.")
            build(self._recipe, group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, exactly: tensors are copied and keep the dtypes that the transformation gives.

        Args:
            state_dict: The state dict of such an optimizer, with groups of the same sizes.

        Raises:
            ValueError: If groups, hyperparameters, names or shapes differ.
        """

        def seal(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            # torch casts tensors that it sees to the parameter's dtype: counts and the moments of 16-bit leaves too.
            sealed = {
                key: _Sealed(value) if isinstance(value, dict) else value for key, value in loaded["state"].items()
            }
            return {**loaded, "state": sealed}

        handle = self.register_load_state_dict_pre_hook(seal)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_recipe": self._recipe}

    def __setstate__(self, state: dict[str, Any]) -> None:
        groups = [_Group(group) for group in state["param_groups"]]
        sealed = {p: own.values for p, own in state["state"].items() if isinstance(own, _Sealed)}
        self._forget()
        if "_recipe" in state:
            self._recipe = state["_recipe"]
        opened = state["state"].copy()
        # Like torch, keep what belongs to no parameter as it came.
        opened.update({key: own.values for key, own in opened.items() if isinstance(own, _Sealed)})
        for group in groups:
            opened.update(self._opened(group, sealed))
        super().__setstate__({**state, "param_groups": groups, "state": opened})

    def _opened(self, group: dict[str, Any], sealed: dict[Tensor, dict[str, Any]]) -> dict[Tensor, dict[str, Tensor]]:
        """Check and copy the loaded state of a group; parameters with equal shared tensors share them again."""
        params = group["params"]
        members = [i for i, p in enumerate(params) if sealed.get(p)]
        transformation = build(self._recipe, group)
        if not members:
            return {}
        with torch.no_grad():
            state = transformation.init(place({i: params[i] for i in members}, len(params)))
        layout, fresh = find_layout(state, len(params)), tree.leaves(state)
        opened: dict[Tensor, dict[str, Tensor]] = {params[i]: {} for i in members}
        for (name, i), like in zip(layout.slots, fresh, strict=True):
            for j in members if i is None else [i]:
                opened[params[j]][name] = _read(sealed[params[j]], name, like)
        shared = [name for name, i in layout.slots if i is None]
        for i in members:
            surplus = sorted(set(sealed[params[i]]) - set(opened[params[i]]))
            if surplus:
                raise ValueError(
                    f"The state dict has {surplus} for a parameter, which this transformation's state lacks: it is "
                    "another optimizer's. For one of torch.optim see `from_torch_state`."
                )
        heads: list[dict[str, Tensor]] = []
        for own in opened.values():
            head = next((h for h in heads if all(torch.equal(h[name], own[name]) for name in shared)), None)
            if head is None:
                heads.append(own)
            else:
                own.update({name: head[name] for name in shared})
        return opened

    def _forget(self) -> None:
        self._built: dict[int, tuple[dict[str, Any], GradientTransformation]] = {}
        self._layouts: dict[Any, Layout] = {}
        self._separable: dict[Any, set[tuple[int, ...]]] = {}
        self._donates: dict[Any, bool] = {}

    def _transformation(self, index: int) -> GradientTransformation:
        """The group's transformation, made anew when a hyperparameter has changed."""
        group = self.param_groups[index]
        options = {key: group[key] for key in self._recipe.names if key in group}
        last = self._built.get(index)
        if last is None or not all(map(_same, last[0].values(), options.values())):
            last = self._built[index] = (options, build(self._recipe, group))
        return last[1]

    def _key(self, index: int, members: Sequence[int]) -> Any:
        """What the structure of a batch's state depends on: numbers among the hyperparameters do not matter."""
        group = self.param_groups[index]
        options = (group[key] for key in self._recipe.names)
        kinds = tuple("number" if isinstance(x, (float, Tensor)) else x for x in options)
        return index, tuple(members), len(group["params"]), kinds

    def _init(self, index: int, members: Sequence[int]) -> list[Tensor]:
        """Make the initial state of a batch, and note its layout."""
        params = self.param_groups[index]["params"]
        state = self._transformation(index).init(place({i: params[i] for i in members}, len(params)))
        self._layouts[self._key(index, members)] = find_layout(state, len(params))
        return unaliased(tree.leaves(state), params)

    def _layout(self, index: int, members: Sequence[int]) -> Layout:
        key = self._key(index, members)
        if key not in self._layouts:
            self._init(index, members)
        return self._layouts[key]

    def _batches(self, index: int) -> list[list[int]]:
        """The parameters of a group that step, by the histories that they share."""
        params = self.param_groups[index]["params"]
        stepping = {i for i, p in enumerate(params) if p.grad is not None}
        for i in stepping:
            if params[i].grad.layout != torch.strided:
                raise ValueError(
                    f"Parameter {i} of group {index} has a sparse gradient. Make it dense (such as by "
                    "torch.nn.Embedding(..., sparse=False)), or step that parameter by torch.optim.SparseAdam."
                )
        new = [i for i in sorted(stepping) if not self.state.get(params[i])]
        if new:
            self._store(index, new, self._init(index, new))
        known = [i for i, p in enumerate(params) if self.state.get(p)]
        if not known:
            return [sorted(stepping)] if stepping else []
        shared = [name for name, i in self._layout(index, known).slots if i is None]
        cohorts: dict[tuple[int, ...], list[int]] = {}
        for i in known:
            cohorts.setdefault(tuple(id(self.state[params[i]][name]) for name in shared), []).append(i)
        if len(cohorts) > 1:
            self._check_separable(index, known, list(cohorts.values()))
        batches = [[i for i in cohort if i in stepping] for cohort in cohorts.values()]
        return [batch for batch in batches if batch]

    def _check_separable(self, index: int, known: Sequence[int], cohorts: Sequence[Sequence[int]]) -> None:
        """Check the cohorts that were not checked before, among the same parameters."""
        key = (index, tuple(known))
        checked = self._separable.get(key, set())
        new = [cohort for cohort in cohorts if tuple(cohort) not in checked]
        if new:
            check_separable(self._transformation(index), self.param_groups[index]["params"], new, known)
            self._separable = {k: v for k, v in self._separable.items() if k[0] != index}
            self._separable[key] = {*checked, *map(tuple, new)}

    def _store(self, index: int, members: Sequence[int], leaves: Sequence[Tensor]) -> None:
        params = self.param_groups[index]["params"]
        for (name, i), leaf in zip(self._layout(index, members).slots, leaves, strict=True):
            for j in members if i is None else [i]:
                self.state[params[j]][name] = leaf

    def _step_batch(self, index: int, members: Sequence[int], extra: dict[str, Any]) -> None:
        params, transformation = self.param_groups[index]["params"], self._transformation(index)
        layout = self._layout(index, members)
        owners = [params[members[0] if i is None else i] for _, i in layout.slots]
        missing = [name for (name, _), p in zip(layout.slots, owners, strict=True) if name not in self.state[p]]
        if missing:
            raise ValueError(
                f"The state of group {index} lacks {missing[0]!r}: a hyperparameter that changes what the state holds "
                "was changed during the run."
            )
        leaves = [self.state[p][name] for (name, _), p in zip(layout.slots, owners, strict=True)]
        state = tree.unflatten(layout.treespec, leaves)
        here = place({i: params[i] for i in members}, len(params))
        grads = place({i: params[i].grad for i in members}, len(params))
        new, treespec = self._advance(transformation, grads, state, here, self._key(index, members), extra)
        if treespec != layout.treespec:
            raise ValueError("The transformation's update changes the structure of its state, which `to_torch` cannot.")
        self._store(index, members, new)

    def _advance(
        self,
        transformation: GradientTransformation,
        grads: Tree,
        state: Any,
        params: Tree,
        key: Any,
        extra: dict[str, Any],
    ) -> tuple[list[Tensor], Any]:
        """Write the new parameters into the old, and give the flat new state."""
        write, values, new_state = Tensor.add_, None, None
        if self._may_donate(transformation, params, key):
            try:
                values, new_state = step(transformation, grads, state, params, donate=True, **extra)
                write = Tensor.copy_
            except ValueError:
                # Parameters that share memory, or a real error, which then is raised again below.
                self._donates[key] = False
        if values is None:
            values, new_state = transformation.update(grads, state, params, **extra)
        old = tree.leaves(params)
        leaves, treespec = tree.flatten(new_state)
        leaves = unaliased(leaves, [*old, *tree.leaves(grads)], kept=tree.leaves(state))
        for p, value in zip(old, tree.leaves(values), strict=True):
            if value is not p:
                write(p, value)
        return leaves, treespec

    def _may_donate(self, transformation: GradientTransformation, params: Tree, key: Any) -> bool:
        if key not in self._donates:
            members = [i for i, p in enumerate(params) if isinstance(p, Tensor)]
            self._donates[key] = transformation.step is not None and not keeps_params(transformation, params, members)
        return self._donates[key]


class _Group(dict[str, Any]):
    """A parameter group that says why it has no learning rate."""

    def __missing__(self, key: str) -> Any:
        if key == "lr":
            raise KeyError(
                "This group has no 'lr' to schedule: the learning rate lies inside the transformation. Make the "
                "optimizer from a factory, such as to_torch(adam, params, lr=1e-3)."
            )
        raise KeyError(key)


class _Sealed:
    """A loaded state that torch does not look into."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values


def _read(values: dict[str, Any], name: str, like: Tensor) -> Tensor:
    value = values.get(name)
    if not isinstance(value, Tensor) or value.shape != like.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else f"only {sorted(values)}"
        raise ValueError(
            f"The state dict needs {name!r} of shape {tuple(like.shape)} for a parameter; got {got}. For a state dict "
            "of torch.optim's own optimizers see `from_torch_state`."
        )
    return value.detach().to(like, copy=True)


def _same(old: Any, new: Any) -> bool:
    return old is new or (type(old) is type(new) and not isinstance(old, Tensor) and old == new)
