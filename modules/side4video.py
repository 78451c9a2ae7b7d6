"""Side4Video: a frozen tower, the side network beside it, and a linear head.

Letters: B clips, T frames of a clip, N patches of a frame, D tower width, H and W pixel height and width, K classes, R
models that share a tower.
"""

import logging
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from modules.backbones import FrozenTower
from modules.probes import Probe
from modules.side_network import SideNetwork
from modules.token_norm import TokenBatchNorm
from utils.distributed import get_world_size
from utils.errors import ConfigError

log = logging.getLogger(__name__)


class SideClassifier(nn.Module):
    """Everything that is trained: the side network or a probe in its place, dropout and the linear head."""

    def __init__(self, side: SideNetwork | Probe, num_classes: int, drop_fc: float = 0.0):
        super().__init__()
        self.side = side
        self.dropout = nn.Dropout(drop_fc)
        self.head = nn.Linear(side.width, num_classes)

    def forward(self, clips: Tensor, layer_tokens: Iterable[Tensor]) -> Tensor:
        """Clips (B, T, 3, H, W) and, for each layer, tower tokens (B, T, 1 + N, D) -> logits (B, K)."""
        return self.classify(self.side(clips, layer_tokens))

    def classify(self, features: Tensor) -> Tensor:
        """Features of the side network (B, S) -> logits (B, K)."""
        return self.head(self.dropout(features))


class Side4Video(nn.Module):
    """Maps normalised clips, float32 (B, T, 3, H, W), to logits (B, K). No gradient reaches `backbone`.

    Attributes:
        layers: tower blocks whose tokens `trained` reads, those of the tower that it was made with. The tower gives the
            tokens of more blocks where other models share it.
        sharded: the tower's tensors are split over the processes, so all of them must call the model equally often.
    """

    def __init__(self, backbone: FrozenTower, trained: SideClassifier):
        super().__init__()
        self.backbone = backbone
        self.trained = trained
        self.layers = list(backbone.layers)
        self.sharded = False
        self._replicas: list[DistributedDataParallel] = []  # in a list, so that state_dict() does not see the wrapper

    @property
    def replica(self) -> DistributedDataParallel | None:
        """The wrapper of `trained` that averages gradients over processes, or None before `parallelize`."""
        return self._replicas[0] if self._replicas else None

    def side_network(self, purpose: str) -> SideNetwork:
        """The side network, for a purpose that a probe cannot serve.

        Raises:
            ConfigError: a probe takes its place; the error says that `purpose` needs a side network.
        """
        if not isinstance(self.trained.side, SideNetwork):
            raise ConfigError(f"network.side: this model is a probe of the tower; {purpose} needs a side network")
        return self.trained.side

    @property
    def outputs(self) -> tuple[int, ...]:
        """Shape of what the model gives for a clip."""
        return (self.trained.head.out_features,)

    def forward(self, clips: Tensor, layer_tokens: Iterable[Tensor] | None = None) -> Tensor:
        """Clips (B, T, 3, H, W) -> logits (B, K).

        Args:
            layer_tokens: tokens of the blocks in `layers`; None lets the tower compute them.
        """
        trained = self.replica if self.replica and self.training else self.trained
        if layer_tokens is None:
            (layer_tokens,) = token_streams(self.backbone, clips, [self.layers])
        return trained(clips, layer_tokens)

    def place(self, device: torch.device, shard_backbone: bool = False, compiled: bool = False) -> None:
        """Move the model, which is on the CPU and holds its weights, to this process's device.

        Args:
            device: the result of `utils.distributed.init_distributed`.
            shard_backbone: split the tower's tensors over the processes of the default group, if there are several.
            compiled: compile the blocks of tower and side network, each by itself: a compiler that saw a recomputed
                block from outside would merge its two runs, and keep all activations in between.

        Raises:
            ConfigError: torch.compile does not work on this machine.
        """
        if compiled:
            check_compiler(device)
            warn_of_old_card(device)
            self.backbone.compile_blocks()
            self.trained.side.compile_blocks()
        if shard_backbone and get_world_size() > 1:
            self.backbone.shard(init_device_mesh(device.type, (get_world_size(),)))
            self.sharded = True
        self.to(device)

    def parallelize(self) -> None:
        """From now on, average the gradients of the trained part over the processes of the default group.

        Running statistics of BatchNorm are not exchanged in each step, because training never reads them. Call
        `broadcast_buffers` before they are used.
        """
        device = next(self.trained.parameters()).device
        device_ids = [device.index] if device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the argument has a newer name that torch 2.6 does not know
            replica = DistributedDataParallel(self.trained, device_ids=device_ids, broadcast_buffers=False)
        self._replicas = [replica]

    def reduced_bytes(self, accumulation: int = 1) -> int:
        """Bytes that each process hands to all-reduce for one update of the weights; 0 without `parallelize`.

        Gradients go once an update. Statistics of BatchNorm with `sync_bn` go in each of the `accumulation` steps,
        forward and backward.
        """
        if self.replica is None:
            return 0
        gradients = sum(parameter.nbytes for parameter in self.trained.parameters() if parameter.requires_grad)
        norms = [module for module in self.trained.modules() if isinstance(module, TokenBatchNorm)]
        return gradients + accumulation * sum(norm.shared_bytes for norm in norms)

    def broadcast_buffers(self) -> None:
        """Give every process the running statistics of process 0."""
        if self.replica is not None:
            for buffer in self.trained.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def no_sync(self) -> AbstractContextManager:
        """Inside, gradients add up on each process and are not averaged: for all but the last step of an update."""
        return nullcontext() if self.replica is None else self.replica.no_sync()


