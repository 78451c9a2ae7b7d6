"""A dry run: the project's own code on tensors without values, with every byte counted that a device would hold.

The tensors are PyTorch's fake tensors. They have a shape, a type and a device, so CUDA's autocast rules and choice of
kernels apply on a machine without a GPU, and nothing is allocated.
"""

import heapq
import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from datasets.transforms import per_channel
from engine import device_copy
from utils.errors import ConfigError

BLOCK = {"cuda": 512, "cpu": 1}  # bytes that the device's allocator rounds every tensor up to


class MemoryCount(TorchDispatchMode):
    """Counts the bytes of all tensors on a type of device, from the operator that makes them until they are freed.

    What a kernel allocates inside itself, such as a workspace of cuDNN, is not seen.

    Attributes:
        live: bytes now.
        peak: most bytes so far; `restart` sets it back.
    """

    def __init__(self, device_type: str):
        super().__init__()
        self._device_type, self._block = device_type, BLOCK[device_type]
        self._storages: dict[int, weakref.ref] = {}
        self.live = self.peak = 0

    def restart(self) -> None:
        """Look for the peak from now on."""
        self.peak = self.live

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, if it lies on the device and is not counted yet."""
        if tensor.device.type != self._device_type:
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._storages:
            return
        size = -(-storage.nbytes() // self._block) * self._block

        def free(_: weakref.ref) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result


@contextmanager
def dry_run(device_type: str) -> Iterator[MemoryCount]:
    """Inside, tensors have no values, `cuda` needs no GPU, and the tensors of the device type are counted.

    The backward pass is walked by `walk_graph`, because autograd's engine refuses tensors of a GPU that is not there.

    Raises:
        ConfigError: this PyTorch asks a driver about tensors without values, and there is none.
    """
    if device_type == "cuda" and not runs_without_gpu():
        raise ConfigError(
            f"torch {torch.__version__} cannot plan for a GPU on a machine without one; take a newer one (2.14 can)"
        )
    count = MemoryCount(device_type)
    with ExitStack() as stack:
        stack.callback(per_channel.cache_clear)  # it would hand fake tensors to a real run, and the other way round
        per_channel.cache_clear()
        if device_type == "cuda":
            stack.enter_context(as_with_gpu())
            stack.enter_context(mock.patch.object(device_copy, "copy_stream", lambda device: None))
            stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", fused_attention))
        stack.enter_context(walked_backward())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(count)
        yield count


def runs_without_gpu() -> bool:
    """Whether tensors without values can be on a GPU here."""
    try:
        with FakeTensorMode():
            return torch.zeros(2, device="cuda")[0].device.type == "cuda"
    except RuntimeError:
        return False


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention by the kernels that CUDA has for its type; without a GPU, PyTorch would choose separate products.

    Half types run FlashAttention, and float32 the memory-efficient kernel, as on cards from capability 8.0 on.
    """
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (t.to(torch.get_autocast_dtype("cuda")) for t in (query, key, value))
    if query.dtype == torch.float32 or attn_mask is not None:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        needs_grad = torch.is_grad_enabled() and query.requires_grad
        return efficient(query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale)[0]
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]


@contextmanager
def as_with_gpu() -> Iterator[None]:
    """Inside, autocast and `amp` find a GPU that supports bf16: its rules are wanted, whatever this machine has."""
    with (
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda **_: True),
    ):
        yield


class _Box:
    """A saved tensor, until the node that needs it has run."""

    def __init__(self, tensor: Tensor):
        self.tensor: Tensor | None = tensor


@contextmanager
def walked_backward() -> Iterator[None]:
    """Inside, `Tensor.backward` and `torch.autograd.grad` are `walk_graph`, which frees saved tensors as it goes."""
    opened: list[_Box] = []

    def unpack(box: _Box) -> Tensor:
        assert box.tensor is not None, "the graph is walked a second time"
        opened.append(box)
        return box.tensor

    def backward(tensors: Any, grad_tensors: Any = None, *_: Any, **__: Any) -> None:
        outputs = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        grads = [grad_tensors] if isinstance(grad_tensors, Tensor) else list(grad_tensors or [None] * len(outputs))
        walk_graph(outputs, grads, accumulate_gradient, opened)

    def grad(outputs: Any, inputs: Any, grad_outputs: Any = None, *_: Any, **__: Any) -> tuple[Tensor | None, ...]:
        found: dict[Any, Tensor] = {}
        # A tensor that `saved_tensors` has unpacked is another object than the leaf, but has the leaf's node.
        leaves = [get_gradient_edge(tensor).node for tensor in inputs]
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        grads = [grad_outputs] if isinstance(grad_outputs, Tensor) else list(grad_outputs or [None] * len(outputs))
        walk_graph(outputs, grads, found.__setitem__, opened)
        return tuple(found.get(leaf) for leaf in leaves)

    with (
        saved_tensors_hooks(_Box, unpack),
        mock.patch.object(torch.autograd, "backward", backward),
        mock.patch.object(torch.autograd, "grad", grad),
    ):
        yield


