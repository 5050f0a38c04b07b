"""Several processes: gradients of the whole batch, the same state everywhere, noise of one's own, faults, other numbers."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import shutil
import signal
import socket
import time
import warnings
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

import fxstn
from fxstn import hp
from fxstn.bilevel import distributed
from fxstn.ops.synced import synced_batch_norm
from tests.nets import SmallConv, mlp, randomize_response
from tests.processes import Failed, has_preloaded, run
from tests.runs import grouped

EXAMPLES = 8
EXAMPLE = Path(__file__).parent.parent / "examples" / "distributed.py"


# Gradients


def weighted_loss(output, target, hparams=None):
    """Cross-entropy that one of the hyperparameters weights, example by example."""
    losses = F.cross_entropy(output, target, reduction="none")
    return (losses * (1 if hparams is None else 0.5 + hparams["weight"])).mean()


def network(kind, method="delta", **settings):
    torch.manual_seed(3)
    model = mlp(0.0) if kind == "mlp" else SmallConv(norm=kind != "conv")
    if kind == "synced":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    hparams = [hp.WeightDecay(shared=True), hp.Scalar("weight", 0.4, 0.0, 1.0)]
    stn = fxstn.transform(model.double(), hparams, method=method, **settings)
    randomize_response(stn)
    return stn


def data_for(kind):
    generator = torch.Generator().manual_seed(4)
    shape = (EXAMPLES, 6) if kind == "mlp" else (EXAMPLES, 3, 9, 9)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x, torch.arange(EXAMPLES) % 3, torch.randn(EXAMPLES, 2, generator=generator, dtype=torch.float64)


def objectives(stn, kind, share):
    """Gradients that each objective leaves, averaged, and the running statistics after them."""
    x, y, noise = (part[share] for part in data_for(kind))
    gradients = {}
    for name, loss in (
        ("general", lambda: fxstn.general_loss(stn, weighted_loss, x, y, perturb=0.7 * noise)),
        ("response", lambda: fxstn.response_loss(stn, weighted_loss, x, y, perturb=0.7 * noise, widening=2.0)),
        ("hyper", lambda: fxstn.hyper_loss(stn, weighted_loss, x, y, perturb=stn.hparams.scale * noise)),
    ):
        stn.zero_grad()
        loss().backward()
        distributed.average_gradients(stn.parameters())
        gradients |= {f"{name} {n}": p.grad.clone() for n, p in stn.named_parameters() if p.grad is not None}
    statistics = [buffer.clone() for name, buffer in stn.named_buffers() if "running" in name]
    return {name: g for name, g in gradients.items() if g.any()}, statistics


def gradients_of_shares(rank, cases):
    size = EXAMPLES // dist.get_world_size()
    return [objectives(network(*case), case[0], slice(rank * size, (rank + 1) * size)) for case in cases]


CASES = [(kind, method) for kind in ("mlp", "synced") for method in ("delta", "centered", "stn")]
CASES += [("conv", "delta"), ("conv", "stn")]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_gradients_are_those_of_the_whole_batch(world):
    cases = CASES if world == 2 else CASES[0:4:3]
    results = run(world, gradients_of_shares, cases)
    for case, *shares in zip(cases, *results, strict=True):
        whole, statistics = objectives(network(*case), case[0], slice(None))
        for prefix in ("general model", "response response", "hyper hparams.unc", "hyper hparams.raw"):
            assert any(name.startswith(prefix) for name in whole), (case, prefix)
        for gradients, shared in shares:
            assert gradients.keys() == whole.keys()
            for name, expected in whole.items():
                size = max(expected.norm(), 1e-6)  # a bias before a norm has none but rounding
                error = (gradients[name] - expected).norm() / size
                assert error < 1e-9, (case, name, error)
            for ours, expected in zip(shared, statistics, strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


# Batch norm over processes


def test_alone_a_synced_norm_is_a_batch_norm():
    plain, synced = (objectives(network(kind), kind, slice(None)) for kind in ("normed", "synced"))
    assert plain[0].keys() == synced[0].keys()
    for a, b in zip((*plain[0].values(), *plain[1]), (*synced[0].values(), *synced[1]), strict=True):
        assert torch.equal(a, b)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(SmallConv())
    for module in (model, model.eval()):
        report = fxstn.verify(module, torch.randn(EXAMPLES, 3, 9, 9))
        assert report.ok, report


def normalized_share(rank, sizes):
    """y, running statistics and gradients of norms of batches of different size."""
    x, *rest = whole_norm()
    share = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return [part[share] if part.shape[:1] == x.shape[:1] else part for part in norm_of(x, *rest, share)]


def whole_norm():
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(11, 4, 3), draw(4), draw(4), draw(11, 4, 3)


def norm_of(x, weight, bias, cotangent, share=slice(None)):
    x, weight, bias = (t.clone().requires_grad_() for t in (x, weight, bias))
    mean, variance = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
    y = synced_batch_norm(x[share], mean, variance, weight, bias, True, 0.3, 1e-3)
    (y * cotangent[share]).sum().backward()
    if len(y) < len(x):
        y = F.pad(y, (0, 0, 0, 0, share.start, len(x) - share.stop))
    return [y.detach(), x.grad, mean, variance, weight.grad, bias.grad]


def test_statistics_over_batches_of_different_sizes():
    y, of_x, mean, variance, of_weight, of_bias = norm_of(*whole_norm())
    shares = run(3, normalized_share, (2, 8, 1))
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # noqa: E731
    close(torch.cat([share[0] for share in shares]), y)
    close(torch.cat([share[1] for share in shares]), of_x)
    for share in shares:
        close(share[2], mean)
        close(share[3], variance)
    close(sum(share[4] for share in shares), of_weight)
    close(sum(share[5] for share in shares), of_bias)


@pytest.mark.nightly
def test_a_compiled_graph_breaks_around_a_synced_norm():
    x, y, noise = data_for("synced")
    gradients = []
    for compiled in (False, True):
        stn = network("synced")
        if compiled:
            stn.compile(backend="aot_eager")
        fxstn.response_loss(stn, weighted_loss, x, y, perturb=noise).backward()
        gradients.append([p.grad for p in stn.response_parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_what_was_made_for_several_processes_otherwise_is_refused():
    with pytest.raises(ValueError, match=r"wrapped in DataParallel .* transform the module inside"):
        fxstn.transform(nn.DataParallel(mlp()))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(SmallConv(), process_group="a group")
    with pytest.raises(ValueError, match="'bn1' is a SyncBatchNorm of a process group"):
        fxstn.transform(model)


# Runs


def dataset(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return TensorDataset(x, (x[:, :3] + 0.3 * torch.randn(n, 3, generator=generator)).argmax(1))


def normed():
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    )


def loaders(train=48, valid=24, batch=4):
    for n, seed in ((train, 0), (valid, 1)):
        yield DataLoader(
            whole := dataset(n, seed), batch, sampler=DistributedSampler(whole) if distributed.processes() > 1 else None
        )


class Seen:
    """What a runner did: state and sampler after each epoch, files wanted, noise of examples and that of whole batches."""

    def __init__(self, out_dir=None, model=None, own_loaders=None, **settings):
        torch.manual_seed(0)
        stn = fxstn.transform(model or normed(), [hp.Dropout(init=0.3), hp.WeightDecay(shared=True)])
        self.states, self.epochs, self.noise, self.joined = [], [], [], []
        train, valid = own_loaders or loaders()
        self.also = settings.pop("callbacks", ())
        self.runner = fxstn.BilevelRunner(
            stn, settings.pop("loss_fn", F.cross_entropy), train, valid, metrics={"accuracy": fxstn.accuracy},
            callbacks=(self.look, *self.also),
            **grouped(settings, hyper={"tune_scale": True, "train_steps": 2}, response={"every": 1}, ema=0.9, progress=False,
                      checkpoints={"out_dir": out_dir}),
        )  # fmt: skip
        draw = stn.hparams.sample

        def sample(n, generator=None):
            epsilon, shares = draw(n, generator), distributed.processes() if generator is not None else 1
            own = epsilon.detach()[distributed.rank() % shares :: shares] if n > 1 else epsilon.detach()
            (self.noise if n > 1 else self.joined).append(own.clone())
            return epsilon

        stn.hparams.sample = sample

    def state(self):
        runner = self.runner
        return {name: value.clone() for name, value in runner.problem.state_dict().items()} | {
            f"average {i}": average.clone() for i, average in enumerate(runner._tuner.averages.averages)
        }

    def look(self, runner):
        self.states.append(self.state())
        self.epochs.append(getattr(runner.train_loader.sampler, "epoch", None))

    def result(self):
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in self.runner.history]
        none = torch.empty(0, len(self.runner.stn.hparams))
        return {"states": self.states, "epochs": self.epochs, "noise": torch.cat([none, *self.noise]), "rows": rows,
                "joined": torch.cat([none, *self.joined]), "seconds": self.runner.history["seconds"]}  # fmt: skip


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def share_noise(a, b):
    return bool((a[:, None] == b).all(-1).any())


def plain_run(rank, folder, synced):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(normed()) if synced else None
    seen = Seen(f"{folder}/{rank}" if rank < 2 else None, model)
    seen.runner.fit(3)
    return seen.result()


@pytest.mark.parametrize(("world", "synced"), [(2, False), (3, True)])
def test_every_process_has_the_same_state_and_other_noise(tmp_path, world, synced):
    first, *others = results = run(world, plain_run, tmp_path, synced)
    assert len(first["states"]) == 3
    for other in others:
        assert all(same(a, b) for a, b in zip(first["states"], other["states"], strict=True))
        assert other["rows"] == first["rows"]
        assert other["seconds"] == first["seconds"]
        assert torch.equal(other["joined"], first["joined"])  # an ε of the whole batch is that of all processes
    assert not same(first["states"][0], first["states"][1])
    assert any("running_mean" in name for name in first["states"][0])
    for a, b in combinations(results, 2):
        assert not share_noise(a["noise"], b["noise"])
    assert [result["epochs"] for result in results] == [[0, 1, 2]] * world
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0"]  # the first one's folder, and no other
    assert {"best.pt", "history.csv", "last.pt"} <= {path.name for path in (tmp_path / "0").iterdir()}


def picky_run(rank):
    """The validation loss refuses the training batches, of 4, of the second process."""

    def picky_loss(output, target):
        if rank and len(target) == 4:
            raise ValueError("a training batch")
        return F.cross_entropy(output, target)

    (train, _), (_, valid) = loaders(), loaders(batch=3)
    seen = Seen(own_loaders=(train, list(valid)), valid_loss_fn=picky_loss)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        seen.runner.fit(2)
    return seen.result() | {"warned": [str(w.message) for w in warned if w.category is fxstn.RunWarning]}


def test_a_validation_loss_that_fails_in_one_process_limits_lambda_in_none():
    first, second = run(2, picky_run)
    assert all(same(a, b) for a, b in zip(first["states"], second["states"], strict=True))
    assert any("λ is not limited" in text for text in first["warned"])
    assert not second["warned"]
    assert all(torch.isnan(torch.tensor([row["clean_train_loss"] for row in first["rows"]])))


def sent(rank):
    """Numbers in each message of two epochs, and how many parameters there are of each kind."""
    seen, messages = Seen(response={"every": 3}), []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda tensor: (messages.append(tensor.numel()), all_reduce(tensor))[1]
    seen.runner.fit(2)
    dist.all_reduce = all_reduce
    problem = seen.runner.problem
    kinds = (problem.general_parameters(), problem.response_parameters(), seen.runner.stn.hparams.parameters())
    kinds = (*kinds, seen.runner._epoch_tensors.tensors())
    return messages, [sum(p.numel() for p in kind) for kind in kinds]


def test_what_is_sent_is_what_is_documented():
    (messages, (general, response, hyper, buffers)), other = run(2, sent)
    assert (messages, [general, response, hyper, buffers]) == other
    assert (general, response, hyper) == (6 * 8 + 8 + 16 + 72 + 27, 2 * 2 * (8 + 8 + 3), 4)
    steps = 2 * 6
    assert messages.count(general) == steps
    assert messages.count(response) == steps  # the first inner steps have a response step each
    small = [count for count in messages if count not in (general, response)]
    assert buffers >= 2 * (8 + 8)  # running mean and variance, and the averages of both
    assert small.count(buffers) == 2 * 2  # the numbers, and where they differ
    statistics = 2 * 3 * 8  # of the one batch norm, for each evaluation: running, sampled, and the noise of these
    assert small.count(statistics) == 2
    assert all(count <= 5 for count in small if count not in (buffers, statistics))
    assert small.count(hyper // 2) >= 2 * steps // 2  # λ, then σ, every other step


def cut_runs(rank, folder):
    """A run of three epochs; the same cut after one, and by a signal that one process gets amid the second."""
    whole = Seen(f"{folder}/whole")
    whole.runner.fit(3)
    between = Seen(f"{folder}/between")
    between.runner.fit(1)
    after = Seen(f"{folder}/between")
    after.runner.fit(3)

    cut = Seen(f"{folder}/amid")
    step, steps_done = cut.runner._tuner.stepper.inner, []

    def counted(*arguments):
        steps_done.append(0)
        if rank == 1 and len(steps_done) == 9:  # of 6 an epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    cut.runner._tuner.stepper.inner = counted
    try:
        cut.runner.fit(3)
        status = None
    except SystemExit as exit_:
        status = exit_.code
    dist.barrier()
    if rank == 0:
        shutil.copytree(f"{folder}/amid", f"{folder}/kept")
    dist.barrier()
    resumed = Seen(f"{folder}/amid")
    resumed.runner.fit(3)
    return {
        "whole": whole.result(), "between": after.result(), "amid": resumed.result(), "status": status,
        "taken": len(steps_done), "kept": cut.state(), "noise": torch.cat(cut.noise),
    }  # fmt: skip


def going_on(rank, folder):
    seen = Seen(f"{folder}/amid")
    seen.runner._checkpoints.resume(begun=False)
    at_start = seen.state()
    seen.runner.fit(3)
    return seen.result() | {"start": at_start, "steps": seen.runner.steps}


@pytest.mark.filterwarnings("error")
def test_a_cut_run_goes_on_alike_and_on_any_number_of_processes(tmp_path):
    results = run(2, cut_runs, tmp_path)
    for result in results:
        assert result["status"] == 128 + signal.SIGTERM  # though one of them alone was told to end
        assert result["taken"] == 10
        for other in ("between", "amid"):
            assert result[other]["rows"] == result["whole"]["rows"]
            assert same(result[other]["states"][-1], result["whole"]["states"][-1])
    assert not share_noise(results[0]["amid"]["noise"], results[1]["amid"]["noise"])
    saved_state = results[0]["kept"]
    for world in (1, 3):
        shutil.copytree(tmp_path / "kept", tmp_path / f"on {world}" / "amid")
        first, *others = resumed = run(world, going_on, tmp_path / f"on {world}")
        for result in resumed:
            assert same(result["start"], saved_state)
            assert [row["epoch"] for row in result["rows"]] == [1, 2, 3]
            assert result["rows"][0] == results[0]["whole"]["rows"][0]
            assert result["steps"] == 10 + 2 * (48 // (4 * world))
        for other in others:
            assert same(first["states"][-1], other["states"][-1])
            assert first["rows"] == other["rows"]
            assert first["epochs"] == other["epochs"] != [None, None]
        for a, b in combinations(resumed, 2):
            assert not share_noise(a["noise"], b["noise"])


# Faults


def nan_in_one(rank):
    calls = []

    def loss_fn(output, target):
        calls.append(0)
        return F.cross_entropy(output, target) * (float("nan") if rank == 1 and len(calls) == 30 else 1)

    seen = Seen(loss_fn=loss_fn, valid_loss_fn=F.cross_entropy)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        seen.runner.fit(4)
    rates = [group["lr"] for group in seen.runner.optimizers["optimizer"].param_groups]
    return seen.result() | {
        "back": seen.runner._tuner.counters.rollbacks,
        "said": [str(w.message) for w in said],
        "rates": rates,
    }


def test_all_go_back_when_one_sees_nan():
    first, second = run(2, nan_in_one)
    assert first["back"] == second["back"] == 1
    assert sum("with lower learning rates" in text for text in first["said"]) == 1
    assert not second["said"]
    assert first["rows"] == second["rows"]
    assert first["rates"] == second["rates"]
    assert len(first["rows"]) == 4
    assert same(first["states"][-1], second["states"][-1])


def overflow_in_one(rank):
    """In float16: the second process has losses whose gradients overflow, one of each kind, and one that is no number."""
    seen = Seen(execution={"autocast": torch.float16}, hyper={"recalibrate": 0})
    for name, factors in (
        ("general_loss", {3: 1e30, 5: float("nan")}),
        ("response_loss", {2: 1e30}),
        ("hyper_loss", {1: 1e30}),
    ):
        original, calls = getattr(seen.runner.problem, name), iter(range(1000))
        changed = lambda *batch, f=original, c=calls, by=factors: f(*batch) * (by.get(next(c), 1) if rank == 1 else 1)  # noqa: E731
        setattr(seen.runner.problem, name, changed)
    seen.runner.fit(2)
    updates, counters = seen.runner.updates, seen.runner._tuner.counters.state_dict()
    return seen.result() | {"scales": {n: s.get_scale() for n, s in updates.scalers.items()}, "counters": counters}


def test_an_overflow_in_one_process_is_one_in_all():
    first, second = run(2, overflow_in_one)
    assert first["scales"] == second["scales"] == dict.fromkeys(first["scales"], 2.0**15)
    assert first["counters"] == second["counters"]
    assert [first["counters"][name] for name in ("steps", "response_steps", "hyper_steps")] == [10, 9, 5]
    assert first["rows"] == second["rows"]
    assert all(same(a, b) for a, b in zip(first["states"], second["states"], strict=True))
    assert all(torch.isfinite(value).all() for value in first["states"][-1].values())


def uneven(rank):
    """Batches and shares of different number, an empty one in the evaluation; one process calls stop."""
    train, valid = dataset(40, 0), dataset(20, 1)
    batches = [(7, 4), (4, 4)][rank]  # of training, of validation
    own_loaders = [DataLoader(Subset(whole, range(4 * n)), 4) for whole, n in zip((train, valid), batches, strict=True)]
    stop = lambda runner: runner.stop() if rank == 1 and len(runner.history) == 2 else None  # noqa: E731
    seen = Seen(own_loaders=own_loaders, callbacks=(stop,), accumulate=2)
    seen.runner.fit(9)
    shares = DataLoader(Subset(valid, range(12 if rank else 0)), 4)
    return seen.result() | {"steps": seen.runner.steps, "evaluated": seen.runner.evaluate(shares)}


def test_uneven_shares_and_a_stop_in_one_process():
    first, second = run(2, uneven)
    assert first["steps"] == second["steps"] == 4  # two epochs of 2 steps: as far as all have batches
    assert first["rows"] == second["rows"]
    assert len(first["rows"]) == 2
    assert first["evaluated"] == second["evaluated"]
    assert same(first["states"][-1], second["states"][-1])


def steps_on_shares(rank, name):
    """Weights and rows after one step of each kind on this process's batches: three of 7 examples, or one of 2; else on all."""
    stn = network("mlp")
    stn.hparams.sample = lambda n, generator=None: torch.full((n, len(stn.hparams)), 0.3, dtype=torch.float64)
    x, y = (torch.cat([part, part[:1]]) for part in data_for("mlp")[:2])
    y[[1, 4, 5]] = -100
    parts = {0: [slice(0, 3), slice(3, 5), slice(5, 7)], 1: [slice(7, 9)], None: [slice(0, 9)]}[rank]
    batches = [(x[part], y[part]) for part in parts]
    sgd = lambda p: torch.optim.SGD(p, lr=0.1)  # noqa: E731
    mean = nn.CrossEntropyLoss(**{name: torch.tensor([1.0, 2.0, 5.0]).double() if name == "weight" else "sum"})
    runner = fxstn.BilevelRunner(
        stn,
        lambda output, target, hparams=None: mean(output, target),
        batches,
        batches,
        optimizer=sgd,
        response=fxstn.ResponseSettings(optimizer=sgd, every=1, perturb="batch"),
        hyper=fxstn.HyperSettings(optimizer=sgd, train_steps=1, recalibrate=0),
        accumulate=3,
        progress=False,
    )
    runner._tuner.valid.next = lambda: ((x[7:], y[7:]) if rank else (x[:7], y[:7]) if rank == 0 else (x, y), False)
    return runner.fit(1).rows[0], [p.detach() for p in stn.parameters()]


