"""What a device has to do for a piece of a program: kernels, bytes, floating-point operations, and what a GPU makes of them."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from benchmarks.fake_cuda import backward

CHUNK = 64  # tensors that one kernel of a multi-tensor operation takes
PROMOTES = {"cat", "stack", "copy_", "_foreach_copy_", "_to_copy"}  # beside what is tagged as pointwise
# CUDA's kernels keep statistics in float32, and those of batch norm take float32 parameters with half values.
STATISTICS = {"mean", "rstd", "save_mean", "save_invstd", "save_var", "logsumexp"}
OF_BATCH_NORM = {"weight", "bias", "running_mean", "running_var"}
# Names, or beginnings of names, of operators that only write.
WRITES = (
    "zeros",
    "ones",
    "full",
    "fill",
    "zero_",
    "rand",
    "new_",
    "arange",
    "eye",
    "bernoulli_",
    "normal_",
    "uniform_",
)
# Names of operators, or parts of them, that a compiler does not join with their neighbours. Random numbers it draws in the
# kernels that use them.
ALONE = ("convolution", "mm", "norm", "attention", "rnn", "pool", "embedding", "index", "gather", "scatter", "grid_sampler",
         "sort", "foreach", "fused", "cat", "softmax", "nll_loss", "cumsum", "upsample")  # fmt: skip


NETWORK = "network, loss"
# What operators are for, by the files that call them. All others are the passes of the network itself.
PURPOSES = {
    "optimizer": ("torch/optim/sgd.py", "torch/optim/adam.py"),
    "weight decay": ("ops/penalty.py", "ops/multi_tensor.py"),
    "Θᵀg": ("ops/pull_back.py",),
    "masks": ("ops/noise.py",),
    "λ, ε": ("hp/space.py", "hp/bijection.py", "bilevel/optim.py", "bilevel/evidence.py", "bilevel/faults.py"),
}
OF_UPDATE = ("_leave_out_bad", "hyper")  # functions of bilevel/steps.py whose own operators are about λ


@dataclass(frozen=True)
class Device:
    """A roofline: rates of a GPU, and times that pass whatever a kernel does.

    bandwidth: bytes per second.
    peaks: floating-point operations per second, by type; half of what the vendor states.
    host: seconds that the host takes for an operator.
    kernel: seconds of the shortest kernel that is launched by the host; in a graph.
    """

    bandwidth: float = 3e12
    peaks: tuple[tuple[torch.dtype, float], ...] = ((torch.float64, 30e12), (torch.float32, 200e12))
    other_peak: float = 400e12
    host: float = 5e-6
    kernel: tuple[float, float] = (2e-6, 1e-6)

    def peak(self, dtype: torch.dtype) -> float:
        return dict(self.peaks).get(dtype, self.other_peak)


H100 = Device()  # TF32 products in float32, 800 TFLOP/s in bfloat16


@dataclass(frozen=True)
class Operator:
    """An operator that ran.

    kind: of the step that it belongs to.
    purpose: a key of PURPOSES, or NETWORK.
    launches: kernels, 0 for none.
    reads, writes: {storage: bytes}.
    flops: of matrix products; other operators have none.
    """

    name: str
    kind: str
    purpose: str
    launches: int
    reads: dict[int, int]
    writes: dict[int, int]
    flops: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())

    def seconds(self, device: Device) -> float:
        """Of its work, without the time that every kernel takes."""
        return max(self.bytes / device.bandwidth, self.flops / device.peak(self.dtype))

    @property
    def alone(self) -> bool:
        return any(word in self.name for word in ALONE)


@dataclass
class Launches(TorchDispatchMode):
    """Inside, `operators` are those that ran on the device, and `syncs`, `copies`, `unlike` count what should not be there.

    kind: of the step under way.
    on: whether what runs is noted.

    syncs: operators that make the host wait for a value or a size.
    copies: between host and device.
    unlike: operators that get tensors of several floating-point types, and do not convert them. A pointwise operator converts
        them where it does on the CPU: the two devices share these checks.
    seen: every operator.
    steps: of each kind that were begun.
    """

    kind: str = ""
    on: bool = True
    operators: list[Operator] = field(default_factory=list)
    syncs: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    unlike: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    _storages: list[object] = field(default_factory=list)  # or their numbers would be used again

    _converts: ClassVar[dict[tuple, bool]] = {}

    def __post_init__(self) -> None:
        super().__init__()

    @contextmanager
    def step(self, kind: str) -> Iterator[None]:
        """Inside, operators belong to a step of this kind."""
        before, self.kind = self.kind, kind
        self.steps[kind] += self.on
        try:
            yield
        finally:
            self.kind = before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # most of what is asked for; the other modes would take their time
        kwargs = kwargs or {}
        name = function._schema.name.partition("::")[2]
        if self.on:
            self.seen[name] += 1
            self._compare_types(function, name, args, kwargs)
        out = function(*args, **kwargs)
        if self.on and function.namespace != "prim":
            self._note(function, name, args, kwargs, out)
        return out

    def _note(self, function: OpOverload, name: str, args: tuple, kwargs: dict, out: object) -> None:
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        devices = {_device(x) for x in (*inputs, *outputs)}
        if devices <= {"cpu"}:
            return
        if name in ("_to_copy", "copy_") and "cpu" in devices:
            self.copies[f"{self.kind}: {' to '.join(map(_device, (inputs[-1], *outputs[:1])))}"] += 1
        if _waits(function, inputs):
            self.syncs[f"{self.kind}: {name}"] += 1
        if name == "_local_scalar_dense":
            return
        facts = {fact.name: fact.alias_info for fact in function._schema.arguments}
        named = dict(zip(facts, args, strict=False)) | kwargs
        if name.startswith("_fused_") and kwargs.get("grad_scale") is None:
            facts["grads"] = None  # written only where they are unscaled
        written = _tensors([arg for key, arg in named.items() if facts[key] is not None and facts[key].is_write])
        if _moves_nothing(function, name, inputs, [] if written else outputs):
            return
        outputs = written or outputs
        results = _tensors(kwargs.get("out"))  # written, not read
        reads = {} if name.startswith(WRITES) else _sizes([x for x in inputs if all(x is not y for y in results)])
        self._storages += [x.untyped_storage() for x in (*inputs, *outputs)]
        floating = [x.dtype for x in outputs if x.is_floating_point()]
        launches, flops = 1, _flops(function, name, args, kwargs, out)
        if name == "convolution_backward":
            launches = sum(args[-1][:2]) + bool(args[-1][2])
        elif "_foreach_" in name or name.startswith("_fused_"):
            launches = math.ceil(len(args[0]) / CHUNK)
        dtype = (floating or [torch.float32])[0]
        purpose = _purpose(sys._getframe())
        self.operators.append(Operator(name, self.kind, purpose, launches, reads, _sizes(outputs), flops, dtype))

    def _compare_types(self, function: OpOverload, name: str, args: tuple, kwargs: dict) -> None:
        ignored = STATISTICS | (OF_BATCH_NORM if "batch_norm" in name else set())
        names = [argument.name for argument in function._schema.arguments]
        checked = [value for key, value in zip(names, args, strict=False) if key not in ignored]
        tensors = [x for x in _tensors((checked, kwargs)) if x.is_floating_point()]
        if len({x.dtype for x in tensors}) > 1:
            kind = (function, *((x.dtype, x.dim() == 0) for x in tensors))
            if kind not in self._converts:
                self._converts[kind] = self._runs_on_cpu(function, name, args, kwargs)
            if not self._converts[kind]:
                self.unlike[f"{function}: {', '.join(str(x.dtype) for x in tensors)}"] += 1

    @staticmethod
    def _runs_on_cpu(function: OpOverload, name: str, args: tuple, kwargs: dict) -> bool:
        if torch.Tag.pointwise not in function.tags and name not in PROMOTES:
            return False
        with _disable_current_modes():
            args, kwargs = tree_map_only(Tensor, lambda x: torch.ones(x.shape, dtype=x.dtype), (args, kwargs))
            try:
                function(*args, **{key: value for key, value in kwargs.items() if key != "device"})
            except RuntimeError:
                return False
        return True


def _purpose(frame: FrameType | None) -> str:
    """The purpose of an operator that runs under a frame: of the outermost file that has one, within a backward pass."""
    result = NETWORK
    innermost = True
    while frame is not None:
        name, function = frame.f_code.co_filename, frame.f_code.co_name
        if name == backward.__code__.co_filename and function in (backward.__name__, "_results", "_run"):
            break
        if innermost and "/fxstn/" in name:
            innermost = False
            result = "λ, ε" if name.endswith("bilevel/steps.py") and function in OF_UPDATE else result
        result = next((own for own, files in PURPOSES.items() if name.endswith(files)), result)
        frame = frame.f_back
    return result


def _device(x: Tensor) -> str:
    return x.fake_device.type if isinstance(x, FakeTensor) else x.device.type


def _tensors(structure: object) -> list[Tensor]:
    return [x for x in tree_leaves(structure) if isinstance(x, Tensor)]


def _sizes(tensors: Sequence[Tensor]) -> dict[int, int]:
    """{storage: bytes of it that tensors cover}."""
    views = {(x.untyped_storage()._cdata, x.storage_offset(), x.shape, _strides(x)): x for x in tensors}
    sizes: Counter[int] = Counter()
    for x in views.values():
        storage = x.untyped_storage()
        sizes[storage._cdata] = min(storage.nbytes(), sizes[storage._cdata] + _entries(x) * x.itemsize)
    return dict(sizes)


def _strides(x: Tensor) -> tuple[int, ...]:
    return x.stride() if x.layout == torch.strided else ()


def _entries(x: Tensor) -> int:
    """The number of a tensor's entries in memory: what is expanded lies there once."""
    steps = _strides(x) or (1,) * x.dim()
    return math.prod(size for size, step in zip(x.shape, steps, strict=True) if step or not size)


