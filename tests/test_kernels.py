"""What a cycle of a run does on a CUDA device, counted without one (benchmarks/kernels.py): how much, and what must not be."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer, resnet18
from torchvision.transforms import v2

import fxstn
from benchmarks import gpu
from benchmarks.fake_cuda import fake_cuda
from benchmarks.kernels import PULL_BACK, count_loop, count_plain, count_run, network
from benchmarks.launches import Launches
from benchmarks.networks import three_layers
from benchmarks.on_device import ratio
from fxstn import hp
from fxstn.bilevel.cadence import steps_of_run
from fxstn.ops import multi_tensor
from fxstn.ops.multi_tensor import add_multiples
from fxstn.tools.bench import plain_baseline


def vision_transformer() -> nn.Module:
    """Two layers of vit_b_16's kind."""
    return VisionTransformer(32, 16, 2, 2, 32, 64, 0.1, num_classes=10)


def group_norms() -> nn.Module:
    layers = [[nn.Conv2d(a, 8, 3), nn.GroupNorm(2, 8), nn.GELU()] for a in (3, 8, 8)]
    return nn.Sequential(*[layer for block in layers for layer in block], nn.Flatten(), nn.Linear(8 * 26 * 26, 10))


def augmented() -> nn.Module:
    return nn.Sequential(
        v2.Normalize([0.5] * 3, [0.25] * 3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3),
        nn.Flatten(), nn.Linear(8 * 28 * 28, 10)
    )  # fmt: skip


BOTH = [hp.Dropout(), hp.WeightDecay(shared=True)]
AUGMENTATIONS = [hp.ColorJitter(), hp.Affine(), hp.Cutout(), hp.Erasing(), hp.Flip(), hp.VerticalFlip(), hp.Grayscale(),
                 hp.GaussianNoise(), hp.GaussianBlur(), hp.MixUp(), hp.CutMix()]  # fmt: skip
# (network, what is tuned, most kernels per inner step of a cycle of the default schedule).
NETWORKS = {
    "resnet18": (partial(resnet18, num_classes=10), BOTH, 331),
    "mlp": (partial(three_layers, 10), BOTH, 88),
    "vision transformer": (vision_transformer, BOTH, 236),
    "group norms": (group_norms, BOTH, 117),
    "augmentations": (augmented, [*AUGMENTATIONS, *BOTH], 793),
}
# Steps of each kind launch what they launch, however many follow each other.
SHORT = {"response": fxstn.ResponseSettings(every=1), "hyper": fxstn.HyperSettings(train_steps=1)}
EVERY = {"inner": 1, "response": fxstn.ResponseSettings.every, "hyper": fxstn.HyperSettings.train_steps}


def per_inner_step(launches):
    """Kernels per inner step of the default schedule, from a cycle of a short one."""
    rates = {kind: launches.steps[kind] * every for kind, every in EVERY.items()} | {"": launches.steps["inner"]}
    rates[PULL_BACK] = rates["inner"]  # in the first cycles
    return sum(o.launches / rates[o.kind] for o in launches.operators)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_cycle_of_a_run_on_cuda(name):
    """It launches so many kernels; the host waits for nothing and sends nothing; no kernel gets several types."""
    build, specs, most = NETWORKS[name]
    torch.manual_seed(0)
    stn = network(build(), specs, torch.rand(4, 3, 32, 32))
    with fake_cuda():
        x, target = torch.empty(8, 3, 32, 32, device="cuda"), torch.zeros(8, dtype=torch.long, device="cuda")
        launches = count_run(stn, x, target, **SHORT)
    assert launches.steps == {"inner": 1, PULL_BACK: 1, "response": 1, "hyper": 1}
    assert not launches.syncs
    assert not launches.copies
    assert not launches.unlike
    assert torch.float64 not in {o.dtype for o in launches.operators}, "slow on most devices, unknown to some"
    assert per_inner_step(launches) <= most, per_inner_step(launches)


