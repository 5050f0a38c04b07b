"""Random programs: networks written line by line, each line checked by running it, and what fxstn must keep of them.

`draw(seed)` writes a program. `check` compares its tangents, gradients and values with the original's, and `smaller` takes out
lines while it still fails. A program is Python source: it can be read, and pasted into a test.
"""

from __future__ import annotations

import copy
import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fxstn
from fxstn import hp
from fxstn.frontends.inputs import Inputs
from fxstn.ops.response import Response, responses_in
from fxstn.tools.reference import ReferenceRun, strengths_of

BATCH = 3  # no other dimension has this size
FACTORS = (1.0, -0.5, 2.0)  # of the delta of each example
SHAPES = ((BATCH, 6), (BATCH, 5, 4), (BATCH, 4, 6, 6))


def statements() -> list[list[str]]:
    """Of the sections of statements.txt: those for any value, for tokens (batch, time, n), for images, and for any value of a
    forward that runs as it is."""
    text = Path(__file__).with_name("statements.txt").read_text(encoding="utf-8")
    sections = [section.split("\n", 1)[1].strip().splitlines() for section in text.split("# of ")[1:]]
    return [[line if "{r}" in line else "{r} = " + line for line in section] for section in sections]


OF_ANY, OF_TOKENS, OF_IMAGES, OF_RUNS = statements()
CATALOGUE = {2: OF_ANY, 3: OF_ANY + OF_TOKENS, 4: OF_ANY + OF_IMAGES}


@dataclass(frozen=True)
class Program:
    """A network: the shape of its input, layers and parameters, the statements of its forward, the values that it returns.

    statements: (name of the result, lines), or (name, name of an earlier value) where one was taken out.
    """

    seed: int
    shape: tuple[int, ...]
    parts: dict[str, str] = field(default_factory=dict)
    statements: tuple[tuple[str, str], ...] = ()
    returned: tuple[str, ...] = ("x",)

    @property
    def source(self) -> str:
        body = [line for _, lines in self.statements for line in lines.split(" | ")]
        parts = [f"s.{name} = {maker}" for name, maker in self.parts.items() if f"s.{name}" in self.text]
        result = " + ".join(f"s.out{i}({name}.flatten(1))" for i, name in enumerate(self.returned))
        heads = [f"s.out{i} = nn.LazyLinear(2)" for i in range(len(self.returned))]
        join = "\n        ".join
        return (
            f"class Program(nn.Module):  # seed {self.seed}, input {self.shape}\n"
            "    def __init__(s):\n        super().__init__()\n"
            f"        {join([*parts, *heads])}\n\n    def forward(s, x):\n        {join([*body, f'return {result}'])}\n"
        )

    @property
    def text(self) -> str:
        return " ".join(lines for _, lines in self.statements) + " "

    def example(self) -> Tensor:
        return torch.randn(self.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed))

    def module(self) -> nn.Module:
        """The network in float64, its values finite; its last layers have their sizes from one run."""
        namespace: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
        torch.manual_seed(self.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(self.source, f"<program {self.seed}>", "exec"), namespace)
            model = namespace["Program"]().double()
            model(self.example())
        return model.double()


def trace_of(seed: int) -> str:
    """How a program is followed."""
    return ("export", "live")[seed % 2] if seed % 7 == 6 else "auto"


def extended(program: Program, rng: random.Random, values: dict[str, Tensor]) -> Program:
    """The program with one more statement, of what `values` (those at the sample input) allow."""
    names = list(values)
    source = names[-1] if rng.random() < 0.6 else rng.choice(names)
    value = values[source]
    alike = [name for name in names if values[name].shape == value.shape]
    sizes = {"v": source, "w": rng.choice(alike), "r": f"v{len(program.statements)}", "n": value.shape[-1], "c": value.shape[1],
             "m": rng.choice([2, 4, 5])}  # fmt: skip
    catalogue = OF_RUNS if trace_of(program.seed) == "live" and rng.random() < 0.4 else CATALOGUE[value.dim()]
    lines, parts = rng.choice(catalogue).format(**sizes), dict(program.parts)

    def part(match: re.Match[str]) -> str:
        maker = match.group(1)
        known = [name for name, other in parts.items() if other == maker]
        name = rng.choice(known) if known and rng.random() < 0.3 else f"p{len(parts)}"  # shared now and then
        parts[name] = maker
        return f"s.{name}"

    lines = re.sub(r"<(.+?)>(?=[\s(),.:]|$)", part, lines)
    return replace(program, parts=parts, statements=(*program.statements, (str(sizes["r"]), lines)))


