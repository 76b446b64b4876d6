"""Vision Transformer under the official MAE state-dict layout, with every block's queries, keys and values in reach."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


@dataclass
class Config:
    """Shape of a ViT; spec A.2 (heads), A.4 and A.5 (drop path), A.7 (dist_token, neck), B.3 (layout)."""

    width: int
    depth: int
    num_heads: int
    last_block_heads: int | None = None  # None: num_heads
    mlp_ratio: float = 4.0
    image_size: int = 224
    patch_size: int = 16
    num_classes: int = 0  # 0: no head
    pool: str = "cls"  # "cls": norm, CLS token; "mean": un-normed patch tokens, mean, fc_norm
    dist_token: bool = False
    neck: int = 0  # width of TinyMIM*'s extra layer before the classifier
    drop_path: float = 0.0
    drop_path_shape: str = "constant"  # or "linear"
    norm_eps: float = 1e-6

    def __post_init__(self):
        if self.pool not in ("cls", "mean") or self.drop_path_shape not in ("constant", "linear"):
            raise ValueError(f"pool {self.pool!r} or drop_path_shape {self.drop_path_shape!r} is unknown")
        if self.neck and self.pool != "mean":
            raise ValueError("a neck goes with pool 'mean' only: the layout has no final norm")

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size


class BlockTrace(NamedTuple):
    """What one block computed: q, k, v [B, H, N, E] and its output [B, N, D] (None: stopped after q, k, v)."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor | None


class Output(NamedTuple):
    """tokens [B, N, D] (normed if pool is "cls"; width `neck` if there is one), trace per block, logits [B, C]."""

    tokens: Tensor
    trace: list[BlockTrace]
    logits: Tensor | None


def sincos(grid: int, width: int) -> Tensor:
    """Fixed position table [1, 1 + grid * grid, width]: zeros for CLS, column half, row half (spec B.1)."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # [grid, width / 2]
    table = torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), table])[None].float()


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [B, L, D] at index [B, K], sample by sample: [B, K, D]."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weight and zero bias if `module` is a Linear (spec A.3); for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def drop_rates(cfg: Config) -> list[float]:
    """Drop-path rate of each block: flat but for the last (spec A.4), or a ramp from 0 (spec A.5)."""
    if cfg.drop_path_shape == "linear":
        return torch.linspace(0, cfg.drop_path, cfg.depth, dtype=torch.float64).tolist()
    return [cfg.drop_path] * (cfg.depth - 1) + [0.0]


class DropPath(nn.Module):
    """Zeroes a residual branch [B, N, D] for whole samples and scales the rest by 1 / (1 - rate) (spec A.4)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]; the identity outside training."""
        if not self.training or self.rate == 0:
            return x
        return x * x.new_empty(len(x), 1, 1).bernoulli_(1 - self.rate) / (1 - self.rate)


class PatchEmbed(nn.Module):
    """Non-overlapping patches as one strided convolution."""

    def __init__(self, width: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.data.view(width, -1))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, L, D], patches in row-major order."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention whose fused projection is ordered (q, k, v), each head-major (spec A.2)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, D] -> queries, keys, values, each [B, H, N, E]."""
        batch, tokens, width = x.shape
        heads = self.qkv(x).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(E)) v, heads joined and projected: [B, N, D]."""
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linears with an exact (erf) GELU between them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block that hands out its queries, keys and values."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float = 4.0, norm_eps: float = 1e-6, drop: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop)

    def forward(self, x: Tensor) -> BlockTrace:
        """[B, N, D] -> q, k, v and the block's output."""
        q, k, v = self.attn.split(self.norm1(x))
        x = x + self.drop_path(self.attn(q, k, v))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return BlockTrace(q, k, v, x)


