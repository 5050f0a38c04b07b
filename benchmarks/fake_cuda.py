"""A CUDA device that is not there: tensors without values, for which torch chooses the operators that it has for CUDA.

Autograd's own engine asks the driver for streams; here its work is done in Python, gradients of leaves included.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

NEEDS = (2, 14)  # torch 2.9 has no fake kernels for some of the operators, and aborts without a driver
ATTENTION = F.scaled_dot_product_attention
Gradients = dict[Any, dict[int, Tensor]]  # {operation: {number of its result: gradient}}


class OldTorch(RuntimeError):
    """This torch cannot rehearse CUDA."""


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Inside, tensors are fake ones, and "cuda" is a present device with one GPU, as far as Python asks. Raises OldTorch."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < NEEDS:
        raise OldTorch(f"fake CUDA tensors need torch {'.'.join(map(str, NEEDS))}; this is {torch.__version__}")
    with ExitStack() as stack:
        for target, value in {
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch.cuda.is_bf16_supported": lambda *_, **__: True,
            "torch.cuda.current_device": lambda: 0,
            "torch.cuda.default_generators": (torch.Generator(),),
            "torch.Generator": _Generator,
            "torch.nn.Module.to": lambda module, *_, **__: module,  # torch cannot swap such parameters; `move` does
            "torch.Tensor.backward": backward,
            "torch.autograd.grad": gradients_of,
            "torch.nn.functional.scaled_dot_product_attention": _attend,  # where torch's own layers call it
        }.items():
            stack.enter_context(mock.patch(target, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Values())
        stack.enter_context(_FusedAttention())
        yield


class _NoCopies(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return args[0] if function is torch.ops.aten.clone.default else function(*args, **(kwargs or {}))


class _Generator(torch.Generator):
    """A generator of the CPU in place of every other."""

    def __new__(cls, device: object = None) -> _Generator:
        return super().__new__(cls)


class _Values(TorchDispatchMode):
    """Inside, every number that the host reads is 1, and fused optimizers, which have no fake kernels, do nothing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name == "aten::_local_scalar_dense":
            return 1.0 if args[0].is_floating_point() else 1
        if function._schema.name.startswith("aten::_fused_") and not function._schema.returns:
            return None
        return function(*args, **(kwargs or {}))


class _FusedAttention(TorchFunctionMode):
    """Inside, attention is the kernel that torch chooses on an H100; without a device it chooses single products.

    That is the one of flash attention for half precision without a mask, with heads that it takes, and else the
    memory-efficient one (`sdp_utils.cpp` of torch).
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return (_attend if function is ATTENTION else function)(*args, **(kwargs or {}))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (x.to(dtype) if x.is_floating_point() else x for x in (query, key, value))
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    plain = query.dim() == 4 and not enable_gqa and query.shape[-1] % 8 == 0
    if plain and attn_mask is None and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, return_debug_mask=False, scale=scale)[0]
    if plain and (attn_mask is None or attn_mask.dtype != torch.bool):
        bias = None if attn_mask is None else attn_mask.expand(*query.shape[:-1], key.shape[-2])
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, bias, trains, dropout_p, is_causal, scale=scale)[0]
    return ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def on_fake_cuda(x: Tensor) -> Tensor:
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda")


def move(*modules: nn.Module) -> None:
    """Exchange every parameter and buffer for a fake one on "cuda", wherever it is referred to."""
    for module in modules:
        move_tensors(*module.parameters(), *module.buffers())


def move_tensors(*tensors: Tensor) -> None:
    """Exchange tensors for fake ones on "cuda", wherever they are referred to."""
    for tensor in tensors:
        if not isinstance(tensor, FakeTensor):
            other = on_fake_cuda(tensor)
            _swap(tensor, nn.Parameter(other, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else other)


def _swap(a: Tensor, b: Tensor) -> None:
    a.__class__, b.__class__ = b.__class__, a.__class__
    a.__dict__, b.__dict__ = b.__dict__, a.__dict__
    torch._C._swap_tensor_impl(a, b)


def backward(loss: Tensor, gradient: Tensor | None = None) -> int:
    """What loss.backward() runs. Hooks of operations are not called.

    Returns the number of leaves that the gradient reaches.
    """
    seed = torch.ones_like(loss) if gradient is None else gradient
    stolen: set[int] = set()  # storages that are some leaf's gradient
    with torch.no_grad():
        leaves = list(_run({loss.grad_fn: {loss.output_nr: seed}}, None))
        for leaf, gradient in leaves:
            _accumulate(leaf, gradient, stolen)
    return len(leaves)


def gradients_of(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Tensor | Sequence[Tensor | None] | None = None,
    create_graph: bool = False,
    materialize_grads: bool = False,
    **_: object,
) -> tuple[Tensor | None, ...]:
    """What torch.autograd.grad runs."""
    sources, results = ([x] if isinstance(x, Tensor) else list(x) for x in (inputs, outputs))
    seeds = [grad_outputs] * len(results) if isinstance(grad_outputs, Tensor | None) else grad_outputs
    roots: Gradients = defaultdict(dict)
    for y, seed in zip(results, seeds, strict=True):
        roots[y.grad_fn][y.output_nr] = torch.ones_like(y) if seed is None else seed
    edges = [get_gradient_edge(x) for x in sources]
    captured: dict[tuple[Any, int], Tensor] = {(edge.node, edge.output_nr): None for edge in edges}
    with torch.set_grad_enabled(create_graph):
        list(_run(roots, captured))
    found = [captured[edge.node, edge.output_nr] for edge in edges]
    if materialize_grads:
        found = [torch.zeros_like(x) if g is None else g for x, g in zip(sources, found, strict=True)]
    return tuple(found)


def _run(roots: Gradients, captured: dict[tuple[Any, int], Tensor] | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The operations of a backward pass, those of the results first; (leaf, gradient) of each leaf.

    captured: (operation, number of its result) of the gradients that are asked for, and where they go; only what they depend
        on then runs. None: all leaves.
    """
    gradients: Gradients = defaultdict(dict, roots)
    order = _children_first(list(roots))
    needed = _leading_to({node for node, _ in captured}, order) if captured is not None else None
    for node in reversed(order):
        own = gradients.pop(node, {})
        for key in [(node, i) for i in own if captured is not None and (node, i) in captured]:
            captured[key] = _given(node, own)[key[1]]
        if not own:
            continue
        if hasattr(node, "variable"):
            if captured is None:
                yield node.variable, _given(node, own)[0]
            continue
        if needed is not None and not any(child in needed for child, _ in node.next_functions):
            continue
        for (target, i), gradient in _results(node, own):
            if gradient is not None:
                before = gradients[target].get(i)
                gradients[target][i] = gradient if before is None else before + gradient