def evaluated(program: Program) -> dict[str, Tensor]:
    """The values of a program that further statements may read. Raises whatever a program raises that cannot be trained."""
    model = replace(
        program, returned=tuple(dict.fromkeys(("x", *(name for name, _ in program.statements[-1:]))))
    ).module()
    loss = model.train()(program.example()).square().sum()
    loss.backward()
    values: dict[str, Any] = {"s": model, "x": program.example(), "torch": torch, "nn": nn, "F": F}
    for _, lines in program.statements:
        exec(lines.replace(" | ", "\n"), values)
    result = {name: values[name] for name in ("x", *(name for name, _ in program.statements))}
    for value in result.values():
        fits = (
            isinstance(value, Tensor) and value.is_floating_point() and value.dim() in CATALOGUE and len(value) == BATCH
        )
        if (
            not fits
            or value.numel() > 3000
            or min(value.shape) == 0
            or not value.isfinite().all()
            or value.abs().max() > 100
        ):
            raise ValueError("out of range")
        if BATCH in value.shape[1:] or value.dtype != torch.float64 or value.shape[-1] < 2:
            raise ValueError("of another kind")
    return result


def draw(seed: int, length: int = 7) -> Program:
    """A program of up to `length` statements that torch can train."""
    rng = random.Random(seed)
    program = Program(seed, rng.choice(SHAPES))
    values = {"x": program.example()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4 * length):
            candidate = extended(program, rng, values)
            try:
                values = evaluated(candidate)
            except Exception:  # a statement that does not fit here
                continue
            program = candidate
            if len(program.statements) == length:
                break
    leaves = [name for i, (name, _) in enumerate(program.statements)
              if not any(re.search(rf"\b{name}\b", lines) for _, lines in program.statements[i + 1 :])]  # fmt: skip
    return replace(program, returned=tuple(leaves) or ("x",))


# What must hold


def moved(stn: fxstn.SelfTuningNetwork) -> Tensor:
    """A response that is not zero, and a delta (h,)."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in stn.modules():
            if isinstance(module, Response):
                module.U.copy_(0.3 * torch.randn(module.U.shape, generator=generator))
    return torch.randn(len(stn.hparams), generator=generator, dtype=torch.float64)


def near(found: object, expected: object, tolerance: float, law: str) -> None:
    """Raises AssertionError, which names the law, where two structures of tensors differ."""
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        error, size = (a - b).double().norm().item(), b.double().norm().item()
        if not error <= tolerance * (1 + size):
            raise AssertionError(f"{law}: differs by {error:.2e} of {size:.2e}")


class Original:
    """The model as torch runs it, at any weights, with the random draws of a network made from it."""

    def __init__(self, program: Program, **settings: Any) -> None:
        self.model, self.x = program.module(), program.example()
        specs = [hp.WeightDecay(shared=True)]
        self.stn = fxstn.transform(self.model, specs, example_inputs=self.x, **settings)
        self.name = f"{self.stn.method}, {self.stn.frontend}"

    def __call__(self, training: bool, weights: Mapping[str, Tensor] = MappingProxyType({}), x: Tensor | None = None,
                 constants: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor], nn.Module]:  # fmt: skip
        """(output, what autograd takes for constant, the copy of the model that ran).

        constants: values of those, from another run.
        """
        model = copy.deepcopy(self.model).train(training)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights.get(name, parameter))
        values = self.stn.hparams().detach()
        run = ReferenceRun(model, strengths_of(self.stn, training), values, constants)
        torch.manual_seed(0)
        output = run.output(Inputs((self.x if x is None else x,), {}))
        assert isinstance(output, Tensor)
        return output, run.collected, model

    def independent(self, training: bool) -> bool:
        """Whether no example's output depends on another example."""
        other = self.x.clone()
        other[0] += 0.1 * torch.cos(other[0])
        return torch.equal(self(training)[0][1:], self(training, x=other)[0][1:])

    def difference(self, training: bool, delta: Tensor, step: float) -> Tensor:
        """The central difference along the response to delta."""
        constants = self(training)[1]
        ends = [self(training, self.stn.best_response(size * delta), None, constants)[0] for size in (step, -step)]
        return (ends[0] - ends[1]) / (2 * step)


def rows_of(delta: Tensor) -> Tensor:
    """A delta of each example, all of them multiples of one."""
    return delta * torch.tensor(FACTORS, dtype=torch.float64)[:, None]


def check_coverage(original: Original) -> None:
    """Every weight that the forward reads, by autograd of the original, responds, or says why it does not."""
    stn = original.stn
    others = {weight.name: weight.reason for weight in (*stn.coverage.lost, *stn.coverage.omitted)}
    output, _, model = original(False)
    if output.requires_grad:
        output.sum().backward()
    for name, weight in model.named_parameters():
        responds = name in responses_in(stn.response)
        if weight.dim() > 1 and weight.numel() and weight.grad is not None and not responds and not others.get(name):
            raise AssertionError(f"'{name}' neither responds nor names an obstacle: {stn.coverage}")