class ViT(nn.Module):
    """ViT with the keys and shapes of spec B.3; positions are trained only where there is a head (spec A.3, A.5)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.cls_token = nn.Parameter(torch.randn(1, 1, cfg.width) * 0.02)
        if cfg.dist_token:
            self.dist_token = nn.Parameter(torch.randn(1, 1, cfg.width) * 0.02)
        positions = sincos(cfg.grid, cfg.width)
        if cfg.dist_token:
            positions = torch.cat([torch.zeros(1, 1, cfg.width), positions], dim=1)
        self.pos_embed = nn.Parameter(positions, requires_grad=cfg.num_classes > 0)
        self.patch_embed = PatchEmbed(cfg.width, cfg.patch_size)
        heads = [cfg.num_heads] * (cfg.depth - 1) + [cfg.last_block_heads or cfg.num_heads]
        blocks = zip(heads, drop_rates(cfg), strict=True)
        self.blocks = nn.ModuleList(Block(cfg.width, h, cfg.mlp_ratio, cfg.norm_eps, rate) for h, rate in blocks)
        if cfg.neck:
            self.conv1x1 = nn.Sequential(nn.LayerNorm(cfg.width, eps=1e-5), nn.Linear(cfg.width, cfg.neck), nn.GELU())
        width = cfg.neck or cfg.width
        setattr(self, "norm" if cfg.pool == "cls" else "fc_norm", nn.LayerNorm(width, eps=cfg.norm_eps))
        self.apply(init_linear)
        if cfg.num_classes:
            for name in ("head", "head_dist") if cfg.dist_token else ("head",):
                setattr(self, name, nn.Linear(width, cfg.num_classes))
                nn.init.trunc_normal_(getattr(self, name).weight, std=2e-5)
                nn.init.zeros_(getattr(self, name).bias)

    def embed(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """[B, 3, S, S] and optional kept patches [B, K] -> tokens [B, N, D], CLS (and DIST) first (spec B.1, A.7)."""
        first = torch.cat([self.cls_token, self.dist_token], dim=1) if self.cfg.dist_token else self.cls_token
        count = first.shape[1]
        patches = self.patch_embed(images) + self.pos_embed[:, count:]
        if keep is not None:
            patches = take(patches, keep)
        return torch.cat([(first + self.pos_embed[:, :count]).expand(len(images), -1, -1), patches], dim=1)

    def encode(self, images: Tensor, keep: Tensor | None = None) -> tuple[Tensor, list[BlockTrace]]:
        """All blocks, then `norm` or the neck where the model has one: tokens [B, N, D] and a trace per block."""
        x, trace = self.embed(images, keep), []
        for block in self.blocks:
            trace.append(block(x))
            x = trace[-1].out
        if self.cfg.pool == "cls":
            x = self.norm(x)
        return (self.conv1x1(x) if self.cfg.neck else x), trace

    def qkv_at(self, images: Tensor, block: int, keep: Tensor | None = None) -> BlockTrace:
        """q, k, v of a block (1-based) without computing anything past them; `out` is None (spec A.1)."""
        x = self.embed(images, keep)
        for earlier in self.blocks[: block - 1]:
            x = earlier(x).out
        last = self.blocks[block - 1]
        return BlockTrace(*last.attn.split(last.norm1(x)), None)

    def classify(self, tokens: Tensor) -> Tensor:
        """Tokens of `encode` -> logits [B, C]; with a DIST token, the mean of the two heads (spec A.5, A.7)."""
        patches = tokens[:, 1 + self.cfg.dist_token :]
        logits = self.head(tokens[:, 0] if self.cfg.pool == "cls" else self.fc_norm(patches.mean(dim=1)))
        return (logits + self.head_dist(tokens[:, 1])) / 2 if self.cfg.dist_token else logits

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Output:
        """[B, 3, S, S] and optional kept patches [B, K] -> tokens, trace, logits (None without classes)."""
        tokens, trace = self.encode(images, keep)
        return Output(tokens, trace, self.classify(tokens) if self.cfg.num_classes else None)
