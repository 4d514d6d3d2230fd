"""What `watch` keeps."""

import pytest
import torch
from torch.func import grad, vmap

import diffopt
from diffopt.visual import watch


def test_values_pass_through_and_are_kept_in_order():
    named = {"start": torch.ones(1)}
    watched = watch(lambda x, *rest, scale=2: (x * scale, rest), named, "call")
    assert watched(torch.tensor(3.0))[0] == 6
    watched(torch.tensor(4.0), torch.tensor(5.0), scale=3)
    assert list(named) == ["start", "call 0", "call 1"]
    assert named["call 1"]["x"] == 4
    assert named["call 1"]["arg 1"] == 5
    assert named["call 1"]["value"][0] == 12
    assert "scale" not in named["call 1"]


def test_under_transforms_the_plain_tensors_are_kept():
    named, x = {}, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    watched = watch(lambda x: x**3, named)
    torch.testing.assert_close(vmap(grad(watched))(x), 3 * x**2)
    torch.testing.assert_close(named["step 0"]["value"], x**3)


def test_arguments_have_the_names_that_they_are_called_by():
    class Player:
        def loss(self, value, scale):
            return value * scale

    named = {}
    watch(Player().loss, named)(torch.tensor(2.0), torch.tensor(3.0))
    assert named["step 0"] == {"value given": 2.0, "scale": 3.0, "value": 6.0}


@pytest.mark.parametrize(("fn", "named"), [(3, {}), (torch.sin, [])])
def test_wrong_arguments_raise(fn, named):
    with pytest.raises(TypeError, match="a function and a dict"):
        watch(fn, named)


def test_compiling_raises():
    with pytest.raises(RuntimeError, match="leave out compile"):
        diffopt.compile(watch(lambda x: 2 * x, {}), backend="eager")(torch.ones(1))
