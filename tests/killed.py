"""Runs that are killed: python tests/killed.py FOLDER KILLS EPOCHS SEED … prints a line of JSON for each seed's scenario.

One process imports everything once; each run, and each resumed one, is a fork of it.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from fxstn.bilevel.checkpoint import load_checkpoint
from tests.runs import same, without_times
from tests.scenarios import Scenario

SAID = "does not end as it would have ended"


def run(scenario: Scenario, out: Path, epochs: int, pipe: int, moment: int) -> None:
    """Train to the end, and write the end and the warnings to files; a byte to the pipe at the loss of this number."""
    os.setpgid(0, 0)
    calls = 0

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == moment:
            os.write(pipe, b".")
        return F.cross_entropy(output, target)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner = scenario.runner(out, loss_fn)
        try:
            history = runner.fit(epochs)
        finally:
            with open(out / "warnings", "a", encoding="utf-8") as file:
                file.writelines(f"{each.message}\n" for each in caught)
    end = {"rows": without_times(history), "stn": runner.stn.state_dict(), "best": runner.best}
    torch.save({"end": end, "calls": calls}, out / "part.pt")
    os.replace(out / "part.pt", out / "end.pt")


def start(scenario: Scenario, out: Path, epochs: int, moment: int = 0) -> tuple[int, int]:
    """The number of a process that runs a scenario, and where to read that its moment has come."""
    reading, writing = os.pipe()
    number = os.fork()
    if number:
        os.close(writing)
        return number, reading
    try:
        os.close(reading)
        run(scenario, out, epochs, writing, moment)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def rereads(scenario: Scenario, file: Path) -> bool:
    """Whether a resume from a file reads something again that no checkpoint holds."""
    if not file.exists():
        return False
    (state,) = load_checkpoint(file)["processes"]
    return any(
        state[name].get("passes") for name in scenario.unfollowed
    )  # a stream that draws itself reads nothing twice


def finish(scenario: Scenario, out: Path, epochs: int) -> dict[str, object]:
    """The end of a run that nothing interrupts."""
    number, pipe = start(scenario, out, epochs)
    assert os.waitpid(number, 0)[1] == 0, f"{scenario}: the run failed"
    os.close(pipe)
    end: dict[str, object] = torch.load(out / "end.pt", weights_only=True)
    return end


def killed(scenario: Scenario, folder: Path, kills: int, epochs: int, seed: int) -> dict[str, object]:
    """What became of a run that was killed so often, at random moments, beside one that was not."""
    chance, whole, cut = random.Random(seed), folder / f"{seed}-whole", folder / f"{seed}-cut"
    whole.mkdir()
    cut.mkdir()
    expected = finish(scenario, whole, epochs)
    calls, hits = int(str(expected["calls"])), 0
    for _ in range(kills):
        number, pipe = start(scenario, cut, epochs, chance.randint(2, max(2, calls // (kills + 1))))
        os.read(pipe, 1)  # empty where the run ends before
        time.sleep(chance.uniform(0.0, 0.002))
        os.killpg(number, signal.SIGKILL)
        hits += os.WIFSIGNALED(os.waitpid(number, 0)[1])
        os.close(pipe)
    notices = rereads(scenario, cut / "last.pt")
    end = finish(scenario, cut, epochs)
    said = SAID in (cut / "warnings").read_text(encoding="utf-8")
    # The last resume says what it cannot follow, and perhaps one before it has said so.
    right = said or not notices if scenario.unfollowed else not said and same(end["end"], expected["end"])
    return {"seed": seed, "right": right, "warned": said, "kills": hits, "words": str(scenario)}


def main(folder: Path, kills: int, epochs: int, seeds: list[int]) -> None:
    torch.set_num_threads(1)
    Scenario.of(0).runner(None, F.cross_entropy).fit(1)  # so that no fork does anew what is done once in a process
    gc.collect()
    gc.freeze()  # a collection in a fork would copy the memory of all objects
    for seed in seeds:
        print(json.dumps(killed(Scenario.of(seed), folder, kills, epochs, seed)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), [int(seed) for seed in sys.argv[4:]])