def all_steps(rank):
    return {name: steps_on_shares(rank, name) for name in ("weight", "reduction")}


def test_processes_with_unequal_batches_and_padding_step_as_one_on_all_examples():
    results = run(2, all_steps)
    for name, (row, expected) in all_steps(None).items():
        for result in results:
            other, parameters = result[name]
            for ours, theirs in zip(parameters, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
            for loss in ("train_loss", "response_loss", "valid_loss"):
                assert other[loss] == pytest.approx(row[loss], rel=1e-9), (name, loss)


def different(rank, what):
    wrong = rank == 1
    arguments = {"settings": {"hyper": {"train_steps": 2 + wrong}}, "model": {"model": mlp() if wrong else None}}[what]
    try:
        Seen(**arguments)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("what", "message"),
    [("settings", "hyper.train_steps is 2 in process 0 and 3 in process 1"), ("model", "do not run the same")],
)
def test_processes_that_do_not_run_the_same_are_told(what, message):
    assert all(message in text for text in run(2, different, what))


def failing(rank, how, folder):
    if how == "folder":
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            seen = Seen(f"{folder}/file/run")
            seen.runner.fit(2)
        return [str(w.message) for w in said], len(seen.runner.history)
    if how == "save":
        try:
            Seen().runner.save(f"{folder}/file/run.pt")
        except OSError as error:
            return type(error).__name__
    if how == "damaged":
        try:
            Seen(folder).runner.fit(1)
        except ValueError as error:
            return str(error)

    def loss_fn(output, target):
        if rank == 1:
            raise ArithmeticError("in one process")
        return F.cross_entropy(output, target)

    Seen(loss_fn=loss_fn).runner.fit(1)