def _waits(function: OpOverload, inputs: Sequence[Tensor]) -> bool:
    """Whether the host waits: the size of the result depends on values."""
    if "index" in function._schema.name:  # by masks alone
        return any(x.dtype in (torch.bool, torch.uint8) for x in inputs[1:]) and "put" not in function._schema.name
    return bool({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(function.tags))


def _moves_nothing(function: OpOverload, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """Whether an operator makes a view, or memory without values."""
    if function.is_view or torch.Tag.inplace_view in function.tags or "empty" in name:
        return True
    storages = {x.untyped_storage()._cdata for x in inputs}
    return bool(outputs) and all(x.untyped_storage()._cdata in storages for x in outputs)


def _flops(function: OpOverload, name: str, args: tuple, kwargs: dict, out: object) -> int:
    if name == "convolution_backward":  # of the gradients of input and weight; torch's own rule forgets groups
        gradient, x, weight, transposed = args[0], args[1], args[2], args[7]
        return sum(args[-1][:2]) * 2 * (x if transposed else gradient).numel() * weight[0].numel()
    rule = flop_registry.get(function.overloadpacket)
    return rule(*args, **kwargs, out_val=out) if rule else 0


# What a device makes of operators


def eager(operators: Sequence[Operator], device: Device = H100) -> float:
    """Seconds where the host launches each kernel: of the host, or of the device, whichever takes longer."""
    work = sum(max(o.seconds(device), device.kernel[0] * o.launches) for o in operators)
    return max(device.host * len(operators), work)


def graphed(operators: Sequence[Operator], device: Device = H100) -> float:
    """Seconds where a CUDA graph launches the same kernels."""
    return sum(max(o.seconds(device), device.kernel[1] * o.launches) for o in operators)


def fused(operators: Sequence[Operator], device: Device = H100) -> float:
    """Seconds in a graph where each run of operators that can be joined is one kernel: it reads and writes what others need.

    A product that is added to its result in place is a product and a sum: steps that are compiled have these.
    """
    operators = [part for number, o in enumerate(operators) for part in _product_and_sum(o, -1 - number)]
    last_reads = {storage: i for i, o in enumerate(operators) for storage in o.reads}
    total, number = 0.0, 0
    for alone, group in groupby(operators, lambda o: o.alone):
        run = list(group)
        if alone:
            total += graphed(run, device)
        else:
            total += max(device.kernel[1], _bytes_across(run, number + len(run), last_reads) / device.bandwidth)
        number += len(run)
    return total


def _product_and_sum(o: Operator, storage: int) -> list[Operator]:
    """storage: a number for what the product is written to."""
    if o.name not in ("addmm_", "baddbmm_"):
        return [o]
    size = sum(o.writes.values())
    product = replace(o, reads={key: n for key, n in o.reads.items() if key not in o.writes}, writes={storage: size})
    return [product, replace(o, name="add_", flops=0, reads={storage: size} | o.writes)]


def _bytes_across(run: Sequence[Operator], end: int, last_reads: dict[int, int]) -> int:
    """Bytes that a joined run reads from before it, and writes for those that read after it, or for nobody that is known."""
    own: dict[int, int] = {}  # bytes of what the run has written
    first = 0
    for o in run:
        read = {storage: size for storage, size in o.reads.items() if storage not in own}
        first += sum(read.values())
        own |= dict.fromkeys(read, 0)
        own |= {storage: max(size, own.get(storage, 0)) for storage, size in o.writes.items()}
    return first + sum(size for storage, size in own.items() if last_reads.get(storage, end) >= end)


ESTIMATES: dict[str, Callable[[Sequence[Operator]], float]] = {"eager": eager, "graphed": graphed, "fused": fused}


def summary(operators: Sequence[Operator], steps: int = 1) -> dict[str, Any]:
    """Launches, bytes, FLOPs and seconds, per step of so many."""
    sums = {
        "launches": sum(o.launches for o in operators),
        "GB": sum(o.bytes for o in operators) / 1e9,
        "GFLOP": sum(o.flops for o in operators) / 1e9,
        **{f"{name}_ms": 1e3 * seconds(operators) for name, seconds in ESTIMATES.items()},
    }
    return {name: value / steps for name, value in sums.items()}
