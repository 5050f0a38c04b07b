"""Sequences in windows: states carried by the runner and by hand, schedulers and clipping, text, and the example."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import fxstn
from fxstn import CarriedState, hp
from fxstn.bilevel import network_problem
from fxstn.tools import text
from tests.nets import randomize_response
from tests.runs import grouped

ROOT = Path(__file__).resolve().parent.parent
WORDS, WIDTH = 11, 6


class Model(nn.Module):
    """The smallest language model that follows the protocol."""

    def __init__(self):
        super().__init__()
        self.encoder, self.rnn = nn.Embedding(WORDS, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.decoder = nn.Linear(WIDTH, WORDS)

    def forward(self, words, h):
        y, h = self.rnn(self.encoder(words), h.unsqueeze(0))
        return self.decoder(y), (h.squeeze(0),)

    def initial_state(self, batch):
        return (self.encoder.weight.new_zeros(batch, WIDTH),)


def loss(scores, target):
    return F.cross_entropy(scores.flatten(0, 1), target.flatten())


def corpus(length, seed):
    return torch.randint(WORDS, (length,), generator=torch.Generator().manual_seed(seed))


def make(model=None, **settings):
    torch.manual_seed(0)
    model = model or Model()
    stn = fxstn.transform(
        model, [hp.LockedDropout("encoder"), hp.LockedDropout("rnn")], method=settings.pop("method", "delta")
    )
    return fxstn.BilevelRunner(
        stn, settings.pop("loss_fn", loss), text.Windows(corpus(170, 0), 4, 8), text.Windows(corpus(110, 1), 4, 8),
        **grouped(settings, initial_state=model.initial_state, progress=False, hyper={"train_steps": 2}, response={"every": 1}),
    )  # fmt: skip


def without_times(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def whole(model, windows):
    """The loss of all rows read in one go from the first state."""
    with torch.no_grad():
        scores, _ = model.eval()(windows.words, *model.initial_state(len(windows.words)))
        return loss(scores, windows.next).item()


@pytest.mark.parametrize("method", ["delta", "centered", "stn"])
def test_the_runner_reads_windows_as_one_sequence(method):
    """Its validation loss is that of the rows read in one go, the shorter last window weighted as such."""
    runner = make(method=method, **fxstn.PAPER)
    history = runner.fit(3)
    assert len(runner.valid_loader) == 4
    assert runner.valid_loader.words.shape[1] % 8
    assert history["valid_loss"][-1] == pytest.approx(whole(runner.stn.export(), runner.valid_loader), rel=1e-5)
    assert len(set(history[runner.stn.hparams.names[0]])) > 1


def test_a_window_begins_with_the_state_after_the_one_before_and_sends_no_gradient_back():
    torch.manual_seed(0)
    model = Model()
    stn = fxstn.transform(model, [hp.Scalar("a", 1.0, 0.0, 2.0)])
    carried, windows = CarriedState(loss, model.initial_state), list(text.Windows(corpus(40, 0), 2, 8))
    for words, target in windows[:2]:
        stn.zero_grad()
        inputs = carried.inputs(words)
        fxstn.general_loss(stn, carried.loss, inputs, target).backward()
        carried.advance()
        fxstn.response_loss(stn, carried.loss, inputs, target)  # leaves another state behind, which nobody goes on with
    with torch.no_grad():
        _, (before,) = model(windows[0][0], *model.initial_state(2))
        _, (after,) = model(torch.cat([words for words, _ in windows[:2]], 1), *model.initial_state(2))
    torch.testing.assert_close(carried.state[0], after)
    loss(model(windows[1][0], before)[0], windows[1][1]).backward()
    for own, expected in zip(stn.general_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad)


def test_the_response_step_keeps_a_perturbation_and_its_state_for_some_windows(monkeypatch):
    """ε is drawn anew every second window; the window between begins with the state of the perturbed network."""
    seen = []
    original = network_problem.response_loss

    def watched(stn, loss_fn, inputs, target, *, perturb, widening):
        result = original(stn, loss_fn, inputs, target, perturb=perturb, widening=widening)
        seen.append((inputs[1], perturb))
        return result

    monkeypatch.setattr(network_problem, "response_loss", watched)
    runner = make(response={"windows": 2})
    general = []

    def advance():
        CarriedState.advance(runner.problem.training_windows)
        general.append(runner.problem.training_windows.state[0])

    monkeypatch.setattr(runner.problem.training_windows, "advance", advance)
    runner.fit(1)
    states, epsilons = zip(*seen, strict=True)
    for i in range(1, len(states)):
        assert torch.equal(epsilons[i], epsilons[i - 1]) == (i % 2 == 1)
        assert torch.equal(states[i], general[i - 1]) == (i % 2 == 0)
    with pytest.raises(ValueError, match=r"response\.windows=2 needs response\.every=1"):
        make(response={"windows": 2, "every": 4})


def test_a_state_that_carries_a_perturbation_makes_the_tangent_reach_back():
    """The slope, in the size of ε, of the loss on a second window is that of the original network over both."""
    torch.manual_seed(0)
    model = Model().double()
    stn = fxstn.transform(model, [hp.Scalar("a", 1.0, 0.0, 2.0)])
    randomize_response(stn)
    windows, epsilon = list(text.Windows(corpus(40, 0), 2, 8))[:2], torch.ones(1, dtype=torch.float64)

    def over_both(size, carry=True):
        carried = CarriedState(loss, stn.model.initial_state)
        for words, target in windows:
            inputs = carried.inputs(words)
            value = fxstn.response_loss(stn, carried.loss, inputs, target, perturb=size * epsilon)
            if not carry:
                fxstn.general_loss(stn, carried.loss, inputs, target)
            carried.advance()
        return value.item()

    def original(size):
        weights, state = stn.best_response(size * epsilon), model.initial_state(2)
        with torch.no_grad():
            for words, target in windows:  # noqa: B007
                scores, state = functional_call(model, weights, (words, *state))
        return loss(scores, target).item()

    def slope(function):
        return (function(1e-5) - function(-1e-5)) / 2e-5

    assert slope(over_both) == pytest.approx(slope(original), rel=1e-6)
    assert slope(lambda size: over_both(size, carry=False)) != pytest.approx(slope(original), rel=1e-2)


def test_a_loss_that_reads_hyperparameters_gets_the_output_alone():
    seen = []

    def smoothed(scores, target, hparams=None):
        seen.append(hparams)
        return loss(scores, target)

    make(loss_fn=smoothed).fit(1)
    assert any(given is None for given in seen)
    assert any(given is not None for given in seen)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_that_was_cut_ends_like_one_that_was_not(epochs, tmp_path):
    """The place in the validation text, its state, and the scheduler's memory included."""
    plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=1.0)
    settings = {"schedulers": {"optimizer": plateau}, "hyper": {"valid_steps": 2}}
    unbroken = make(**settings)
    unbroken.fit(4)
    make(checkpoints={"out_dir": tmp_path}, **settings).fit(epochs)
    resumed = make(checkpoints={"out_dir": tmp_path}, **settings)
    assert without_times(resumed.fit(4)) == without_times(unbroken.history)
    for a, b in zip(resumed.stn.parameters(), unbroken.stn.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (
        resumed.optimizers["optimizer"].param_groups[0]["lr"] == unbroken.optimizers["optimizer"].param_groups[0]["lr"]
    )


def test_schedulers_move_learning_rates_epoch_by_epoch():
    step = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.1)
    runner = make(schedulers={"optimizer": step})
    runner.fit(2)
    assert runner.optimizers["optimizer"].param_groups[0]["lr"] == pytest.approx(1e-4)
    with pytest.raises(ValueError, match="schedulers names 'weights'"):
        make(schedulers={"weights": step})


