"""SHA-256 of tensors: checks that a checkpoint runs beside the tower it was trained with."""

import hashlib

import torch
from torch import Tensor

TOWER_POSITIONS = "vit.pos_embed"  # the only tensor of a tower that depends on the input size
_CHUNK = 1 << 22  # elements that are converted at a time, so that no large tensor is in memory twice


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in alphabetical order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        _update([digest], name, tensor, tensor.dtype)
    return digest.hexdigest()


def tower_hashes(tower: dict[str, Tensor]) -> dict[str, str]:
    """Return `tower_sha256` and `tower_sha256_but_positions` of a checkpoint, from the state dict of a FrozenTower.

    They are `hash_tensors` of the tensors converted to float32, with and without the position table. float32 holds
    every value of the half types, so a file in half precision and its float32 copy have the same hashes.
    """
    whole, others = hashlib.sha256(), None
    for name, tensor in sorted(tower.items()):
        if name == TOWER_POSITIONS:
            others = whole.copy()  # in alphabetical order it comes after all blocks, so these are hashed once
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
