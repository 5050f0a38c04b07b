"""fxstn tune: on a folder of images, on what a function returns, and what the shell gets to know of the end."""

from __future__ import annotations

import io
import re
import runpy
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2.functional import to_pil_image

from fxstn.bilevel import progress
from fxstn.bilevel.history import History
from fxstn.tools import cli, commands
from fxstn.tools.status import RunFailed
from fxstn.tools.tuning_data import DataRequest, load_tuning_data
from tests.nets import tiny_conv

torch_images, torch_classes = torch.randn(20, 3, 8, 8), torch.arange(20) % 4
ALL = TensorDataset(torch_images, torch_classes)
HALVES = TensorDataset(*ALL[:12]), TensorDataset(*ALL[12:])
RETURNED = {
    "one": ALL,
    "pair": HALVES,
    "triple": (*HALVES, TensorDataset(*ALL[:4])),
    "loaders": tuple(DataLoader(half, 4) for half in HALVES),
    "batches": ([ALL[:4]], [ALL[4:8]]),
    "nothing": None,
    "four": (*HALVES, *HALVES),
    "unlabelled": (TensorDataset(torch_images), TensorDataset(torch_images)),
}


@pytest.fixture
def folder(tmp_path):
    """Makes images in sub-folders, {"train/cat": 3}, and gives the folder."""

    def make(counts):
        (tmp_path / "images").mkdir()
        for path, count in counts.items():
            (tmp_path / "images" / path).mkdir(parents=True)
            for i in range(count):
                image = torch.randint(256, (3, 10 + i, 12), dtype=torch.uint8)
                to_pil_image(image).save(tmp_path / "images" / path / f"{i}.png")
        return tmp_path / "images"

    return make


@pytest.fixture
def returned(monkeypatch):
    """The name of a function that returns one of RETURNED."""
    functions = {name: (lambda value=value: value) for name, value in RETURNED.items()}
    monkeypatch.setitem(sys.modules, "data_of_mine", SimpleNamespace(**functions, needs=lambda size: size))
    return lambda name: f"data_of_mine:{name}"


def lengths(loaded):
    return [
        None if part is None else len(getattr(part, "dataset", part))
        for part in (loaded.train, loaded.valid, loaded.test)
    ]


def classes_of(loader):
    return sorted(torch.cat([y for _, y in loader]).tolist())


def tune_on(data, out, *more):
    """The exit status of an epoch on a folder of small images."""
    sizes = ("--image-size", 8, "--batch-size", 4, "--epochs", 1)
    return cli.main(
        [*map(str, ("tune", "--model", "tests.nets:tiny_conv", "--data", data, *sizes, "--out", out)), *more]
    )


def test_tune_trains_on_a_folder_and_refits_it_quietly(folder, tmp_path, capsys):
    data = folder({f"{part}/{name}": 4 for part in ("train", "val", "test") for name in ("cat", "dog")})
    assert tune_on(data, tmp_path / "out", "--refit") == 0
    printed = capsys.readouterr()
    assert printed.err == ""  # no progress bar where nobody looks
    for text in (
        "best epoch 1: validation loss",
        "last epoch 1: test loss",
        "weight_decay",
        "refit, 1 epochs: test loss",
    ):
        assert text in printed.out
    tiny_conv(2).load_state_dict(torch.load(tmp_path / "out" / "refit" / "weights.pt", weights_only=True))


def test_a_run_that_no_epoch_makes_better_than_its_start_says_so_everywhere(folder, tmp_path, capsys):
    data = folder({f"{part}/{name}": 4 for part in ("train", "val") for name in ("cat", "dog")})
    assert tune_on(data, tmp_path / "out", "--lr", "30") == 0
    best = torch.load(tmp_path / "out" / "best.pt", weights_only=True)
    assert best["epoch"] == 0
    assert f"best epoch 0: validation loss {best['valid_loss']:.4f}, that of the start" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "0, the start" in page
    assert "before the first step, the best" in page


def test_a_folder_without_a_split_is_held_out_class_by_class(folder):
    data = folder({"cat": 8, "dog": 4})
    loaded = load_tuning_data(DataRequest(str(data), 8, valid_size=3, train_size=6))
    assert lengths(loaded) == [6, 3, None]
    assert classes_of(loaded.valid) == [0, 0, 1]
    assert classes_of(loaded.train) == [0, 0, 0, 0, 1, 1]
    assert loaded.classes == 2
    assert len(loaded.everything.dataset) == 9
    assert next(iter(loaded.train))[0].shape == (6, 3, 8, 8)


