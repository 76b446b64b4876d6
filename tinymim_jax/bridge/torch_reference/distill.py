"""TinyMIM's relation distillation (the paper's equations 5 and 9)."""

import torch
from torch import Tensor

from tinymim_jax.bridge.torch_reference.vit import ViT


def relation_kl(teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor]) -> Tensor:
    """KL(teacher || student) of the softmaxes of a b^T / sqrt(E), each (a, b) [B, H, N, E].

    Sum over keys, mean over batch, heads and queries.
    """
    log_t, log_p = ((a @ b.transpose(-2, -1) * a.shape[-1] ** -0.5).log_softmax(dim=-1) for a, b in (teacher, student))
    return (log_t.exp() * (log_t - log_p)).sum(dim=-1).mean()


def loss(teacher: ViT, teacher_block: int, student: ViT, clean: Tensor, jittered: Tensor) -> Tensor:
    """L_QK + L_VV of the teacher's block (1-based) on `clean` and the student's last on `jittered` [B, 3, S, S].

    Both stop at q, k, v of their block, the teacher without gradient. The models' train or eval mode is the caller's.
    """
    with torch.no_grad():
        t = teacher.qkv_at(clean, teacher_block)
    s = student.qkv_at(jittered, student.cfg.depth)
    return relation_kl((t.q, t.k), (s.q, s.k)) + relation_kl((t.v, t.v), (s.v, s.v))