def test_errors_of_files_reach_every_process(tmp_path):
    (tmp_path / "file").write_text("no folder")
    first, second = run(2, failing, "folder", tmp_path)
    assert first[1] == second[1] == 2
    assert sum("cannot write to" in text for text in first[0]) == 1
    assert not second[0]
    assert len(set(run(2, failing, "save", tmp_path))) == 1
    (tmp_path / "last.pt").write_text("damaged")
    assert all("no whole checkpoint is left" in text for text in run(2, failing, "damaged", tmp_path))


def test_an_error_in_one_process_ends_all(tmp_path):
    with pytest.raises(Failed, match="ArithmeticError: in one process") as failed:
        run(2, failing, "loss", tmp_path)
    assert [rank for rank, name, _ in failed.value.errors if name not in ("Stuck", "Gone")] == [0, 1]


def test_a_group_that_is_stuck_fails():
    with pytest.raises(Failed, match="Stuck"):
        run(2, stuck, seconds=3)


def stuck(rank):
    if rank:
        dist.barrier()
    time.sleep(60)


def test_a_process_of_a_group_imports_nothing_anew():
    assert run(1, has_preloaded) == [True]


def averaged(rank):
    value = torch.tensor([0.1, -torch.inf, float(rank)])
    distributed.average([value], constants=True)
    return value