@pytest.mark.parametrize("part", ["val", "valid", "validation"])
def test_a_folder_of_validation_images_has_one_of_three_names(folder, part):
    assert lengths(load_tuning_data(DataRequest(str(folder({"train/a": 3, f"{part}/a": 2})), 8))) == [3, 2, None]


def test_training_images_alone_are_split(folder):
    assert lengths(load_tuning_data(DataRequest(str(folder({"train/a": 10, "train/b": 10})), 8))) == [17, 3, None]


@pytest.mark.parametrize(("name", "sizes"), [("one", [17, 3, None]), ("pair", [12, 8, None]), ("triple", [12, 8, 4]),
                                             ("loaders", [12, 8, None])])  # fmt: skip
def test_a_function_returns_a_data_set_or_parts(returned, name, sizes):
    loaded = load_tuning_data(DataRequest(returned(name), batch_size=5))
    assert lengths(loaded) == sizes
    assert loaded.classes == 4
    assert len(loaded.everything.dataset) == 20
    assert loaded.train.batch_size == (4 if name == "loaders" else 5)


def test_batches_in_a_list_need_the_number_of_classes_and_have_no_refit(returned):
    loaded = load_tuning_data(DataRequest(returned("batches"), classes=4))
    assert loaded.train is RETURNED["batches"][0]
    assert (loaded.classes, loaded.everything, loaded.test) == (4, None, None)


