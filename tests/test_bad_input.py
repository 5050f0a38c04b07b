"""What cannot be meant, kind by kind: each is refused by fxstn itself, in a line or two that name the thing and the remedy."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import itertools
import math
import pickle
import re
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fxstn
from fxstn import hp
from fxstn.bilevel.checkpoint import FORMAT
from fxstn.bilevel.run_settings import SettingsDict
from fxstn.bilevel.settings import GROUPS
from fxstn.loops.tune import TuneSettings
from fxstn.tools import cli, data, text
from tests.nets import SmallConv, mlp
from tests.runs import grouped

PACKAGE = str(Path(fxstn.__file__).parent)
X, Y = torch.randn(24, 6), torch.arange(24) % 3
ROWS: list = []


def row(name, message):
    """Enters a function of a temporary folder that does the bad thing. message: what the error must match."""

    def enter(case):
        ROWS.append(pytest.param(case, message, id=re.sub(r" at 0x\w*", "", name)))
        return case

    return enter


def batches(x=X, y=Y, size=8, **settings):
    return DataLoader(TensorDataset(x, y), size, **settings)


def runner(train=None, valid=None, loss_fn=F.cross_entropy, model=None, **settings):
    stn = settings.pop("stn", None) or fxstn.transform(model or mlp())
    return fxstn.BilevelRunner(
        stn, loss_fn, batches() if train is None else train, batches() if valid is None else valid,
        **grouped(settings, progress=False, hyper={"train_steps": 2}),
    )  # fmt: skip


def fit(*args, **settings):
    return lambda folder: runner(*args, **settings).fit(2)


def made(**settings):
    return lambda folder: runner(**settings)


def nested(path, value):
    """{"hyper": {"train_steps": value}} of "hyper.train_steps"."""
    group, _, name = path.rpartition(".")
    return {group: {name: value}} if group else {name: value}


def command(*words):
    """What a command line prints as its error, which must come with exit status 2 and without a traceback."""

    def run(folder):
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            try:
                status = cli.main([str(folder / word[1:]) if word.startswith("@") else word for word in words])
            except SystemExit as end:
                status = end.code
        assert status == 2
        usage, _, said = printed.getvalue().rpartition(f"fxstn {words[0]}: ")
        assert "Traceback" not in usage
        return said

    return run


def tune(*words):
    return command("tune", "--epochs", "1", "--model", "tests.nets:tiny_conv", "--out", "@out", *words)


# Arguments of the runner

row(
    "first argument a plain model", r"first argument must come from fxstn\.transform\(model, hparams\), got Sequential"
)(lambda folder: fxstn.BilevelRunner(mlp(), F.cross_entropy, batches(), batches()))
row("loss None", r"loss_fn must be a function of \(output, target\), got NoneType")(made(loss_fn=None))
row(
    "loader and loss swapped",
    r"^loss_fn is a DataLoader and valid_loader is a CrossEntropyLoss: .*is BilevelRunner\(stn, l",
)(lambda folder: fxstn.BilevelRunner(fxstn.transform(mlp()), batches(), batches(), nn.CrossEntropyLoss()))
row("specs as valid_loader", r"^valid_loader is a list of specs: was an argument left out, or were two swapped")(
    made(valid=[hp.Dropout()])
)
row("loss a class", r"loss_fn is the class CrossEntropyLoss.*make one: CrossEntropyLoss\(\)")(
    made(loss_fn=nn.CrossEntropyLoss)
)
row("loss of one argument", r"loss_fn must be a function of \(output, target\).*its arguments are \(output\)")(
    made(loss_fn=lambda output: output.sum())
)
row("validation loss of three arguments", r"valid_loss_fn must be a function of \(output, target\).*'third'")(
    made(valid_loss_fn=lambda output, target, third: output.sum())
)
for _name, _value, _message in (
    ("hyper.train_steps", 0, "hyper.train_steps=0 must be at least 1"),
    ("hyper.train_steps", 2.5, r"hyper.train_steps=2\.5 must be a whole number"),
    ("hyper.train_steps", float("inf"), "hyper.train_steps=inf must be a whole number"),
    ("hyper.train_steps", "5", "hyper.train_steps='5' must be a number"),
    ("response.fraction", 0, r"response.fraction=0 must be in \(0, 1\]"),
    ("response.fraction", float("nan"), r"response.fraction=nan must be in \(0, 1\]"),
    ("hyper.entropy_weight", float("inf"), "hyper.entropy_weight=inf must not be negative or infinite"),
    ("checkpoints.save_minutes", None, "checkpoints.save_minutes=None must be a number"),
    ("ema", 1.0, r"ema=1\.0 must be in \(0, 1\)"),
    ("response.perturb", "sample", "response.perturb='sample' must be 'auto', 'example' or 'batch'"),
    (
        "response.perturb",
        "off",
        "response.perturb=.off. must be .auto., .example. or .batch.: the response is learned from perturbations",
    ),
    ("response.perturb", None, "response.perturb=None must be 'auto', 'example' or 'batch'; 'auto' has replaced None"),
    (
        "response.perturb",
        "none",
        "response.perturb='none' must be .*: the response is learned .* only; 'off' has replaced 'none', which hyper_loss",
    ),
    (
        "hyper.optimizer",
        partial(fxstn.optim.SettlingAdam, lr=-1),
        "hyper.optimizer cannot be made: SettlingAdam: lr=-1 must be",
    ),
    (
        "execution.autocast",
        torch.float64,
        r"execution.autocast=torch\.float64 must be torch\.bfloat16, torch\.float16 or None",
    ),
    (
        "execution.memory_format",
        "channels_last",
        r"execution.memory_format='channels_last' must be such as torch\.channels_last",
    ),
    ("execution.compile", "yes", "execution.compile='yes' must be True, False or a dict"),
    ("unpack", "image", "unpack='image' must be a function"),
    ("metrics", [fxstn.accuracy], r"metrics=\[.*\] must be a dict by name"),
    ("metrics", fxstn.accuracy, r"must be a dict by name, or None; give \{'accuracy': fxstn\.accuracy\}$"),
    ("callbacks", fxstn.EarlyStopping(3), r"be a list of functions of the run; give \[EarlyStopping\(patience=3\)\]$"),
    ("metrics", {"accuracy": "top1"}, r"metrics\['accuracy'\] must be a function, got str"),
    ("callbacks", print, "callbacks=.* must be a list of functions of the run"),
    ("checkpoints.out_dir", 5, "checkpoints.out_dir=5 must be a path, or None"),
    ("schedule", {"2.dropout": [0.1]}, r"schedule=.* must be a fxstn\.Schedule, such as Schedule\.from_json"),
    ("execution.device", "gpu", "execution.device='gpu' cannot be used here.*there is cpu"),
    ("execution.device", "cuda:99", "execution.device='cuda:99' cannot be used here.*there is cpu"),
    ("optimizer", "sgd", "optimizer='sgd' must be an optimizer or a factory; pass a factory, such as lambda"),
    (
        "optimizer",
        lambda p: None,
        "optimizer must be an optimizer, or a list of them, its factory returns NoneType; pass a factory",
    ),
    (
        "optimizer",
        partial(torch.optim.SGD, lr=-1.0),
        r"optimizer cannot be made: Invalid learning rate: -1\.0; pass a factory",
    ),
    ("optimizer", torch.optim.LBFGS, "optimizer: LBFGS evaluates a closure.*use SGD, Adam"),
    (
        "hyper.optimizer",
        lambda p: torch.optim.Adam(mlp().parameters()),
        "hyper.optimizer holds 6 .*not its own.*pass a factory",
    ),
    (
        "schedulers",
        {"adam": partial(StepLR, step_size=1)},
        "schedulers names 'adam'; this run has optimizer, response.optimizer",
    ),
    (
        "schedulers",
        {"optimizer": StepLR(torch.optim.SGD(mlp().parameters()), 1)},
        r"\['optimizer'\] must be a factory, such as",
    ),
    (
        "schedulers",
        {"optimizer": lambda o: StepLR(torch.optim.SGD(mlp().parameters()), 1)},
        r"schedulers\['optimizer'\] returns a scheduler of another optimizer \(SGD\): make it of the one that the factory is",
    ),
    (
        "step_schedulers",
        {"optimizer": lambda o: None},
        r"step_schedulers\['optimizer'\] must return a scheduler.*NoneType",
    ),
    (
        "step_schedulers",
        {"optimizer": ReduceLROnPlateau},
        r"step_schedulers\['optimizer'\] is a ReduceLROnPlateau, which needs the validation loss.*give it in schedulers",
    ),
):
    row(f"{_name} {_value!r}", _message)(made(**nested(_name, _value)))

for _name, _message in {
    "lr": r"'lr'; learning rates belong to the optimizers: optimizer=lambda p: torch\.optim\.SGD\(p, lr=0\.1\)",
    "learning_rate": "'learning_rate'; learning rates belong to the optimizers",
    "epochs": r"'epochs'; the number of epochs belongs to fit\(epochs\)",
    "batch_size": "'batch_size'; the batch size belongs to the DataLoader",
    "train_step": r"'train_step'; did you mean hyper=fxstn\.HyperSettings\(train_steps=\.\.\.\)\?",
    "response_every": r"'response_every'; did you mean response=fxstn\.ResponseSettings\(every=\.\.\.\)\?",
    "scale_optimizer": r"'scale_optimizer'; did you mean hyper=fxstn\.HyperSettings\(scale_optimizer=\.\.\.\)\?",
    "out_dir": r"'out_dir'; did you mean checkpoints=fxstn\.CheckpointSettings\(out_dir=\.\.\.\)\?",
    "device": r"'device'; did you mean execution=fxstn\.ExecutionSettings\(device=\.\.\.\)\?",
    "patience": r"'patience'; it is a callback: callbacks=\[fxstn\.EarlyStopping\(patience=\.\.\.\)\]",
    "hyper_lr": r"'hyper_lr'; λ's optimizer has it: hyper=fxstn\.HyperSettings\(optimizer=",
    "response_lr": r"'response_lr'; Θ's optimizer has it: response=fxstn\.ResponseSettings\(optimizer=",
    "seed": r"'seed'; call torch\.manual_seed\(seed\) before fxstn\.transform",
    "warmup": r"'warmup'; did you mean hyper=fxstn\.HyperSettings\(warmup_epochs=\.\.\.\)\?",
    "metric": r"'metric'; did you mean 'metrics'\?",
    "zzz": r"'zzz'; help\(fxstn\.BilevelRunner\) lists them",
}.items():
    row(f"argument {_name}", f"BilevelRunner has no argument {_message}")(made(**{_name: 1}))


row("unknown in a group", r"ResponseSettings has no argument 'evry'; did you mean 'every'\?")(
    made(response={"evry": 1})
)
row(
    "setting in another group",
    r"ResponseSettings has no argument 'keep'; did you mean checkpoints=fxstn\.CheckpointSettings\(",
)(made(response={"keep": 1}))
row("group a number", r"response=4 must be a fxstn\.ResponseSettings$")(made(response=4))
row("group of another kind", r"response=HyperSettings\(\) must be a fxstn\.ResponseSettings$")(
    made(response=fxstn.HyperSettings())
)
row("patience 0", "patience=0 must be at least 1")(lambda folder: fxstn.EarlyStopping(0))
row("patience a text", "patience='3' must be a number")(lambda folder: fxstn.EarlyStopping("3"))
row(
    "no loss function",
    r"takes \(stn, loss_fn, .*, or \(problem, train_loader, .*missing a required argument: 'valid_loader'",
)(lambda folder: fxstn.BilevelRunner(fxstn.transform(mlp()), batches(), batches()))
row("unknown of a group in all", r"hyper\.train_steps=0 must be at least 1; hyper\.fraction=2 must be in \(0, 1\]")(
    made(hyper={"train_steps": 0, "fraction": 2})
)


@row(
    "optimizer of the original",
    "optimizer is not over the 6 parameters of the network: .* copies the model, so pass a fac",
)
def _(folder):
    model = mlp()
    runner(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


for _objective in (fxstn.general_loss, fxstn.response_loss, fxstn.hyper_loss):
    row(f"{_objective.__name__} of a plain model", r"stn must come from fxstn\.transform, got Sequential; give")(
        lambda folder, objective=_objective: objective(mlp(), F.cross_entropy, X, Y)
    )


@row("out_dir a file", "checkpoints.out_dir='.*taken' is a file; name a folder")
def _(folder):
    (folder / "taken").write_text("here")
    runner(checkpoints={"out_dir": folder / "taken"})


for _arguments, _message in (
    ((-1,), "epochs=-1 must be a whole number, 0 or more"),
    (("3",), "fit takes a number of epochs.*got '3'"),
    ((2.5,), r"epochs=2\.5 must be a whole number"),
    ((3, 0), "minutes=0 must be positive, or None"),
):
    row(f"fit{_arguments}", _message)(lambda folder, given=_arguments: runner().fit(*given))

row("best model before fit", "no epoch is done yet; call fit first")(lambda folder: runner().best_model())
row("best row before fit", "history is empty.*call fit first")(lambda folder: runner().history.best())

# Loaders and what they yield

row("loader a data set", r"valid_loader must be a DataLoader.*got TensorDataset; DataLoader\(dataset")(
    made(valid=TensorDataset(X, Y))
)
row("loader a dict", r"train_loader must be a DataLoader.*got dict; DataLoader\(dataset")(
    made(train={"train": batches()})
)
ONCE = r"train_loader is an iterator \({}\), which yields its batches once; give the DataLoader that it was made from"
row("loader a generator", ONCE.format("generator"))(made(train=(batch for batch in batches())))
row("loader a cycle", ONCE.format("cycle"))(made(train=itertools.cycle(batches())))
row("loader a chain", ONCE.format("chain"))(made(train=itertools.chain(batches(), batches())))
row("loader a pass", ONCE.format("_SingleProcessDataLoaderIter"))(made(train=iter(batches())))
row("loader a cycle in a loop", ONCE.format("cycle"))(
    lambda folder: fxstn.tune(
        model := mlp(), torch.optim.SGD(model.parameters(), 0.1), F.cross_entropy, itertools.cycle(batches()), batches()
    )
)
row("loader empty", r"valid_loader is empty.*fewer examples than batch_size with drop_last\?")(
    made(valid=batches(size=99, drop_last=True))
)
row("evaluating a data set", r"loader must be a DataLoader.*got TensorDataset; DataLoader\(dataset")(
    lambda folder: runner().evaluate(TensorDataset(X, Y))
)


class Nothing(IterableDataset):
    def __iter__(self):
        return iter(())


row("stream of nothing", "train_loader is empty: it yielded no batch")(fit(DataLoader(Nothing(), 4)))
row("batch a tensor", r"train_loader must yield \(inputs, target\), got Tensor.*give unpack=")(fit([X]))
row("batch a dict", r"train_loader must yield \(inputs, target\), got dict.*give unpack=")(fit([{"x": X, "y": Y}]))
row("unpack makes a triple", r"unpack of a batch of train_loader must yield \(inputs, target\), got tuple of length 3")(
    fit(unpack=lambda batch: (*batch, 0))
)
row("batch of no examples", "a batch of train_loader in epoch 1, step 1: the batch has no examples; leave it out")(
    fit([(X[:0], Y[:0])])
)
row("inputs without a tensor", "a batch of train_loader in epoch 1, step 1: .*must be Tensor, not str; give inputs of")(
    fit([("words", Y)])
)
row(
    "inputs float64",
    r"train_loader in epoch 1, step 1: .* inputs float64 \(8, 6\): .*convert the inputs with \.to\(torch\.float32\)",
)(fit(batches(X.double())))
row(
    "images uint8",
    r"train_loader in epoch 1, step 1: .* inputs uint8 \(8, 3, 16, 16\) 0 to 9: .*convert the inputs with \.to\(",
)(fit(batches((torch.arange(24 * 768) % 10).byte().view(24, 3, 16, 16)), model=SmallConv()))
row(
    "a half frozen layer before a whole one",
    r"train_loader .*parameters are torch\.bfloat16 and torch\.float32: if it trains under torch\.autocast, call transform,",
)(fit(model=nn.Sequential(nn.Linear(6, 4).bfloat16().requires_grad_(False), nn.Tanh(), nn.Linear(4, 3))))
row(
    "feature count",
    r"train_loader in epoch 1, step 1: .* inputs float32 \(8, 5\): .*8x5 and 6x8.*; give inputs of the .*shapes",
)(fit(batches(X[:, :5])))
row(
    "feature count in validation",
    r"valid_loader in epoch 1, step 2: .* inputs float32 \(8, 5\): .*; give inputs of the .*shapes",
)(fit(valid=batches(X[:, :5])))
row(
    "feature count when evaluating",
    r"a batch of loader in evaluation: .* inputs float32 \(8, 5\): .*; give inputs of the",
)(lambda folder: runner().evaluate(batches(X[:, :5])))
row(
    "two inputs for one",
    r"train_loader in epoch 1, step 1: the forward of Sequential takes \(input\): too many .*give the inputs that it names",
)(fit([((X, X), Y)]))
row(
    "one example under a batch norm",
    r"train_loader .*step 1: .*more than 1 value per channel.*give the DataLoader drop_last=True",
)(fit(batches(size=1), model=nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))))
row(
    "word out of range", r"train_loader .* inputs int64 \(8, 2\) 0 to 9: index out of range.*give inputs of the .*range"
)(fit(batches(torch.tensor([[0, 9]] * 24)), model=nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3))))
row("fewer targets", "train_loader in epoch 1, step 1: the target has 5 examples, the inputs have 8; give as many")(
    fit([(X[:8], Y[:5])])
)
row(
    "label too high",
    r"step 1: loss_fn .* int64 \(8,\) 7 to 7: Target 7 .*labels of 3 classes must be 0 to 2: mend .* 8 outputs",
)(fit(batches(y=0 * Y + 7)))
row(
    "label negative",
    r"step 1: loss_fn .* int64 \(8,\) -1 to 1: Target -1 .*labels of 3 classes must be 0 to 2: mend them",
)(fit(batches(y=Y - 1)))
row(
    "label too high in validation",
    r"valid_loader .*: loss_fn .* 3 to 5: Target .*labels of 3 classes must be 0 to 2: mend them",
)(fit(valid=batches(y=Y + 3)))
row(
    "labels float", r"step 1: loss_fn .* target float32 \(8,\): .*class labels must be whole numbers: target\.long\(\)"
)(fit(batches(y=Y.float())))
for _loss in (nn.MSELoss(), nn.BCEWithLogitsLoss()):
    row(
        f"numbers of another shape in {_loss}",
        r"step 1: loss_fn .* target float32 \(8,\): .*; give targets of the shape of the output, or a model with as many out",
    )(fit(batches(y=Y.float()), loss_fn=_loss))
row(
    "loss that swaps its arguments",
    r"a batch of train_loader in epoch 1, step 1: loss_fn .* for 'Long'; loss_fn is called as loss_fn\(output, target\): give",
)(fit(loss_fn=lambda target, output: F.cross_entropy(output, target)))
row(
    "labels int32",
    r"step 1: loss_fn .* target int32 \(8,\) 0 to 2: .*; class labels must be .* int64: target\.long\(\)",
)(fit(batches(y=Y.int())))
row(
    "labels one-hot",
    r"step 1: loss_fn .* target int64 \(8, 3\) 0 to 1: .*; targets of the output's shape, .*target\.float\(\)",
)(fit(batches(y=F.one_hot(Y))))
row(
    "label too high under mixup",
    r"train_loader .*mixup and cutmix turn classes into probabilities: they must be 0 to 2.*got 7",
)(fit(batches(y=0 * Y + 7), stn=fxstn.transform(mlp(), [hp.MixUp("input")])))
row(
    "target of another shape",
    r"loss_fn .* output float32 \(8, 3\) with a target float32 \(8, 2\): .*; give targets of the shape",
)(fit(batches(y=X[:, :2].abs()), loss_fn=F.binary_cross_entropy_with_logits))
for _rollbacks in (0, 1):
    row(
        f"NaN in inputs, rollbacks={_rollbacks}",
        r"a batch of train_loader in epoch 1, step 1 has inputs that are NaN.*row 3.*drop",
    )(fit(batches(X.clone().index_fill_(0, torch.tensor([3]), float("nan"))), checkpoints={"rollbacks": _rollbacks}))
row(
    "NaN in validation inputs",
    r"a batch of valid_loader in epoch 1, step \d+ has inputs that are NaN .*row \d of .*drop these",
)(fit(valid=batches(X.clone().index_fill_(0, torch.tensor([5]), float("nan"))), checkpoints={"rollbacks": 0}))
row(
    "infinite targets",
    r"a batch of train_loader in epoch 1, step 2 has target that are NaN or infinite \(row 1 .*drop these",
)(
    fit(
        batches(y=X[:, :3].clone().index_fill_(0, torch.tensor([9]), float("inf"))),
        loss_fn=F.mse_loss,
        checkpoints={"rollbacks": 1},
    )
)

# Losses and metrics

row("loss per example", r"step 1: loss_fn must return a scalar tensor, the mean over the batch; got shape \(8,\)")(
    fit(loss_fn=partial(F.cross_entropy, reduction="none"))
)
row("loss a float", "step 1: loss_fn must return a scalar tensor, the mean over the batch; got float")(
    fit(loss_fn=lambda output, target: F.cross_entropy(output, target).item())
)
row("loss without gradient", r"step 1: loss_fn returns a tensor without a gradient; compute it .* without \.item\(\)")(
    fit(loss_fn=lambda output, target: F.cross_entropy(output.detach(), target),
        stn=fxstn.transform(mlp(), [hp.WeightDecay()]))
)  # fmt: skip


class Cut(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(x).detach()


row(
    "output without gradient",
    r"step 1: general_loss has no gradient; .*must depend on its trainable.*without \.detach\(\)",
)(fit(model=Cut()))
row(
    "metric a vector",
    r"metrics\['correct'\] must return one number, such as a mean; it returns a tensor of shape \(8,\)",
)(fit(metrics={"correct": lambda output, target: output.argmax(1) == target}))
row("column nothing", r"columns\['gap'\] must return one number, such as a mean; it returns NoneType")(
    fit(columns={"gap": lambda row: None})
)

# Hyperparameters

for _name, _case, _message in (
    ("start out of range", lambda: hp.Dropout("2", init=0.99), r"2\.dropout: init=0\.99 is not .*move it inside"),
    ("start NaN", lambda: hp.Dropout("2", init=float("nan")), r"2\.dropout: init=nan is not .*move it inside"),
    ("start text", lambda: hp.Dropout("2", init="0.1"), r"hp\.Dropout: init='0\.1' must be a number"),
    (
        "low above high",
        lambda: hp.Dropout("2", low=0.5, high=0.2),
        r"hp\.Dropout: need 0 <= low < high < 1, got low=0\.5",
    ),
    ("empty range", lambda: hp.Scalar("a", 1.0, 1.0, 1.0), r"a: low=1\.0 is not below high=1\.0; give a range"),
    ("no whole start", lambda: hp.Scalar("a", 2.5, 0, 5, integer=True), r"a: init=2\.5 must be a whole number"),
    (
        "range beyond float32",
        lambda: hp.Scalar("a", 1, 0, 2**24, integer=True),
        r"a: low=0 .* within 2\*\*23 \(8388608\)",
    ),
    (
        "low that is infinite",
        lambda: hp.Scalar("a", 1.0, -math.inf, 5.0),
        r"a: low=-inf must be finite; only high may be",
    ),
    (
        "ends that are one in float32",
        lambda: hp.Scalar("a", 1e8 + 0.5, 1e8, 1e8 + 1),
        r"a: low=.* cannot be told apart",
    ),
    ("low that is 0 in float32", lambda: hp.Scalar("a", 1.0, 1e-300, 2.0, log=True), r"a: low=1e-300 .* told from 0"),
    (
        "scale beyond float32",
        lambda: hp.Dropout("2", scale=1e39),
        r"2\.dropout: scale=1e\+39 must be positive and finite",
    ),
    ("empty name", lambda: hp.Scalar("", 0.5, 0, 1), r"hp\.Scalar: the name '' must be text"),
    ("scale zero", lambda: hp.Dropout("2", scale=0), r"2\.dropout: scale=0 must be positive and finite"),
    ("name no text", lambda: hp.Scalar(3, 0.5, 0, 1), r"hp\.Scalar: the name 3 must be text"),
    (
        "unknown number",
        lambda: hp.ColorJitter(init={"hu": 0.1}),
        r"init is given for 'hu'; its numbers are 'brightness'",
    ),
    (
        "unknown pattern",
        lambda: hp.Dropout("sevn"),
        r"^hp\.Dropout: the pattern 'sevn' matches nothing.*nearest module names: .*\. A pattern is a whole name, or",
    ),
    ("pattern like the root", lambda: hp.Dropout("zz"), r"'input', '' \(the whole model\), '0'\. A pattern is"),
    ("start as p", lambda: hp.Dropout(p=0.5), r"^hp\.Dropout has no argument 'p'; the start is init=0\.5$"),
    ("start by its name", lambda: hp.WeightDecay(weight_decay=0.1), "WeightDecay has no .*; the start is init=0.1"),
    (
        "start of a penalty",
        lambda: hp.ActivationDecay("2", lam=1),
        "hp.ActivationDecay has no argument 'lam'; the start is",
    ),
    (
        "start of a norm",
        lambda: hp.JacobianNorm(weight=1),
        "hp.JacobianNorm has no argument 'weight'; the start is init=1",
    ),
    ("one of several starts", lambda: hp.ColorJitter(hue=0.1), r"'hue'; the start is init=\{'hue': 0\.1\}"),
    ("start of smoothing", lambda: hp.LabelSmoothing(smoothing=0.1), "'smoothing'; the start is init=0.1"),
    (
        "unknown argument of a scalar",
        lambda: hp.Scalar("a", 0.5, 0, 1, to=2),
        "no argument 'to'; it has name, init, low, ",
    ),
    (
        "unknown argument of a penalty",
        lambda: hp.TemporalDecay("2", dim=1),
        "no argument 'dim'; it has axis, init, low, high",
    ),
    ("unknown argument", lambda: hp.WeightDecay(power=1), "no argument 'power'; it has init, low, high, scale, shared"),
    (
        "fill a number",
        lambda: hp.Affine(fill=0.5),
        r"hp\.Affine: fill=0\.5 must be a tuple of one or more numbers, or None",
    ),
    ("center a number", lambda: hp.Rotation(center=3), r"hp\.Rotation: center=3 must be a tuple of 2 numbers, or None"),
    ("mode unknown", lambda: hp.Affine(mode="bicubic"), r"mode='bicubic' must be one of 'bilinear', 'nearest'"),
    ("shear of two", lambda: hp.Affine(shear=(-1, 1)), r"shear=\(-1, 1\) must be a tuple of 4 numbers in \[-1, 1\]"),
    (
        "value a number",
        lambda: hp.Erasing(value=0.5),
        r"hp\.Erasing: value=0\.5 must be a tuple of one or more numbers",
    ),
    ("area above 1", lambda: hp.Erasing(area=(2, 3)), r"area=\(2, 3\) must be a range \(a, b\) with 0 < a ≤ b ≤ 1$"),
    ("ratio negative", lambda: hp.Erasing(ratio=(-1, 3)), r"ratio=\(-1, 3\) must be a range \(a, b\) with 0 < a ≤ b$"),
    ("kernel even", lambda: hp.GaussianBlur(kernel_size=(4, 4)), r"\(4, 4\) must be a tuple \(width, height\) of odd"),
    (
        "kernel a number",
        lambda: hp.GaussianBlur(kernel_size=3),
        r"kernel_size=3 must be a tuple \(width, height\) of odd",
    ),
    (
        "shares backwards",
        lambda: hp.GaussianBlur(shares=(1, 0)),
        r"shares=\(1, 0\) must be a range \(a, b\) with 0 ≤ a",
    ),
    ("clip a number", lambda: hp.GaussianNoise(clip=1), r"hp\.GaussianNoise: clip=1 must be True or False"),
    (
        "no block",
        lambda: hp.DropBlock("2", block_size=0),
        r"hp\.DropBlock: block_size=0 must be a whole number, 1 or more",
    ),
    ("blocks never", lambda: hp.DropBlock("2", gamma_scale=-1), r"gamma_scale=-1 must be a finite number above 0"),
    ("axis from the end", lambda: hp.LockedDropout("2", axis=-1), r"hp\.LockedDropout: axis=-1 must be a whole number"),
    ("axis no number", lambda: hp.TemporalDecay("2", axis=1.0), r"hp\.TemporalDecay: axis=1\.0 must be a whole number"),
    ("spec a class", lambda: hp.Dropout, r"hparams holds <class .*Dropout'>, which is no spec.*write hp\.Dropout\(\)"),
    ("spec a name", lambda: "dropout", r"hparams holds 'dropout', which is no spec.*write hp\.Dropout\(\)"),
):
    row(_name, _message)(lambda folder, case=_case: fxstn.transform(mlp(), [case()]))
row("two specs on one site", "Dropout is asked for twice at '2'; match each site once")(
    lambda folder: fxstn.transform(mlp(), [hp.Dropout("2"), hp.Dropout("*2*")])
)
row("name taken", "two hyperparameters are called 'a'; match each site once")(
    lambda folder: fxstn.transform(mlp(), [hp.Scalar("a", 0.5, 0, 1), hp.Scalar("a", 0.5, 0, 1)])
)
row(
    "no specs",
    r"^hparams=\[\] asks for nothing; pass None for the defaults, or a list such as \[hp\.WeightDecay\(\)\]$",
)(lambda folder: fxstn.transform(mlp(), []))
row("spec not in a list", r"hparams=hp\.Dropout\(.*\) must be a list of specs, such as \[hp\.Dropout\(\)\]")(
    lambda folder: fxstn.transform(mlp(), hp.Dropout())
)
_NO_SPECS = r"hparams is a Tensor of shape \(24, 6\), not a list of specs; inputs go to example_inputs="
row("explain with inputs as specs", _NO_SPECS)(lambda folder: fxstn.explain(mlp(), X))
row("transform with inputs as specs", _NO_SPECS)(lambda folder: fxstn.transform(mlp(), X))
row(
    "explain what is no model",
    r"^model must be an nn\.Module that is not transformed yet, got .*int.*; give the plain model",
)(lambda folder: fxstn.explain(3))
row("explain with a spec that is none", r"hparams holds 'dropout', which is no spec")(
    lambda folder: fxstn.explain(mlp(), ["dropout"])
)
row("set an unknown name", r"there is no hyperparameter 'x'; there are 2\.dropout, 5\.dropout")(
    lambda folder: fxstn.transform(mlp()).hparams.set({"x": 0.1})
)
row("set out of range", r"2\.dropout=3 is outside its range \[0\.0, 0\.95\]; give one inside")(
    lambda folder: fxstn.transform(mlp()).hparams.set({"2.dropout": 3})
)
row("set text", r"2\.dropout='high' must be a number within its range")(
    lambda folder: fxstn.transform(mlp()).hparams.set({"2.dropout": "high"})
)

# Models


@row(
    "perturbations of examples on a live network",
    r"response\.perturb='example' needs a graph, .*trace='live'.*give perturb='auto'",
)
def example_on_live(folder):
    stn = fxstn.transform(
        nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 3)), example_inputs=X, trace="live"
    )
    fxstn.BilevelRunner(stn, F.cross_entropy, batches(), batches(), response=fxstn.ResponseSettings(perturb="example"))


row("model a class", r"model must be an nn\.Module.*got <class .*Cut'>; give the plain model")(
    lambda folder: fxstn.transform(Cut)
)
row("model transformed already", r"model must be an nn\.Module that is not transformed yet.*; give the plain model")(
    lambda folder: fxstn.transform(fxstn.transform(mlp()))
)
row("model without parameters", r"no parameter can respond.*fxstn\.explain\(model\) lists why")(
    lambda folder: fxstn.transform(nn.Sequential(nn.ReLU()), [hp.Scalar("a", 0.5, 0, 1)])
)
row("model a branch on data", r"cannot follow.*give example_inputs")(
    lambda folder: fxstn.transform(Branching(), [hp.Scalar("a", 0.5, 0, 1)])
)
row(
    "examples of another type",
    r"example_inputs must be a tensor, or a tuple or dict.*got DataLoader; take the inputs of a batch",
)(lambda folder: fxstn.transform(mlp(), example_inputs=batches()))
row("examples of another shape", r"example_inputs: .* inputs float32 \(4, 5\): .*; give inputs of the .*shapes")(
    lambda folder: fxstn.transform(mlp(), example_inputs=torch.randn(4, 5))
)
row(
    "examples of another shape, run as it is",
    r"example_inputs: .* inputs float32 \(4, 5\): .*4x5 and 6x8.*; give inputs of the .*shapes",
)(lambda folder: fxstn.transform(mlp(), example_inputs=torch.randn(4, 5), trace="live"))
row(
    "verify on another shape", r"inputs: the model cannot take inputs float64 \(4, 5\): .*; give inputs of the .*shapes"
)(lambda folder: fxstn.verify(mlp(), torch.randn(4, 5)))
row("response to another number", r"delta must have shape \(2,\) .*one entry per hyperparameter; got \(3,\)")(
    lambda folder: fxstn.transform(mlp()).best_response(torch.zeros(3))
)
row("rule for no function", r"register_rule takes the operation .* a function, got 'relu'")(
    lambda folder: fxstn.register_rule("relu", kind="linear")
)
row("rule of unknown kind", r"give partials, or a kind out of linear, bilinear, zero; got 0 partials, kind='smooth'")(
    lambda folder: fxstn.register_rule(torch.special.i0, kind="smooth")
)
row("rule that is there", r"torch\.tanh already has a rule \(pointwise\); there is nothing to register")(
    lambda folder: fxstn.register_rule(torch.tanh, kind="linear")
)
row("operation no class", r"register_operation takes a subclass of hp\.Operation, .*; got <class .*Dropout'>")(
    lambda folder: fxstn.register_operation(hp.Dropout, nn.Dropout)
)


class Branching(Cut):
    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x


# Files


def saved(folder):
    first = runner(checkpoints={"out_dir": folder})
    first.fit(1)
    return folder / "last.pt"


@row("checkpoint empty", r"run\.pt is empty; load an older file")
def _(folder):
    (folder / "run.pt").touch()
    runner().load(folder / "run.pt")


for _name, _case in {
    "runner.load": lambda: runner().load(3),
    "runner.save": lambda: runner().save(3),
    "Schedule.from_json": lambda: fxstn.Schedule.from_json(3),
    "Schedule.to_json": lambda: fxstn.Schedule({"a": [0.5]}).to_json(3),
    "write_report": lambda: fxstn.write_report(runner(), 3),
    "TensorBoard": lambda: fxstn.TensorBoard(3),
    "History.to_csv": lambda: fxstn.History(()).to_csv(3),
    "History.to_jsonl": lambda: fxstn.History(()).to_jsonl(3),
}.items():
    row(f"{_name} of no path", rf"{_name}: 3 must be a path; give text or a pathlib\.Path")(
        lambda folder, case=_case: case()
    )
row("checkpoint for a folder", r"runner\.save: .* is a folder; name a file in it, .*last\.pt say")(
    lambda folder: runner().save(folder)
)
row("checkpoint missing", r"^runner\.load: there is no file '.*run\.pt'; a run writes last\.pt into its out_dir$")(
    lambda folder: runner().load(folder / "run.pt")
)


@row("checkpoint truncated", r"last\.pt is not a checkpoint of fxstn, or its end is missing; load an older file")
def _(folder):
    path = saved(folder)
    path.write_bytes(path.read_bytes()[:-9])
    runner().load(path)


@row("checkpoint changed", r"last\.pt is damaged: .*checksum.*; load an older file")
def _(folder):
    path = saved(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    runner().load(path)


@row("checkpoint of the model alone", r"best\.pt is not a checkpoint of fxstn.*; load an older file")
def _(folder):
    saved(folder)
    runner().load(folder / "best.pt")


@row(
    "checkpoint of another format",
    r"last\.pt was written in format 9999 by another version.*; remove it, or choose another out_dir",
)
def _(folder):
    path = saved(folder)
    content = path.read_bytes()
    sealed = content[: content.rindex(f"{FORMAT:04d}".encode())] + b"9999"
    path.write_bytes(sealed + hashlib.sha256(sealed).digest() + content[-9:])
    runner().load(path)


@row(
    "checkpoint of other hyperparameters",
    r"last\.pt has hyperparameters \['2\.dropout'.*this run \['weight_dec.*choose another",
)
def _(folder):
    saved(folder)
    runner(stn=fxstn.transform(mlp(), [hp.WeightDecay(shared=True)]), checkpoints={"out_dir": folder}).fit(1)


@row("schedule no JSON", r"s\.json is not a readable schedule: .*; History\.schedule\(\)\.to_json writes one")
def _(folder):
    (folder / "s.json").write_text("0.1, 0.2")
    fxstn.Schedule.from_json(folder / "s.json")


@row("schedule of text", r"s\.json holds no whole schedule: .*'high' among the values of '2\.dropout'; mend it")
def _(folder):
    (folder / "s.json").write_text('{"format": "fxstn-schedule-1", "values": {"2.dropout": ["high"]}}')
    fxstn.Schedule.from_json(folder / "s.json")


row("schedule of unequal lengths", r"needs as many values of each hyperparameter.*got \[1, 2\]")(
    lambda folder: fxstn.Schedule({"2.dropout": [0.1], "5.dropout": [0.1, 0.2]})
)
row(
    "schedule of others", r"schedule is of x, 5\.dropout, the network has 2\.dropout, 5\.dropout; give one of the same"
)(made(schedule=fxstn.Schedule({"x": [0.1], "5.dropout": [0.1]})))
row("schedule of fewer", r"schedule is of 5\.dropout, the network has 2\.dropout, 5\.dropout; give one of the same")(
    made(schedule=fxstn.Schedule({"5.dropout": [0.1]}))
)
row("text missing", r"no\.txt is not a readable text in UTF-8: .*No such file.*; give the path of a text file")(
    lambda folder: text.load(folder / "no.txt")
)


@row("text empty", r"empty\.txt has 0 words, too few for a training")
def _(folder):
    (folder / "empty.txt").touch()
    text.load(folder / "empty.txt")


@row("text no text", r"image\.txt is not a readable text in UTF-8: .*; give the path of a text file")
def _(folder):
    (folder / "image.txt").write_bytes(b"\xff\xd8\xff")
    text.load(folder / "image.txt")


row("data set unknown", "data set 'imagenet' is not one of digits, mnist")(lambda folder: data.load("imagenet"))
row("no training images", "train=0 must be at least 1")(lambda folder: data.load("digits", train=0))

for value in (torch.ones(3), 5, "x", None):
    row(f"shared={value!r}", r"hp.Dropout: shared=.* must be True, one λ for all, or False")(
        lambda folder, value=value: hp.Dropout(shared=value)
    )

# A loop of one's own


def in_a_loop(**changes):
    """fxstn.tune with other arguments."""

    def case(folder):
        model = mlp()
        loader = DataLoader(TensorDataset(X, Y), 8)
        arguments = {"optimizer": torch.optim.SGD(model.parameters(), 0.1), "loss_fn": F.cross_entropy}
        arguments |= {"train_loader": loader, "valid_loader": loader} | changes
        return fxstn.tune(model, **arguments)

    return case


for name, changes, message in (
    ("loss", {"loss_fn": 5}, "loss_fn=5 must be a function, or None"),
    ("validation loss", {"valid_loss_fn": 5}, "valid_loss_fn=5 must be a function, or None"),
    (
        "class of a loss",
        {"loss_fn": nn.CrossEntropyLoss},
        r"loss_fn is the class CrossEnt.*make one: CrossEntropyLoss\(\)",
    ),
    (
        "class of a validation loss",
        {"valid_loss_fn": nn.NLLLoss},
        r"valid_loss_fn is the class NLLLoss, not a function; m",
    ),
    (
        "optimizer as loss",
        {"loss_fn": torch.optim.SGD(mlp().parameters(), 0.1)},
        r"^loss_fn is a SGD: .* were two swapped\? The order is fxstn\.tune\(model, optimizer, loss_fn, train_loader, valid",
    ),
    ("model as optimizer", {"optimizer": mlp()}, "optimizer must be an optimizer of the model, or .*got a Sequential$"),
    (
        "optimizer and loss swapped",
        {"optimizer": nn.CrossEntropyLoss(), "loss_fn": torch.optim.AdamW(mlp().parameters())},
        "^optimizer is a CrossEntropyLoss and loss_fn is an AdamW: was an argument left out, or were two swapped",
    ),
    (
        "no valid_loader",
        {"valid_loader": [hp.Dropout()]},
        r"^valid_loader is a list of specs: was an argument left out",
    ),
    ("one spec for valid_loader", {"valid_loader": hp.Dropout()}, r"^valid_loader is a Dropout: was an argument left"),
    ("specs as train_loader", {"train_loader": [hp.Dropout()]}, r"^train_loader is a list of specs: was an argument"),
    ("loss as loader", {"train_loader": nn.MSELoss()}, r"^train_loader is a MSELoss: was an argument left out"),
    ("loader as specs", {"hparams": batches()}, r"^hparams is a DataLoader: was an argument left out, or"),
    (
        "images of a table",
        {"hparams": [hp.Flip()]},
        r"^hp\.Flip acts on images .*, and got \(8, 6\); add the dimensions",
    ),
    ("text as specs", {"hparams": "dropout"}, r"hparams must be a list of fxstn.hp specs, got 'dropout'; give \["),
    ("forward", {"forward": 5}, "forward=5 must be a function, or None"),
    ("one spec", {"hparams": hp.Dropout()}, r"hparams must be a list, got one Dropout; give \[hp.Dropout\(...\)\]"),
    ("no specs", {"hparams": 5}, r"hparams must be a list of fxstn.hp specs, got 5; give \[hp"),
    ("epoch of no step", {"epoch_steps": 0}, "epoch_steps=0 must be at least 1"),
    ("epoch of a part", {"epoch_steps": 2.5}, "epoch_steps=2.5 must be a whole number"),
    ("epoch of NaN", {"epoch_steps": math.nan}, "epoch_steps=nan must be at least 1"),
    ("epoch of a text", {"epoch_steps": "3"}, "epoch_steps='3' must be a number"),
    (
        "early stopping",
        {"callbacks": [fxstn.EarlyStopping(1)]},
        "ends a BilevelRunner, and no loop.*leave the loop where",
    ),
    ("one early stopping", {"callbacks": fxstn.EarlyStopping(1)}, "ends a BilevelRunner, and no loop.*leave the loop"),
    ("one callback", {"callbacks": print}, r"must be a list of functions of the run; give \[print\]$"),
    ("callbacks a number", {"callbacks": 3}, r"callbacks=3 must be a list of functions of the run$"),
):
    row(f"tune: {name}", message)(in_a_loop(**changes))


for _names, _message in {
    ("checkpoints", "out_dir", "save_minutes", "keep", "checkpoints_keep", "out_dirs"): (
        r"tune writes no files: put tuner\.state_dict\(\) in your checkpoint$"
    ),
    ("epochs", "max_epochs", "epoch"): "your loop has the epochs$",
    ("lr", "learning_rate"): "your optimizer has it$",
    ("hyper_lr",): r"λ's optimizer has it: hyper=fxstn\.HyperSettings\(optimizer=lambda p: fxstn\.optim\.SettlingAdam",
    ("valid",): "validation data are valid_loader$",
    ("device",): "the tuner works where the model is: move the model before tune$",
    ("metrics", "metric"): r"your loop measures what it likes, in callbacks=",
    ("patience",): r"leave your loop where len\(tuner\.history\)",
    ("clip_norm",): "your loop clips: torch.nn.utils.clip_grad_norm_",
    ("accumulate",): "your loop accumulates",
    ("ema",): "your loop averages",
    ("scheduler", "step_schedulers"): "your loop has its schedulers",
    ("schedule",): "a schedule is replayed by a BilevelRunner",
    ("progress",): "your loop has the progress bar$",
    ("seed",): r"call torch\.manual_seed\(seed\) before tune$",
    ("unpack",): "give forward=, a function",
    ("train_step",): r"did you mean hyper=fxstn\.HyperSettings\(train_steps=\.\.\.\)\?",
    ("autocast",): r"did you mean execution=fxstn\.ExecutionSettings\(autocast=\.\.\.\)\?",
    ("epoch_step",): r"did you mean 'epoch_steps'\?",
    ("zzz",): r"help\(fxstn\.tune\) lists them$",
}.items():
    for _name in _names:
        row(f"tune: argument {_name}", f"tune has no argument '{_name}'; {_message}")(in_a_loop(**{_name: 1}))


def test_what_an_argument_is_taken_for_is_taken():
    """No argument of fxstn.tune is refused with the advice to give another one that is refused as well."""
    names = {*SettingsDict.__annotations__, *(field.name for group in GROUPS for field in fields(group))}
    for name in sorted(names - set(TuneSettings.__annotations__) - {"optimizer", "valid_loss_fn"}):
        with pytest.raises(TypeError, match=f"tune has no argument '{name}'; ") as caught:
            in_a_loop(**{name: 1})(None)
        for group in re.findall(r"did you mean (\w+)=", str(caught.value)):
            assert group in TuneSettings.__annotations__


@row(
    "tune: float labels in validation",
    r"a batch of valid_loader in evaluation: loss_fn .* with a target float32 \(24,\): .*must be whole numbers: target\.long",
)
def _(folder):
    model, loader = mlp(), batches()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fxstn.tune(model, optimizer, F.cross_entropy, loader, batches(y=Y.float(), size=24))
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@row("tune: the same optimizer twice", "optimizer names one twice; give each .* once")
def _(folder):
    model, loader = mlp(), DataLoader(TensorDataset(X, Y), 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fxstn.tune(model, [optimizer, optimizer], F.cross_entropy, loader, loader)


for number in (0, -1, "x", 2.5):

    @row(f"strengths of {number!r} examples", f"examples={number!r} must be the number of examples in the batch")
    def _(folder, number=number):
        model, loader = mlp(), DataLoader(TensorDataset(X, Y), 8)
        tuner = fxstn.tune(model, torch.optim.SGD(model.parameters(), 0.1), F.cross_entropy, loader, loader)
        tuner.strengths(number)


# Files and data


def trained():
    loader = DataLoader(TensorDataset(X, Y), 8)
    runner = fxstn.BilevelRunner(fxstn.transform(mlp()), F.cross_entropy, loader, loader, progress=False)
    runner.fit(1)
    return runner


for kind, write in (
    ("report", lambda path: fxstn.write_report(trained(), path)),
    ("table", lambda path: trained().history.to_csv(path)),
    ("plot", lambda path: trained().history.plot(path)),
):
    row(f"{kind} to nowhere", "'' is no path; give one")(lambda folder, write=write: write(""))

    @row(f"{kind} to a folder", "is a folder; name a file in it")
    def _(folder, write=write):
        (folder / "sub").mkdir()
        write(folder / "sub")


row("title of a report", "title=5 must be text")(lambda folder: fxstn.write_report(trained(), folder / "r", title=5))
for _name, _copied in {"copy": copy.copy, "deep copy": copy.deepcopy, "pickle": pickle.dumps}.items():
    row(
        f"{_name} of a runner",
        r"a BilevelRunner cannot be copied or pickled; runner\.save\(path\) writes it, and runner.load",
    )(lambda folder, copied=_copied: copied(runner()))
    row(
        f"{_name} of a tuner",
        r"a LoopTuner cannot be .*; tuner\.state_dict\(\) is for .* tuner\.report\(path\) writes a",
    )(lambda folder, copied=_copied: copied(in_a_loop()(folder)))
row(
    "report of a network",
    r"write_report\(runner, path\): .* of a BilevelRunner, or of what fxstn.tune .*got a SelfTuni",
)(lambda folder: fxstn.write_report(fxstn.transform(mlp()), folder / "r"))
row("report with arguments swapped", r"write_report\(runner, path\): .*got '.*/r'$")(
    lambda folder: fxstn.write_report(str(folder / "r"), trained())
)
row("report to a network", r"write_report: a SelfTuningNetwork must be a path; give text or")(
    lambda folder: fxstn.write_report(trained(), fxstn.transform(mlp()))
)
IMAGES = torch.rand(2, 3, 8, 8)
for _name, _arguments, _message in (
    (
        "path and images swapped",
        ([hp.Flip()], "a.png", IMAGES),
        r"got str; the order is fxstn\.show\(specs, images, path\)$",
    ),
    ("images first", (IMAGES, [hp.Flip()], "a.png"), r"got Tensor; the order is fxstn\.show\(specs, images, path\)$"),
    (
        "no augmentation",
        ([hp.Dropout()], IMAGES, "a.png"),
        r"show: hp\.Dropout\(.*\) is no augmentation, such as hp\.Color",
    ),
    ("one spec", (hp.Flip(), IMAGES, "a.png"), r"specs must be a list, got one Flip; give \[hp\.Flip\("),
    ("one image", ([hp.Flip()], IMAGES[0], "a.png"), r"got \(3, 8, 8\); for one image give images\[None\]$"),
):
    row(f"show: {_name}", _message)(lambda folder, arguments=_arguments: fxstn.show(*arguments))
row(
    "verify without inputs", r"verify\(model, \*inputs\): give inputs as the model's forward takes them, a batch of two"
)(lambda folder: fxstn.verify(mlp()))
row("verify of no model", "model must be an nn.Module that is not transformed yet, got")(
    lambda folder: fxstn.verify(5, X)
)
for seed in (1.5, None, 2**70, -1):
    row(f"hold_out by seed {seed}", f"seed={seed} must be a whole number, 0 or more")(
        lambda folder, seed=seed: fxstn.hold_out(TensorDataset(X, Y), 0.5, seed=seed)
    )
for _kind in (tuple, list):
    row(
        f"hold_out of a {_kind.__name__} of tensors",
        r"of 2 tensors, each with 24 examples; give TensorDataset\(inputs, targ",
    )(lambda folder, kind=_kind: fxstn.hold_out(kind((X, Y)), 0.2))
row("hold_out with no transform", "transform=5 must be a function of an example, None or 'same'")(
    lambda folder: fxstn.hold_out(TensorDataset(X, Y), 0.5, transform=5)
)

# The command line


def without_examples():
    return TensorDataset(X[:0], Y[:0]), TensorDataset(X, Y)


row("CLI data without examples", "the training data are empty; give at least one example")(
    tune("--data", f"{__name__}:without_examples", "--num-classes", "3")
)


def not_a_model(num_classes):
    return num_classes


row("CLI model unknown", "model 'resnet99' is neither a torchvision classification model nor package.module:function")(
    command("explain", "resnet99")
)
row(
    "CLI module unknown",
    r"nowhere:net: there is no module 'nowhere' in .*, nor where Python finds modules",
)(command("explain", "nowhere:net"))
row("CLI function unknown", r"tests.nets:net: module 'tests.nets' has no attribute 'net'")(
    command("explain", "tests.nets:net")
)
row(
    "CLI function without num_classes",
    r"model 'tests.nets:mlp' takes no num_classes, and its classes must be those of the data; write def mlp\(num_classes\)",
)(command("tune", "--model", "tests.nets:mlp", "--out", "@out"))
row("CLI function that makes no model", r"model '.*:not_a_model' must return an nn\.Module, it returns int")(
    command("explain", f"{__name__}:not_a_model")
)
row("CLI data unknown", r"--data 'imagenet' is neither one of digits, .*, nor a folder that exists, nor package")(
    tune("--data", "imagenet")
)
row("CLI epochs negative", "argument --epochs: '-1' must be a whole number, 1 or more")(tune("--epochs", "-1"))
row("CLI batch size zero", "argument --batch-size: '0' must be a whole number, 1 or more")(tune("--batch-size", "0"))
row("CLI verify on one example", "argument --batch-size: '1' must be a whole number, 2 or more")(
    command("verify", "tests.nets:tiny_conv", "--batch-size", "1")
)
row("CLI rate negative", "argument --lr: '-0.1' must be a positive number")(tune("--lr", "-0.1"))
row("CLI rate no number", "argument --hyper-lr: 'fast' must be a positive number")(tune("--hyper-lr", "fast"))
row("CLI sizes too large", "digits has 1797 images, too few for train=5000 and valid=500")(tune("--train-size", "5000"))
row("CLI device unknown", "--device='gpu' cannot be used here.*there is cpu")(tune("--device", "gpu"))
row(
    "CLI image too small",
    r"step 1: the model cannot take inputs float32 \(64, 3, 2, 2\): .*; give inputs of the .*shapes",
)(tune("--image-size", "2"))
row("CLI bench of something else", "argument --tuned: 'depth' must be a whole number, 1 or more")(
    command("bench", "tests.nets:tiny_conv", "--tuned", "depth")
)
row(
    "CLI bench on images too small",
    r"plain training of tests.nets:tiny_conv fails on 2 images of 2 pixels: .*; choose others",
)(command("bench", "tests.nets:tiny_conv", "--batch-size", "2", "--image-size", "2", "--variants", "plain", "--memory"))
row(
    "CLI verify on images too small",
    r"inputs: the model cannot take inputs float64 \(4, 3, 2, 2\): .*; give inputs of the",
)(command("verify", "tests.nets:tiny_conv", "--image-size", "2"))
row("CLI augmentation unknown", "'Blur' is no augmentation; there are ColorJitter")(command("show", "Blur"))


@row("CLI out a file", r"--out '.*out' is a file; name a folder")
def _(folder):
    (folder / "out").touch()
    return tune()(folder)


def test_there_are_rows_enough():
    assert len(ROWS) >= 60
    assert len({parameters.id for parameters in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("case", "message"), ROWS)
@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")  # torch's, of nn.MSELoss, before its error
@pytest.mark.filterwarnings("ignore:.* became (nan|inf) in .*back to epoch:fxstn.RunWarning")
def test_bad_input_is_refused_in_a_line_that_names_it_and_the_remedy(case, message, tmp_path):
    try:
        said = case(tmp_path)  # what a command prints
        assert said is not None, "nothing was refused"
    except (ValueError, TypeError) as error:
        trace = error.__traceback__
        while trace.tb_next is not None:
            trace = trace.tb_next
        assert trace.tb_frame.f_code.co_filename.startswith(PACKAGE)
        said = str(error)
    lines = said.strip().splitlines()
    assert len(lines) <= 2
    assert len(said) <= 400

    assert re.search(message, " ".join(lines))
