"""diffopt.testing: a wrong derivative rule is caught, and the cell that shows it is named."""

import re

import pytest
import torch

from diffopt.autodiff import custom_derivative
from diffopt.testing import CELLS, check_composition, check_hypergradient

F64 = torch.float64
X = torch.tensor([0.5, -0.4, 0.8], dtype=F64)
EAGER = {"backend": None}


def exp_with(vjp=None, jvp=None):
    """exp with a rule replaced by a wrong one."""
    rules = {
        "vjp": vjp or (lambda inputs, outputs, c, wanted: (outputs[0] * c[0],)),
        "jvp": jvp or (lambda inputs, outputs, t: (outputs[0] * t[0],)),
    }
    op = custom_derivative(lambda x: (x.exp(),), **rules)
    return lambda x: op(x)[0]


def wrong_cells(operator, reference=torch.exp, **options):
    with pytest.raises(AssertionError, match=r"\d+ of \d+ cells are wrong") as info:
        check_composition(operator, (X,), reference, **EAGER, **options)
    lines = str(info.value).splitlines()[1:]
    return {re.split(r"\s{2,}", line)[0] for line in lines if re.split(r"\s{2,}", line)[1].startswith("wrong")}


def test_a_right_operator_passes_in_every_cell():
    report = check_composition(exp_with(), (X,), torch.exp, **EAGER)
    assert {cell.status for cell in report.cells} == {"right"}
    assert report.bad == ()
    assert {cell.name for cell in report.cells} == {name for name in CELLS if not name.startswith("compile")}


def test_a_wrong_vjp_rule_is_caught_where_reverse_mode_runs():
    wrong = wrong_cells(exp_with(vjp=lambda inputs, outputs, c, wanted: (1.01 * outputs[0] * c[0],)))
    assert {"grad", "vjp", "jacrev", "hessian", "vmap(grad)", "backward, thrice"} <= wrong
    assert not wrong & {"forward", "jvp", "jacfwd", "vmap", "jvp(jvp(jvp))"}


def test_a_wrong_jvp_rule_is_caught_where_forward_mode_runs():
    wrong = wrong_cells(exp_with(jvp=lambda inputs, outputs, t: (1.01 * outputs[0] * t[0],)))
    assert {"jvp", "jacfwd", "dual_level", "jvp(vmap)", "gradcheck"} <= wrong
    assert not wrong & {"forward", "grad", "jacrev", "vmap", "grad(grad)"}


def test_a_rule_right_in_first_order_only_is_caught_in_second():
    wrong = wrong_cells(exp_with(vjp=lambda inputs, outputs, c, wanted: (outputs[0].detach() * c[0],)))
    assert {"hessian", "jacrev(jacrev)", "grad(grad)", "backward, thrice"} <= wrong
    assert not wrong & {"forward", "grad", "jacrev", "jvp", "vmap"}


def test_a_wrong_batching_rule_is_caught_under_vmap():
    op = custom_derivative(
        lambda x: (x.exp(),),
        vjp=lambda inputs, outputs, c, wanted: (outputs[0] * c[0],),
        jvp=lambda inputs, outputs, t: (outputs[0] * t[0],),
        batching=lambda primal, dims, size: lambda x: (x.movedim(dims[0], 0).exp().flip(0),),
    )
    wrong = wrong_cells(lambda x: op(x)[0])
    assert {"vmap", "vmap(grad)", "vmap(vmap)"} <= wrong
    assert not wrong & {"forward", "grad", "jvp"}


@pytest.mark.parametrize(
    ("reference", "shown"),
    [
        (lambda x: x.exp() + 1e-6, "1.0e-06"),
        (lambda x: x.exp()[:2], "nan"),
        (lambda x: x.exp() * float("nan"), "the reference is not finite"),
    ],
)
def test_wrong_values_shapes_and_nan_are_shown(reference, shown):
    with pytest.raises(AssertionError, match=rf"forward +wrong +{shown}"):
        check_composition(torch.exp, (X,), reference, cells=["forward"])


def test_an_error_is_wrong_unless_it_may_be_raised_and_says_what_to_do():
    def refuses(x):
        raise RuntimeError("this cannot be: use the dense form")

    with pytest.raises(AssertionError, match=r"forward +wrong +RuntimeError: this cannot be"):
        check_composition(refuses, (X,), torch.exp, cells=["forward"])
    report = check_composition(refuses, (X,), torch.exp, cells=["forward"], may_raise={"forward": "use the .*"})
    assert [(cell.status, cell.detail) for cell in report.cells] == [("raises", "use the dense form")]
    with pytest.raises(AssertionError, match=r"forward +wrong"):
        check_composition(refuses, (X,), torch.exp, cells=["forward"], may_raise={"forward": "something else"})


def test_compiled_cells_compare_with_the_eager_reference():
    cells = ["compile", "compile(grad)", "compile(vmap(grad))", "compile(grad(grad))"]
    report = check_composition(torch.sinh, (X,), lambda x: (x.exp() - (-x).exp()) / 2, cells=cells, backend="eager")
    assert [cell.status for cell in report.cells] == ["right"] * 4
    with pytest.raises(AssertionError, match="4 of 4 cells are wrong"):
        check_composition(torch.sinh, (X,), torch.cosh, cells=cells, backend="eager")


def test_trees_and_several_arguments():
    report = check_composition(
        lambda tree, s: {"y": tree["a"] * s, "z": tree["b"].sum()},
        ({"a": X, "b": X[:2]}, X[0]),
        lambda tree, s: {"y": s * tree["a"], "z": tree["b"][0] + tree["b"][1]},
        **EAGER,
    )
    assert report.bad == ()
    assert "vmap, shared" in str(report)


def test_single_precision_is_refused():
    with pytest.raises(TypeError, match=r"checked in float64; got \['torch.float32'\]"):
        check_composition(torch.exp, (X.float(),), torch.exp)
    with pytest.raises(TypeError, match=r"hypergradients are checked in float64; argument 1 is torch.float32"):
        check_hypergradient(lambda x, y: (x * y).sum(), (X, X.float()))


def test_a_right_gradient_passes_and_its_error_is_returned():
    assert check_hypergradient(lambda x, t: (x.sin() * t["s"] ** 3).sum(), (X, {"s": X[1]})) < 1e-8


def test_a_wrong_gradient_is_caught_and_its_element_named():
    spoiled = torch.tensor([1.0, 1.0, 1.001], dtype=F64)
    wrong = exp_with(vjp=lambda inputs, outputs, c, wanted: (outputs[0] * c[0] * spoiled,))
    with pytest.raises(AssertionError, match=r"argument 1, element 2: gradient .*, central difference .*, allowed"):
        check_hypergradient(lambda y, x: (y * wrong(x)).sum(), (X, X))


def test_a_lost_gradient_is_caught():
    with pytest.raises(AssertionError, match=r"argument 0, element \d: gradient 0, central difference"):
        check_hypergradient(lambda x: (x.detach() ** 2).sum() + 0 * x.sum(), (X,))


def test_nan_is_caught():
    with pytest.raises(AssertionError, match="gradient nan"):
        check_hypergradient(lambda x: (x * float("nan")).sum(), (X,))