@torch.no_grad()
def walk_graph(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    deliver: Callable[[Any, Tensor], None],
    opened: list[_Box],
) -> None:
    """The backward pass in the order of autograd's engine: of the nodes that are ready, the youngest runs first.

    Args:
        outputs: tensors with a graph.
        gradients: one for each output; None for 1.
        deliver: called with the node of each leaf and its gradient.
        opened: receives the saved tensors that a node asks for; they are freed when the node has run.
    """
    roots = [output.grad_fn for output in outputs]
    waiting = _consumers(roots)
    buffers: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    number = itertools.count()
    ready: list[tuple[int, int, Any]] = []
    for root, output, gradient in zip(roots, outputs, gradients, strict=True):
        buffers[root][output.output_nr] = torch.ones_like(output) if gradient is None else gradient
        heapq.heappush(ready, (_rank(root), next(number), root))
    while ready:
        _, _, node = heapq.heappop(ready)
        received = buffers.pop(node, {})
        if _is_leaf(node):
            if received:
                deliver(node, received.pop(0))
            continue
        results = _run_node(node, received)
        received.clear()
        for box in opened:
            box.tensor = None
        opened.clear()
        for (following, position), result in zip(node.next_functions, results, strict=False):
            if following is None:
                continue
            if result is not None:
                _add(buffers[following], position, _fitting(result, following, position))
            waiting[following] -= 1
            if waiting[following] == 0:
                heapq.heappush(ready, (_rank(following), next(number), following))
        del results, result


def accumulate_gradient(node: Any, gradient: Tensor) -> None:
    """Add to the gradient of a leaf; the first one is taken as it is if it lies in memory as the leaf does."""
    leaf = node.variable
    if leaf.grad is not None:
        leaf.grad += gradient
    elif gradient.stride() == leaf.stride():
        leaf.grad = gradient.detach()
    else:
        leaf.grad = torch.empty_like(leaf).copy_(gradient)


def _consumers(roots: Sequence[Any]) -> dict[Any, int]:
    """For each node below the roots, the number of edges that lead to it."""
    counts: dict[Any, int] = defaultdict(int)
    todo, seen = list(roots), set(roots)
    while todo:
        for following, _ in todo.pop().next_functions:
            if following is not None:
                counts[following] += 1
                if following not in seen:
                    seen.add(following)
                    todo.append(following)
    return counts


def _is_leaf(node: Any) -> bool:
    return hasattr(node, "variable")


def _rank(node: Any) -> int:
    """What runs first has the lowest rank."""
    return -(1 << 63) if _is_leaf(node) else -node._sequence_nr()


def _run_node(node: Any, received: dict[int, Tensor]) -> Sequence[Tensor | None]:
    metadata = node._input_metadata  # of the gradients that it receives
    gradients = [received.get(position) for position in range(len(metadata))]
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        gradients = [
            torch.zeros(m.shape, dtype=m.dtype, device=m.device) if g is None else g
            for g, m in zip(gradients, metadata, strict=True)
        ]
        results = node.apply(*gradients)
        # A result for every argument; autograd has an edge for every tensor among them, an empty one without gradient.
        wanted = itertools.compress(results if isinstance(results, tuple) else (results,), node.needs_input_grad)
        return [None if following is None else next(wanted) for following, _ in node.next_functions]
    results = node(*gradients)
    return results if isinstance(results, tuple | list) else (results,)


def _fitting(gradient: Tensor, node: Any, position: int) -> Tensor:
    """The gradient in shape and type of the tensor that it belongs to, as the engine makes it."""
    if _is_leaf(node):
        shape, dtype = node.variable.shape, node.variable.dtype
    else:
        shape, dtype = node._input_metadata[position].shape, node._input_metadata[position].dtype
    return gradient.sum_to_size(shape).to(dtype)


def _add(buffer: dict[int, Tensor], position: int, gradient: Tensor) -> None:
    buffer[position] = buffer[position] + gradient if position in buffer else gradient
