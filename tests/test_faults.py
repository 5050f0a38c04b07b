"""What a run survives: signals, damaged files, a full disk, losses that are no numbers; and what it warns of."""

from __future__ import annotations

import copy
import functools
import math
import os
import random
import resource
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxstn
from fxstn import hp
from fxstn.bilevel.checkpoint import DamagedError, latest_checkpoint, load_checkpoint, save_checkpoint
from fxstn.bilevel.faults import PERSISTENT, Monitors
from fxstn.bilevel.loaders import ResumableLoader
from tests.runs import dataset, make, same, without_times

# Signals


def loss_of_best(runner: fxstn.BilevelRunner) -> float:
    """The validation loss of best_model(), computed here."""
    x, y = runner.valid_loader.dataset.tensors
    with torch.no_grad():
        return F.cross_entropy(runner.best_model().eval()(x), y).item()


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_saves_within_the_epoch_and_the_run_goes_on_from_there(tmp_path, number, raised):
    whole = make().fit(4)
    calls = []

    @functools.wraps(F.cross_entropy)  # a run that goes on would tell of another loss
    def loss_fn(output, target):
        calls.append(0)
        if len(calls) == 17:  # in the third epoch, of five steps each with a response step at every fourth
            os.kill(os.getpid(), number)
        return F.cross_entropy(output, target)

    runner = make(tmp_path, loss_fn=loss_fn, valid_loss_fn=F.cross_entropy)
    before = signal.getsignal(number)
    with pytest.raises(raised) as caught:
        runner.fit(4)
    assert getattr(caught.value, "code", None) == (128 + signal.SIGTERM if raised is SystemExit else None)
    assert signal.getsignal(number) is before
    saved = load_checkpoint(tmp_path / "last.pt")
    assert 0 < saved["processes"][0]["means"]["steps"] < 5
    done = saved["shared"]["counters"]["steps"]
    resumed = make(tmp_path, valid_loss_fn=F.cross_entropy)
    assert without_times(resumed.fit(4)) == without_times(whole)
    assert resumed.steps == 20
    assert done == 5 * len(saved["shared"]["history"]["rows"]) + saved["processes"][0]["means"]["steps"]


def parts_of(runner):
    """{name: part} of everything with a state."""
    parts = runner._checkpoints.parts
    return {**parts.all_shared(), **{f"local {name}": part for name, part in parts.local.items()}}


def test_every_part_takes_over_the_state_that_the_same_part_of_another_run_has():
    """Amid an epoch, after a warning and a few hyper steps; the clock of the epoch apart."""
    calls, settings = (
        [],
        {"ema": 0.9, "hyper": {"tune_scale": True, "train_steps": 3}, "valid_loss_fn": F.cross_entropy},
    )

    def loss_fn(output, target):
        calls.append(0)
        if len(calls) == 17:
            raise KeyboardInterrupt
        return F.cross_entropy(output, target)

    first, second = make(loss_fn=loss_fn, **settings), make(seed=7, **settings)
    first._tuner.monitors.warnings.append((1, "a sign"))
    with pytest.raises(KeyboardInterrupt):
        first.fit(4)
    moved = []
    for (name, part), other in zip(parts_of(first).items(), parts_of(second).values(), strict=True):
        state = copy.deepcopy(part.state_dict())
        moved += [name] if not same(other.state_dict(), state) else []
        other.load_state_dict(copy.deepcopy(state))
        new = other.state_dict()
        assert same(*({key: value for key, value in s.items() if key != "seconds"} for s in (new, state))), name
    # the state of a limit is in its optimizer, local tensors are of several processes, statistics of batch norms, here none
    assert set(parts_of(first)) - set(moved) == {"limit", "local tensors", "statistics"}


