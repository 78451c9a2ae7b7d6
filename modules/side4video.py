"""Side4Video: a frozen tower, the side network beside it, and a linear head.

Letters: B clips, T frames of a clip, N patches of a frame, D tower width, H and W pixel height and width, K classes.
"""

import logging
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from modules.backbones import FrozenTower
from modules.side_network import SideNetwork
from modules.token_norm import TokenBatchNorm
from utils.distributed import get_world_size
from utils.errors import ConfigError

log = logging.getLogger(__name__)


class SideClassifier(nn.Module):
    """Everything that is trained: the side network, dropout and the linear head."""

    def __init__(self, side: SideNetwork, num_classes: int, drop_fc: float = 0.0):
        super().__init__()
        self.side = side
        self.dropout = nn.Dropout(drop_fc)
        self.head = nn.Linear(side.pos.shape[1], num_classes)

    def forward(self, clips: Tensor, layer_tokens: Iterable[Tensor]) -> Tensor:
        """Clips (B, T, 3, H, W) and, for each layer, tower tokens (B, T, 1 + N, D) -> logits (B, K)."""
        return self.classify(self.side(clips, layer_tokens))

    def classify(self, features: Tensor) -> Tensor:
        """Features of the side network (B, S) -> logits (B, K)."""
        return self.head(self.dropout(features))


class Side4Video(nn.Module):
    """Maps normalised clips, float32 (B, T, 3, H, W), to logits (B, K). No gradient reaches `backbone`.

    Attributes:
        sharded: the tower's tensors are split over the processes, so all of them must call the model equally often.
    """

    def __init__(self, backbone: FrozenTower, trained: SideClassifier):
        super().__init__()
        self.backbone = backbone
        self.trained = trained
        self.sharded = False
        self._replicas: list[DistributedDataParallel] = []  # in a list, so that state_dict() does not see the wrapper

    @property
    def replica(self) -> DistributedDataParallel | None:
        """The wrapper of `trained` that averages gradients over processes, or None before `parallelize`."""
        return self._replicas[0] if self._replicas else None

    def forward(self, clips: Tensor) -> Tensor:
        """Clips (B, T, 3, H, W) -> logits (B, K)."""
        trained = self.replica if self.replica and self.training else self.trained
        return trained(clips, self.backbone.layer_tokens(clips))

    def place(self, device: torch.device, shard_backbone: bool = False, compile_backbone: bool = False) -> None:
        """Move the model, which is on the CPU and holds its weights, to this process's device.

        Args:
            device: the result of `utils.distributed.init_distributed`.
            shard_backbone: split the tower's tensors over the processes of the default group, if there are several.
            compile_backbone: compile the tower's blocks. The side network is never compiled: a compiler would merge
                the second run of a recomputed block with the first one, and so keep all activations in between.

        Raises:
            ConfigError: torch.compile does not work on this machine.
        """
        if compile_backbone:
            check_compiler(device)
            warn_of_old_card(device)
            self.backbone.compile_blocks()
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