def test_a_cycle_of_a_loop_of_ones_own_on_cuda():
    """The hooks of `fxstn.tune` let the host wait for nothing either, and send nothing."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=1e-2, fused=True)
    few = torch.rand(4, 3, 4, 4), torch.zeros(4, dtype=torch.long)
    with fake_cuda():
        x, target = (torch.empty(8, *t.shape[1:], dtype=t.dtype, device="cuda") for t in few)
        launches = count_loop(model, optimizer, BOTH, few, x, target)
    assert launches.steps == {"inner": 20, PULL_BACK: 20, "response": 5, "hyper": 4}
    assert not launches.syncs
    assert not launches.copies
    assert not launches.unlike
    assert torch.float64 not in {o.dtype for o in launches.operators}


@pytest.mark.parametrize(("name", "kernels"), [("resnet18", 194), ("mlp", 26)])
def test_plain_training_launches_what_torchs_own_engine_does(name, kernels):
    """As counted where CUDA's driver was a stub, so that torch's engine ran the backward pass."""
    build = NETWORKS[name][0]
    model = plain_baseline(build(), [hp.Dropout()])
    with fake_cuda():
        x, target = torch.empty(8, 3, 32, 32, device="cuda"), torch.zeros(8, dtype=torch.long, device="cuda")
        launches = count_plain(model, x, target, 1e-4, None)
    assert sum(o.launches for o in launches.operators) == kernels


def test_multiples_are_added_by_one_kernel_on_cuda_and_are_the_same(monkeypatch):
    """The kernel of fused SGD, which the CPU has as well; tensors that it does not take are added one by one."""
    with fake_cuda(), (launches := Launches()):
        x, d = ([torch.empty(size, device="cuda") for size in ((3, 4), (5,))] for _ in range(2))
        add_multiples(x, d, torch.empty((), device="cuda"))
        add_multiples([x[0].t()], [torch.empty(4, 3, device="cuda")], torch.empty((), device="cuda"))
    assert [(o.name, o.bytes) for o in launches.operators] == [
        ("_fused_sgd_", 4 * (3 * 17 + 1)),  # with the factor
        ("addcmul_", 4 * (3 * 12 + 1)),
    ]
    for dtype in (torch.float32, torch.bfloat16):
        x, d = ([torch.randn(size).to(dtype) for size in ((3, 4), (0,), (5,))] for _ in range(2))
        expected = [a.double() + 0.125 * b.double() for a, b in zip(x, d, strict=True)]
        fused, versions = [a.clone() for a in x], [b._version for b in d]
        with monkeypatch.context() as patch:
            patch.setattr(multi_tensor, "_fusible", lambda *_: True)
            add_multiples(fused, d, torch.tensor(0.125))
        add_multiples(x, d, torch.tensor(0.125))
        assert [b._version for b in d] == versions
        for one, other, value in zip(fused, x, expected, strict=True):
            torch.testing.assert_close(one, value.to(dtype))
            torch.testing.assert_close(other, value.to(dtype))


def test_a_result_in_memory_that_is_given_is_a_kernel_and_an_expanded_tensor_is_read_once():
    with fake_cuda(), (launches := Launches()):
        x = torch.empty(4, 5, device="cuda")
        torch.div(x, x[:, :1].expand(4, 5), out=torch.empty(4, 5, device="cuda"))
        torch.add(x, torch.empty(5, device="cuda").expand(4, 5))
    assert [(o.name, o.bytes // 4) for o in launches.operators] == [("div", 20 + 20), ("add", 20 + 5 + 20)]


@pytest.mark.slow  # four processes that import torch
def test_make_gpu_runs_the_same_commands_without_a_gpu(tmp_path):
    """Each part says how it ended, and what it measured."""
    assert gpu.main(["--device", "cpu", "--tiny", "--results", str(tmp_path)]) == 0
    parts = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert {name: part["outcome"] for name, part in parts.items()} == {"tests": "passed", "MLP": "passed"}
    times = parts["MLP"]["times"]
    assert set(times) == {"plain", "inner", PULL_BACK, "response", "hyper", "cycle"}
    assert all(0 < one["host"] <= one["ms"] for one in times.values())


def test_a_part_of_make_gpu_that_is_stopped_says_so(tmp_path):
    clock = gpu.Process("clock", ("timeit",), tmp_path, gate=False)
    clock.begin()
    assert clock.finish(0)["outcome"] == "stopped"


def test_the_ratio_of_a_run_is_that_of_its_steps():
    """Of times of steps that are plain numbers, with what a cycle takes beside them."""
    ms = {"plain": 2.0, "inner": 2.0, PULL_BACK: 3.0, "response": 4.0, "hyper": 5.0, "cycle": 5.5}
    times = {name: {"ms": value} for name, value in ms.items()}
    responses, hypers = steps_of_run(1000)
    between = 5.5 - (2 + 1 + 4 / 4 + 5 / 5)
    expected = (2 + 5 * hypers / 1000 + 4 * responses / 1000 + 5 * hypers / 1000 + between) / 2
    assert ratio(times, 1000) == pytest.approx(expected)
