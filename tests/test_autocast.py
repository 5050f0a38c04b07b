"""Autocast: kernels of CUDA want one type where those of the CPU take several, and gradients stay near those without it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxstn
from benchmarks.fake_cuda import backward, fake_cuda, move, on_fake_cuda
from benchmarks.launches import Launches
from fxstn import hp

IMAGES, SEQUENCES = (4, 3, 6, 6), (4, 5, 8)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.LSTM(8, 8, 2, batch_first=True, dropout=0.1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0][:, -1])


class FrozenBackbone(nn.Module):
    """A bfloat16 backbone that is not trained under a float32 head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)).bfloat16().requires_grad_(False)
        self.head = nn.Sequential(nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(128, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x.bfloat16()).float())


class InstanceNorm(nn.InstanceNorm2d):
    """Without the branch on the input's rank, for which the frontend would be "export"."""

    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x, weight=self.weight, bias=self.bias)


def norms() -> nn.Sequential:
    """Norms with parameters behind layers, which autocast lowers, and activations of which it raises some."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.GELU(), nn.Dropout(0.1), nn.Conv2d(8, 8, 1),
        InstanceNorm(8, affine=True), nn.Softplus(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.PReLU(), nn.Flatten(),
        nn.Linear(128, 8), nn.LayerNorm(8), nn.Mish(), nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 3),
    )  # fmt: skip


def plain_norms() -> nn.Sequential:
    """Norms without parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8, affine=False), nn.SiLU(), nn.Conv2d(8, 8, 1),
        nn.BatchNorm2d(8, affine=False), nn.ELU(), nn.Conv2d(8, 8, 1), InstanceNorm(8), nn.LocalResponseNorm(3),
        nn.Flatten(), nn.Linear(128, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 8), nn.Softmax(-1),
        nn.Linear(8, 3),
    )  # fmt: skip


def attention() -> nn.Sequential:
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True), nn.Flatten(), nn.Linear(40, 3))


AUGMENTED = [
    hp.Cutout("0"),
    hp.Affine("0"),
    hp.GaussianBlur("0"),
    hp.MixUp("0"),
    hp.ActivationDecay("2"),
    hp.WeightDecay(norm=1),
]
NETS = {
    "norms": (norms, IMAGES, {}, torch.bfloat16),
    "norms, structured, float16": (norms, IMAGES, {"response": "structured"}, torch.float16),
    "plain norms": (plain_norms, IMAGES, {"hparams": AUGMENTED}, torch.bfloat16),
    "attention": (attention, SEQUENCES, {}, torch.bfloat16),
    "recurrent": (Recurrent, SEQUENCES, {}, torch.bfloat16),
    "frozen backbone, live": (FrozenBackbone, IMAGES, {"hparams": [hp.WeightDecay()], "trace": "live"}, torch.bfloat16),
}


@pytest.mark.parametrize("net", NETS)
def test_no_kernel_of_cuda_gets_several_types(net):
    """In the forward and the backward pass of each objective."""
    torch.manual_seed(0)
    make, shape, options, precision = NETS[net]
    x, target = torch.randn(shape), torch.arange(4) % 3
    options = {"hparams": [hp.Dropout(), hp.WeightDecay(shared=True)]} | options
    stn = fxstn.transform(make(), example_inputs=x, **options).train()
    example = "example" if stn.frontend != "live" and stn.per_example(x) else "batch"
    objectives = [(fxstn.response_loss, example), (fxstn.hyper_loss, "batch")]
    if net != "recurrent":  # cuDNN's kernel, which the general step runs, asks for a driver
        objectives.append((fxstn.general_loss, "batch"))
    launches = Launches()
    with fake_cuda():
        move(stn, *filter(None, map(graph_of(stn), (True, False))))
        x, target = on_fake_cuda(x), on_fake_cuda(target)
        for objective, perturb in objectives:
            with launches:
                with torch.autocast("cuda", precision):
                    loss = objective(stn, F.cross_entropy, x, target, perturb=perturb)
                assert backward(loss) > 0
    assert not launches.unlike
    assert sum(launches.seen.values()) > 100


class Projected(nn.Module):
    """An LSTM with a projection, whose product autocast lowers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout, self.head = (
            nn.LSTM(8, 8, batch_first=True, proj_size=4),
            nn.Dropout(0.1),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.layer(x)[0].mean(1)))


def maps() -> nn.Sequential:
    """A layer norm over channels and pixels behind a convolution."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.LayerNorm([4, 6, 6]), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(144, 3)
    )


def encoder() -> nn.Sequential:
    """Layer norms behind products."""
    return nn.Sequential(nn.Linear(8, 8), *attention())


ON_CPU = NETS | {
    "projected": (Projected, SEQUENCES, {}, torch.bfloat16),
    "maps": (maps, IMAGES, {}, torch.bfloat16),
    "maps, structured": (maps, IMAGES, {"response": "structured"}, torch.bfloat16),
    "maps, live": (maps, IMAGES, {"trace": "live"}, torch.bfloat16),
    "encoder": (encoder, SEQUENCES, {}, torch.bfloat16),
    "encoder, float16": (encoder, SEQUENCES, {}, torch.float16),
}


@pytest.mark.parametrize("net", ON_CPU)
def test_gradients_of_the_response_are_near_those_without_autocast(net):
    torch.manual_seed(0)
    make, shape, options, precision = ON_CPU[net]
    x, target = torch.randn(shape), torch.arange(4) % 3
    options = {"hparams": [hp.Dropout(), hp.WeightDecay(shared=True)]} | options
    stn = fxstn.transform(make(), example_inputs=x, **options).train()
    parameters = list(stn.response_parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.1)
    gradients = []
    for autocast in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", precision, enabled=autocast):
            loss = fxstn.response_loss(stn, F.cross_entropy, x, target, perturb=torch.ones(len(stn.hparams)))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


def graph_of(stn):
    """The canonical graph of a mode, which may hold tensors of its own; None for a network that runs as it is."""
    return lambda training: stn.canonical(training) if stn.frontend != "live" else None


def test_what_the_kernels_are_compared_by_sees_unlike_types():
    launches = Launches()
    with fake_cuda():
        x, weight = torch.empty(2, 4, 3, dtype=torch.bfloat16, device="cuda"), torch.empty(4, device="cuda")
        with launches:
            torch.native_group_norm(x, weight, None, 2, 4, 3, 2, 1e-5)
            x + weight[:3]
            torch.nn.functional.batch_norm(x, weight, weight, weight, weight, True)
    assert list(launches.unlike) == ["aten.native_group_norm.default: torch.bfloat16, torch.float32"]


class Conversions(TorchDispatchMode):
    """`numbers`: how often each tensor, by its memory, was converted."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: Counter[int] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.numbers[args[0].data_ptr()] += 1
        if function is torch.ops.aten._foreach_copy_.default:
            self.numbers.update(source.data_ptr() for source in args[1])
        return function(*args, **kwargs or {})


def test_a_response_step_converts_each_weight_once():
    """Autocast converts a weight that requires no gradient at every read."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 8), nn.ReLU(), nn.Linear(8, 3))
    stn = fxstn.transform(net, [hp.Dropout("1")]).train()
    x = torch.randn(IMAGES)
    stn.per_example(x)
    with Conversions() as conversions, torch.autocast("cpu", torch.bfloat16):
        fxstn.response_loss(stn, F.cross_entropy, x, torch.arange(4) % 3).backward()
    assert [conversions.numbers[parameter.data_ptr()] for parameter in stn.model.parameters()] == [1] * 6
