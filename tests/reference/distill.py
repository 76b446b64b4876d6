"""TinyMIM's relation distillation (paper Eq. 5 and 9, in the exact form of spec A.1)."""

import torch
from torch import Tensor

from .vit import BlockTrace, ViT


def scores(a: Tensor, b: Tensor) -> Tensor:
    """Scaled dot products a b^T / sqrt(E) of [B, H, N, E]: [B, H, N, N], keys last."""
    return a @ b.transpose(-2, -1) * a.shape[-1] ** -0.5


def relation(a: Tensor, b: Tensor) -> Tensor:
    """Softmax over the keys of `scores`: [B, H, N, N] (spec A.1, teacher side, 3)."""
    return scores(a, b).softmax(dim=-1)


def relation_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of two *scores* [B, H, N, N]: sum over keys, mean over batch, heads, queries (A.1)."""
    if teacher.shape != student.shape:
        raise ValueError(f"relations differ in shape: {tuple(teacher.shape)}, {tuple(student.shape)}")
    log_t, log_p = teacher.log_softmax(dim=-1), student.log_softmax(dim=-1)
    return (log_t.exp() * (log_t - log_p)).sum(dim=-1).mean()


def distill_loss(teacher: BlockTrace, student: BlockTrace) -> Tensor:
    """L = L_QK + L_VV of two blocks with the same number of heads and tokens (spec A.1)."""
    qk = relation_kl(scores(teacher.q, teacher.k), scores(student.q, student.k))
    vv = relation_kl(scores(teacher.v, teacher.v), scores(student.v, student.v))
    return qk + vv


def loss(teacher: ViT, teacher_block: int, student: ViT, clean: Tensor, jittered: Tensor) -> Tensor:
    """Teacher's block (1-based) on `clean`, without gradient, against the student's last on `jittered` [B, 3, S, S].

    Both stop at q, k, v of their block (spec A.1, A.4). The models' train or eval mode is the caller's.
    """
    with torch.no_grad():
        target = teacher.qkv_at(clean, teacher_block)
    return distill_loss(target, student.qkv_at(jittered, student.cfg.depth))
