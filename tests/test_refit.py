"""A refit: the network that plain training at the values of the run gives, from its start, and a run that stays as it is."""

from __future__ import annotations

import copy
import errno
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import fxstn
from fxstn import Schedule, hp
from fxstn.bilevel.checkpoint import load_checkpoint, save_checkpoint
from fxstn.bilevel.state import random_state
from fxstn.loops.rates import RatesAgain, SeenRates, at_share
from tests.nets import SmallConv, mlp
from tests.runs import dataset, make, same

EVERYTHING = dataset(70, 0)
DECAY = [hp.WeightDecay(shared=True, init=0.02)]
KEPT = Schedule({"weight_decay": [0.05]})


def loader(size: int = 8, seed: int = 5) -> DataLoader:
    return DataLoader(EVERYTHING, size, shuffle=True, generator=torch.Generator().manual_seed(seed))


def plainly(
    model: nn.Module, optimizer: Optimizer, epochs: int, scheduler: Any = None, averages: AveragedModel | None = None
) -> dict[str, Tensor]:
    """What a loop of anybody's gives."""
    batches = loader()
    model.train()
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            if averages is not None:
                averages.update_parameters(model)
    return (averages.module if averages is not None else model).state_dict()


def close(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def started() -> nn.Module:
    """The network with which `make` begins, without the dropouts that draw."""
    torch.manual_seed(0)
    return mlp(0.0)


# The network that comes out


@pytest.mark.parametrize("method", ["delta", "centered", "stn"])
def test_a_refit_is_plain_training_from_the_start_at_the_values_of_the_run(method: str) -> None:
    torch.manual_seed(0)
    stn = fxstn.transform(mlp(0.0), DECAY, method=method)
    runner = fxstn.BilevelRunner(stn, F.cross_entropy, loader(), loader(seed=6), progress=False)
    runner.fit(2)
    model, other = runner.refit(loader(), epochs=3, ema=None), started()
    decay = runner.history.best_values()["weight_decay"]
    groups = [
        {"params": [p for p in other.parameters() if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in other.parameters() if p.dim() < 2]},
    ]
    assert type(model) is nn.Sequential
    assert close(model.state_dict(), plainly(other, torch.optim.SGD(groups, lr=1e-2, momentum=0.9), 3))


def test_a_refit_averages_the_weights_over_the_last_of_its_steps() -> None:
    """Witness: torch's own averages. 27 steps, of which the averages reach back over 5 %."""
    runner = fxstn.BilevelRunner(
        fxstn.transform(started(), DECAY), F.cross_entropy, loader(), loader(seed=6), progress=False
    )
    runner.fit(2)
    other = started()
    averages = AveragedModel(other, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / (0.05 * 27)))
    averages.update_parameters(other)
    groups = [
        {"params": [p for p in other.parameters() if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in other.parameters() if p.dim() < 2]},
    ]
    expected = plainly(other, torch.optim.SGD(groups, lr=1e-2, momentum=0.9), 3, averages=averages)
    assert close(runner.refit(loader(), epochs=3, schedule=KEPT).state_dict(), expected)
    assert not close(runner.refit(loader(), epochs=3, schedule=KEPT, ema=None).state_dict(), expected)
    assert close(runner.refit(loader(), epochs=3, schedule=KEPT, ema=1 - 1 / 1.35).state_dict(), expected)


@pytest.mark.parametrize("trace", ["fx", "export", "live"])
def test_a_refit_of_any_frontend_is_a_replay_from_the_start(trace: str) -> None:
    def network() -> Any:
        torch.manual_seed(0)
        return fxstn.transform(SmallConv(), None, trace=trace, example_inputs=torch.randn(2, 3, 9, 9))

    images = [(torch.randn(6, 3, 9, 9), torch.arange(6) % 3) for _ in range(2)]
    runner = fxstn.BilevelRunner(network(), F.cross_entropy, images, images, progress=False)
    runner.fit(1)
    schedule, other = runner.history.schedule().final(), network()
    torch.manual_seed(1)
    model = runner.refit(images, epochs=2)
    torch.manual_seed(1)
    replay = fxstn.BilevelRunner(other, F.cross_entropy, images, None, schedule=schedule, progress=False)
    replay.fit(2)
    assert same(dict(model.state_dict()), dict(replay.best_model().state_dict()))
    assert "valid_loss" not in replay.history.columns()


