"""The side network in its plainest form (docs/protocol.md section 2): slow and obvious, to test the fast form against.

Plain nn.Conv3d, nn.BatchNorm3d and nn.MultiheadAttention on (B, S, T, h, w) and rearranged copies. No code is shared
with modules/side_network.py; `textbook_of` copies the weights.

Letters: B clips, T frames of a clip, P patch size, h and w rows and columns of patches, N = h w patches of a frame,
D tower width, S side width.
"""

import torch
from torch import nn


class TextbookBlock(nn.Module):
    def __init__(self, S, placement):
        super().__init__()
        self.placement = placement
        self.bn_1 = nn.BatchNorm3d(S)
        self.conv = nn.Sequential(
            nn.Conv3d(S, S, (1, 1, 1)),
            nn.Conv3d(S, S, (3, 1, 1), padding=(1, 0, 0), groups=S),
            nn.Conv3d(S, S, (1, 1, 1)),
        )
        self.ln_1 = nn.LayerNorm(S)
        self.attn = nn.MultiheadAttention(S, S // 64, batch_first=True)
        self.bn_2 = nn.BatchNorm3d(S)
        self.mlp = nn.Sequential(nn.Linear(S, 4 * S), nn.GELU(), nn.Linear(4 * S, S))

    def forward(self, x, c, pos):
        """Tokens x (B, S, T, h, w), class tokens c (B, T, S), positions pos (N, S) -> (B, S, T, h, w)."""
        B, S, T, h, w = x.shape
        x = x + (self.conv(self.bn_1(x)) if self.placement == "pre" else self.bn_1(self.conv(x)))

        shifted = torch.zeros_like(c)
        for t in range(T):
            if t + 1 < T:
                shifted[:, t, : S // 2] = c[:, t + 1, : S // 2]
            if t - 1 >= 0:
                shifted[:, t, S // 2 :] = c[:, t - 1, S // 2 :]
        frames = x.permute(0, 2, 3, 4, 1).reshape(B * T, h * w, S)
        tokens = torch.cat([shifted.reshape(B * T, 1, S), frames + pos], dim=1)
        if self.placement == "pre":
            tokens = self.ln_1(tokens)
            out = self.attn(tokens[:, 1:], tokens, tokens, need_weights=False)[0]
        else:
            out = self.ln_1(self.attn(tokens[:, 1:], tokens, tokens, need_weights=False)[0])
        x = x + out.reshape(B, T, h, w, S).permute(0, 4, 1, 2, 3)

        if self.placement == "pre":
            return x + self._mlp(self.bn_2(x))
        return x + self.bn_2(self._mlp(x))

    def _mlp(self, x):
        return self.mlp(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class TextbookSideNetwork(nn.Module):
    def __init__(self, backbone_width, side_width, num_layers, patch_size, num_patches, norm_placement="pre"):
        super().__init__()
        D, S, P = backbone_width, side_width, patch_size
        self.placement = norm_placement
        self.stem = nn.Conv3d(3, S, (3, P, P), stride=(1, P, P), padding=(1, 0, 0))
        self.stem_bn = nn.BatchNorm3d(S)
        self.pos = nn.Parameter(torch.empty(num_patches, S))
        self.norms = nn.ModuleList(nn.LayerNorm(D if norm_placement == "pre" else S) for _ in range(num_layers))
        self.linears = nn.ModuleList(nn.Linear(D, S) for _ in range(num_layers))
        self.blocks = nn.ModuleList(TextbookBlock(S, norm_placement) for _ in range(num_layers))
        self.post_bn = nn.BatchNorm3d(S) if norm_placement == "pre" else None

    def forward(self, clips, layer_tokens):
        """Clips (B, T, 3, H, W), H and W in pixels, and tokens (B, T, 1 + N, D) for each layer -> (B, S)."""
        x = self.stem_bn(self.stem(clips.permute(0, 2, 1, 3, 4)))
        B, S, T, h, w = x.shape
        for norm, linear, block, tokens in zip(self.norms, self.linears, self.blocks, layer_tokens, strict=True):
            z = linear(norm(tokens)) if self.placement == "pre" else norm(linear(tokens))
            z_patches = z[:, :, 1:].reshape(B, T, h, w, S).permute(0, 4, 1, 2, 3)
            x = block(0.5 * x + 0.5 * z_patches, z[:, :, 0], self.pos)
        if self.post_bn is not None:
            x = self.post_bn(x)
        return x.mean(dim=(2, 3, 4))


def textbook_name(name):
    """The name in TextbookSideNetwork of a tensor of modules.side_network.SideNetwork."""
    parts = name.split(".")
    if parts[0] == "projections":
        return ".".join([{"norm": "norms", "linear": "linears"}[parts[2]], parts[1], *parts[3:]])
    for ours, theirs in (
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj.", "attn.out_proj."),
        ("mlp.fc1.", "mlp.0."),
        ("mlp.fc2.", "mlp.2."),
    ):
        name = name.replace(ours, theirs)
    return name


def textbook_of(side, **sizes):
    """The textbook form of a side network, with copies of its tensors, in the same mode."""
    textbook = TextbookSideNetwork(**sizes).to(next(side.parameters()).dtype).train(side.training)
    textbook.load_state_dict({textbook_name(name): tensor for name, tensor in side.state_dict().items()})
    return textbook
