"""What cannot be transformed says so: everything at once, with module path, source line and remedy."""

from __future__ import annotations

import copy
import inspect
import math
import operator
import pickle
import re
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._ops import OpOverloadPacket
from torch.utils.checkpoint import checkpoint

import fxstn
from fxstn import hp
from fxstn.ir.errors import ExplainedError
from fxstn.ops.response import responses_in
from fxstn.rules import RULES
from tests.nets import Double, mlp, randomize_response

SCALAR = [hp.Scalar("a", 0.5, 0, 1)]


class Around(nn.Module):
    """A linear layer and then any function of its output."""

    def __init__(self, body):
        super().__init__()
        self.fc, self.inner = nn.Linear(4, 4), Inner(body)

    def forward(self, x):
        return self.inner(self.fc(x))


class Inner(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, y):
        return self.body(y)


def no_derivatives(y):
    distances = torch.pdist(y)
    return distances.sum() + torch.bincount(y.flatten())


def test_operations_without_rule_and_derivative_are_listed_all_at_once():
    with pytest.raises(fxstn.TransformError) as caught:
        fxstn.transform(Around(no_derivatives), SCALAR)
    assert len(caught.value.problems) == 2
    for problem, name in zip(caught.value.problems, ("torch.pdist", "torch.bincount"), strict=True):
        assert problem.where == "inner"
        assert problem.what.startswith(f"{name} has no tangent rule")
        assert "test_errors.py:" in problem.source
        assert name.split(".")[1] in problem.source
        assert "register one" in problem.remedy