def check_tangents(response: str, program: Program, trace: str) -> None:
    """Law 1 in both modes, with one delta for all examples and one for each."""
    original = Original(program, response=response, trace=trace)
    stn, x = original.stn, original.x
    check_coverage(original)
    delta = moved(stn)
    for training in (False, True):
        where = f"{response}, {original.name}, {'train' if training else 'eval'}"
        stn.train(training)

        def push(delta: Tensor) -> tuple[Tensor, Tensor]:
            torch.manual_seed(0)
            return stn.pushforward(x, delta=delta)

        with torch.no_grad():
            y, dy = push(delta)
            near(y, original(training)[0], 1e-10, f"value ({where})")
            errors = [(dy - original.difference(training, delta, step)).norm() for step in (1e-6, 1e-7, 1e-5)]
            if not min(errors) <= 1e-6 * (1e-2 + dy.norm()):
                raise AssertionError(f"tangent ({where}): differs by {min(errors):.2e} of {dy.norm():.2e}")
            if stn.per_example(x):
                near(push(delta.expand(BATCH, -1))[1], dy, 1e-9, f"equal deltas ({where})")
                if original.independent(training):  # the tangent is linear in delta
                    expected = dy * torch.tensor(FACTORS, dtype=torch.float64)[:, None]
                    near(push(rows_of(delta))[1], expected, 1e-9, f"a delta of each example ({where})")


def check_training(program: Program, trace: str) -> None:
    """General steps have the original's gradients, and eval mode its values bit for bit."""
    original = Original(program, trace=trace)
    stn, x = original.stn, original.x
    expected, _, model = original(True)
    torch.manual_seed(0)
    found = stn.train()(x)
    near(found, expected, 1e-10, "value in training")
    cotangent = torch.randn_like(expected)
    gradients = []
    for output, parameters in ((found, stn.model.parameters()), (expected, model.parameters())):
        weights = list(parameters)
        gradients.append(torch.autograd.grad(output, weights, cotangent, allow_unused=True, materialize_grads=True))
    near(gradients[0], gradients[1], 1e-9, "gradients of a general step")
    near(list(stn.model.buffers()), list(model.buffers()), 1e-10, "statistics")
    for made in (stn, stn.export()):
        if not torch.equal(made.eval()(x), model.eval()(x)):
            raise AssertionError("eval mode: not bit for bit")


def check_method(method: str, program: Program, trace: str) -> None:
    """The other methods run the network at the weights of best_response, of all examples and of each."""
    original = Original(program, method=method, trace=trace)
    stn, x = original.stn, original.x
    delta = moved(stn)
    for training in (False, True):
        where = f"{original.name}, {'train' if training else 'eval'}"

        def output(delta: Tensor, training: bool = training) -> Tensor:
            torch.manual_seed(0)
            return stn.perturbed_output(x, delta=delta, training=training)[0]

        with torch.no_grad():
            near(output(delta), original(training, stn.best_response(delta))[0], 1e-9, f"value ({where})")
            if stn.per_example(x) and original.independent(training):
                each = [original(training, stn.best_response(row))[0][i] for i, row in enumerate(rows_of(delta))]
                near(output(rows_of(delta)), torch.stack(each), 1e-9, f"a delta of each example ({where})")


LAWS: dict[str, Callable[[Program, str], None]] = {
    "scaled": partial(check_tangents, "scaled"),
    "structured": partial(check_tangents, "structured"),
    "training": check_training,
    "centered": partial(check_method, "centered"),
    "stn": partial(check_method, "stn"),
}


def failure(program: Program, laws: Sequence[str] | None = None) -> tuple[str, str] | None:
    """(name of the law, what is wrong) of the first law that a program breaks; None where it keeps all.

    laws: names of those to check; None for one, each in its turn.
    """
    trace = trace_of(program.seed)
    for law in laws or [list(LAWS)[program.seed % len(LAWS)]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                LAWS[law](program, "auto" if law in ("centered", "stn") else trace)
            except Exception as error:
                return law, f"{type(error).__name__}: {error}"
    return None


def smaller(program: Program, law: str) -> Program:
    """The program without the statements that it takes not to break a law."""
    kind = (failure(program, [law]) or ("", ""))[1][:12]
    changed = True
    while changed:
        changed = False
        for candidate in _reductions(program):
            try:
                evaluated(candidate)
            except Exception:
                continue
            found = failure(candidate, [law])
            if found is not None and found[1][:12] == kind:
                program, changed = candidate, True
                break
    return program


def _reductions(program: Program) -> Iterator[Program]:
    """Programs with one value less: not returned, or replaced by an earlier one wherever it is read."""
    if len(program.returned) > 1:
        for name in program.returned:
            yield replace(program, returned=tuple(other for other in program.returned if other != name))
    for i, (name, _) in enumerate(program.statements):
        for earlier in ["x", *(other for other, _ in program.statements[:i])]:
            swap = lambda text, earlier=earlier, name=name: re.sub(rf"\b{name}\b", earlier, text)  # noqa: E731
            rest = tuple((other, swap(lines)) for other, lines in program.statements[i + 1 :])
            returned = tuple(dict.fromkeys(swap(other) for other in program.returned))
            yield replace(program, statements=(*program.statements[:i], *rest), returned=returned)
