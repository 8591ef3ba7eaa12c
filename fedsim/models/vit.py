"""Vision transformer (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021): pre-norm blocks, CLS token.

vit-tiny-32  patch 4, width 96, 4 blocks: 0.46 M parameters, small images on a laptop
vit-tiny, vit-small, vit-base  patch 16; at 224x224 and 1000 classes 5,717,416, 22,050,664 and 86,567,656 parameters

Tensors have timm's names and shapes, so that its weights load as they are (``fedsim.models.weights``). The norm is
always LayerNorm (eps 1e-6), whatever ``model.norm`` says; the classifier sees the CLS token after the final norm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.errors import ConfigError
from fedsim.models import image_shape, register


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)  # [B, heads, T, C/h]
        # Written out, not torch's fused kernel: that one has no rule for vmap on a CPU.
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)  # [B, heads, T, T]
        return self.proj((weights @ v).transpose(1, 2).reshape(b, t, c))


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(nn.Module):
    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # [B, C, H, W] -> [B, patches, width]


class VisionTransformer(nn.Module):
    """Args: grid: patches down and across, row by row in the sequence after the CLS token."""

    def __init__(
        self, classes: int, channels: int, grid: tuple[int, int], patch: int, width: int, depth: int, heads: int
    ):
        super().__init__()
        self.grid = grid
        self.patch_embed = PatchEmbedding(channels, width, patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid[0] * grid[1], width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed  # [B, 1 + patches, width]
        return self.head(self.norm(self.blocks(x))[:, 0])


def _vit(name: str, patch: int, width: int, depth: int, heads: int) -> None:
    @register(name)
    def build(classes: int, shape: tuple[int, ...], norm: str) -> nn.Module:
        channels, h, w = image_shape(shape, patch)
        if h % patch or w % patch:
            raise ConfigError(
                f"model.name = '{name}': takes images of a multiple of {patch} pixels, the data are {h}x{w}"
            )
        return VisionTransformer(classes, channels, (h // patch, w // patch), patch, width, depth, heads)


_vit("vit-tiny-32", 4, 96, 4, 3)
_vit("vit-tiny", 16, 192, 12, 3)
_vit("vit-small", 16, 384, 12, 6)
_vit("vit-base", 16, 768, 12, 12)