def test_a_custom_operator_without_forward_mode_is_refused():
    @torch.library.custom_op("fxstn_tests::plus_one", mutates_args=())
    def plus_one(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    with pytest.raises(fxstn.TransformError, match="plus_one has no tangent rule"):
        fxstn.transform(Around(torch.ops.fxstn_tests.plus_one.default), SCALAR)


@pytest.fixture
def square(request):
    """A custom operator without a derivative; its rule is forgotten after the test."""
    name = "square_" + "".join(letter for letter in request.node.name if letter.isalnum())

    @torch.library.custom_op(f"fxstn_tests::{name}", mutates_args=())
    def operator(x: torch.Tensor) -> torch.Tensor:
        return x * x

    before = set(RULES)
    yield operator
    for key in set(RULES) - before:
        del RULES[key]


def test_a_rule_of_ones_own_is_one_call_and_verified(square):
    net = Around(lambda y: square(y))
    with pytest.raises(fxstn.TransformError, match="has no tangent rule"):
        fxstn.transform(net, SCALAR)
    fxstn.register_rule(square, lambda dx, y, x: 2 * x * dx)
    assert fxstn.verify(net, torch.randn(3, 4), hparams=SCALAR).ok
    with pytest.raises(ValueError, match="kind='smooth'"):
        fxstn.register_rule(square, kind="smooth")
    assert fxstn.verify(net, torch.randn(3, 4), hparams=SCALAR).ok  # the rule is still there
    fxstn.register_rule(square, kind="linear")  # a later one replaces it
    assert not fxstn.verify(net, torch.randn(3, 4), hparams=SCALAR).ok


@pytest.mark.parametrize("trace", ["fx", "export", "live"])
def test_a_custom_operator_is_told_of_and_taught_alike_in_every_frontend(square, trace):
    square.register_fake(torch.empty_like)
    net, x = Around(lambda y: y + square(y)), torch.randn(3, 4)
    with pytest.raises(fxstn.TransformError, match=r"square_\w+ has no tangent rule .*; register one"):
        fxstn.transform(net, SCALAR, example_inputs=x, trace=trace)
    fxstn.register_rule(square, lambda dx, y, x: 2 * x * dx)
    assert fxstn.transform(net, SCALAR, example_inputs=x, trace=trace).frontend == trace
    assert fxstn.verify(net, x, hparams=SCALAR, trace=trace).ok


def test_a_wrong_rule_of_ones_own_is_found(square):
    fxstn.register_rule(square, lambda dx, y, x: 2.01 * x * dx)
    assert not fxstn.verify(Around(lambda y: square(y)), torch.randn(3, 4), hparams=SCALAR).ok


def test_a_rule_needs_partials_or_a_kind(square):
    with pytest.raises(ValueError, match="got 0 partials, kind=None"):
        fxstn.register_rule(square)
    with pytest.raises(ValueError, match="kind='smooth'"):
        fxstn.register_rule(square, kind="smooth")


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize(
    ("function", "said", "remedy"),
    [
        (nn.ReLU, "nn.ReLU is a module", "register the functions that its forward calls, F.relu for nn.ReLU say"),
        (nn.Linear(2, 2), "nn.Linear is a module", "register the functions that its forward calls"),
        (Doubled, "Doubled is a module", "register the functions that its forward calls"),
        (torch.no_grad, "no_grad is a class", "register the functions that its forward calls"),
        (len, "len is a function of Python's", "register torch's operation in its place"),
        (print, "print is a function of Python's", "register torch's operation in its place"),
        (math.sin, "math.sin is a function of Python's", "register torch's operation in its place"),
        (copy.deepcopy, "copy.deepcopy is a function of Python's", "register torch's operation in its place"),
        (torch.Tensor.backward, "Tensor.backward is a function that returns no tensor", "register the operation whose tensor"),
        (torch.Tensor.tolist, "Tensor.tolist is a function that returns no tensor", "register the operation whose tensor"),
        (torch.Tensor.register_hook, "Tensor.register_hook is a function that returns no tensor", "register the operation"),
        (torch.Tensor.item, "Tensor.item is a function that returns no tensor", "register the operation whose tensor"),
        (torch.is_same_size, "torch.is_same_size is a function that returns no tensor", "register the operation"),
        (torch.save, "torch.save is a function that returns no tensor", "register the operation whose tensor"),
        (torch.manual_seed, "torch.manual_seed is a function that returns no tensor", "register the operation"),
    ],
)  # fmt: skip
def test_what_no_graph_has_as_an_operation_gets_no_rule(function, said, remedy):
    before = dict(RULES)
    with pytest.raises(
        ValueError, match=rf"^register_rule: .*{re.escape(said)}, and no operation with a tangent; {remedy}"
    ):
        fxstn.register_rule(function, kind="linear")
    assert before == RULES


@pytest.fixture
def rules_as_before():
    before = dict(RULES)
    yield before
    RULES.clear()
    RULES.update(before)


@pytest.mark.parametrize(
    ("function", "kind"),
    [(torch.Tensor.cdouble, "linear"), (torch.is_same_size, "zero"), (torch.Tensor.dim_order, "zero")],
)
def test_operations_without_a_rule_get_one_where_they_give_tensors_or_sizes(rules_as_before, function, kind):
    fxstn.register_rule(function, kind=kind)
    assert RULES[function].kind == kind


def test_a_spelling_that_has_the_name_of_the_operation_is_told_from_it():
    with pytest.raises(
        ValueError, match=r"a graph has F\.elu in place of torch\._C\._nn\.elu, and that already has a rule"
    ):
        fxstn.register_rule(torch._C._nn.elu, kind="linear")


def spellings():
    """Every ATen overload, and every function of torch, Tensor and torch.nn.functional."""
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads() if isinstance(packet, OpOverloadPacket) else ():
            if torch._C._dispatch_has_kernel(getattr(packet, overload).name()):  # not TorchScript's own
                yield getattr(packet, overload)
    for namespace in (torch, torch.Tensor, F, operator):
        yield from filter(inspect.isroutine, (getattr(namespace, name) for name in dir(namespace)))


REFUSALS = {  # kinds of messages; each names the operation
    "another operation's": r"register_rule: a graph has \S+\.\S+ in place of \S+, and that already has a",
    "another operation": r"register_rule: a graph has \S+\.\S+ in place of \S+, with other arguments",
    "a mutation": r"register_rule: \S+ changes a tensor in place",
    "no operation": r"register_rule: \S+ is (a class|a function [^,]*), and no operation",
    "its own": r"(F|torch|Tensor|operator)\.\S+ already has a",
}


def outcome(spelling):
    """Which kind of message register_rule refuses a spelling with; "registered" where it takes it."""
    try:
        fxstn.register_rule(spelling, lambda dx, y, *_: dx)
    except ValueError as error:
        return next((kind for kind, pattern in REFUSALS.items() if re.match(pattern, str(error))), str(error))
    return "registered"


def test_any_spelling_gets_a_rule_or_the_error_says_which_operation_has_it(rules_as_before):
    outcomes = Counter()
    for spelling in dict.fromkeys(spellings()):
        outcomes[outcome(spelling)] += 1
        RULES.clear()
        RULES.update(rules_as_before)
    assert set(outcomes) == {"registered", *REFUSALS}
    assert min(outcomes[key] for key in ("registered", "another operation's", "a mutation", "its own")) > 50


def test_a_rule_for_a_spelling_with_arguments_of_its_own_names_the_operation_that_has_it(rules_as_before):
    with pytest.raises(
        ValueError, match=r"F\.elu in place of torch\.ops\.aten\.elu\.default, .* already has a rule \(pointwise\)"
    ):
        fxstn.register_rule(torch.ops.aten.elu.default, lambda dx, y, x, *_: dx)
    assert rules_as_before == RULES


def test_an_operation_without_rule_falls_back_to_torchs_forward_mode():
    net = Around(lambda y: torch.special.i0(y) + torch.logcumsumexp(y, 1))
    assert fxstn.verify(net, torch.randn(3, 4), hparams=SCALAR).ok
    rules = [row.rule for row in fxstn.explain(net, SCALAR).rows]
    assert rules[:2] == ["fallback", "fallback"]


def data_dependent(y):
    return y if y.sum() > 0 else -y


def in_no_grad(y):
    with torch.no_grad():
        return y * 2


def in_autocast(y):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return y * 2


def assigned(y):
    view = y[:, 1:]
    y[:, 0] = 0
    return view


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (data_dependent, "symbolic tracing cannot follow"),
        (in_no_grad, "a no_grad region"),
        (in_autocast, "an autocast region"),
        (lambda y: Double.apply(y), "custom autograd function Double"),
        (assigned, "on a tensor whose memory 'getitem' shares"),
        (lambda y: torch.exp(y, out=y), "writes into a tensor"),
        (lambda y: y.uniform_(), "in place"),
    ],
)
def test_what_a_trace_would_lose_is_refused_with_its_module(body, what):
    with pytest.raises(fxstn.TransformError, match=what) as caught:
        fxstn.transform(Around(body), SCALAR)
    assert caught.value.problems[0].where == "inner"
    explanation = fxstn.explain(Around(body), SCALAR)
    assert not explanation.ok
    assert str(explanation).startswith("PROBLEMS (1)")


