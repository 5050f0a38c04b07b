"""What is changed on a module after transform is followed at the next step, or refused with a remedy; names of the model."""

from __future__ import annotations

import copy
import itertools
import pickle
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxstn
from fxstn import hp
from fxstn.bilevel.temporary import eval_mode
from tests.nets import SmallConv, randomize_response


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.tuned, self.own = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Dropout(0.5)
        self.b, self.fc = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(torch.tanh(self.b(self.own(self.tuned(torch.relu(self.bn(self.a(x))))))))

    def encode(self, x):
        return self.a(x)


X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3


def step(stn):
    """Backward passes of the three objectives; every parameter has its gradient of the last."""
    fxstn.general_loss(stn, F.cross_entropy, X, Y).backward()
    fxstn.response_loss(stn, F.cross_entropy, X, Y, perturb="batch").backward()
    fxstn.hyper_loss(stn, F.cross_entropy, X, Y, perturb="batch").backward()


def network(trace, model=None):
    torch.manual_seed(0)
    stn = fxstn.transform(model or Net(), [hp.Dropout("tuned")], trace=trace, example_inputs=X).train()
    randomize_response(stn)
    step(stn)
    stn.zero_grad()
    return stn


@pytest.fixture(params=["fx", "live"])
def stn(request):
    return network(request.param)


def outputs(stn, steps=1):
    """Of a training step at one seed."""
    torch.manual_seed(1)
    return torch.stack([stn(X) for _ in range(steps)]).detach()


@pytest.mark.parametrize("trace", ["fx", "export", "live"])
def test_a_batch_norm_that_is_put_in_eval_mode_stays_there(trace):
    """Its statistics stay, in every objective, through evaluations; as in torch it trains again when it is told to."""
    stn = network(trace)
    stn.model.bn.eval()
    mean = stn.model.bn.running_mean.clone()
    with eval_mode(stn):
        stn(X)
    step(stn)
    stn.eval().train()
    expected = stn.model.bn(stn.model.a(X))
    torch.testing.assert_close(stn.model.bn.running_mean, mean, rtol=0, atol=0)
    torch.testing.assert_close(expected, F.batch_norm(stn.model.a(X), mean, stn.model.bn.running_var, stn.model.bn.weight,
                                                      stn.model.bn.bias))  # fmt: skip
    with_frozen = outputs(stn)
    model = copy.deepcopy(stn.model)
    model.bn.eval()
    torch.testing.assert_close(with_frozen, outputs(network(trace, model)))
    stn.model.bn.train()
    step(stn)
    assert not torch.equal(stn.model.bn.running_mean, mean)


def test_a_batch_norm_that_is_frozen_at_transform_stays_so_until_it_is_told_to_train(stn):
    model = Net()
    model.bn.eval()
    stn = network(stn.frontend, model)
    mean = stn.model.bn.running_mean.clone()
    step(stn.eval().train())
    assert (stn.model.bn.training, torch.equal(stn.model.bn.running_mean, mean)) == (False, True)
    stn.model.bn.train()
    step(stn)
    assert not torch.equal(stn.model.bn.running_mean, mean)


@pytest.mark.parametrize("trace", ["fx", "export", "live"])
def test_an_evaluation_of_the_whole_model_freezes_nothing(trace):
    """A step without `stn.train()` is one in train mode; what was frozen before stays so."""
    stn, same, frozen = network(trace), network(trace), network(trace)
    frozen.model.bn.eval()
    step(frozen)
    mean = frozen.model.bn.running_mean.clone()
    for net in (stn, frozen):
        net.model.eval()(X)
    torch.testing.assert_close(outputs(stn), outputs(same), rtol=0, atol=0)
    step(frozen)
    for net in (stn, frozen):
        net.model.eval()
        step(net.train())
    assert all(module.training for module in stn.modules())
    assert [name for name, module in frozen.named_modules() if not module.training] == ["model.bn"]
    torch.testing.assert_close(frozen.model.bn.running_mean, mean, rtol=0, atol=0)


class Staged(nn.Module):
    def __init__(self):
        super().__init__()
        self.stage = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout())
        self.tuned, self.fc = nn.Dropout(), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.tuned(self.stage(x)))


