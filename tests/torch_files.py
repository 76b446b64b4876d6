"""Checkpoint files laid out like the public ones, at any size, with random contents.

Every function writes `path` and returns the model it holds, in eval mode. Settings that the kind of file fixes
(pooling, tokens, and 1000 classes where the kind has a head and `cfg` none) override those of `cfg`.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from tests.torch_optim import layer_decay_groups, make_adamw, param_groups, set_lr
from tinymim_jax.bridge.torch_reference.mae import MAE
from tinymim_jax.bridge.torch_reference.vit import ViT
from tinymim_jax.experiment import config
from tinymim_jax.experiment.config import Decoder

Model = TypeVar("Model", bound=nn.Module)


def randomise(model: nn.Module) -> None:
    """Noise on what initialisation leaves trivial: biases, LayerNorm affines, positions, classifier weights."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or "pos_embed" in name or name.startswith("head"):
                p.add_(torch.randn_like(p) * 0.05)


def build(make: Callable[[], Model], seed: int) -> Model:
    """make(), randomised, in eval mode and from `seed`; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        randomise(model)
    return model.eval()


def adamw_state(model: nn.Module, groups: list[dict], lr: float, betas: tuple[float, float]) -> dict:
    """State dict of an AdamW that has taken one step on made-up gradients; the model is left as it was."""
    optimizer = make_adamw(groups, lr=0.0, betas=betas)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3) if p.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()
    set_lr(optimizer, lr)
    return optimizer.state_dict()


def _save_weights(path: Path, model: Model) -> Model:
    torch.save({"model": model.state_dict()}, path)
    return model


def _save_run(path: Path, model: Model, optimizer: dict, args: Namespace) -> Model:
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    run = {"epoch": args.epochs - 1, "scaler": scaler | {"_growth_tracker": 0}, "args": args}
    torch.save({"model": model.state_dict(), "optimizer": optimizer, **run}, path)
    return model


def _encoder(cfg: config.ViT, seed: int) -> ViT:
    return build(lambda: ViT(replace(cfg, pool="cls", num_classes=0)), seed)


def _finetuned(path: Path, cfg: config.ViT, name: str, drop_path: float, seed: int) -> ViT:
    cfg = replace(cfg, pool="mean", num_classes=cfg.num_classes or 1000)
    model = build(lambda: ViT(cfg), seed)
    optim = {"blr": 5e-4, "lr": 2e-3, "min_lr": 1e-6, "weight_decay": 0.05, "layer_decay": 0.65, "warmup_epochs": 5}
    aug = {"aa": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "reprob": 0.25}
    size = {"input_size": cfg.image_size, "nb_classes": cfg.num_classes, "batch_size": 128, "epochs": 100}
    args = Namespace(model=name, drop_path=drop_path, global_pool=True, **optim, **aug, **size)
    groups = layer_decay_groups(model, args.weight_decay, args.layer_decay)
    return _save_run(path, model, adamw_state(model, groups, args.lr, (0.9, 0.999)), args)


def mae_encoder(path: Path, cfg: config.ViT, seed: int = 0) -> ViT:
    """`mae_pretrain_vit_*.pth`: {"model"}, the encoder only."""
    return _save_weights(path, _encoder(cfg, seed))


def mae_full(path: Path, cfg: config.ViT, decoder: Decoder | None = None, seed: int = 0) -> MAE:
    """`mae_visualize_vit_*.pth`: {"model"}, encoder and decoder (None: MAE's)."""
    return _save_weights(path, build(lambda: MAE(cfg, config.Mae(decoder=decoder or Decoder())), seed))


def mae_finetuned(path: Path, cfg: config.ViT, name: str = "vit_base_patch16", seed: int = 0) -> ViT:
    """MAE's fine-tuned file: no `norm`, but `fc_norm` and `head`, with the whole training record."""
    return _finetuned(path, cfg, name, 0.1, seed)


def tinymim_pretrained(path: Path, cfg: config.ViT, name: str = "tinymim_vit_base_patch16", seed: int = 0) -> ViT:
    """`TinyMIM-PT-*.pth`: the keys of an MAE encoder, unused last-block weights included."""
    model = _encoder(cfg, seed)
    optim = {"blr": 1.5e-4, "lr": 2.4e-3, "min_lr": 0.0, "weight_decay": 0.05, "warmup_epochs": 15, "accum_iter": 1}
    args = Namespace(model=name, input_size=cfg.image_size, batch_size=256, epochs=300, intermediate=18, **optim)
    groups = param_groups(model, args.weight_decay)
    return _save_run(path, model, adamw_state(model, groups, args.lr, (0.9, 0.95)), args)


def tinymim_finetuned(path: Path, cfg: config.ViT, name: str = "vit_base_patch16", seed: int = 0) -> ViT:
    """TinyMIM's fine-tuned file: the layout of MAE's."""
    return _finetuned(path, cfg, name, 0.2, seed)


def tinymim_star(path: Path, cfg: config.ViT, seed: int = 0) -> ViT:
    """TinyMIM*-T: {"model"} with dist_token, conv1x1, fc_norm, head and head_dist, no `norm`."""
    fixed = {"dist_token": True, "pool": "mean", "neck": cfg.neck or 1280, "num_classes": cfg.num_classes or 1000}
    return _save_weights(path, build(lambda: ViT(replace(cfg, **fixed)), seed))


def mae_lite(
    path: Path, cfg: config.ViT, prefix: str = "module.model.", decoder: Decoder | None = None, seed: int = 0
) -> MAE:
    """MAE-Lite's file: start_epoch, optimizer and a full MAE (decoder None: MAE-Tiny's) under `prefix`."""
    model = build(lambda: MAE(cfg, config.Mae(decoder=decoder or Decoder(96, 1, 3))), seed)
    weights = {prefix + key: value for key, value in model.state_dict().items()}
    optimizer = adamw_state(model, param_groups(model, 0.05), 2.4e-3, (0.9, 0.95))
    torch.save({"start_epoch": 400, "model": weights, "optimizer": optimizer}, path)
    return model


def deit(path: Path, cfg: config.ViT, seed: int = 0) -> ViT:
    """DeiT: {"model"} with `norm` and `head` on the CLS token."""
    return _save_weights(path, build(lambda: ViT(replace(cfg, pool="cls", num_classes=cfg.num_classes or 1000)), seed))


def deit_distilled(path: Path, cfg: config.ViT, seed: int = 0) -> ViT:
    """Distilled DeiT: as `deit`, and dist_token and head_dist."""
    return deit(path, replace(cfg, dist_token=True), seed)


def timm_safetensors(path: Path, cfg: config.ViT, seed: int = 0) -> ViT:
    """A hub `model.safetensors`: the bare keys of ViT(cfg)."""
    from safetensors.torch import save_file

    model = build(lambda: ViT(cfg), seed)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path, metadata={"format": "pt"})
    return model