def test_without_example_inputs_the_remedy_names_them(capfd):
    net = Around(lambda y: y if y.sum() > 0 else -y)
    with pytest.raises(fxstn.TransformError, match="or give example_inputs"):
        fxstn.transform(net, SCALAR)
    assert fxstn.transform(net, SCALAR, example_inputs=torch.randn(2, 4)).frontend == "live"
    assert capfd.readouterr() == ("", "")


def test_everything_that_a_trace_would_lose_is_listed_at_once():
    net = nn.Sequential(Around(in_no_grad), Around(in_autocast), Around(lambda y: Double.apply(y)), nn.Tanh())
    net[3].register_forward_hook(lambda *_: None)
    with pytest.raises(fxstn.TransformError) as caught:
        fxstn.transform(net, SCALAR)
    assert [(problem.where, problem.what.split(",")[0]) for problem in caught.value.problems] == [
        ("0.inner", "a no_grad region"),
        ("1.inner", "an autocast region"),
        ("2.inner", "custom autograd function Double"),
        ("3", "a hook"),
    ]
    assert all("test_errors.py" in problem.source for problem in caught.value.problems[:3])


def with_gradient_hook(y):
    y = y.tanh()
    y.register_hook(lambda gradient: gradient * 0.1)
    return y


def with_saved_tensors_hooks(y):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t / 2, lambda t: t):
        return y.sin()


def with_hook_on_several(y):
    torch.autograd.graph.register_multi_grad_hook((y,), lambda _: None, mode="any")
    return y * 1


def with_hook_on_grad(y):
    nn.Parameter(torch.ones(2)).register_post_accumulate_grad_hook(lambda _: None)
    return y * 1


