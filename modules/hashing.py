"""SHA-256 of tensors: what a checkpoint proves its frozen tower with."""

import hashlib

import torch
from torch import Tensor

TOWER_POSITIONS = "vit.pos_embed"  # the only tensor of a tower that another input size changes
_CHUNK = 1 << 22  # elements converted at a time, so that a big tensor is never held twice


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        _update([digest], name, tensor, tensor.dtype)
    return digest.hexdigest()


def tower_hashes(tower: dict[str, Tensor]) -> dict[str, str]:
    """`tower_sha256` and `tower_sha256_but_positions` of a checkpoint, from the state dict of a FrozenTower.

    The same as `hash_tensors` of the tensors in float32, which holds every value of the half types: the proof of a
    published file is one and the same whatever `network.backbone_dtype` the tower is then converted to.
    """
    whole, others = hashlib.sha256(), None
    for name, tensor in sorted(tower.items()):
        if name == TOWER_POSITIONS:
            others = whole.copy()  # all blocks come before it in the alphabet, so they are hashed once
            digests = [whole]
        else:
            digests = [whole] if others is None else [whole, others]
        _update(digests, name, tensor, torch.float32 if tensor.is_floating_point() else tensor.dtype)
    return {
        "tower_sha256": whole.hexdigest(),
        "tower_sha256_but_positions": (others or whole).hexdigest(),
    }


def _update(digests: list, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    for digest in digests:
        digest.update(f"{name} {dtype} {tuple(tensor.shape)}".encode())
    for chunk in tensor.detach().flatten().split(_CHUNK):
        content = chunk.cpu().to(dtype).contiguous().view(torch.uint8).numpy()
        for digest in digests:
            digest.update(content)