def test_a_gradient_is_clipped():
    runner = make(clip_norm=0.01, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    before = torch.cat([p.detach().flatten() for p in runner.stn.general_parameters()])
    runner.fit(1)
    after = torch.cat([p.detach().flatten() for p in runner.stn.general_parameters()])
    assert 0 < (after - before).norm() <= 0.01 * len(runner.train_loader) + 1e-6
    with pytest.raises(ValueError, match=r"clip_norm=0.0 must be positive"):
        make(clip_norm=0.0)


def test_a_column_is_computed_from_the_row(tmp_path):
    runner = make(columns={"perplexity": lambda row: math.exp(row["valid_loss"])}, checkpoints={"out_dir": tmp_path})
    row = runner.fit(1).rows[0]
    assert row["perplexity"] == math.exp(row["valid_loss"])
    assert "perplexity" in (tmp_path / "history.csv").read_text().splitlines()[0]


def test_what_does_not_follow_the_protocol_is_refused():
    class Forgetful(Model):
        def forward(self, words, h):
            return super().forward(words, h)[0]

    with pytest.raises(TypeError, match=r"must return \(output, state\), got a Tensor"):
        make(Forgetful()).fit(1)

    class LayersFirst(Model):
        def initial_state(self, batch):
            return (self.encoder.weight.new_zeros(1, batch, WIDTH),)

    with pytest.raises(ValueError, match=r"a window has 4 examples, and the state has \[1\] rows"):
        make(LayersFirst()).fit(1)


def test_windows_are_rows_of_running_text():
    windows = text.Windows(torch.arange(23), 2, 4)
    batches = list(windows)
    assert len(windows) == len(batches) == 3
    words, following = (torch.cat(parts, 1) for parts in zip(*batches, strict=True))
    assert words.tolist() == [list(range(11)), list(range(11, 22))]
    assert torch.equal(following, words + 1)
    with pytest.raises(ValueError, match="a text of 3 words gives no windows of 4 rows"):
        text.Windows(torch.arange(3), 4, 2)


def test_a_corpus_of_three_files_of_one_and_of_none(tmp_path):
    paths = [tmp_path / name for name in ("train", "valid", "test")]
    for path, content in zip(paths, ("a b a\na c\n", "a d\n", "b\nb\n"), strict=True):
        path.write_text(content)
    three = text.load(*paths)
    assert three.words == ("a", "<eos>", "b", "c", "<unk>")
    assert [three.words[i] for i in three.valid] == ["a", "<unk>", "<eos>"]
    assert text.load(*paths, most=2).words == ("a", "b", "<unk>")
    paths[0].write_text("x y\n" * 50)
    one = text.load(paths[0])
    assert [len(part) for part in (one.train, one.valid, one.test)] == [120, 15, 15]
    embedded = text.load()
    assert len(embedded.train) > 50_000
    assert embedded.words[embedded.train[0]] != "<unk>"
    with pytest.raises(ValueError, match="got 2"):
        text.load(*paths[:2])
    paths[1].write_text("")
    with pytest.raises(ValueError, match="valid has 0 words"):
        text.load(*paths)


@pytest.mark.nightly
def test_the_example_tunes_seven_numbers_and_goes_on_where_it_stopped(tmp_path):
    def run(epochs):
        command = [sys.executable, str(ROOT / "examples" / "language_model.py"), "--small", "--width", "8", "--words", "1500",
                   "--epochs", str(epochs), "--method", "delta", "--out", str(tmp_path)]  # fmt: skip
        subprocess.run(
            command, check=True, capture_output=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        )
        return json.loads((tmp_path / "result.json").read_text())

    first, second = run(1), run(2)
    assert (first["epochs"], second["epochs"]) == (1, 2)
    assert second["history"][0] == first["history"][0]
    assert len(second["found"]) == 7
    assert all(second["history"][1][name] != second["history"][0][name] for name in second["found"])
    assert 1 < second["test_perplexity"] < 5000