@pytest.mark.parametrize(
    "body", [with_gradient_hook, with_saved_tensors_hooks, with_hook_on_several, with_hook_on_grad]
)
def test_tensor_hooks_of_a_forward_are_refused_by_graphs_and_run_by_live(body):
    model, x, y = Around(body), torch.randn(3, 4), torch.randn(3, 4)
    stn = fxstn.transform(model, SCALAR, example_inputs=x)
    assert stn.frontend == "live"
    if body is not with_hook_on_several:  # symbolic tracing stops at its loop over the tensors
        assert [(problem.where, problem.frontend) for problem in stn.rejected] == [("inner", "fx"), ("inner", "export")]
    assert "hook" in stn.rejected[-1].what
    fxstn.general_loss(stn, F.mse_loss, x, y).backward()
    F.mse_loss(model(x), y).backward()
    torch.testing.assert_close(stn.model.fc.weight.grad, model.fc.weight.grad)


def test_hooks_by_which_the_backward_pass_reads_what_the_forward_saved_leave_a_graph():
    def saved_on_cpu(y):
        with torch.autograd.graph.save_on_cpu():
            return checkpoint(torch.sin, y, use_reentrant=False)

    x = torch.randn(3, 4)
    for trace in ("fx", "export"):
        assert fxstn.transform(Around(saved_on_cpu), SCALAR, example_inputs=x, trace=trace).frontend == trace


class Several(nn.Module):
    """A forward that symbolic tracing cannot follow, because it looks at a size."""

    def __init__(self, body=lambda h: h):
        super().__init__()
        self.a, self.dropout, self.b, self.body = nn.Linear(6, 6), nn.Dropout(0.3), nn.Linear(6, 3), body

    def forward(self, x):
        h = self.dropout(self.a(x))
        return self.b(self.body(h) if h.shape[1] == 6 else h)


@pytest.mark.parametrize("path", ["0", "1.0", ""])
def test_a_scripted_module_is_refused_by_every_frontend_with_its_path(path):
    net = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.Linear(6, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is deprecated, and still around
        warnings.simplefilter("ignore", FutureWarning)
        scripted = torch.jit.script(net.get_submodule(path))
    if path:
        net.set_submodule(path, scripted)
    else:
        net = scripted
    with pytest.raises(fxstn.TransformError) as caught:
        fxstn.transform(net, SCALAR, example_inputs=torch.randn(4, 6))
    problems = caught.value.problems
    assert [problem.frontend for problem in problems] == ["fx", "export", "live"]
    assert {(problem.where, problem.what.split(",")[0]) for problem in problems} == {(path, "a scripted module")}
    with pytest.raises(fxstn.TransformError, match=r"a scripted module.*; or give example_inputs"):
        fxstn.transform(net, SCALAR)


def hooked():
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda *_: None)
    return nn.Sequential(nn.Linear(4, 4), layer)


def normed():
    return nn.Sequential(nn.Linear(4, 4), nn.utils.spectral_norm(nn.Linear(4, 4)))


def from_numpy():
    return Around(lambda y: (y, torch.from_numpy(numpy.ones((3, 4), "float32"))))


@pytest.mark.filterwarnings("ignore")  # of torch: the old spectral_norm is deprecated
@pytest.mark.parametrize(
    ("make", "trace"),
    [(hooked, "fx"), (hooked, "export"), (normed, "fx"), (normed, "export"), (from_numpy, "live")],
)
def test_the_line_of_a_problem_is_never_that_of_the_call_of_transform(make, trace):
    with pytest.raises(fxstn.TransformError) as caught:
        fxstn.transform(make(), SCALAR, example_inputs=torch.randn(3, 4), trace=trace)
    assert not [problem.source for problem in caught.value.problems if "transform(" in problem.source]


def test_a_module_of_torch_export_is_refused_because_it_has_one_mode():
    x = torch.randn(4, 6)
    exported = torch.export.export(mlp(0.3), (x,)).module()
    with pytest.raises(
        ValueError, match=r"the model comes from torch\.export, .*; transform the module that was exported"
    ):
        fxstn.transform(exported, example_inputs=x)
    with pytest.raises(ValueError, match=r"module '1' comes from torch\.export"):
        fxstn.transform(nn.Sequential(nn.Linear(6, 6), exported), example_inputs=x)