class SharedTower(nn.Module):
    """Several models beside one tower: clips (B, T, 3, H, W) -> logits (B, R, K), with one pass of the tower."""

    def __init__(self, models: Sequence[Side4Video]):
        """
        Args:
            models: with the same tower and the same number of classes; see `share_tower`.
        """
        super().__init__()
        self.models = nn.ModuleList(models)
        self._layers = [model.layers for model in models]

    @property
    def sharded(self) -> bool:
        """As of Side4Video."""
        return self._first.sharded

    @property
    def outputs(self) -> tuple[int, ...]:
        """As of Side4Video."""
        return (len(self.models), *self._first.outputs)

    @property
    def _first(self) -> Side4Video:
        return cast(Side4Video, self.models[0])

    def forward(self, clips: Tensor) -> Tensor:
        """(B, T, 3, H, W) -> (B, R, K)."""
        streams = token_streams(self._first.backbone, clips, self._layers)
        return torch.stack([model(clips, s) for model, s in zip(self.models, streams, strict=True)], dim=1)


def share_tower(models: Sequence[Side4Video]) -> None:
    """Give all models the deepest of their towers, whose weights must be the same, and drop the others.

    Raises:
        ValueError: the towers differ.
    """
    tower = max((model.backbone for model in models), key=lambda backbone: backbone.num_blocks)
    tensors = tower.state_dict()
    for other in {id(model.backbone): model.backbone for model in models}.values():
        if any(not torch.equal(tensor, tensors[name]) for name, tensor in other.state_dict().items()):
            raise ValueError("the frozen towers of these models differ")
    tower.layers = sorted({layer for model in models for layer in model.layers})
    for model in models:
        model.backbone = tower


def token_streams(tower: FrozenTower, clips: Tensor, layers: Sequence[Sequence[int]]) -> list[Iterator[Tensor]]:
    """The tokens of one pass of the tower over `clips` (B, T, 3, H, W), once for each reader.

    A block of the tower runs when the first reader asks for it, and its tokens are kept until the last reader that
    wants them has asked for them. `itertools.tee` would keep them longer: it frees items in groups of 57.

    Args:
        layers: for each reader, the blocks whose tokens it wants, in ascending order.

    Returns:
        for each reader, an iterator over tokens (B, T, 1 + N, D) of the tower's dtype.
    """
    numbers, source = iter(tower.layers), tower.layer_tokens(clips)
    waiting: list[deque[Tensor]] = [deque() for _ in layers]

    def read(own: deque[Tensor], wanted: Sequence[int]) -> Iterator[Tensor]:
        for _ in wanted:
            while not own:
                layer, tokens = next(numbers), next(source)
                for queue, others in zip(waiting, layers, strict=True):
                    if layer in others:
                        queue.append(tokens)
                del tokens
            yield own.popleft()

    return [read(own, wanted) for own, wanted in zip(waiting, layers, strict=True)]


def warn_of_old_card(device: torch.device) -> None:
    """Log that torch.compile may not pay on a GPU below capability 8.0, which its code is not written for first."""
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        log.warning(
            "solver.compile: this GPU has capability %d.%d; compiled code is written for 8.0 and above, so compare a "
            "few steps with solver.compile=False",
            *capability,
        )


def check_compiler(device: torch.device) -> None:
    """Compile a small function, to fail early.

    Raises:
        ConfigError: torch.compile does not work on this machine, most often because there is no C++ compiler.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(16, device=device))
    except Exception as error:  # errors of compilers and linkers come wrapped in many exception types
        reason = " ".join(str(error).partition("Set TORCHDYNAMO_VERBOSE")[0].split())
        raise ConfigError(
            f"solver.compile: torch.compile does not work here ({reason}); install a C++ compiler such as g++ (CXX "
            "names another), or set solver.compile=False"
        ) from error
