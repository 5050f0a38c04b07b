"""On a CUDA device: the same tangents as on the CPU, every step, and no state left behind on the host."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torchvision import models

import fxstn
from benchmarks.kernels import cycle
from fxstn import hp
from fxstn.ir.tangents import ZERO
from fxstn.rules import apply_rule
from tests.nets import SmallConv, randomize_response
from tests.processes import run
from tests.runs import dataset, make, without_times
from tests.test_kernels import AUGMENTATIONS, augmented, group_norms, vision_transformer
from tests.test_rules import NAMES, VARYING, Prepared, check_rule
from tests.test_tune import QUICK, loaders, mlp, sgd

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


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_on_cuda_equal_those_on_the_cpu(kind):
    """cuDNN in training and for the finite steps, the loop over time for the tangent; and no warning about its weights."""
    model = nn.Sequential(kind(3, 4, 2, batch_first=True, bidirectional=True)).double()
    stn = fxstn.transform(model, [hp.Scalar("a", 1.0, 0.0, 2.0)], response="structured").train()
    randomize_response(stn)
    x, delta = torch.randn(5, 6, 3).double(), torch.randn(5, 1).double()
    expected = *stn.pushforward(x, delta=delta), stn(x), stn.graph("perturbed")(x, delta=delta)
    stn, x, delta = stn.cuda(), x.cuda(), delta.cuda()
    found = *stn.pushforward(x, delta=delta), stn(x), stn.graph("perturbed")(x, delta=delta)
    for a, b in zip(tree_leaves(expected), tree_leaves(found), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")  # torch's own aminmax
@pytest.mark.parametrize("case", VARYING, ids=NAMES)
def test_a_rule_on_cuda_equals_a_central_difference_there(case):
    if case.function is torch._weight_norm and not is_exact(case):
        pytest.skip(reason="torch's own kernel on CUDA differs from that on the CPU")
    check_rule(case, device="cuda")


def is_exact(case):
    """Whether torch's kernel on CUDA computes what that on the CPU does."""
    values = [
        (prepared := Prepared(case, device=device)).function(*prepared.primals()).cpu() for device in ("cpu", "cuda")
    ]
    return (values[0] - values[1]).norm() <= 1e-12 * values[0].norm()


def recurrent():
    return nn.Sequential(nn.Unflatten(1, (48, 64)), nn.LSTM(64, 8, 2, batch_first=True), LastState(), nn.Linear(8, 3))


class LastState(nn.Module):
    def forward(self, outputs):
        return outputs[0][:, -1]


WHOLE = {
    "resnet": (lambda: models.resnet18(num_classes=10), None),
    "transformer": (vision_transformer, None),
    "group norms": (group_norms, [hp.WeightDecay(), hp.Dropout()]),
    "augmentations": (augmented, AUGMENTATIONS),
    "recurrent": (lambda: nn.Sequential(nn.Flatten(), recurrent()), None),
    "mobilenet": (lambda: models.mobilenet_v3_small(num_classes=10), None),
    "windows": (lambda: models.swin_t(num_classes=10), None),
}


@pytest.mark.parametrize("name", WHOLE)
def test_tangents_of_whole_networks_on_cuda_are_derivatives_of_the_original(name):
    """A central difference of the original network in float64, computed on the device, too."""
    build, specs = WHOLE[name]
    torch.manual_seed(0)
    report = fxstn.verify(build().cuda(), torch.rand(4, 3, 32, 32, device="cuda"), hparams=specs)
    assert report.ok, str(report)


QKV = ((2, 4, 8, 16), (2, 4, 8, 16), (2, 4, 8, 16))
OPERATIONS = {
    "attention": (F.scaled_dot_product_attention, QKV, ()),
    "causal attention": (F.scaled_dot_product_attention, QKV, (None, 0.0, True)),
    "layer norm": (F.layer_norm, ((4, 16),), ((16,),)),
    "group norm": (F.group_norm, ((4, 8, 5),), (2,)),
    "rms norm": (F.rms_norm, ((4, 16),), ((16,),)),
    "instance norm": (F.instance_norm, ((4, 8, 5),), ()),
    "softmax": (torch.softmax, ((4, 16),), (-1,)),
}


def check_precision(name, precision, device):
    """A rule in low precision on a device against itself in float64 on the CPU, relative to the rounding of the type."""
    function, shapes, rest = OPERATIONS[name]
    values = [torch.randn(shape).to(precision) for shape in shapes]
    directions = [torch.randn(shape).to(precision) for shape in shapes]
    results = []
    for kind, where in ((precision, device), (torch.float64, "cpu")):
        x, dx = ([value.to(where, kind) for value in tensors] for tensors in (values, directions))
        results.append(apply_rule(function, (*dx, *[ZERO] * len(rest)), (*x, *rest), {}))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == precision
        assert (found.cpu().double() - expected).norm() <= 30 * torch.finfo(precision).eps * expected.norm()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_attention_and_norms_on_cuda_in_low_precision(name, precision):
    check_precision(name, precision, "cuda")


def test_every_step_of_resnet18_runs_on_cuda():
    stn = fxstn.transform(models.resnet18(num_classes=10)).cuda()
    x, target = torch.randn(8, 3, 32, 32, device="cuda"), torch.randint(10, (8,), device="cuda")
    for step in (fxstn.general_loss, fxstn.response_loss, fxstn.hyper_loss):
        loss = step(stn, F.cross_entropy, x, target)
        loss.backward()
        assert torch.isfinite(loss)
    assert all(tensor.is_cuda for tensor in (*stn.parameters(), *stn.buffers()))


