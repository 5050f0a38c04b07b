"""No mistake of a user's ends in somebody else's words: random mistakes of tests/fuzz.py, and those that once did."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from fuzz import committed, everything, mistakes, outcome
from hypothesis import HealthCheck, example, given, settings

from fxstn import Schedule


def commit(mistake):
    with tempfile.TemporaryDirectory() as folder:
        committed(mistake, Path(folder))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mistakes())
@example(("transform_argument", ("method", "array")))
@example(("transform_argument", ("recompute", "tensor")))
@example(("setting", ("accumulate", "10**30")))
@example(("setting", ("hyper.valid_steps", "3.0")))
@example(("setting", ("response.perturb", "array")))
@example(("setting", ("execution.compile", "{1: 2}")))
@example(("setting", ("unpack", "int")))
@example(("specs", ("LabelSmoothing", {"init": "{'x': 1}"})))
@example(("specs", ("LabelSmoothing", {"low": "None"})))
@example(("specs", ("Activity", {"shared": "True"})))
@example(("batch_of", ("batch", "0-d", "valid_loader")))
def test_a_mistake_is_refused_by_fxstn_or_works(mistake):
    commit(mistake)


@pytest.mark.nightly
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(mistakes())
def test_a_thousand_mistakes(mistake):
    commit(mistake)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["setting", "transform_argument", "call"])
def test_every_argument_with_every_value(kind):
    for mistake in everything():
        if mistake[0] == kind:
            commit(mistake)


def test_an_error_of_somebody_else_is_noticed(tmp_path):
    with pytest.raises(AssertionError, match="not in fxstn's words: ValueError"):
        outcome(lambda folder: int("x"), tmp_path)
    assert outcome(lambda folder: Schedule.from_json(folder / "gone.json"), tmp_path)
