"""Probes: what can be trained in place of the side network, to show what the side network adds (`network.side`).

They read the tokens of the last tower block only, as the evaluations of image and video models do that compare frozen
features. `average_frames` decides whether a probe can know the order of the frames.

Letters: B clips, T frames of a clip, N patches of a frame, D tower width, H and W pixel height and width.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn

HEAD_WIDTH = 64


class Probe(nn.Module, ABC):
    """Maps the same input as a SideNetwork to features (B, width), which dropout and the linear head follow."""

    width: int
    average_frames: bool

    def forward(self, clips: Tensor, layer_tokens: Iterable[Tensor]) -> Tensor:
        """Clips (B, T, 3, H, W), which are not looked at, and tower tokens (B, T, 1 + N, D) of one block or more, of
        which the last counts -> (B, width)."""
        *_, tokens = layer_tokens
        return self.pool(tokens.to(torch.float32))

    def compile_blocks(self) -> None:
        """As of SideNetwork."""
        self.compile()

    @abstractmethod
    def pool(self, tokens: Tensor) -> Tensor:
        """Float32 tokens (B, T, 1 + N, D) -> (B, width)."""


class LinearProbe(Probe):
    """The class token beside the mean of the patch tokens, normalised; its frames are averaged or put in a row."""

    def __init__(self, backbone_width: int, num_frames: int, average_frames: bool):
        super().__init__()
        self.average_frames = average_frames
        self.norm = nn.LayerNorm(2 * backbone_width)
        self.width = 2 * backbone_width * (1 if average_frames else num_frames)

    def pool(self, tokens: Tensor) -> Tensor:
        """(B, T, 1 + N, D) -> (B, 2D), or (B, 2TD) without `average_frames`."""
        frames = self.norm(torch.cat([tokens[:, :, 0], tokens[:, :, 1:].mean(dim=2)], dim=-1))
        return frames.mean(dim=1) if self.average_frames else frames.flatten(1)


class AttentiveProbe(Probe):
    """A learned query that attends to the tokens, and an MLP, as in the attentive probes of V-JEPA.

    With `average_frames`, the query looks at each frame alone, and the results are averaged. Without it, it looks at
    the tokens of all frames together, each with a learned vector of its frame.
    """

    def __init__(self, backbone_width: int, num_frames: int, average_frames: bool):
        super().__init__()
        self.average_frames, self.width = average_frames, backbone_width
        self.query = nn.Parameter(torch.empty(1, 1, backbone_width))
        nn.init.trunc_normal_(self.query, std=0.02)
        if not average_frames:
            self.times = nn.Parameter(torch.empty(num_frames, 1, backbone_width))
            nn.init.trunc_normal_(self.times, std=0.02)
        self.norm = nn.LayerNorm(backbone_width)
        heads = max(1, backbone_width // HEAD_WIDTH)
        self.attention = nn.MultiheadAttention(backbone_width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(backbone_width),
            nn.Linear(backbone_width, 4 * backbone_width),
            nn.GELU(),
            nn.Linear(4 * backbone_width, backbone_width),
        )

    def pool(self, tokens: Tensor) -> Tensor:
        """(B, T, 1 + N, D) -> (B, D)."""
        B, T = tokens.shape[:2]
        tokens = self.norm(tokens)
        rows = tokens.flatten(0, 1) if self.average_frames else (tokens + self.times).flatten(1, 2)
        query = self.query.to(rows.dtype).expand(len(rows), -1, -1)
        x = query + self.attention(query, rows, rows, need_weights=False)[0]
        x = (x + self.mlp(x)).squeeze(1)
        return x.unflatten(0, (B, T)).mean(dim=1) if self.average_frames else x


PROBES: dict[str, type[LinearProbe] | type[AttentiveProbe]] = {"linear": LinearProbe, "attentive": AttentiveProbe}