MISTAKES = {
    "--data no/such/folder": r"--data 'no/such/folder' is neither one of digits, .*nor a folder that exists",
    "--data EMPTY": "needs a sub-folder of images for each class",
    "--data ODD": "must have the same classes, but 'dog' is in one alone",
    "--data data_of_mine:missing": "data_of_mine:missing: .* has no attribute 'missing'",
    "--data data_of_mine:needs": "data_of_mine:needs needs size; name a function that can be called without arguments",
    "--data data_of_mine:nothing": "must return a data set, or .* it returns NoneType",
    "--data data_of_mine:four": "must return a data set, or .* it returns TensorDataset, TensorDataset, TensorDataset",
    "--data data_of_mine:batches": "does not say how many classes it has; add --num-classes N",
    "--data data_of_mine:unlabelled": "does not say how many classes it has; add --num-classes N",
    "--data data_of_mine:batches --num-classes 4 --refit": "--refit trains on training and validation data together",
    "--data data_of_mine:batches --num-classes 4 --train-size 2": "--train-size is for data sets, and these are list",
    "--data data_of_mine:pair --valid-size 9": "--valid-size 9 is more than the 8 examples that there are",
    "--workers -1": "argument --workers: '-1' must be a whole number, 0 or more",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_call_is_one_sentence_and_status_2(mistake, folder, returned, tmp_path, capsys):
    images = str(folder({"train/cat": 1, "val/cat": 1, "val/dog": 1} if "ODD" in mistake else {}))
    words = mistake.replace("EMPTY", images).replace("ODD", images)
    try:
        status = cli.main(["tune", "--out", str(tmp_path / "out"), *words.split()])
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr().err
    assert status == 2
    assert "Traceback" not in printed
    assert re.search(MISTAKES[mistake], printed), printed


ENDS = {
    "failed": (RunFailed("the loss is no number"), 1, "fxstn tune: the loss is no number\n"),
    "memory": (torch.OutOfMemoryError("out of memory"), 1, "choose a smaller --batch-size, or another --device"),
    "wrong": (ValueError("choose another"), 2, "fxstn tune: choose another\n"),
    "Ctrl-C": (KeyboardInterrupt(), 128 + signal.SIGINT, "interrupted; the same command goes on from here"),
    "SIGTERM": (SystemExit(128 + signal.SIGTERM), 128 + signal.SIGTERM, "ended by a signal; the same command goes on"),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_exit_status_says_how_a_command_ended(end, monkeypatch, capsys):
    error, status, text = ENDS[end]

    def fail(args):
        raise error

    monkeypatch.setitem(commands.COMMANDS, "tune", fail)
    assert cli.main(["tune", "--out", "here"]) == status
    assert text in capsys.readouterr().err


def test_ctrl_c_while_pytorch_loads_is_one_sentence(monkeypatch, capsys):
    class Interrupted:
        def find_spec(self, name, path=None, target=None):
            if name == "fxstn.tools.commands":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "fxstn.tools.commands")
    monkeypatch.delattr(sys.modules["fxstn.tools"], "commands", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    assert cli.main(["explain", "resnet18"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "fxstn explain: interrupted\n"


def test_a_reader_that_has_enough_ends_a_command_without_a_word(monkeypatch, capfd):
    def fail(args):
        raise BrokenPipeError(32, "Broken pipe")

    redirected = []
    monkeypatch.setitem(commands.COMMANDS, "explain", fail)
    monkeypatch.setattr(commands.os, "dup2", lambda source, target: redirected.append(target))
    assert cli.main(["explain", "resnet18"]) == 128 + signal.SIGPIPE
    assert redirected == [sys.stdout.fileno()]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("seed", ["-1", str(2**32), "1.5"])
@pytest.mark.parametrize("command", [["tune"], ["verify", "resnet18"], ["show"]])
def test_a_seed_that_is_none_is_refused_by_its_option(command, seed, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--seed", seed])
    assert end.value.code == 2
    assert re.search(
        rf"argument --seed: '{seed}' must be (a whole number, 0 or more|below 4294967296)", capsys.readouterr().err
    )


@pytest.mark.parametrize(("spoiled", "status"), [("train", 2), ("later", 1)])
def test_data_that_fail_before_the_first_step_are_a_wrong_call_and_later_a_failed_run(
    spoiled, status, monkeypatch, tmp_path, capsys
):
    good, wrong = ALL[:4], (ALL[4:8][0][:, :1], ALL[4:8][1])
    parts = ([wrong, good], [good]) if spoiled == "train" else ([good, wrong], [good])
    monkeypatch.setitem(sys.modules, "data_of_mine", SimpleNamespace(load=lambda: parts))
    words = ["--model", "tests.nets:tiny_conv", "--data", "data_of_mine:load", "--num-classes", "4", "--epochs", "1"]
    assert cli.main(["tune", *words, "--out", str(tmp_path)]) == status
    assert "cannot take inputs float32 (4, 1, 8, 8)" in capsys.readouterr().err


def test_python_m_fxstn_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fxstn", "--version"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("fxstn", run_name="__main__")
    assert end.value.code == 0
    assert re.fullmatch(r"fxstn \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_help_has_examples_that_parse_and_the_exit_statuses(capsys):
    for name, command in cli.COMMANDS.items():
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        printed = capsys.readouterr().out
        assert "exit status: 0 done; 1 the run failed" in printed
        for words in command.examples:
            assert f"  fxstn {name} {words}\n" in printed
            assert cli.parser().parse_args([name, *words.split()]).command == name


def test_the_bar_of_a_run_moves_within_an_epoch_and_goes_back():
    with progress.EpochBar(total=2, file=io.StringIO(), bar_format=progress.FORMAT, mininterval=0) as bar:
        bar.move_to(0.4)
        bar.move_to(0.25)
        assert "| 0.25/2 epochs [" in str(bar)
        row = {"epoch": 1, "train_loss": 1.0, "valid_loss": 2.0, "train.dropout": 0.1, "train.weight_decay": 0.2}
        bar.end_epoch(History(("train.dropout", "train.weight_decay"), [row]), ())
        assert "1.00/2" in str(bar)
        assert "train=1, valid=2, train.dropout=0.1, train.weight_decay=0.2" in str(bar)


def test_a_refit_is_named_before_its_bar(monkeypatch):
    monkeypatch.setattr(progress.distributed, "rank", lambda: 0)
    with progress.progress_bar(2, 0, True, "refit") as named, progress.progress_bar(2, 0, True) as plain:
        assert str(named).startswith("refit: ")
        assert str(plain).startswith("  0%")


def test_a_command_says_what_it_loads_on_a_terminal_alone(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        cli.main(["tune", "--help"])
    assert capsys.readouterr().err == ""
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert cli.main(["tune", "--data", "nowhere"]) == 2
    said = terminal.getvalue()
    assert said.index("loading PyTorch") < said.index("loading the data") < said.index("fxstn tune: --data 'nowhere'")
