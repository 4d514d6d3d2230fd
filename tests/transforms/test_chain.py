"""diffopt.transforms.chain: composition of updates, states, steps and extra arguments."""

import pytest
import torch

from diffopt import tree
from diffopt.transforms import EmptyState, GradientTransformation, chain, identity, scale, step, trace


def recorder(seen, name, **options):
    """A transformation that notes the extra arguments it was given."""
    if options.get("takes") == "value":

        def update(updates, state, params=None, *, value=None):
            seen[name] = {"value": value}
            return updates, state
    elif options.get("takes") == "all":

        def update(updates, state, params=None, **extra):
            seen[name] = extra
            return updates, state
    else:

        def update(updates, state, params=None):
            seen[name] = {}
            return updates, state

    return GradientTransformation(lambda params: EmptyState(), update)


def test_members_run_in_order_on_the_state_of_each():
    params = {"w": torch.randn(3)}
    transformation = chain(trace(0.9), scale(-0.1), identity())
    state = transformation.init(params)
    assert isinstance(state, tuple)
    assert len(state) == 3
    for _ in range(2):
        updates, state = transformation.update(params, state)
    torch.testing.assert_close(updates["w"], -0.19 * params["w"])
    torch.testing.assert_close(state[0].trace["w"], 1.9 * params["w"])


def test_chains_nest_and_may_be_empty():
    x = torch.randn(2)
    nested = chain(chain(scale(2.0)), chain(), scale(3.0))
    updates, state = nested.update(x, nested.init(x))
    torch.testing.assert_close(updates, 6 * x)
    assert state == ((EmptyState(),), (), EmptyState())


def test_extra_arguments_reach_those_who_take_them():
    seen, x = {}, torch.ones(1)
    members = [recorder(seen, takes, takes=takes) for takes in ("none", "value", "all")]
    transformation = chain(*members)
    transformation.update(x, transformation.init(x), x, value=3.0, other=4.0)
    assert seen == {"none": {}, "value": {"value": 3.0}, "all": {"value": 3.0, "other": 4.0}}


def test_step_is_that_of_the_last_member():
    def own(grads, state, params, *, rate=1.0):
        return params - rate * grads, EmptyState()

    last = GradientTransformation(lambda params: EmptyState(), scale(-1.0).update, own)
    x = torch.tensor([4.0])
    assert chain(last, scale(1.0)).step is None
    for transformation in (chain(scale(0.5), last), chain(scale(0.5), chain(last)), chain(chain(scale(0.5)), last)):
        assert transformation.step is not None
        new, state = step(transformation, x, transformation.init(x), x, rate=0.5, unknown=None)
        assert torch.equal(new, torch.tensor([3.0]))
        assert tree.leaves(state) == []
        assert len(state) == 2


def test_bad_members_and_states_raise():
    with pytest.raises(TypeError, match="argument 1 is a list"):
        chain(scale(1.0), [scale(1.0)])
    x = torch.ones(1)
    transformation = chain(scale(1.0), scale(1.0))
    with pytest.raises(ValueError, match="2 entries; got 1 entries"):
        transformation.update(x, (EmptyState(),))
    with pytest.raises(ValueError, match="got list"):
        transformation.update(x, [EmptyState(), EmptyState()])
