"""Training scripts as people have them (tests/ports): they run, learn and resume as they stand."""

from __future__ import annotations

import pytest
from runs import same

from tests import ports

RESUMES = {  # options of a run of one half, and of the run that goes on from there
    "imagenet": ("--epochs 1 --out {0}", "--resume {0}/checkpoint.pt"),
    "nanogpt": ("--max_iters 10 --out_dir {0}", "--out_dir {0} --init_from resume"),
    "cifar": ("--stop 1 --checkpoint {0}/last.pt", "--checkpoint {0}/last.pt --resume"),
    "references": ("--stop 1 --output-dir {0}", "--resume {0}/checkpoint.pth"),
    "timm_train": ("--stop 1 --output {0}", "--resume {0}/last.pth.tar"),
}


def run(module, options: str) -> dict:
    """What a script returns, with options as one types them."""
    return module.main(options.split())


def losses(result) -> list[float]:
    return [row["loss"] for row in result["log"]]


@pytest.mark.parametrize("script", ports.SCRIPTS)
def test_a_plain_script_learns(script):
    result = losses(run(ports.plain(script), ""))
    last = result[-max(1, len(result) // 3) :]
    assert sum(last) / len(last) < 0.9 * result[0]


@pytest.mark.parametrize("script", RESUMES)
def test_a_plain_script_resumes_where_it_left_off(script, tmp_path):
    first, second = (options.format(tmp_path) for options in RESUMES[script])
    whole = run(ports.plain(script), "")
    run(ports.plain(script), first)
    resumed = run(ports.plain(script), second)
    assert 0 < len(resumed["log"]) < len(whole["log"])
    assert resumed["log"] == whole["log"][-len(resumed["log"]) :]
    assert same(resumed["model"].state_dict(), whole["model"].state_dict())


@pytest.mark.parametrize("script", ports.SCRIPTS)
def test_a_port_changes_at_most_five_lines(script):
    assert 0 < len(ports.changed_lines(script)) <= 5
    assert ports.source(script).count("# fxstn:") == len(ports.changed_lines(script))