def _given(node: Any, own: dict[int, Tensor]) -> list[Any]:
    """The gradients of an operation's results, in their shapes and types."""
    return [_like(own[i], facts) if i in own else None for i, facts in enumerate(node._input_metadata)]


def _like(gradient: Tensor, facts: Any) -> Tensor:
    same = gradient.shape == tuple(facts.shape)
    return (gradient if same else gradient.sum_to_size(facts.shape)).to(facts.dtype)


def _results(node: Any, own: dict[int, Tensor]) -> list[tuple[tuple[Any, int], Tensor | None]]:
    """((operation, number of its result), gradient) of each operand that needs one."""
    given = _given(node, own)
    written = hasattr(node, "apply")  # in Python: it gets zeros
    if written:
        pairs = zip(given, node._input_metadata, strict=True)
        given = [torch.zeros(f.shape, dtype=f.dtype, device=f.device) if g is None else g for g, f in pairs]
    # torch's engine says that no second backward pass follows; else the reserve of batch norms is copied
    with _NoCopies() if node.name().startswith("CudnnBatchNorm") else nullcontext():
        results = node.apply(*given) if written else node(*given)
    results = results if isinstance(results, tuple) else (results,)
    edges = node.next_functions
    if written:  # there are results for arguments that are no tensors, too
        results = [result for result, needed in zip(results, node.needs_input_grad, strict=True) if needed]
        edges = [edge for edge in edges if edge[0] is not None]
    return [(edge, result) for edge, result in zip(edges, results, strict=False) if edge[0] is not None]


def _accumulate(leaf: Tensor, gradient: Tensor, stolen: set[int]) -> None:
    """As torch's AccumulateGrad: a first gradient is taken as it is where its layout is the leaf's and it is nobody else's."""
    if leaf.grad is not None:
        leaf.grad += gradient
        return
    storage = gradient.untyped_storage()._cdata
    if gradient.is_sparse or (gradient.stride() == leaf.stride() and storage not in stolen):
        leaf.grad = gradient.detach()
    else:
        leaf.grad = torch.empty_like(leaf).copy_(gradient)
    stolen.add(storage)


def _children_first(roots: list[Any]) -> list[Any]:
    order: list[Any] = []
    seen, stack = set(roots), [(root, iter(root.next_functions)) for root in roots]
    while stack:
        children = stack[-1][1]
        child = next((child for child, _ in children if child is not None and child not in seen), None)
        if child is None:
            order.append(stack.pop()[0])
        else:
            seen.add(child)
            stack.append((child, iter(child.next_functions)))
    return order


def _leading_to(targets: set[Any], order: list[Any]) -> set[Any]:
    """The operations of which some of the targets are operands, and the targets."""
    result: set[Any] = set()
    for node in order:
        if node in targets or any(child in result for child, _ in node.next_functions):
            result.add(node)
    return result
