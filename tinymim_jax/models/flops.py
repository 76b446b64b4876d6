"""FLOPs counted by hand: the matmuls that the method needs, a multiply-add counting as 2."""

from tinymim_jax.experiment.config import ViT


def num_tokens(cfg: ViT) -> int:
    """N: patches and what stands in front of them."""
    return (cfg.image_size // cfg.patch_size) ** 2 + 1 + cfg.dist_token


def embed(cfg: ViT, tokens: int | None = None) -> float:
    """Of the patch embedding of one image; `tokens` incl. those in front, None: all."""
    return 2.0 * ((tokens or num_tokens(cfg)) - 1 - cfg.dist_token) * 3 * cfg.patch_size**2 * cfg.width


def forward(cfg: ViT, *, tokens: int | None = None, target_block: int | None = None) -> float:
    """Of one image's forward pass, up to q, k, v of `target_block` if there is one."""
    n, d = tokens or num_tokens(cfg), cfg.width
    if target_block is not None:
        return embed(cfg, n) + (target_block - 1) * block(cfg, n) + 6.0 * n * d * d
    head = 2.0 * (cfg.neck or d) * cfg.num_classes * (1 + cfg.dist_token)
    return embed(cfg, n) + cfg.depth * block(cfg, n) + 2.0 * n * d * cfg.neck + head


def block(cfg: ViT, tokens: int) -> float:
    """Of one block's forward pass: qkv and projection, attention, MLP."""
    n, d = tokens, cfg.width
    return 8.0 * n * d * d + 4.0 * n * n * d + 4.0 * n * d * int(d * cfg.mlp_ratio)


def forward_backward(
    cfg: ViT, *, tokens: int | None = None, target_block: int | None = None, frozen_blocks: int = 0
) -> float:
    """Of one image's forward and backward pass; pixels get no gradient, nor does the embedding below frozen blocks."""
    whole = forward(cfg, tokens=tokens, target_block=target_block)
    if frozen_blocks:
        return 3 * whole - 2 * (embed(cfg, tokens) + frozen_blocks * block(cfg, tokens or num_tokens(cfg)))
    return 3 * whole - embed(cfg, tokens)


def relations(teacher: ViT, student: ViT, count: int) -> float:
    """Of `count` relations of one image: the teacher's forward, the student's forward and backward."""
    n = num_tokens(student)
    return count * 2.0 * n * n * (teacher.width + 3 * student.width)
