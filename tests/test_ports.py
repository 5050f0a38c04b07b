"""Training scripts as people have them (tests/ports): plain, and with the few lines that `fxstn.tune` takes."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
import torch.distributed as dist

import fxstn
from fxstn import HyperSettings, ResponseSettings
from tests import ports
from tests.runs import same, without_times

VARIANTS = {  # options, and how many rows the history has then
    "mnist": 2,
    "imagenet --distributed": 2,
    "nanogpt": 3,
    "nanogpt --compile --gradient_accumulation_steps 1": 3,
    "cifar": 2,
    "word_language_model --tied": 4,
    "references --model-ema": 3,
    "references --opt adamw --lr 0.02 --wd 0.05 --bias-weight-decay 0.01 --amp --clip-grad-norm 1 --distributed": 3,
    "timm_train --amp": 2,
}
RESUMES = {  # the file that a run saves into, the options to save and those to go on from there
    "imagenet": ("checkpoint.pt", "--out {0}", "--resume {0}/checkpoint.pt"),
    "nanogpt": ("ckpt.pt", "--out_dir {0}", "--out_dir {0} --init_from resume"),
    "cifar": ("last.pt", "--checkpoint {0}/last.pt", "--checkpoint {0}/last.pt --resume"),
    "references": ("checkpoint.pth", "--output-dir {0}", "--resume {0}/checkpoint.pth"),
    "timm_train": ("last.pth.tar", "--output {0}", "--resume {0}/last.pth.tar"),
}
QUICK = {  # the runs are so short that λ has to move by every gradient
    "response": ResponseSettings(every=1),
    "hyper": HyperSettings(train_steps=2, optimizer=partial(fxstn.optim.SettlingAdam, certainty=None)),
}


@pytest.fixture(autouse=True)
def _one_process(request, tmp_path):
    """A group of one process, for the variants that are distributed."""
    if "--distributed" not in request.node.callspec.params.get("variant", ""):
        yield
        return
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def tuners(monkeypatch):
    """The tuners that scripts make, in order. They take more steps of Θ and λ than usual."""
    tuners, original = [], fxstn.tune

    def tune(*args, **settings):
        tuners.append(original(*args, **QUICK, **settings))
        return tuners[-1]

    monkeypatch.setattr(fxstn, "tune", tune)
    return tuners


def run(module, options: str) -> dict:
    """What a script returns, with options as one types them."""
    return module.main(options.split())


def learns(result) -> bool:
    losses = [row["loss"] for row in result["log"]]
    last = losses[-max(1, len(losses) // 3) :]
    return sum(last) / len(last) < 0.9 * losses[0]


def schedule(result) -> list[dict]:
    """What a script logs besides losses: epochs, steps and learning rates."""
    return [{name: row[name] for name in row.keys() & {"epoch", "iter", "lr"}} for row in result["log"]]


def groups(result) -> list[dict]:
    """The groups of the optimizer, without their parameters and without rates that follow the validation loss."""
    all_groups = result["optimizer"].param_groups
    return [{name: value for name, value in group.items() if name not in ("params", "lr")} for group in all_groups]


@pytest.mark.parametrize("script", ports.SCRIPTS)
def test_a_port_changes_at_most_five_lines(script):
    assert 0 < len(ports.changed_lines(script)) <= 5
    assert ports.source(script).count("# fxstn:") == len(ports.changed_lines(script))


@pytest.mark.filterwarnings(
    "ignore:one ε for the whole batch"
)  # a language model, whose examples are not along one axis
@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=pytest.mark.nightly) if "--compile" in v else v for v in VARIANTS]
)
def test_a_tuned_script_tunes_and_is_otherwise_the_plain_one_and_goes_on_with_its_tuner(
    variant, tmp_path, tuners, monkeypatch
):
    script, _, options = variant.partition(" ")
    file, first, second = (part.format(tmp_path) for part in RESUMES.get(script, ("", "", "")))
    save = torch.save

    def save_also_first(state, path):  # what comes later goes to the same path
        save(state, path)
        if not (tmp_path / "first").exists():
            shutil.copyfile(path, tmp_path / "first")

    plain = run(ports.plain(script), options)
    monkeypatch.setattr(torch, "save", save_also_first)
    tuned = run(ports.tuned(script), f"{options} {first}")
    tuner = tuners[0]
    assert learns(plain)
    assert learns(tuned)
    assert tuner.values() != tuner.history.start
    assert len(tuner.history) == VARIANTS[variant]
    assert schedule(tuned) == schedule(plain)
    assert groups(tuned) == groups(plain)
    for name in plain.keys() - {"log", "evaluations"}:
        assert type(tuned[name]).__qualname__ == type(plain[name]).__qualname__
        assert tuned[name].state_dict().keys() == plain[name].state_dict().keys()
    if file:
        shutil.copyfile(tmp_path / "first", tmp_path / file)
        resumed = run(ports.tuned(script), f"{options} {second}")
        assert 0 < len(resumed["log"]) < len(tuned["log"])
        assert resumed["log"] == tuned["log"][-len(resumed["log"]) :]
        assert same(resumed["model"].state_dict(), tuned["model"].state_dict())
        assert tuners[1].values() == tuner.values()
        assert same(*(without_times(t.history) for t in tuners))
        # a script that resumes loads its weights before `tune`, whose first weights they then are
        other = ("history", "means", "starts")
        states = [{k: v for k, v in t.state_dict().items() if k not in other} for t in tuners]
        assert same(*states)
