"""AdamW, its parameter groups and its schedule."""

import math

import torch
from torch import nn

from tinymim_jax.bridge.torch_reference.vit import ViT


def lr_at(epoch: float, peak: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """Learning rate at epoch + step / steps_per_epoch: linear from 0, then half a cosine to min_lr."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that require a gradient."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def param_groups(model: nn.Module, weight_decay: float, skip: tuple[str, ...] = ()) -> list[dict]:
    """Pre-training groups: no decay for biases, ndim <= 1 and names in `skip`; cls_token is decayed."""
    decayed, rest = [], []
    for name, p in trainable(model):
        plain = p.ndim <= 1 or name.endswith(".bias") or name in skip
        (rest if plain else decayed).append(p)
    return [{"params": rest, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def layer_id(name: str, depth: int) -> int:
    """0 for the embedding, i + 1 for blocks.i, depth + 1 for everything else."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


def layer_decay_groups(model: ViT, weight_decay: float, layer_decay: float) -> list[dict]:
    """Fine-tuning groups with lr_scale = layer_decay^(depth + 1 - id); CLS, positions, 1-D undecayed."""
    groups: dict[tuple[int, bool], dict] = {}
    last = model.cfg.depth + 1
    for name, p in trainable(model):
        plain = p.ndim == 1 or name in ("pos_embed", "cls_token")  # timm 0.3.2: not dist_token
        i = layer_id(name, model.cfg.depth)
        decay = 0.0 if plain else weight_decay
        new = {"params": [], "weight_decay": decay, "lr_scale": layer_decay ** (last - i)}
        groups.setdefault((i, plain), new)["params"].append(p)
    return list(groups.values())


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group lr times its lr_scale (1 if it has none)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def make_adamw(groups: list[dict], lr: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW with eps 1e-8 on groups that carry their own weight_decay and, maybe, lr_scale."""
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, weight_decay=0.0)
    set_lr(optimizer, lr)
    return optimizer