@pytest.mark.parametrize("inside", [False, True], ids=["whole", "submodule"])
@pytest.mark.parametrize("trace", ["fx", "export", "live"])
def test_a_compiled_model_is_followed_as_the_model_that_was_compiled(trace, inside):
    torch.manual_seed(0)
    plain, x = mlp(0.3), torch.randn(4, 6)
    net = copy.deepcopy(plain)
    if inside:
        net[0] = torch.compile(net[0], backend="eager")
        net[1].compile(backend="eager")
    else:
        net = torch.compile(net, backend="eager")
    stn = fxstn.transform(net, example_inputs=x, trace=trace)
    assert stn.hparams.names == fxstn.transform(plain).hparams.names
    torch.testing.assert_close(stn.eval()(x), plain.eval()(x))
    plain.load_state_dict(stn.export().state_dict(), strict=True)
    assert fxstn.verify(net, x, trace=trace).ok
    assert fxstn.explain(net, example_inputs=x).ok
    assert ("_orig_mod" in str(net.state_dict())) == (net is not plain)


def test_a_graph_that_fails_where_the_model_runs_is_a_reason_and_no_fault_of_the_inputs(broken_when_exported):
    net, x = Several(broken_when_exported), torch.randn(4, 6)
    stn = fxstn.transform(net, SCALAR, example_inputs=x)
    assert stn.frontend == "live"
    problem = stn.rejected[-1]
    assert (problem.frontend, "the graph 'train'" in problem.what) == ("export", True)
    assert "TypeError: not on this machine" in problem.what
    with pytest.raises(fxstn.TransformError, match="not on this machine"):
        fxstn.transform(net, SCALAR, example_inputs=x, trace="export")


@pytest.fixture
def broken_when_exported():
    """A function that calls an operator in exported graphs only, and that operator fails."""

    @torch.library.custom_op("fxstn_tests::broken", mutates_args=())
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise TypeError("not on this machine")

    broken.register_fake(torch.empty_like)
    return lambda h: h + broken(h.detach()) if torch.compiler.is_exporting() else h


def test_example_inputs_that_the_model_itself_refuses_are_the_callers_mistake():
    def refuse(h):
        raise KeyError("no such batch")

    for trace in ("auto", "export", "live"):
        with pytest.raises(ValueError, match=r"^example_inputs: the model cannot take inputs float32 \(4, 5\)"):
            fxstn.transform(Several(), SCALAR, example_inputs=torch.randn(4, 5), trace=trace)
        with pytest.raises(KeyError, match="no such batch"):
            fxstn.transform(Several(refuse), SCALAR, example_inputs=torch.randn(4, 6), trace=trace)


