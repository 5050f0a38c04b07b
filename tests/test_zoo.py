"""Law 1 on torchvision's models: most families here, by small members or with few layers; all with `pytest -m nightly`."""

from __future__ import annotations

import pytest
import torch
from torchvision import models

import fxstn
from benchmarks import zoo

pytestmark = pytest.mark.slow

WHOLE = ["resnet18", "squeezenet1_0"]
SHORTENED = ["vit_b_16", "convnext_tiny"]
LIVE = ["raft_small"]  # small detectors, and optical flow by day: test_detection.py


def check(model, inputs, trace="auto"):
    report = fxstn.verify(model, *inputs, trace=trace)
    assert {check.mode for check in report.checks} == {"train", "eval"}
    assert report.ok, str(report)


@pytest.mark.parametrize("name", WHOLE)
def test_the_tangent_of_a_model_is_the_derivative_of_the_original(name):
    model, inputs, _ = zoo.build(name)
    check(model, inputs)


@pytest.mark.parametrize("name", SHORTENED)
def test_the_tangent_of_a_model_without_its_repeated_blocks(name):
    model, inputs, _ = zoo.build(name)
    check(zoo.shortened(model), inputs)


def test_the_tangent_of_a_narrow_densenet():
    check(models.DenseNet(8, (2, 2, 2), 16, num_classes=5), [torch.randn(4, 3, 64, 64)])


@pytest.mark.nightly
@pytest.mark.parametrize("name", LIVE)
def test_the_tangent_of_a_model_that_only_runs_as_it_is(name):
    model, inputs, _ = zoo.build(name)
    with pytest.raises(fxstn.TransformError):
        fxstn.transform(model)
    check(model, inputs, trace="live")


@pytest.mark.nightly
@pytest.mark.parametrize("name", zoo.names())
def test_every_model(name):
    torch.manual_seed(0)
    model, inputs, _ = zoo.build(name)
    check(model, inputs)


@pytest.mark.parametrize("name", ["vit_b_16", "r3d_18"])
def test_examples_are_found_in_attention_windows_and_video(name):
    model, inputs, _ = zoo.build(name)
    assert fxstn.transform(zoo.shortened(model)).per_example(*inputs)


def test_vision_transformers_tune_the_dropouts_they_have():
    assert len(fxstn.transform(zoo.build("vit_b_16")[0]).hparams) == 37