class Counted(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_a_refit_multiplies_as_often_as_plain_training_and_reads_no_validation_data() -> None:
    runner = make(hparams=[hp.Dropout("2", init=0.3)], hyper={"recalibrate": 0})
    runner.fit(1)
    vars(runner)["valid_loader"] = None
    with Counted() as refitting:
        runner.refit(loader(), epochs=2)
    model = started()
    with Counted() as plain:
        plainly(model, torch.optim.SGD(model.parameters(), lr=1e-2), 2)
    assert 0 < refitting.products <= plain.products


def test_a_fresh_model_gives_the_weights_to_start_from() -> None:
    runner = make(hparams=[hp.WeightDecay(shared=True)], hyper={"warmup_epochs": 9})
    runner.fit(1)
    torch.manual_seed(7)
    fresh = mlp()
    for choice in (fresh, lambda: copy.deepcopy(fresh)):
        model = runner.refit(loader(), epochs=1, fresh=choice, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
        assert close(model.state_dict(), fresh.state_dict())


class HeadAlone(nn.Module):
    """Its checkpoints have no backbone, however it is left out."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.backbone, self.drop, self.head = kind, nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 3)
        if kind == "hook":
            self.register_state_dict_post_hook(lambda _, state, prefix, __: _drop(state, f"{prefix}backbone") and None)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.backbone(x))))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return _drop(dict(state), "backbone") if self.kind == "override" else state


def _drop(state: Any, prefix: str) -> Any:
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]
    return state


@pytest.mark.parametrize("kind", ["override", "hook"])
def test_what_a_state_dict_leaves_out_is_kept_with_the_rest(tmp_path: Path, kind: str) -> None:
    def runner() -> fxstn.BilevelRunner:
        stn = fxstn.transform(HeadAlone(kind), [hp.Dropout()])
        files = fxstn.CheckpointSettings(out_dir=tmp_path)
        return fxstn.BilevelRunner(stn, F.cross_entropy, loader(), loader(), checkpoints=files, progress=False)

    run = runner()
    assert run.fit(3).best()["epoch"] == 3
    weights = {name: weight.clone() for name, weight in run.stn.model.named_parameters()}
    assert same(dict(run.best_model().named_parameters()), weights)
    assert run.best is not None
    assert sorted(run.best["model"]) == ["head.bias", "head.weight"]
    again = runner()
    again.fit(3)
    assert same(dict(again.stn.model.named_parameters()), weights)
    assert same(dict(again.best_model().named_parameters()), weights)
    fresh = HeadAlone(kind)
    nn.init.zeros_(fresh.backbone.weight)
    refit = again.refit(loader(), epochs=1, fresh=fresh, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    assert close(dict(refit.named_parameters()), dict(fresh.named_parameters()))


def test_the_length_of_a_refit_is_that_of_the_best_epoch_and_another_schedule_is_stretched() -> None:
    runner = make()
    runner.fit(3)
    runner.refit(loader())
    assert len(runner.refit_history) == runner.history.best()["epoch"]
    rising = Schedule({"2.dropout": [0.1, 0.3], "5.dropout": [0.3, 0.1], "weight_decay": [1e-3, 1e-3]})
    runner.refit(loader(), epochs=4, schedule=rising)
    assert runner.refit_history["2.dropout"] == pytest.approx([0.15, 0.2, 0.25, 0.3])


# Optimizers and schedulers, as they were at first


def onecycle(optimizer: Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=10, cycle_momentum=False
    )  # two epochs of 5 steps


@pytest.mark.parametrize("kind", ["factory", "instance", "list"])
def test_optimizers_and_their_schedules_begin_anew(kind: str) -> None:
    torch.manual_seed(0)
    stn = fxstn.transform(mlp(0.0), DECAY)
    parameters = list(stn.model.parameters())
    choices: dict[str, Any] = {
        "factory": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
        "instance": torch.optim.SGD(parameters, lr=1.0, momentum=0.9),
        "list": [torch.optim.SGD(part, lr=1.0, momentum=0.9) for part in (parameters[:2], parameters[2:])],
    }
    batches = DataLoader(dataset(40, 0), 8)
    runner = fxstn.BilevelRunner(stn, F.cross_entropy, batches, batches, optimizer=choices[kind], progress=False,
                                 step_schedulers={"optimizer": onecycle})  # fmt: skip
    runner.fit(2)
    constant = Schedule({"weight_decay": [1e-7]})
    model, other = runner.refit(loader(), epochs=2, schedule=constant), started()  # two epochs of 9 steps
    optimizer = torch.optim.SGD(other.parameters(), lr=1.0, momentum=0.9)
    scheduler, steps = onecycle(optimizer), iter(range(1, 99))

    class EverySoOften:
        def step(self) -> None:
            number = next(steps)
            if number * 5 // 9 > (number - 1) * 5 // 9:
                scheduler.step()

    assert close(model.state_dict(), plainly(other, optimizer, 2, EverySoOften()))


def test_a_scheduler_by_steps_is_stretched_over_the_steps_of_the_refit() -> None:
    halving = {"optimizer": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}
    runner, rates = make(step_schedulers=halving), list[float]()
    runner.fit(1)  # 5 steps, to 1/32 of the rate; the refit has 3
    runner.refit(loader(), epochs=1, accumulate=3, callbacks=[lambda run: rates.append(rate_of(run))])
    assert rates == pytest.approx([rate_of(runner)])


def test_a_plateau_scheduler_hears_the_losses_of_the_run() -> None:
    plateau = {
        "optimizer": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    }
    runner = make(schedulers=plateau, ema=0.5, accumulate=2, clip_norm=1.0)
    runner.fit(3)
    for row, loss in zip(runner.history, (1.0, 2.0, 0.5), strict=True):
        row["valid_loss"] = loss
    rates: list[float] = []
    runner.refit(loader(), epochs=3, callbacks=[lambda run: rates.append(rate_of(run))])
    assert rates == [1e-2, 5e-3, 5e-3]


def rate_of(run: Any) -> float:
    return float(run.optimizers["optimizer"].param_groups[0]["lr"])


# The run stays as it is, and a refit goes on


def test_a_run_goes_on_as_if_there_had_been_no_refit() -> None:
    runner = make()
    runner.fit(2)
    before, random = copy.deepcopy(dict(runner.stn.state_dict())), random_state()
    runner.refit(loader())
    assert same(before, dict(runner.stn.state_dict()))
    assert same(random, random_state())
    assert runner._tuner.evaluator.statistics.hold()
    runner.fit(3)
    other = make()
    other.fit(3)
    assert same(dict(runner.stn.state_dict()), dict(other.stn.state_dict()))


def interrupt(run: Any) -> None:
    if len(run.history) == 2:
        raise KeyboardInterrupt


@pytest.mark.parametrize("fault", ["missing", "damaged", "of another run", "unreadable"])
def test_a_run_whose_first_weights_are_lost_asks_for_them(tmp_path: Path, fault: str) -> None:
    make(tmp_path / "run").fit(2)
    make(tmp_path / "other", seed=7).fit(1)
    file = tmp_path / "run" / "start.pt"
    file.unlink()
    if fault == "damaged":
        file.write_bytes(b"text")
    elif fault == "of another run":
        shutil.copy(tmp_path / "other" / "start.pt", file)
    elif fault == "unreadable":
        file.mkdir()
    again = make(tmp_path / "run", seed=7)
    again.fit(3)
    with pytest.raises(
        ValueError, match=r"the weights that the run began with are not known: .*; give refit fresh=, a model"
    ):
        again.refit(loader(), epochs=2)
    assert file.exists() == (fault != "missing")
    assert len(again.refit(loader(), epochs=2, fresh=started).state_dict())


@pytest.mark.parametrize("content", [None, b"text"])
def test_a_script_that_makes_the_same_model_brings_the_first_weights_back(
    tmp_path: Path, content: bytes | None
) -> None:
    runner, models, first = make(tmp_path), [], started()
    runner.fit(2)
    (tmp_path / "start.pt").unlink()
    if content is not None:
        (tmp_path / "start.pt").write_bytes(content)
    for run in (runner, make(tmp_path)):
        run.fit(2)
        torch.manual_seed(3)
        refitted = run.refit(loader(), fresh=None if models else first, out_dir=tmp_path / f"refit {len(models)}")
        models.append(dict(refitted.state_dict()))
    assert len(load_checkpoint(tmp_path / "start.pt"))
    assert same(*models)


def test_a_run_that_is_loaded_is_refitted_from_the_weights_in_its_folder(tmp_path: Path) -> None:
    runner, other = make(tmp_path), make(tmp_path, seed=7)
    runner.fit(2)
    models = []
    for run in (runner, other):
        if run is other:
            run.load(tmp_path / "last.pt")
        torch.manual_seed(3)
        models.append(dict(run.refit(loader(), epochs=1, out_dir=tmp_path / f"refit {len(models)}").state_dict()))
    assert same(*models)


def test_the_first_weights_are_written_as_soon_as_they_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, seed=7).fit(1)
    (tmp_path / "last.pt").unlink()  # another run begins beside the start of this one
    runner, calls = make(tmp_path), []

    def save(state: Any, path: Path) -> None:
        calls.append(path.name)
        if len(calls) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_checkpoint(state, path)

    monkeypatch.setattr("fxstn.bilevel.starts.save_checkpoint", save)
    runner.fit(4)
    assert calls == ["start.pt"] * 3
    assert same(load_checkpoint(tmp_path / "start.pt")["0.weight"], started()[0].weight.detach())


def test_a_refit_that_was_interrupted_goes_on_to_the_same_end_with_the_first_start(tmp_path: Any) -> None:
    runner = make(tmp_path / "run")
    runner.fit(2)
    whole = runner.refit(loader(), epochs=4, out_dir=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        runner.refit(loader(), epochs=4, callbacks=[interrupt])
    again = make(tmp_path / "run", seed=7)  # another start than that of the run, which is in a file
    again.fit(2)
    for _ in range(2):  # the second finds it finished
        model = again.refit(loader(), epochs=4)
        assert same(dict(whole.state_dict()), dict(model.state_dict()))
    assert [row["epoch"] for row in again.refit_history] == [1, 2, 3, 4]
    saved = torch.load(tmp_path / "run" / "refit" / "best.pt", weights_only=True)
    assert same(saved["model"], dict(whole.state_dict()))


def test_a_refit_of_another_length_begins_anew_in_its_folder(tmp_path: Any) -> None:
    runner = make(tmp_path)
    runner.fit(1)
    runner.refit(loader(), epochs=2)
    with pytest.warns(UserWarning, match=r"refit had a refit with other length: the refit begins anew there"):
        model = runner.refit(loader(), epochs=1)
    assert same(dict(model.state_dict()), dict(runner.refit(loader(), epochs=1, out_dir=tmp_path / "x").state_dict()))


def test_a_refit_whose_note_cannot_be_read_leaves_its_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be of other values: to go on with it would be to return another network."""
    runner = make(tmp_path)
    runner.fit(1)
    runner.refit(loader(), epochs=2)
    files = {path: path.read_bytes() for path in (tmp_path / "refit").iterdir()}

    def refuse(path: Path, **options: Any) -> str:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(
        OSError, match=r"refit\.json cannot be read \(Too many open files\).*mend the cause, or choose another"
    ):
        runner.refit(loader(), epochs=1)
    assert files == {path: path.read_bytes() for path in (tmp_path / "refit").iterdir()}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]"])
def test_a_refit_whose_note_is_damaged_begins_anew(tmp_path: Path, content: bytes) -> None:
    runner = make(tmp_path)
    runner.fit(1)
    whole = runner.refit(loader(), epochs=1)
    (tmp_path / "refit" / "refit.json").write_bytes(content)
    with pytest.warns(UserWarning, match=r"another refit, whose refit\.json is damaged: the refit begins anew there"):
        model = runner.refit(loader(), epochs=1)
    assert same(dict(whole.state_dict()), dict(model.state_dict()))


def test_a_refit_leaves_the_files_of_other_runs_alone(tmp_path: Any) -> None:
    runner = make(tmp_path)
    runner.fit(1)
    files = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"has the files of another run, .* choose another out_dir"):
        runner.refit(loader(), out_dir=tmp_path)
    assert set(tmp_path.iterdir()) == files
    runner.refit(loader(), epochs=1)
    for wrong in ({"epochs": 0}, {"epochs": 1.5}, {"epochs": "2"}, {"schedule": Schedule({"x": [1.0]})}, {"clip": 1.0}):
        with pytest.raises((ValueError, TypeError)):
            runner.refit(loader(), **wrong)
        assert (tmp_path / "refit" / "last.pt").is_file()