def test_the_mean_of_a_constant_is_that_constant():
    for value in run(3, averaged):
        assert torch.equal(value, torch.tensor([0.1, -torch.inf, 1.0]))


def missing_gradient(rank):
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    (a.sum() if rank else a.sum() + 3 * b.sum()).backward()
    fxstn.average_gradients([a, b])
    return a.grad, b.grad


def test_a_gradient_that_one_process_lacks_counts_as_zero():
    for a, b in run(2, missing_gradient):
        assert torch.equal(a, torch.ones(2))
        assert torch.equal(b, 1.5 * torch.ones(3))


def sparse_gradient(rank):
    table, word = nn.Embedding(9, 2, sparse=True), torch.tensor([[1, 1], [1, 5]][rank])
    (table(word) * torch.tensor([3.0, 0.0])).sum().backward()
    fxstn.average_gradients(table.parameters())
    return table.weight.grad.is_sparse, table.weight.grad.to_dense()


def test_sparse_gradients_are_averaged_and_stay_sparse():
    expected = torch.zeros(9, 2)
    expected[1, 0], expected[5, 0] = 4.5, 1.5
    for is_sparse, gradient in run(2, sparse_gradient):
        assert is_sparse
        assert torch.equal(gradient, expected)


def example(rank, folder, port):
    dist.destroy_process_group()
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "EPOCHS": "1",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as said:
        runpy.run_path(str(EXAMPLE))
    dist.init_process_group("gloo", init_method=f"file://{folder}/after", rank=rank, world_size=2)
    return said.getvalue()


