import pytest
import torch
from torch.func import grad

from diffopt.meta import anil, maml, meta_sgd
from diffopt.optimizers import adamw, sgd
from meta.problems import assert_trees_close, check_slope, f64, network_params, regression, regression_tasks

HEAD = {"body": False, "head": True}


@pytest.mark.parametrize("mask", [HEAD, lambda params: HEAD, {"body": {"w": False, "b": False}, "head": True}])
def test_is_maml_with_rates_of_zero_elsewhere(mask):
    tasks, params, rate = regression_tasks(), network_params(), f64(0.2)

    def by_rates(rate, params):
        rates = {"body": torch.zeros((), dtype=torch.float64), "head": rate}
        return maml(regression, meta_sgd(rates), 3)(params, tasks)

    ours = lambda rate, params: anil(regression, sgd(rate), 3, mask)(params, tasks)  # noqa: E731
    torch.testing.assert_close(ours(rate, params), by_rates(rate, params))
    assert_trees_close(grad(ours, argnums=(0, 1))(rate, params), grad(by_rates, argnums=(0, 1))(rate, params))


def test_against_finite_differences_with_state_chunks_and_checkpoints():
    tasks, params = regression_tasks(), network_params()
    meta_loss = anil(regression, adamw(0.1, eps_root=1e-8), 3, HEAD, chunk_size=2, checkpoint="sqrt")
    check_slope(lambda p: meta_loss(p, tasks), params)
    plain = anil(regression, adamw(0.1, eps_root=1e-8), 3, HEAD)
    assert_trees_close(grad(meta_loss)(params, tasks), grad(plain)(params, tasks))


def test_a_mask_of_all_is_maml():
    tasks, params = regression_tasks(), network_params()
    assert_trees_close(
        grad(anil(regression, sgd(0.2), 2, True))(params, tasks), grad(maml(regression, sgd(0.2), 2))(params, tasks)
    )


def test_compiles_where_nothing_of_a_dict_adapts():
    tasks, params = regression_tasks(), network_params()
    slope = grad(anil(regression, adamw(0.1, eps_root=1e-8), 2, HEAD))
    torch._dynamo.reset()
    compiled = torch.compile(slope, backend="eager", fullgraph=True)
    assert_trees_close(compiled(params, tasks), slope(params, tasks))


def test_bad_masks_raise():
    tasks, params = regression_tasks(), network_params()
    with pytest.raises(TypeError, match="use `maml`"):
        anil(regression, sgd(0.1), 1, None)
    with pytest.raises(ValueError, match="holds for none"):
        anil(regression, sgd(0.1), 1, {"body": False, "head": False})(params, tasks)
    with pytest.raises(ValueError, match="prefix"):
        anil(regression, sgd(0.1), 1, {"neck": True})(params, tasks)
    with pytest.raises(TypeError, match="bool"):
        anil(regression, sgd(0.1), 1, {"body": 0, "head": 1})(params, tasks)
