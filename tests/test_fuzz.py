"""No mistake of a user's ends in somebody else's words, and no program loses a tangent: random mistakes of tests/fuzz.py, and
random programs of tests/programs.py."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings

from fxstn import Schedule
from fxstn.rules import RULES, Rule
from tests.fuzz import committed, everything, mistakes, outcome
from tests.programs import LAWS, Program, draw, failure, smaller


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
@example(("specs", ("ActivationDecay", {"shared": "tensor"})))
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


# Random programs


def kept(seed, laws=None):
    """Fails with the smallest program, as source, that breaks the law which the one of this seed breaks."""
    program = draw(seed)
    broken = failure(program, laws)
    if broken is not None:
        least = smaller(program, broken[0])
        pytest.fail(f"{broken[0]}: {broken[1]}\n\n{least.source}\n{(failure(least, [broken[0]]) or ('', ''))[1]}")


@pytest.mark.parametrize("seed", range(30))
def test_a_random_program_keeps_the_law_of_its_turn(seed):
    kept(seed)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1000, 1500))
def test_a_random_program_keeps_every_law(seed):
    kept(seed, list(LAWS))


def test_a_program_that_breaks_a_law_is_named_in_a_line_or_two(monkeypatch):
    """A rule that is wrong is found, and the program has only what it takes."""
    wrong = Rule("pointwise", lambda tangents, args, kwargs: (torch.tanh(*args), 0.9 * tangents[0]))
    monkeypatch.setitem(RULES, torch.tanh, wrong)
    lines = (("v0", "v0 = s.p0(x)"), ("v1", "v1 = v0 * 2"), ("v2", "v2 = torch.tanh(v1)"))
    program = Program(0, (3, 6), {"p0": "nn.Linear(6, 5)"}, lines, ("v2",))
    law, wrong = failure(program, ["structured"])
    assert "tangent" in wrong
    assert [text for _, text in smaller(program, law).statements] == ["v0 = s.p0(x)", "v2 = torch.tanh(v0)"]