def test_what_cannot_be_refitted_is_said() -> None:
    runner = make()
    with pytest.raises(ValueError, match="the history is empty"):
        runner.refit(loader())
    runner.fit(1)
    with pytest.raises(ValueError, match="valid_loader=None: λ is tuned on validation data"):
        fxstn.BilevelRunner(runner.stn, F.cross_entropy, loader(), None)
    kept: list[Optimizer] = []

    def one_for_all(parameters: Any) -> Optimizer:
        kept.append(kept[0] if kept else torch.optim.SGD(parameters, 0.1))
        return kept[0]

    shared = fxstn.BilevelRunner(make().stn, F.cross_entropy, loader(), loader(), optimizer=one_for_all, progress=False)
    shared.fit(1)
    with pytest.raises(ValueError, match="returns the optimizer that the run steps with"):
        shared.refit(loader())
    frozen = mlp()
    frozen[0].weight.requires_grad_(False)
    stn = fxstn.transform(frozen, [hp.Dropout("2")])
    thawed = fxstn.BilevelRunner(stn, F.cross_entropy, loader(), loader(), progress=False)
    thawed.fit(1)
    stn.model[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'0.weight' is trained by now .* fresh="):
        thawed.refit(loader())


# In somebody else's loop


def tuned(kind: str, rate: Any = None) -> Any:
    model = started()
    parameters, options = model.parameters(), {"weight_decay": 0.02}
    optimizer = (
        torch.optim.AdamW(parameters, lr=1e-2, **options)
        if kind == "decoupled"
        else torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, **options)
    )
    batches = DataLoader(dataset(40, 0), 8)
    tuner = fxstn.tune(model, optimizer, F.cross_entropy, batches, loader(seed=6), DECAY)
    scheduler = rate and rate(optimizer)
    for _ in range(2):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        if scheduler:
            scheduler.step()
    return model, optimizer, tuner


