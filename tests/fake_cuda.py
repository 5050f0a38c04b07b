"""Networks on a CUDA device that is not there: which operators run, on tensors of which types; nothing is computed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

PROMOTES = {"cat", "stack", "copy_", "_to_copy", "bernoulli_"}  # beside what is tagged as pointwise
# CUDA's kernels keep statistics in float32, and those of batch norm take float32 parameters with half values.
STATISTICS = {"mean", "rstd", "save_mean", "save_invstd", "save_var"}
OF_BATCH_NORM = {"weight", "bias", "running_mean", "running_var"}


class UnlikeKernels(TorchDispatchMode):
    """Inside, `problems` counts the operators that get tensors of several floating-point types and do not convert them.

    A pointwise operator converts them where it does on the CPU: the two devices share these checks.
    """

    _converts: ClassVar[dict[tuple, bool]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.problems: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.partition("::")[2]
        self.seen[name] += 1
        ignored = STATISTICS | (OF_BATCH_NORM if "batch_norm" in name else set())
        names = [argument.name for argument in function._schema.arguments]
        checked = [value for key, value in zip(names, args, strict=False) if key not in ignored]
        tensors = [x for x in tree_leaves((checked, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()]
        if len({x.dtype for x in tensors}) > 1:
            kind = (function, *((x.dtype, x.dim() == 0) for x in tensors))
            if kind not in self._converts:
                self._converts[kind] = self._runs_on_cpu(function, name, args, kwargs)
            if not self._converts[kind]:
                self.problems[f"{function}: {', '.join(str(x.dtype) for x in tensors)}"] += 1
        return function(*args, **kwargs)

    @staticmethod
    def _runs_on_cpu(function, name, args, kwargs) -> bool:
        if torch.Tag.pointwise not in function.tags and name not in PROMOTES:
            return False
        with _disable_current_modes():
            args, kwargs = tree_map_only(Tensor, lambda x: torch.ones(x.shape, dtype=x.dtype), (args, kwargs))
            try:
                function(*args, **{key: value for key, value in kwargs.items() if key != "device"})
            except RuntimeError:
                return False
        return True


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Inside, tensors are fake ones, and autocast takes the device "cuda" for a present one."""
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


def on_fake_cuda(x: Tensor) -> Tensor:
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda")


def move(*modules: nn.Module) -> None:
    """Exchange every parameter and buffer for a fake one on "cuda", wherever it is referred to."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if not isinstance(tensor, FakeTensor):
                other = on_fake_cuda(tensor)
                _swap(tensor, nn.Parameter(other, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else other)


def _swap(a: Tensor, b: Tensor) -> None:
    a.__class__, b.__class__ = b.__class__, a.__class__
    a.__dict__, b.__dict__ = b.__dict__, a.__dict__
    torch._C._swap_tensor_impl(a, b)


def backward(loss: Tensor) -> int:
    """What loss.backward() runs, in Python: torch's own engine asks CUDA's driver for its streams. Nothing is accumulated.

    Returns the number of leaves that the gradient reaches.
    """
    gradients: dict[object, dict[int, Tensor]] = defaultdict(dict)
    gradients[loss.grad_fn][loss.output_nr] = torch.ones_like(loss)
    leaves = 0
    for node in reversed(_children_first(loss.grad_fn)):
        own = gradients.pop(node, {})
        if hasattr(node, "variable"):
            leaves += 1
        if not own or hasattr(node, "variable"):
            continue
        given = [
            own[i].sum_to_size(facts.shape).to(facts.dtype) if i in own else None
            for i, facts in enumerate(node._input_metadata)
        ]
        if hasattr(node, "apply"):  # a function written in Python, which gets zeros
            pairs = zip(given, node._input_metadata, strict=True)
            given = [torch.zeros(f.shape, dtype=f.dtype, device=f.device) if g is None else g for g, f in pairs]
        results = getattr(node, "apply", node)(*given)
        results = results if isinstance(results, tuple) else (results,)
        for (target, i), gradient in zip(
            node.next_functions, results, strict=False
        ):  # what is no tensor has no function
            if target is not None and gradient is not None:
                before = gradients[target].get(i)
                gradients[target][i] = gradient if before is None else before + gradient
    return leaves


def _children_first(root) -> list:
    order, seen, stack = [], {root}, [(root, iter(root.next_functions))]
    while stack:
        children = stack[-1][1]
        child = next((child for child, _ in children if child is not None and child not in seen), None)
        if child is None:
            order.append(stack.pop()[0])
        else:
            seen.add(child)
            stack.append((child, iter(child.next_functions)))
    return order
