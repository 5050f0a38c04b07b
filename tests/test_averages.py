"""Means in narrow types, of batches that are padding alone, and over processes; rates that are tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fxstn
from fxstn import hp
from fxstn.bilevel import distributed
from fxstn.bilevel.counts import Mean, as_loss
from fxstn.bilevel.faults import LossGuard
from fxstn.bilevel.running_means import RunningMeans
from fxstn.bilevel.validation import SplitStream
from tests.test_tune import data, mlp


@pytest.mark.parametrize("counts", [[3.0, 3.0], [1.0, 2.0], [torch.tensor(1.0), torch.tensor(2.0)]])
@pytest.mark.parametrize(("dtype", "value"), [(torch.bfloat16, 1.0), (torch.float16, 64.0), (torch.float32, 1.0)])
def test_losses_in_a_narrow_type_are_summed_in_a_wide_one(dtype: torch.dtype, value: float, counts: list) -> None:
    means = RunningMeans(torch.device("cpu"))
    means.begin()
    for step in range(3000):
        means.add({"train_loss": Mean(torch.tensor(value, dtype=dtype), counts[step % 2])})
    assert means.means()["train_loss"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("least", [0, 1])
def test_a_batch_of_padding_alone_counts_for_nothing_however_its_divisor_is_kept_from_zero(least: int) -> None:
    output, target = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, -100, 2])

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction="none").sum() / (target != -100).sum().clamp(min=least)

    loss = as_loss(loss_fn(output, target), output, target)
    assert float(loss.count) == 3
    assert loss.data.item() == pytest.approx(F.cross_entropy(output, target).item())
    empty = torch.full((4,), -100)
    loss = as_loss(loss_fn(output, empty), output, empty)
    assert float(loss.count) == 0
    loss.data.backward()
    assert output.grad is not None
    assert not output.grad.any()


def test_processes_agree_on_a_bad_loss_where_one_has_padding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes, one has the mean of three entries, the other one of none, which torch calls NaN."""
    sums: list[Tensor] = []
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    monkeypatch.setattr(distributed, "average", lambda tensors: sums.append(tensors[0].clone()))
    losses = Mean(torch.tensor(2.0), torch.tensor(3)), Mean(torch.tensor(float("nan")), torch.tensor(0))
    for loss in losses:
        LossGuard(torch.device("cpu")).note("hyper_loss", loss, "step 1")
    average = torch.stack(sums).mean(0)
    monkeypatch.setattr(distributed, "average", lambda tensors: tensors[0].copy_(average))
    for loss in losses:
        guard = LossGuard(torch.device("cpu"))
        assert not guard.note("hyper_loss", loss, "step 1")
        guard.check({}, "step 1")
        assert guard.first == {"hyper_loss": 2.0}


def test_a_rate_that_is_a_tensor_is_the_first_one_in_every_refit() -> None:
    rates: list[float] = []

    class Noting(torch.optim.SGD):
        def step(self, closure=None):  # type: ignore[no-untyped-def,override]
            rates.append(float(self.param_groups[0]["lr"]))
            return super().step(closure)

    stn, loader = fxstn.transform(mlp(), [hp.Dropout()]), DataLoader(data(20), 10)
    optimizer = Noting(list(stn.general_parameters()), lr=torch.tensor(0.1))
    falls = {"optimizer": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)}
    runner = fxstn.BilevelRunner(stn, nn.CrossEntropyLoss(), loader, loader, optimizer=optimizer, schedulers=falls,
                                 progress=False)  # fmt: skip
    runner.fit(2)
    for _ in range(2):
        rates.clear()
        runner.refit(loader, epochs=2)
        assert rates == pytest.approx([0.1, 0.1, 0.05, 0.05])


def test_another_number_of_processes_has_validation_batches_of_another_size() -> None:
    stream, other = (SplitStream([(torch.zeros(12, 1), torch.zeros(12))], 0) for _ in range(2))
    stream.resize(3)
    stream.next()
    other.restart(stream.state_dict())
    other.resize(6)
    batch, _ = other.next()
    assert len(batch[1]) in (3, 6)
    assert other.size == 6