@pytest.mark.parametrize("kind", ["coupled", "decoupled"])
def test_a_tuner_refits_with_the_loops_optimizer_and_leaves_the_loop_alone(kind: str) -> None:
    model, optimizer, tuner = tuned(kind)
    before = copy.deepcopy((dict(model.state_dict()), optimizer.state_dict(), tuner.values()))
    for _ in range(2):
        result = tuner.refit(loader(), epochs=2, schedule=KEPT)
        other = started()
        matrices = [p for p in other.parameters() if p.dim() > 1]
        groups = [{"params": matrices, "weight_decay": 0.05},
                  {"params": [p for p in other.parameters() if p.dim() < 2], "weight_decay": 0.02}]  # fmt: skip
        plain = (
            torch.optim.AdamW(groups, lr=1e-2)
            if kind == "decoupled"
            else torch.optim.SGD(groups, lr=1e-2, momentum=0.9)
        )
        assert close(result.state_dict(), plainly(other, plain, 2))
        assert same(before, (dict(model.state_dict()), optimizer.state_dict(), tuner.values()))
        assert len(tuner.history) == 2
        tuner.detach()  # a second refit, after the end of the loop


def test_a_tuner_refits_at_the_rates_that_the_loop_had() -> None:
    _, _, tuner = tuned("coupled", lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1))
    rates: list[float] = []
    tuner.refit(loader(), epochs=3, callbacks=[lambda run: rates.append(rate_of(run))])
    assert rates == pytest.approx(
        [1e-2, 1e-3, 1e-3]
    )  # after each epoch: that of the next one, at the same share of all
    assert [at_share(epoch, share) for epoch in tuner._rates.epochs for share in (0.0, 0.99)] == [
        [1e-2], [1e-2], [1e-3], [1e-3]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "tolerance"),
    [(lambda step: 1.0 if step < 10 else 0.1, 0.0), (lambda step: 0.01 + math.sin(math.pi * step / 20) ** 2, 0.02),
     (lambda step: min(1.0, (step + 1) / 6) * (0.1 if step >= 10 else 1.0), 0.0)],
)  # fmt: skip
def test_rates_of_a_loop_are_those_of_each_step_and_a_longer_refit_has_them_at_the_same_shares(shape, tolerance):
    """A step of a schedule stays one, also between two epochs; a curve stays a curve."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    seen = SeenRates([optimizer])
    for step in range(20):
        optimizer.param_groups[0]["lr"] = shape(step)
        seen.note()
        if step in (9, 19):
            seen.end_epoch()
    for times in (1, 3):
        again = RatesAgain(other := torch.optim.SGD([parameter], lr=5.0), seen.epochs, 20 * times)
        rates = []
        for _ in range(20 * times):
            rates.append(other.param_groups[0]["lr"])
            again.step()
        assert rates[::times] == pytest.approx([shape(step) for step in range(20)])
        assert all(min(shape(n), shape(n + 1)) - tolerance <= rates[n * times + 1] <= max(shape(n), shape(n + 1)) + tolerance
                   for n in range(19))  # fmt: skip
        assert max(rates[: 10 * times]) == pytest.approx(max(shape(n) for n in range(10)), rel=tolerance)


def test_the_rates_of_a_long_epoch_take_little_room():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    seen = SeenRates([optimizer])
    for step in range(3000):
        optimizer.param_groups[0]["lr"] = 1.0 - step / 3000
        seen.note()
    (epoch,) = seen.epochs
    assert len(epoch["places"]) <= 256
    assert [at_share(epoch, share)[0] for share in (0.0, 0.3, 0.7)] == pytest.approx([1.0, 0.7, 0.3], abs=0.01)


def test_a_tuner_that_goes_on_from_a_state_refits_from_the_same_start_or_asks_for_one() -> None:
    _, _, tuner = tuned("coupled")
    state = copy.deepcopy(tuner.state_dict())
    whole = tuner.refit(loader())
    _, _, same_start = tuned("coupled")
    same_start.load_state_dict(state)
    assert same(dict(whole.state_dict()), dict(same_start.refit(loader()).state_dict()))
    torch.manual_seed(9)
    other = mlp(0.0)
    optimizer = torch.optim.SGD(other.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.02)
    elsewhere = fxstn.tune(other, optimizer, F.cross_entropy, loader(), loader(), DECAY)
    elsewhere.load_state_dict(state)
    with pytest.raises(ValueError, match="give refit fresh="):
        elsewhere.refit(loader())
    assert same(dict(whole.state_dict()), dict(elsewhere.refit(loader(), fresh=started).state_dict()))