def test_the_example_runs(tmp_path):
    pytest.importorskip("sklearn", reason="the digits come with the extra fxstn[data]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, second = run(2, example, tmp_path, port)
    assert first.startswith("2 processes, {'epoch': 1")
    assert not second
    assert (tmp_path / "out" / "distributed" / "last.pt").exists()


# A refit


def refitted(rank, folder):
    """The weights of a refit, of a rank's share of every batch; of the whole batch for rank None."""
    torch.manual_seed(0)
    stn = fxstn.transform(mlp(0.0).double(), [hp.WeightDecay(shared=True)])
    x, y, _ = data_for("mlp")
    share = slice(None) if rank is None else slice(rank, None, 2)
    batches, out_dir = [(x[share], y[share])] * 3, None if rank else folder
    runner = fxstn.BilevelRunner(
        stn, F.cross_entropy, batches, batches, progress=False, checkpoints=fxstn.CheckpointSettings(out_dir=out_dir)
    )
    runner.fit(1)
    schedule = fxstn.Schedule({"weight_decay": [0.05]})
    return dict(runner.refit(batches, epochs=2, schedule=schedule).state_dict())


def test_two_processes_refit_as_one_with_the_whole_batch(tmp_path):
    first, second = run(2, refitted, str(tmp_path / "two"))
    whole = refitted(None, str(tmp_path / "one"))
    for name, weight in whole.items():
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], weight, rtol=1e-12)
