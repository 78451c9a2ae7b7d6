"""An exponential moving average of what is trained (`solver.ema`)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class AveragedWeights:
    """average = decay * average + (1 - decay) * trained, after each update, from the weights of the start.

    It holds the parameters and the running statistics of BatchNorm; counters are copied.
    """

    def __init__(self, trained: nn.Module, decay: float):
        """
        Args:
            trained: on its device, with the weights of the start.
        """
        self._decay = decay
        self._tensors = {name: tensor.detach().clone() for name, tensor in named_tensors(trained).items()}

    @torch.no_grad()
    def update(self, trained: nn.Module) -> None:
        """Take in the weights after an update."""
        current = named_tensors(trained)
        floating = [name for name, tensor in self._tensors.items() if tensor.is_floating_point()]
        torch._foreach_lerp_(
            [self._tensors[name] for name in floating], [current[name].detach() for name in floating], 1 - self._decay
        )
        for name in self._tensors.keys() - set(floating):
            self._tensors[name].copy_(current[name])

    @contextmanager
    def in_place_of(self, trained: nn.Module) -> Iterator[None]:
        """Inside, the module computes with the average. Tensors are exchanged, not copied."""
        self._exchange(trained)
        try:
            yield
        finally:
            self._exchange(trained)

    def _exchange(self, trained: nn.Module) -> None:
        for name, tensor in named_tensors(trained).items():
            tensor.data, self._tensors[name] = self._tensors[name], tensor.data

    def state_dict(self) -> dict[str, Tensor]:
        """Named as in the state dict of the module."""
        return dict(self._tensors)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self._tensors.items():
            tensor.copy_(state[name])


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors themselves that the state dict of a module has copies of."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensors[name] for name in module.state_dict()}
