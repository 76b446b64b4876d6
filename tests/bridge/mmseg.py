"""UPerNet in PyTorch with the names of TinyMIM's released files of segmentation, which are mmseg's (spec E.5 and I.2)."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.torch_files import build
from tinymim_jax.models.posembed import relative_index


class Attention(nn.Module):
    def __init__(self, width, heads, grid, front):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        rows = (2 * grid - 1) ** 2 + 3 * front
        self.relative_position_bias_table = nn.Parameter(0.5 * torch.randn(rows, heads))
        self.register_buffer("relative_position_index", torch.tensor(relative_index(grid, front)).long())

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        shares = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias).softmax(-1)
        return self.proj((shares @ v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, *kinds):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, *kinds), Mlp(width)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.rand(width) + 0.5) for _ in range(2))

    def forward(self, x):
        x = x + self.gamma_1 * self.attn(self.norm1(x))
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class Backbone(nn.Module):
    """With `star`, TinyMIM*-T's: a second token, maps of four times the width, the last behind a layer of 40."""

    def __init__(self, width, depth, heads, grid, patch, taps, star):
        super().__init__()
        self.grid, self.taps, self.star, self.front = grid, taps, star, 1 + star
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        if star:
            self.dist_token = nn.Parameter(torch.randn(1, 1, width))
            self.conv1x1 = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 40), nn.GELU())
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1, self.front + grid**2, width))
        self.blocks = nn.ModuleList([Block(width, heads, grid, self.front) for _ in range(depth)])
        inner, outer = (2 * width, 4 * width) if star else (width, width)
        up = lambda *sizes: nn.ConvTranspose2d(*sizes, 2, 2)  # noqa: E731
        self.fpn1 = nn.Sequential(up(width, inner), nn.BatchNorm2d(inner), nn.GELU(), up(inner, outer))
        self.fpn2 = nn.Sequential(up(width, outer))
        self.fpn3 = nn.Conv2d(width, outer, 1) if star else nn.Identity()
        self.fpn4 = nn.Sequential(nn.Conv2d(40, outer, 3, 2, 1)) if star else nn.MaxPool2d(2)

    def forward(self, images):
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        tokens = [self.cls_token, *([self.dist_token] if self.star else [])]
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in tokens), x], dim=1) + self.pos_embed
        maps = []
        for i, block in enumerate(self.blocks, 1):
            x = block(x)
            if i in self.taps:
                y = self.conv1x1(x) if self.star and i == len(self.blocks) else x
                maps.append(y[:, self.front :].transpose(1, 2).unflatten(2, (self.grid, self.grid)))
        levels = self.fpn1, self.fpn2, self.fpn3, self.fpn4
        return [level(x) for level, x in zip(levels, maps, strict=True)]


class ConvModule(nn.Module):
    def __init__(self, inputs, outputs, size):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def like(x, other):
    return F.interpolate(x, other.shape[2:], mode="bilinear", align_corners=False)


class UPerHead(nn.Module):
    def __init__(self, inputs, width, classes):
        super().__init__()
        self.conv_seg = nn.Conv2d(width, classes, 1)
        pools = [nn.Sequential(nn.AdaptiveAvgPool2d(n), ConvModule(inputs, width, 1)) for n in (1, 2, 3, 6)]
        self.psp_modules = nn.ModuleList(pools)
        self.bottleneck = ConvModule(inputs + 4 * width, width, 3)
        self.lateral_convs = nn.ModuleList([ConvModule(inputs, width, 1) for _ in range(3)])
        self.fpn_convs = nn.ModuleList([ConvModule(width, width, 3) for _ in range(3)])
        self.fpn_bottleneck = ConvModule(4 * width, width, 3)

    def forward(self, maps):
        top = maps[-1]
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps[:-1], strict=True)]
        levels.append(self.bottleneck(torch.cat([top, *(like(pool(top), top) for pool in self.psp_modules)], dim=1)))
        for i in (2, 1, 0):
            levels[i] = levels[i] + like(levels[i + 1], levels[i])
        levels[:3] = [conv(x) for conv, x in zip(self.fpn_convs, levels[:3], strict=True)]
        return self.conv_seg(self.fpn_bottleneck(torch.cat([like(x, levels[0]) for x in levels], dim=1)))


class FCNHead(nn.Module):
    def __init__(self, inputs, width, classes):
        super().__init__()
        self.conv_seg = nn.Conv2d(width, classes, 1)
        self.convs = nn.ModuleList([ConvModule(inputs, width, 3)])

    def forward(self, maps):
        return self.conv_seg(self.convs[0](maps[2]))


class EncoderDecoder(nn.Module):
    def __init__(self, width=24, depth=4, heads=3, grid=4, patch=8, taps=(1, 2, 3, 4), star=False, classes=5):
        super().__init__()
        self.backbone = Backbone(width, depth, heads, grid, patch, taps, star)
        channels = 4 * width if star else width
        self.decode_head = UPerHead(channels, 16, classes)
        self.auxiliary_head = FCNHead(channels, 12, classes)

    def forward(self, images):
        """[B, 3, S, S] -> logits of both heads, [B, C, h, w]."""
        maps = self.backbone(images)
        return self.decode_head(maps), self.auxiliary_head(maps)


def write(path, seed=0, **sizes):
    """A checkpoint as mmcv's runner writes it; returns its model."""
    model = build(lambda: EncoderDecoder(**sizes), seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    palette = [[i, 2 * i, 3 * i] for i in range(5)]
    meta = {
        "mmcv_version": "1.3.0",
        "iter": 160000,
        "CLASSES": ("wall", "sky", "tree", "road", "bed "),
        "PALETTE": palette,
    }
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": []}
    torch.save({"meta": meta, "state_dict": model.state_dict(), "optimizer": optimizer}, path)
    return model