def test_networks_over_the_same_modules_know_their_own_example_axes():
    """What one of them finds out about the examples is not taken for granted by the other, whose graphs are made already."""

    class TimeMajor(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(self.a(x.transpose(0, 1)).tanh()).transpose(0, 1)

    stn = fxstn.transform(TimeMajor().double(), SCALAR).eval()
    randomize_response(stn)
    twin = stn.with_recipe(stn.recipe)
    x, delta = torch.randn(3, 5, 4).double(), torch.randn(3, 1).double()
    twin.graph("pushforward_eval")
    expected = stn.pushforward(x, delta=delta)[1]
    torch.testing.assert_close(twin.pushforward(x, delta=delta)[1], expected)
    assert (stn.per_example(x), twin.per_example(x)) == (True, True)


def test_hooks_are_refused():
    net = mlp()
    net[1].register_forward_hook(lambda *_: None)
    with pytest.raises(fxstn.TransformError, match=r"a hook.*in module '1'.*remove it"):
        fxstn.transform(net)


@pytest.mark.parametrize("shape", [(3,), (4, 1), (2, 2, 2), ()])
def test_a_delta_of_the_wrong_shape_is_refused(shape):
    stn = fxstn.transform(mlp())
    for name in ("delta", "condition"):
        arguments = {"delta": torch.zeros(2), name: torch.zeros(shape)}
        with pytest.raises(ValueError, match=rf"{name} must have shape \(2,\) or \(batch, 2\)"):
            stn.pushforward(torch.randn(4, 6), **arguments)
    with pytest.raises(ValueError, match="delta has 3 rows for a batch of 4"):
        stn.pushforward(torch.randn(4, 6), delta=torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"delta of shape|delta must have shape"):
        stn.best_response(torch.zeros(3, 2))


def test_an_unknown_graph_is_refused():
    with pytest.raises(ValueError, match=r"no graph is called 'forward'; there are train, eval"):
        fxstn.transform(mlp()).graph("forward")


def test_targets_of_another_length_are_refused():
    stn = fxstn.transform(mlp())
    for step in (fxstn.general_loss, fxstn.response_loss, fxstn.hyper_loss):
        with pytest.raises(ValueError, match="the target has 3 examples, the inputs have 4"):
            step(stn, F.cross_entropy, torch.randn(4, 6), torch.zeros(3, dtype=torch.long))


def test_a_loss_that_is_no_scalar_is_refused():
    stn = fxstn.transform(mlp())
    with pytest.raises(ValueError, match=r"scalar.*shape \(4, 3\)"):
        fxstn.general_loss(stn, lambda y, t: y, torch.randn(4, 6), None)


def test_an_input_named_like_ours_is_refused():
    class Delta(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, delta):
            return self.fc(delta)

    with pytest.raises(ValueError, match="input named 'delta'"):
        fxstn.transform(Delta(), SCALAR)


def test_example_inputs_find_failures_at_transform_time():
    with pytest.raises(ValueError, match=r"^example_inputs: the model cannot take inputs float32 \(4, 5\)"):
        fxstn.transform(mlp(), example_inputs=torch.randn(4, 5))
    stn = fxstn.transform(mlp(), example_inputs=(torch.randn(4, 6),))
    assert stn.training


def test_a_parameter_that_something_else_reads_gets_no_response_and_explain_says_so():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.bias.requires_grad_(False)

        def forward(self, x):
            largest = F.embedding_bag(torch.tensor([[0, 1]]), self.a.weight, mode="max")
            return self.b(self.a(x)) + largest

    stn = fxstn.transform(Normed(), SCALAR)
    assert responses_in(stn.response).keys() == {"a.bias", "b.weight"}
    notes = "\n".join(fxstn.explain(Normed(), SCALAR).notes)
    assert "'a.weight' (16 elements): read by F.embedding_bag" in notes
    assert "'b.bias': frozen" in notes
    assert fxstn.verify(Normed(), torch.randn(3, 4), hparams=SCALAR).ok


def test_the_fallback_is_differentiable_in_the_response():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(torch.special.i0(self.a(x)))

    stn = fxstn.transform(Net().double(), SCALAR, response="structured")
    randomize_response(stn)
    x, delta, g = torch.randn(3, 4).double(), torch.ones(1).double(), torch.randn(3, 2).double()
    response = stn.response.get_submodule("a.weight").R

    def objective():
        return (stn.pushforward(x, delta=delta)[1] * g).sum()

    (gradient,) = torch.autograd.grad(objective(), response)
    step = 1e-6 * torch.randn_like(response)
    with torch.no_grad():
        response += step
        high = objective()
        response -= 2 * step
        low = objective()
    assert (high - low).item() / 2 == pytest.approx((gradient * step).sum().item(), rel=1e-6)


def test_errors_name_a_page_of_the_docs_with_a_heading_that_exists():
    error = fxstn.DivergedError("no")
    root, kinds = Path(fxstn.__file__).parents[1] / "docs", ExplainedError.__subclasses__()
    assert {kind.__name__ for kind in kinds} == {"TransformError", "DivergedError"}
    for kind in (*kinds, SimpleNamespace(page="guides/runs.md#signs-of-trouble")):  # in reports
        page, _, heading = kind.page.partition("#")
        headings = re.findall(r"^#+ (.*)$", (root / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert heading in {re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") for text in headings}, kind.page
    assert str(error) == "no"
    assert error.__notes__ == ["docs/guides/runs.md#a-loss-that-is-no-number says more."]
    assert pickle.loads(pickle.dumps(error)).args == ("no",)
