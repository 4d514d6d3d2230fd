"""Graphs of meta-computations: which nodes, which edges, what names."""

import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import diffopt
from diffopt.meta import adapt, maml
from diffopt.nn import MetaOptimizer, extract_state
from diffopt.visual import make_dot, to_svg, watch

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")


def nodes(dot):
    """The attributes of each node by its first label line, with the box it is in: `box/label`."""
    found, box = {}, ""
    for line in dot.splitlines():
        if line.strip().startswith("label="):
            box = re.search(r'label="(.*?)"', line)[1] + "/"
        elif line.strip() == "}":
            box = ""
        elif match := re.match(r'\s+(n\d+) \[label="(.*?)"(.*)\]', line):
            found[match[1]] = (box + match[2].split("\\n")[0], match[3])
    return found


def edges(dot):
    """The edges as pairs of labels, and those that are dashed."""
    names = {key: label for key, (label, _) in nodes(dot).items()}
    pairs = re.findall(r"(n\d+) -> (n\d+)( \[style=dashed.*)?", dot)
    solid = {(names[a], names[b]) for a, b, dashed in pairs if not dashed}
    return solid, {(names[a], names[b]) for a, b, dashed in pairs if dashed}


def leaf(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def test_edges_pass_over_what_has_no_name():
    a, b = leaf(1.0), leaf(2.0)
    middle = (a * b).sin()
    dot = make_dot(middle.exp() + a, {"a": a, "middle": middle})
    assert edges(dot)[0] == {("a", "middle"), ("middle", "value"), ("a", "value"), ("()", "middle")}


def test_an_unnamed_leaf_shows_its_shape():
    dot = make_dot(torch.ones(2, 3, requires_grad=True).sum(), {})
    assert "(2, 3)" in [label for label, _ in nodes(dot).values()]


def test_operations_are_shown_where_wanted():
    a = leaf(1.0)
    value = a.sin().exp()
    assert edges(make_dot(value, {"a": a}, operations=True))[0] == {("a", "SinBackward"), ("SinBackward", "value")}


def test_outputs_of_one_operation_are_told_apart():
    first, second = torch.ones(2, 3, requires_grad=True).unbind()
    solid, dashed = edges(make_dot(first.sum(), {"first": first, "second": second}))
    assert ("first", "value") in solid
    assert ("second", "value") not in solid
    assert {b for _, b in dashed} == {"second"}


def test_what_the_value_does_not_depend_on_is_dashed():
    a, other = leaf(1.0), leaf(2.0)
    found = dict(nodes(make_dot(2 * a, {"a": a, "other": other, "constant": torch.ones(2)})).values())
    assert "dashed" in found["other"]
    assert "dashed" not in found["a"]
    assert "constant" not in found


def test_two_names_of_one_tensor():
    a = leaf(1.0)
    dot = make_dot(2 * a, {"start": {"w": a}, "step 0": {"w": a}})
    assert 'label="w\\nstep 0: w"' in dot


def test_the_steps_of_a_meta_optimizer():
    net, rate = nn.Linear(2, 1, bias=False), leaf(0.1)
    inner = MetaOptimizer(net, diffopt.sgd(rate.float(), momentum=0.9))
    named = {"rate": rate}
    for k in range(2):
        loss = net(torch.ones(3, 2)).square().mean()
        named[f"step {k}"] = {"net": extract_state(net).params, "sgd": extract_state(inner), "loss": loss}
        inner.step(loss)
    solid, dashed = edges(make_dot(net(torch.ones(1, 2)).sum(), {**named, "end": net}))
    assert ("step 0/net.weight", "step 1/net.weight") in solid
    assert ("step 1/net.weight", "end/weight") in solid
    assert ("rate", "end/weight") in solid
    assert any(a.startswith("step 1/sgd") and b == "end/weight" for a, b in solid)
    assert ("step 0/net.weight", "end/weight") not in solid
    assert {b for _, b in dashed} == {"step 0/loss", "step 1/loss"}


@pytest.mark.parametrize("batched", [False, True])
def test_a_watched_loss_shows_the_steps_of_an_unroll(batched):
    loss = lambda params, data: ((data @ params["w"]) ** 2).mean()  # noqa: E731
    params, named = {"w": torch.ones(2, dtype=torch.float64, requires_grad=True)}, {}
    data = torch.rand(4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    watched = watch(loss, named)
    if batched:
        value = maml(watched, diffopt.sgd(0.1), 2)(params, (data, data))
    else:
        value = watched(adapt(watched, params, data[0], diffopt.sgd(0.1), 2).params, data[0])
    solid, _ = edges(make_dot(value, {"start": params, **named}))
    assert {("start/w", "step 1/params.w"), ("step 1/params.w", "step 2/params.w")} <= solid
    assert ("start/w", "step 2/params.w") not in solid


def test_a_detached_step_is_seen():
    w = leaf(1.0)
    middle = 2 * w
    found = dict(nodes(make_dot(middle.detach().requires_grad_() * 3, {"w": w, "middle": middle})).values())
    assert "dashed" in found["w"]


@given(st.text(min_size=1, max_size=8))
@settings(max_examples=30)
def test_any_label_is_quoted(label):
    a = leaf(1.0)
    text = make_dot(2 * a, {label: a})
    strings = re.findall(r'label="((?:[^"\\]|\\.)*)"', text, flags=re.DOTALL)
    assert label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") in strings


def test_a_tree_of_values():
    a = leaf(1.0)
    dot = make_dot({"x": 2 * a, "y": torch.ones(1)}, {"a": a})
    assert edges(dot)[0] == {("a", "x")}


@pytest.mark.parametrize("value", [torch.ones(2), {"x": torch.ones(1)}])
def test_no_graph_raises(value):
    with pytest.raises(ValueError, match="require grad, in grad mode"):
        make_dot(value, {})


@pytest.mark.parametrize(
    ("named", "kind", "message"),
    [
        ([leaf(1.0)], TypeError, "dict from labels"),
        ({"a": {"b": 1.0}}, TypeError, r"`a\['b'\]` must be a tensor"),
        ({3: leaf(1.0)}, TypeError, "must be a string; got int"),
        ({"": leaf(1.0)}, ValueError, "must not be empty"),
    ],
)
def test_wrong_names_raise(named, kind, message):
    with pytest.raises(kind, match=message):
        make_dot(2 * leaf(1.0), named)


@needs_dot
def test_svg():
    a = leaf(1.0)
    svg = to_svg(make_dot(2 * a, {'a "quoted" \\ name': {"w": a}}))
    assert svg.count("<g ") >= 3
    assert "quoted" in svg
    with pytest.raises(RuntimeError, match="could not draw"):
        to_svg("no graph")


def test_svg_takes_a_text():
    with pytest.raises(TypeError, match="source of a graph"):
        to_svg(None)


def test_inference_mode_shows_the_graph_of_before():
    a = leaf(1.0)
    value = 2 * a
    with torch.inference_mode():
        inside = make_dot(value, {"a": a})
    assert inside == make_dot(value, {"a": a})


def test_without_graphviz_the_error_names_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="apt install graphviz"):
        to_svg("digraph {}")