def test_a_stage_in_eval_mode_is_frozen_as_a_whole(stn):
    stn = network(stn.frontend, Staged())
    stn.model.stage.eval()
    mean = stn.model.stage[1].running_mean.clone()
    step(stn)
    step(stn.eval().train())
    assert not any(module.training for module in stn.model.stage.modules())
    torch.testing.assert_close(stn.model.stage[1].running_mean, mean, rtol=0, atol=0)


class Tracked(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.a, self.bn, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8), norm(2, track_running_stats=True)
        self.tuned, self.fc = nn.Dropout(), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.tuned(self.norm(self.bn(self.a(x)).view(-1, 2, 4)).flatten(1)))


def untrack(model):
    for norm in (model.bn, model.norm):
        norm.track_running_stats = False


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("trace", ["fx", "export", "live"])
def test_norms_whose_statistics_are_no_longer_tracked_are_as_in_torch(trace, before):
    plain = Tracked(nn.SyncBatchNorm if trace == "fx" else nn.InstanceNorm1d)  # "fx" follows no instance norm
    if before:
        untrack(plain)
    stn = network(trace, plain)
    if not before:
        untrack(stn.model)
    plain = stn.export()
    stn(X)
    plain(X)
    torch.testing.assert_close(stn.model.state_dict(), plain.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(stn.eval()(X), plain.eval()(X), rtol=0, atol=0)
    torch.testing.assert_close(stn.graph("eval")(X), plain(X))


FOLLOWED = {
    "dropout.p": lambda m: setattr(m.own, "p", 0.9),
    "dropout.p = 0": lambda m: setattr(m.own, "p", 0),
    "dropout.eval": lambda m: m.own.eval(),
    "eps": lambda m: setattr(m.bn, "eps", 10.0),
    "forward": lambda m: setattr(m, "forward", types.MethodType(lambda self, x: self.fc(self.tuned(self.a(x))), m)),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_the_graphs_can_follow_is_followed(name, stn):
    before = outputs(stn)
    FOLLOWED[name](stn.model)
    step(stn)
    changed = copy.deepcopy(stn.model)
    assert not torch.equal(outputs(stn), before)
    torch.testing.assert_close(outputs(stn), outputs(network(stn.frontend, changed)))


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.tuned, self.factors = nn.Linear(6, 3), nn.Dropout(0.3), [1.0, 1.0]

    def forward(self, x):
        return self.tuned(self.a(x)) * self.factors[0]


def test_a_list_that_is_changed_is_followed(stn):
    stn = network(stn.frontend, Listed())
    before = outputs(stn)
    stn.factors[0] = 3.0
    torch.testing.assert_close(outputs(stn), 3 * before)
    assert stn.graph("train") is stn.graph("train")


def test_recurrent_layers_in_another_precision_are_no_change():
    net = nn.Sequential(nn.Linear(6, 4), nn.LSTM(4, 4, batch_first=True))
    stn = fxstn.transform(net, [hp.WeightDecay()]).train()
    stn(X[None])
    graph = stn.double().graph("train")
    assert stn(X[None].double())[0].dtype == torch.float64
    assert stn.graph("train") is graph


def test_momentum_is_followed(stn):
    stn.model.bn.momentum = 1.0
    stn(X)
    torch.testing.assert_close(stn.model.bn.running_mean, stn.model.a(X).mean(0))


def hooked(m):
    m.fc.register_forward_hook(lambda *_: None)


REFUSED = {
    "tuned p": (
        lambda m: setattr(m.tuned, "p", 0),
        r"'tuned': p is 0 .* 'tuned\.dropout': set that by hparams\.set of the network",
    ),
    "tuned in eval mode": (lambda m: m.tuned.eval(), r"module 'tuned': it is in eval mode .* 'tuned\.dropout'"),
    "child": (
        lambda m: setattr(m, "fc", nn.Linear(8, 3)),
        r"the model: its module 'fc' is another object .* transform",
    ),
    "parameter": (
        lambda m: setattr(m.fc, "weight", nn.Parameter(torch.randn(3, 8))),
        r"module 'fc': its parameter 'weight' is another object .* copy values",
    ),
    "parametrized": (
        lambda m: nn.utils.parametrizations.weight_norm(m.fc),
        r"module 'fc': its parameter 'weight' is another",
    ),
}
HOOKS = {
    "forward": hooked,
    "forward pre": lambda m: m.fc.register_forward_pre_hook(lambda *_: None),
    "backward": lambda m: m.fc.register_full_backward_hook(lambda *_: None),
    "of the model": lambda m: m.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_over_the_same_parameters_can_follow_is_refused(name, stn):
    change, message = REFUSED[name]
    change(stn.model)
    for objective in (fxstn.general_loss, fxstn.response_loss, fxstn.hyper_loss):
        with pytest.raises(ValueError, match=message):
            objective(stn, F.cross_entropy, X, Y, perturb="batch")


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_refused_where_it_would_not_run(name):
    stn = network("fx")
    HOOKS[name](stn.model)
    with pytest.raises(
        ValueError, match=r'hook that it did not have .*remove it, or give transform, or fxstn\.tune, trace="live"'
    ):
        stn(X)
    called = itertools.count()  # not a list: what a response or a hyper step keeps in one is taken out again
    stn = network("live")
    stn.model.fc.register_forward_hook(lambda *_: (next(called), None)[1])
    step(stn)
    assert next(called) == 3


def test_a_weight_responds_while_it_is_trained(stn):
    def gradient_of(name):
        block = stn.response.get_submodule(name).block
        return stn.response.flat_U.grad.split(stn.response.flat_sizes)[block]

    delta = torch.ones(1)
    first, (_, dy) = stn.best_response(delta), stn.pushforward(X, delta=delta)
    stn.model.b.requires_grad_(False)
    step(stn)
    assert not gradient_of("b.weight").any()
    assert stn.model.b.weight.grad is None
    assert gradient_of("fc.weight").any()
    torch.testing.assert_close(stn.best_response(delta)["b.weight"], stn.model.b.weight, rtol=0, atol=0)
    torch.manual_seed(1)
    assert not torch.allclose(stn.pushforward(X, delta=delta)[1], dy)
    stn.model.b.requires_grad_(True)
    step(stn)
    assert gradient_of("b.weight").any()
    torch.testing.assert_close(stn.best_response(delta), first, rtol=0, atol=0)


def test_a_weight_that_was_frozen_at_transform_is_trained_and_said_not_to_respond(stn):
    model = Net()
    model.b.requires_grad_(False)
    stn = network(stn.frontend, model)
    stn.model.b.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"'b\.weight' will be trained, but cannot respond .* after transform instead"):
        step(stn)
    assert stn.model.b.weight.grad is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(stn)


def test_a_weight_without_a_response_for_another_reason_is_trained_again_without_a_warning(stn):
    """The batch norm after `a` takes its scale away."""
    assert "a.weight" not in dict(stn.response.named_modules())
    for network in (stn, pickle.loads(pickle.dumps(stn))):
        for trained in (False, True):
            network.model.a.requires_grad_(trained)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                step(network)


def test_an_optimizer_over_all_parameters_in_one_group_is_refused(stn):
    step(stn)
    optimizer = torch.optim.SGD(stn.parameters(), lr=0.1)
    before = copy.deepcopy(stn.state_dict())
    with pytest.raises(
        ValueError, match=r"holds the hyperparameters of a network and its weights.*network\.general_parameters\(\)"
    ):
        optimizer.step()
    torch.testing.assert_close(stn.state_dict(), before, rtol=0, atol=0)
    groups = [list(stn.general_parameters()), list(stn.response_parameters()), list(stn.hparams.parameters())]
    torch.optim.SGD([{"params": group} for group in groups], lr=0.1).step()
    torch.optim.SGD([*groups[0], *groups[1]], lr=0.1).step()  # for the sum of the general and the response loss
    for other in (copy.deepcopy(stn), pickle.loads(pickle.dumps(stn))):
        with pytest.raises(ValueError, match="holds the hyperparameters of a network"):
            torch.optim.Adam(other.parameters()).step()


def test_names_of_the_model_are_the_networks_where_it_has_none(stn):
    for network in (stn, copy.deepcopy(stn), pickle.loads(pickle.dumps(stn))):
        assert network.fc is network.model.fc
        torch.testing.assert_close(network.encode(X), network.model.a(X))
    stn.own.p = 0.25
    stn.extra = 3
    assert (stn.model.own.p, hasattr(stn.model, "extra"), stn.extra) == (0.25, False, 3)
    with pytest.raises(AttributeError, match="'SelfTuningNetwork' object has no attribute 'nothing'"):
        _ = stn.nothing
    stn.fc = nn.Linear(8, 3)  # the model's, and refused as such
    with pytest.raises(ValueError, match="its module 'fc' is another object"):
        stn(X)


class SameNames(nn.Module):
    """Children and attributes of the names that the network has."""

    def __init__(self):
        super().__init__()
        self.response, self.hparams, self.terms, self.drop = (
            nn.Linear(6, 4),
            nn.Linear(4, 4),
            nn.Linear(4, 3),
            nn.Dropout(),
        )
        self.method, self.augments, self.rejected, self.frontend, self.recipe = "mean", "a", "r", "f", "c"

    def forward(self, x):
        y = self.terms(self.drop(torch.tanh(self.hparams(self.response(x)))))
        return y - y.mean() if self.method == "mean" else 2 * y

    @property
    def bad(self):
        return self.nope


@pytest.mark.parametrize("trace", ["fx", "export", "live"])
def test_names_that_the_model_and_the_network_have_are_each_ones_own(trace):
    plain = SameNames().eval()
    stn = fxstn.transform(plain, [hp.Dropout("drop"), hp.WeightDecay()], trace=trace, example_inputs=X)
    torch.testing.assert_close(stn(X), plain(X), rtol=0, atol=0)
    step(stn.train())
    for network in (stn, copy.deepcopy(stn), pickle.loads(pickle.dumps(stn))):
        assert (network.method, network.frontend, network.rejected, network.augments) == ("delta", trace, (), False)
        assert all(vars(network.model)[name] == value for name, value in vars(plain).items() if isinstance(value, str))
        assert network.export().state_dict().keys() == plain.state_dict().keys()
    stn.rejected = ()
    assert stn.model.rejected == "r"


def test_the_error_of_a_property_of_the_model_is_not_hidden():
    stn = fxstn.transform(SameNames(), [hp.Dropout("drop")])
    with pytest.raises(AttributeError, match="'SameNames' object has no attribute 'nope'"):
        _ = stn.bad


def test_other_parameters_by_load_state_dict_are_refused_at_the_call(stn):
    for state in (Net().state_dict(), copy.deepcopy(stn.state_dict())):
        with pytest.raises(ValueError, match=r"assign=True .* leave it out"):
            stn.load_state_dict(state, assign=True)
    step(stn)


def test_the_state_of_a_plain_model_is_loaded_into_the_model(stn):
    plain, own = Net(), copy.deepcopy(stn.state_dict())
    assert str(stn.load_state_dict(plain.state_dict())) == "<All keys matched successfully>"
    torch.testing.assert_close(stn.model.state_dict(), plain.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(
        stn.response.state_dict(), {k[9:]: v for k, v in own.items() if k.startswith("response.")}
    )
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "a\.weight"'):
        stn.load_state_dict({"fc.weight": plain.fc.weight})
    assert "a.weight" in stn.load_state_dict({"fc.weight": plain.fc.weight}, strict=False).missing_keys
    stn.load_state_dict(own)
    torch.testing.assert_close(stn.state_dict(), own, rtol=0, atol=0)


def test_a_model_that_comes_in_eval_mode_has_no_module_frozen():
    model = SmallConv().eval()
    stn = fxstn.transform(model)
    assert not stn.training
    assert stn.recipe.plan.frozen == ()
    before = stn.model.bn1.running_mean.clone()
    stn.train()(torch.randn(4, 3, 9, 9))
    assert not torch.equal(stn.model.bn1.running_mean, before)
    report = fxstn.verify(model, torch.randn(4, 3, 9, 9))
    assert report.ok, report