def test_steps_run_as_cuda_graphs_and_are_those_of_eager_mode():
    """Noise, gradients, carried statistics and λ: a run with "reduce-overhead" is the run without, but for rounding."""
    with torch._inductor.config.patch(fallback_random=True):  # the draws of eager mode
        plain, compiled = (make(execution={"device": "cuda", "compile": flag}).fit(3) for flag in (False, True))
    for a, b in zip(without_times(plain), without_times(compiled), strict=True):
        assert b == pytest.approx(a, rel=1e-3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_compiled_steps_record_no_new_graph_after_the_first_epoch(accumulate):
    run = make(train=45, execution={"device": "cuda", "compile": True}, accumulate=accumulate)
    run.fit(2)
    torch._dynamo.utils.counters.clear()
    run.fit(4)
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    assert all(math.isfinite(loss) for loss in run.history["train_loss"])


def a_cycle(compiled=False, device="cuda", **execution):
    """(batches, loop, network) of resnet18 with the default schedule."""
    torch.manual_seed(0)
    stn = (
        fxstn.transform(models.resnet18(num_classes=10), [hp.Dropout(), hp.WeightDecay(shared=True)]).to(device).train()
    )
    if compiled:
        stn.compile()
    x, target = torch.randn(8, 3, 32, 32, device=device), torch.randint(10, (8,), device=device)
    return *cycle(stn, x, target, execution=fxstn.ExecutionSettings(**execution)), stn


def wait_is_an_error(on):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that this is a prototype
        torch.cuda.set_sync_debug_mode("error" if on else "default")


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=str)
def test_in_a_cycle_the_host_does_not_wait_for_the_device(precision):
    batches, loop, _ = a_cycle(autocast=precision)
    try:
        wait_is_an_error(True)
        losses = loop.epoch(lambda: wait_is_an_error(batches.left > 0))
    finally:
        wait_is_an_error(False)
    assert all(math.isfinite(loss) for loss in losses.values())
    assert loop.tuner.counters.hyper_steps == 4


@pytest.mark.parametrize("settings", [{"autocast": torch.float16}, {"compiled": True}], ids=["float16", "compiled"])
def test_a_cycle_runs(settings):
    """In float16 torch's GradScaler makes the host wait, once for each step."""
    _, loop, _ = a_cycle(**settings)
    assert all(math.isfinite(loss) for loss in loop.epoch(lambda: None).values())


def differing(rows, others, error):
    """[(epoch, column, value, other)] where two histories differ by more than a relative error."""
    return [
        (row["epoch"], name, value, other[name])
        for row, other in zip(rows, others, strict=True)
        for name, value in row.items()
        if value != pytest.approx(other[name], rel=error, abs=0, nan_ok=True)
    ]


@pytest.mark.parametrize("settings", [{}, {"compile": True}, {"autocast": torch.float16}], ids=str)
def test_a_run_on_cuda_that_was_stopped_goes_on_as_it_would_have_and_is_fitted_anew(tmp_path, settings):
    execution = {"device": "cuda"} | settings
    whole, twin = (without_times(make(tmp_path / name, execution=execution).fit(4)) for name in ("whole", "twin"))
    make(tmp_path / "half", execution=execution).fit(2)
    again = make(tmp_path / "half", execution=execution)
    resumed = without_times(again.fit(4))
    # A device whose kernels round otherwise from run to run allows no more.
    error = 0 if not differing(whole, twin, 0) else 1e-4
    assert not differing(resumed, whole, error), f"two runs that were not stopped: {differing(whole, twin, 0)}"
    assert all(tensor.is_cuda for tensor in again.stn.state_dict().values())
    network = again.refit(DataLoader(dataset(40, 0), 8, shuffle=True), epochs=2)
    assert all(tensor.is_cuda and tensor.isfinite().all() for tensor in network.state_dict().values())


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16], ids=str)
def test_a_loop_of_ones_own_on_cuda_is_that_on_the_cpu(precision):
    """With torch's own scaler in float16; losses after two epochs differ by rounding and by the draws of noise alone."""
    losses = {}
    for device in ("cpu", "cuda"):
        model, (train, valid) = mlp().to(device), loaders()
        optimizer, scaler = sgd(model), torch.amp.GradScaler(device, enabled=precision is torch.float16)
        tuner = fxstn.tune(model, optimizer, F.cross_entropy, train, valid, **QUICK)
        for _ in range(4):
            model.train()
            for x, y in train:
                optimizer.zero_grad()
                with torch.autocast(device, precision, enabled=precision is not None):
                    loss = F.cross_entropy(model(x.to(device)), y.to(device))
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        losses[device] = tuner.history["valid_loss"][-1]
        assert tuner.values() != tuner.history.start
        assert len(tuner.history) == 4
        tuner.detach()
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.1)


def test_recurrent_layers_compile_on_cuda():
    stn = fxstn.transform(recurrent()).cuda().train()
    stn.compile()
    x, target = torch.randn(8, 3072, device="cuda"), torch.randint(3, (8,), device="cuda")
    for step in (fxstn.general_loss, fxstn.response_loss, fxstn.hyper_loss):
        loss = step(stn, F.cross_entropy, x, target)
        loss.backward()
        assert torch.isfinite(loss)


def on_a_gpu_of_its_own(rank):
    _, loop, stn = a_cycle(device=f"cuda:{rank}")
    torch.manual_seed(rank)
    loop.epoch(lambda: None)
    return stn.hparams.values()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_processes_on_two_gpus_tune_the_same():
    first, second = run(2, on_a_gpu_of_its_own)
    assert first == second