# Files


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with the checkpoints of two epochs."""
    folder = tmp_path_factory.mktemp("files")
    make(folder, checkpoints={"keep": 2}).fit(3)
    assert {path.name for path in folder.iterdir()} == {"best.pt", "history.csv", "last.pt", "last.1.pt", "start.pt"}
    return folder


def damages():
    """100 ways to damage a file of bytes."""
    chance = random.Random(0)
    cases = [("empty", lambda data: b""), ("other", lambda data: b"nonsense"), ("zeros", lambda data: bytes(len(data)))]
    cases += [("twice", lambda data: data + data), ("longer", lambda data: data + b"\0")]
    cases += [(f"end-{n}", lambda data, n=n: data[:-n]) for n in range(1, 10)]
    for share in [chance.random() for _ in range(36)]:
        cases.append((f"cut-{share:.3f}", lambda data, share=share: data[: int(share * len(data))]))
    for share in [*(chance.random() for _ in range(40)), *(1 - k / 1e5 for k in range(1, 11))]:
        bit = 1 << chance.randrange(8)

        def flipped(data, share=share, bit=bit):
            place = int(share * len(data))
            return data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]

        cases.append((f"flip-{share:.5f}", flipped))
    return cases


def test_a_hundred_damaged_files_are_all_noticed_and_the_one_before_is_used(files, tmp_path):
    cases = damages()
    assert len(cases) == 100
    whole, older = ((files / name).read_bytes() for name in ("last.pt", "last.1.pt"))
    for name, damage in cases:
        broken = damage(whole)
        (tmp_path / "last.pt").write_bytes(broken)
        (tmp_path / "last.1.pt").write_bytes(older)
        with pytest.raises(DamagedError, match=r"last\.pt (is|cannot)"):
            load_checkpoint(tmp_path / "last.pt")
        with pytest.warns(
            UserWarning, match=r"last\.pt .*; it is now last\.pt\.broken; the run resumes from last\.1\.pt"
        ):
            state = latest_checkpoint(tmp_path / "last.pt")
        assert state is not None
        assert len(state["shared"]["history"]["rows"]) == 2, name
        assert (tmp_path / "last.pt.broken").read_bytes() == broken
        assert (tmp_path / "last.1.pt").read_bytes() == older


def test_a_run_resumes_from_the_file_before_a_damaged_one_and_ends_the_same(tmp_path):
    whole = make().fit(5)
    make(tmp_path).fit(3)
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:-1000])
    runner = make(tmp_path)
    with pytest.warns(UserWarning, match=r"last\.pt .*checkpoint.*resumes from last\.1\.pt, saved before it"):
        history = runner.fit(5)
    assert without_times(history) == without_times(whole)


def test_where_every_file_is_damaged_the_run_says_so_and_nothing_is_overwritten(tmp_path):
    make(tmp_path, checkpoints={"keep": 1}).fit(1)
    (tmp_path / "last.pt").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"last\.pt is empty; it is now last\.pt\.broken; no whole checkpoint.*run again"
    ):
        make(tmp_path).fit(2)
    assert len(make(tmp_path).fit(2)) == 2
    assert (tmp_path / "last.pt.broken").exists()


def test_a_file_of_another_format_is_no_damage(tmp_path, monkeypatch):
    monkeypatch.setattr("fxstn.bilevel.checkpoint.FORMAT", 3)
    save_checkpoint({"a": 1}, tmp_path / "last.pt")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="written in format 3 by another version of fxstn, this one reads"):
        make(tmp_path).fit(1)
    assert (tmp_path / "last.pt").exists()


def test_as_many_files_are_kept_as_asked_for(tmp_path):
    make(tmp_path, checkpoints={"keep": 4}).fit(6)
    epochs = {path.name: len(load_checkpoint(path)["shared"]["history"]["rows"]) for path in tmp_path.glob("last*.pt")}
    assert epochs == {"last.pt": 6, "last.1.pt": 5, "last.2.pt": 4, "last.3.pt": 3}


def test_a_full_disk_is_a_warning_and_training_goes_on(tmp_path):
    """The operating system refuses to write files of more than 2,000 bytes during two epochs."""
    whole = make().fit(5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(runner):
        small = 2 <= len(runner.history) <= 3
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]) if small else limits)

    runner = make(tmp_path, callbacks=[full])
    try:
        with pytest.warns(fxstn.RunWarning, match=r"cannot write to .*: File too large; training goes on") as caught:
            runner.fit(3)
        assert len(caught) == 1
        assert len(load_checkpoint(tmp_path / "last.pt")["shared"]["history"]["rows"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert without_times(runner.fit(5)) == without_times(whole)
    assert len(load_checkpoint(tmp_path / "last.pt")["shared"]["history"]["rows"]) == 5


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    runner = make(tmp_path / "file" / "folder")
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(fxstn.RunWarning, match="cannot write to .*: Not a directory; training goes on"):
        assert len(runner.fit(2)) == 2
    assert loss_of_best(runner) == pytest.approx(min(runner.history["valid_loss"]), rel=1e-5)


# Streams


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_a_stream_goes_on_where_it_was(own, count):
    def stream():
        generator = torch.Generator().manual_seed(3) if own else None
        return ResumableLoader(
            DataLoader(TensorDataset(torch.arange(10)), 2, shuffle=True, generator=generator), "loader"
        )

    first = stream()
    torch.manual_seed(5)
    first.begin()
    assert len(first.take(count) if count else []) == count
    torch.rand(3)
    state, place = first.state_dict(), torch.get_rng_state()
    expected = [first.take(9), first.next()]
    torch.manual_seed(77)
    other = stream()
    other.load_state_dict(state)
    torch.set_rng_state(place)
    assert same([other.take(9), other.next()], expected)


# Losses


def broken_at(calls_broken, value=math.nan):
    """Cross entropy, and `value` times it in the calls numbered: at first two for each inner step, one by its response step."""
    calls = []

    def loss_fn(output, target):
        calls.append(0)
        return F.cross_entropy(output, target) * (value if len(calls) in calls_broken else 1.0)

    return loss_fn


@pytest.mark.parametrize("storage", ["file", "memory"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
def test_after_a_bad_loss_the_run_goes_back_and_on_at_a_lower_rate(tmp_path, storage, value):
    runner = make(
        tmp_path if storage == "file" else None, loss_fn=broken_at({21}, value), valid_loss_fn=F.cross_entropy,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )  # fmt: skip
    with pytest.warns(
        fxstn.RunWarning, match=r"train_loss became .* in epoch 3, step 1; back to epoch 2 .*optimizer 0.05 \(attempt 1"
    ):
        history = runner.fit(5)
    assert history["epoch"] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(loss) for loss in history["valid_loss"])
    assert runner.optimizers["optimizer"].param_groups[0]["lr"] == 0.05
    assert runner.optimizers["response.optimizer"].param_groups[0]["lr"] == 0.01


def test_what_comes_after_going_back_is_training_at_the_lower_rate(tmp_path):
    """The same as a run whose rate was lowered by hand at that epoch."""
    runner = make(
        loss_fn=broken_at({21}), valid_loss_fn=F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
    )
    with pytest.warns(fxstn.RunWarning, match="attempt 1"):
        history = runner.fit(4)
    other = make(optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    other.fit(2)
    other.optimizers["optimizer"].param_groups[0]["lr"] = 0.05
    assert without_times(history) == without_times(other.fit(4))


def test_rates_halve_again_for_a_second_attempt_and_a_third_is_refused():
    runner = make(loss_fn=broken_at(range(21, 100)), valid_loss_fn=F.cross_entropy)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(
            fxstn.DivergedError, match=r"train_loss became nan in epoch 3.*of epoch [12], is in runner.best"
        ):
            runner.fit(5)
    for text, expected in zip([str(w.message) for w in said], ("0.005 (attempt 1", "0.0025 (attempt 2"), strict=True):
        assert f"rates: optimizer {expected} of 2)" in text
    assert loss_of_best(runner) == pytest.approx(min(runner.history["valid_loss"]), rel=1e-5)
    with pytest.raises(fxstn.DivergedError, match="train_loss became nan in epoch 3"):
        make(loss_fn=broken_at(range(21, 100)), valid_loss_fn=F.cross_entropy, checkpoints={"rollbacks": 0}).fit(5)


def test_a_way_back_that_is_closed_is_told_with_the_fault(tmp_path):
    broken = broken_at({26})

    def loss_fn(output, target):
        loss = broken(output, target)
        if loss != loss:
            runner._checkpoints.finish()
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return loss

    runner = make(tmp_path / "run", loss_fn=loss_fn, valid_loss_fn=F.cross_entropy)
    with pytest.raises(
        fxstn.DivergedError, match=r"became nan in .*; the way back .* is closed: .*last\.pt cannot be read"
    ):
        runner.fit(5)


@pytest.mark.parametrize(("name", "loss"), [("train", "train_loss"), ("valid", "hyper_loss")])
def test_nan_in_the_data_is_found_and_named(name, loss):
    runner = make()
    loader = getattr(runner, f"{name}_loader")
    loader.dataset.tensors[0][3:, 2] = math.nan
    with (
        pytest.warns(fxstn.RunWarning, match=rf"^{loss} became nan in epoch 1, step \d+; back to"),
        pytest.raises(
            ValueError, match=rf"a batch of {name}_loader in epoch 1, step \d+ has inputs that are NaN.*\(row \d"
        ),
    ):
        runner.fit(2)


def test_a_bad_hyper_loss_leaves_lambda_also_where_the_host_does_not_wait_for_the_device():
    """Then the loss is found at the end of the epoch, with the time of its step."""
    runner = make(valid_loss_fn=lambda output, target: math.nan * output.sum(), checkpoints={"rollbacks": 0})
    runner._tuner.guard.device = torch.device("meta")  # for which the host would wait
    before = runner.problem.values()
    with pytest.raises(fxstn.DivergedError, match=r"hyper_loss became nan in epoch 1, step \d"):
        runner.fit(1)
    assert runner._tuner.counters.hyper_steps > 1
    assert runner.problem.values() == pytest.approx(before, rel=0.5)


# Signs


RANGES = {"d": (0.0, 0.95), "low": (0.1, 0.95), "free": (0.0, 0.95)}  # the last one is no regulariser


def row(epoch, **values):
    usual = {"valid_loss": 1.0, "response_norm": 0.1, "linearization_error": 0.2}
    usual |= dict.fromkeys(RANGES, 0.3) | {f"scale:{name}": 1.0 for name in RANGES}
    return {"epoch": epoch} | usual | values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d": [0.9495, 0.95, 0.949]}, r"d = 0\.949 is at the upper end of its range \[0, 0\.95\].*high="),
        (
            {"low": [0.1005, 0.1, 0.104]},
            r"low = 0\.104 is at the lower end of its range \[0\.1, 0\.95\].*low=, or leave out",
        ),
        ({"free": [0.004, 0.003, 0.002]}, r"free = 0\.002 is at the lower end of its range \[0, 0\.95\].*low=$"),
        ({"scale:d": [9e-4, 8e-4, 7e-4]}, r"σ of d has shrunk to 0\.0007.*entropy_weight"),
        ({"response_norm": [1.5, 1.2, 3.0]}, r"change the weights by 3 times their size; lower response\.optimizer"),
        ({"linearization_error": [0.91, 0.92, 0.99]}, r"relative error 0\.99.*scale="),
        ({"clean_train_loss": [1.2, 1.15, 1.3]}, r"training batches have a loss of 1\.3, validation 1: .*limits=False"),
    ],
)
def test_a_sign_of_trouble_is_a_warning_once_it_lasts(values, message):
    ((column, bad),) = values.items()
    monitors, rows = Monitors(RANGES, regularizing=["d", "low"]), [row(1)]
    for epoch, value in enumerate(bad[: PERSISTENT - 1], 2):
        rows.append(row(epoch, **{column: value}))
        monitors.read(rows)
    rows.append(row(5, **{column: bad[-1]}))
    with pytest.warns(fxstn.RunWarning, match=message):
        monitors.read(rows)
    rows.append(row(6, **{column: bad[-1]}))
    monitors.read(rows)  # not again: warnings are errors here


def test_hyperparameters_that_show_the_same_share_a_warning():
    names = [f"{k}.decay" for k in range(6)]
    monitors = Monitors(dict.fromkeys([*names, "free"], (1e-5, 1.0)), regularizing=names)
    rows = [row(epoch, **dict.fromkeys(names[:5], 1e-5), **{"5.decay": 0.1}, free=1e-5) for epoch in (1, 2, 3)]
    with pytest.warns(fxstn.RunWarning) as caught:
        monitors.read(rows)
    texts = [str(warning.message) for warning in caught]
    assert texts == [text for _, text in monitors.warnings]
    assert texts[0].startswith(
        "epoch 3: 5 hyperparameters are at the lower end of their ranges: 0.decay, 1.decay, 2.decay and 2 more; if the model "
        "is better for it, widen the ranges with low=, or leave out"
    )
    assert [text.partition(" = ")[0] for text in texts[1:]] == ["epoch 3: free"]
    monitors.read(rows)  # not again: warnings are errors here
    with pytest.warns(fxstn.RunWarning, match=r"^epoch 3: 5\.decay = 1e-05 is at the lower end"):
        monitors.read([one | {"5.decay": 1e-5} for one in rows])
    shrunk = [
        one | {f"scale:{name}": scale for name in names} for one, scale in zip(rows, (1.0, 1e-4, 1e-4), strict=True)
    ]
    shrunk.append(shrunk[-1])
    with pytest.warns(fxstn.RunWarning, match=r"σ of 6 hyperparameters has shrunk .* and 3 more; raise") as caught:
        monitors.read(shrunk)
    assert len(caught) == 1


def test_a_regulariser_that_is_off_is_no_trouble():
    """Dropout of 0 in [0, 0.95]: a lower end cannot be given. Warnings are errors here."""
    Monitors(RANGES, regularizing=["d"]).read([row(epoch, d=0.0) for epoch in (1, 2, 3)])


def test_a_range_in_logarithms_is_at_its_end_there():
    monitors = Monitors({"d": (1e-7, 1e-1)})
    monitors.read([row(epoch, d=0.05) for epoch in (1, 2, 3)])
    with pytest.warns(fxstn.RunWarning, match="lower end"):
        monitors.read([row(epoch, d=1.1e-7) for epoch in (1, 2, 3)])
    with pytest.warns(fxstn.RunWarning, match="upper end"):
        monitors.read([row(epoch, d=0.095) for epoch in (1, 2, 3)])


def test_a_run_driven_to_a_bound_warns_and_knows_it_after_resuming(tmp_path):
    up = {
        "hparams": [hp.Dropout("2", init=0.9)],
        "valid_loss_fn": lambda y, t: (y**2).mean(),
        "hyper": {"recalibrate": 0},
    }

    def bent(runner):
        runner.stn.hparams.set({"2.dropout": 0.9499})

    runner = make(tmp_path, **up, callbacks=[bent])
    with pytest.warns(fxstn.RunWarning, match=r"2\.dropout = .* upper end") as warned:
        runner.fit(5)
    assert {w.filename for w in warned if w.category is fxstn.RunWarning} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(tmp_path, **up).fit(6)


def test_diagnostics_are_zero_for_a_response_that_predicts_nothing_and_small_for_a_small_one():
    runner = make(hyper={"tune_scale": False})
    x, y = dataset(16, 3).tensors
    at_rest = runner.problem.diagnostics(x, y, 0)
    assert at_rest == {"response_norm": 0.0, "linearization_error": 0.0}
    errors = []
    for size in (1e-1, 1e-2):
        with torch.no_grad():
            for parameter in runner.stn.response_parameters():
                parameter.fill_(size)
        numbers = runner.problem.diagnostics(x, y, 0)
        errors.append(numbers["linearization_error"])
        epsilon = torch.randn(3, generator=torch.Generator().manual_seed(0)) * runner.stn.hparams.scale.detach()
        moved, plain = runner.stn.best_response(epsilon), dict(runner.stn.model.named_parameters())
        flat = [torch.cat([(w[n] - plain[n] * k).flatten() for n in plain]) for w, k in ((moved, 1), (plain, 0))]
        assert numbers["response_norm"] == pytest.approx((flat[0].norm() / flat[1].norm()).item(), rel=1e-4)
    assert 0 < errors[1] < 0.2 * errors[0] < 0.2
