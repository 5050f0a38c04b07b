"""On a CUDA device: the same tangents as on the CPU, every step, and no state left behind on the host."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nets import SmallConv, randomize_response
from torchvision import models

import fxstn
from fxstn import hp

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_tangents_on_cuda_equal_those_on_the_cpu():
    stn = fxstn.transform(SmallConv().double(), [hp.WeightDecay()]).train()
    randomize_response(stn)
    x, delta = torch.randn(4, 3, 16, 16).double(), torch.randn(4, len(stn.hparams)).double()
    expected = stn.pushforward(x, delta=delta)
    found = stn.cuda().pushforward(x.cuda(), delta=delta.cuda())
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-8, atol=1e-10)


def test_every_step_of_resnet18_runs_on_cuda():
    stn = fxstn.transform(models.resnet18(num_classes=10)).cuda()
    x, target = torch.randn(8, 3, 32, 32, device="cuda"), torch.randint(10, (8,), device="cuda")
    for step in (fxstn.general_loss, fxstn.response_loss, fxstn.hyper_loss):
        loss = step(stn, F.cross_entropy, x, target)
        loss.backward()
        assert torch.isfinite(loss)
    assert all(tensor.is_cuda for tensor in (*stn.parameters(), *stn.buffers()))
