"""Side4Video: a frozen tower, the side network beside it, and a linear head."""

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from modules.backbones import FrozenTower
from modules.side_network import SideNetwork, TokenBatchNorm
from utils.distributed import average_bucket, get_world_size
from utils.errors import ConfigError


class SideClassifier(nn.Module):
    """All that is trained: the side network, dropout and the linear head."""

    def __init__(self, side: SideNetwork, num_classes: int, drop_fc: float = 0.0):
        super().__init__()
        self.side = side
        self.dropout = nn.Dropout(drop_fc)
        self.head = nn.Linear(side.pos.shape[1], num_classes)

    def forward(self, clips: Tensor, layer_tokens: Iterable[Tensor]) -> Tensor:
        """(B, T, 3, H, W) and (B, T, 1 + N, D) a layer -> logits (B, K)."""
        return self.head(self.dropout(self.side(clips, layer_tokens)))


class Side4Video(nn.Module):
    """Maps normalised clips, float32 (B, T, 3, H, W), to logits (B, K). No gradient reaches `backbone`."""

    def __init__(self, backbone: FrozenTower, trained: SideClassifier):
        super().__init__()
        self.backbone = backbone
        self.trained = trained
        self.sharded = False
        self._replicas: list[DistributedDataParallel] = []  # a list, so that state_dict() does not see the wrapper

    def forward(self, clips: Tensor) -> Tensor:
        trained = self._replicas[0] if self._replicas and self.training else self.trained
        return trained(clips, self.backbone.layer_tokens(clips))

    def place(self, device: torch.device, shard_backbone: bool = False, compile_backbone: bool = False) -> None:
        """Move the model, filled and on the CPU, to this process's device.

        Args:
            device: that of `utils.distributed.init_distributed`.
            shard_backbone: split the tower's tensors over the processes of the default group, if there are several.
                `sharded` is True then, and all processes must call the model equally often.
            compile_backbone: compile the tower's blocks. The side network stays as it is: compilers would merge what
                its backward pass computes again with what it computed before, and keep all of it in between.

        Raises:
            ConfigError: nothing can be compiled on this machine.
        """
        if compile_backbone:
            check_compiler(device)
            self.backbone.compile_blocks()
        if shard_backbone and get_world_size() > 1:
            self.backbone.shard(init_device_mesh(device.type, (get_world_size(),)))
            self.sharded = True
        self.to(device)

    def parallelize(self, sync_bn: bool = False) -> None:
        """Average the gradients of the trained part over the processes of the default group; the tower stays outside.

        BatchNorm's running statistics are not sent in every step: training never reads them. `broadcast_buffers`
        makes them those of process 0 before they are used.

        Args:
            sync_bn: BatchNorm takes its statistics over all processes.
        """
        for module in self.trained.modules():
            if isinstance(module, TokenBatchNorm):
                module.synced = sync_bn
        device = next(self.trained.parameters()).device
        device_ids = [device.index] if device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the argument's newer name, which torch 2.6 has not
            replica = DistributedDataParallel(self.trained, device_ids=device_ids, broadcast_buffers=False)
        replica.register_comm_hook(None, average_bucket)
        self._replicas = [replica]

    def broadcast_buffers(self) -> None:
        """Give every process the running statistics of process 0."""
        if self._replicas:
            for buffer in self.trained.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def no_sync(self) -> AbstractContextManager:
        """Forward and backward inside add to the local gradients only (all but the last step of an accumulation)."""
        return self._replicas[0].no_sync() if self._replicas else nullcontext()


def check_compiler(device: torch.device) -> None:
    """Raises ConfigError if torch.compile does not work here, for want of a C++ compiler above all."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(16, device=device))
    except Exception as error:  # torch wraps what compilers and linkers say in many kinds
        reason = " ".join(str(error).partition("Set TORCHDYNAMO_VERBOSE")[0].split())
        raise ConfigError(
            f"solver.compile: torch.compile does not work here ({reason}); install a C++ compiler such as g++ (CXX "
            "names another), or set solver.compile=False"
        ) from error
