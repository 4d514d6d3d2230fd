import pytest
import torch
from torch.func import grad, vmap

from diffopt import step, tree
from diffopt.meta import maml, meta_sgd, per_step
from diffopt.optimizers import adam, sgd
from meta.problems import assert_trees_close, check_slope, f64, network_params, regression, regression_tasks


def rates_like(params, factor=0.1):
    return tree.map(lambda p: factor * (1.5 + p.cos()), params)


def test_meta_sgd_scales_each_entry():
    params = network_params()
    rates = rates_like(params)
    optimizer = meta_sgd(rates)
    got, state = step(optimizer, params, optimizer.init(params), params)
    assert_trees_close(got, tree.map(lambda p, r: p - r * p, params, rates))
    assert state.count == 1


@pytest.mark.parametrize(
    "rates",
    [
        rates_like(network_params()),
        {"body": f64(0.1), "head": {"w": f64([[0.2], [0.1], [0.3], [0.15]]), "b": f64(-0.05)}},
        f64(0.2),
    ],
)
def test_meta_sgd_rates_and_start_against_finite_differences(rates):
    meta = {"rates": rates, "params": network_params()}
    tasks = regression_tasks()

    def meta_loss(meta):
        return maml(regression, meta_sgd(meta["rates"]), 3)(meta["params"], tasks)

    check_slope(meta_loss, meta)
    for part in meta:
        check_slope(lambda values, part=part: meta_loss({**meta, part: values}), meta[part])


def test_a_rate_a_layer_and_step_against_finite_differences_and_constants():
    tasks, params = regression_tasks(), network_params()
    rates = {"body": f64([0.1, 0.2, 0.05]), "head": f64([0.3, -0.1, 0.2])}

    def meta_loss(rates):
        return maml(regression, meta_sgd(rates, stepwise=True), 3)(params, tasks)

    check_slope(meta_loss, rates)
    constant = tree.map(lambda r: torch.full_like(r, 0.2), rates)
    torch.testing.assert_close(meta_loss(constant), maml(regression, sgd(0.2), 3)(params, tasks))


@pytest.mark.parametrize("make", [sgd, lambda rate: adam(rate, eps_root=1e-8)])
def test_per_step_rates_of_any_optimizer_against_finite_differences(make):
    tasks, params, rates = regression_tasks(), network_params(), f64([0.1, 0.2, 0.05])

    def meta_loss(rates):
        return maml(regression, make(per_step(rates)), 3)(params, tasks)

    check_slope(meta_loss, rates)
    batch = torch.stack([rates, 0.5 * rates])
    slopes = vmap(grad(meta_loss))(batch)
    torch.testing.assert_close(slopes, torch.stack([grad(meta_loss)(r) for r in batch]))
    for i in range(3):
        e, h = torch.eye(3, dtype=torch.float64)[i], 1e-5
        torch.testing.assert_close(
            slopes[0, i], (meta_loss(rates + h * e) - meta_loss(rates - h * e)) / (2 * h), rtol=1e-6, atol=1e-9
        )


def test_the_last_row_serves_later_steps_and_counts_may_be_batched():
    schedule = per_step(f64([0.5, 0.25]))
    torch.testing.assert_close(vmap(schedule)(torch.arange(4)), f64([0.5, 0.25, 0.25, 0.25]))


def test_half_precision_keeps_its_dtype():
    params = {"w": torch.ones(2, dtype=torch.bfloat16)}
    optimizer = meta_sgd({"w": torch.tensor([0.5, 0.25])})
    assert step(optimizer, params, optimizer.init(params), params)[0]["w"].tolist() == [0.5, 0.75]


def test_bad_rates_raise():
    params = {"w": torch.ones(2), "b": torch.ones(())}

    def take(rates, **options):
        optimizer = meta_sgd(rates, **options)
        return step(optimizer, params, optimizer.init(params), params)

    with pytest.raises(ValueError, match=r"params\['b'\]` must broadcast to its shape \(\); got \(2,\)"):
        take({"w": torch.ones(2), "b": torch.ones(2)})
    with pytest.raises(TypeError, match=r"params\['w'\]` must be a floating-point tensor; got torch.int64"):
        take({"w": torch.ones(2, dtype=torch.int64), "b": torch.ones(())})
    with pytest.raises(TypeError, match="Tensor"):
        take(0.1)
    with pytest.raises(ValueError, match="prefix"):
        take({"w": torch.ones(2)})
    with pytest.raises(ValueError, match="leading dimension"):
        take(torch.tensor(0.1), stepwise=True)
    with pytest.raises(ValueError, match=r"shape \(steps,\).*got \(\)"):
        per_step(torch.tensor(0.1))
    with pytest.raises(TypeError, match="got float"):
        per_step(0.1)
