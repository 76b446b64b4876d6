"""Reconstruction and classification losses, per image."""

import chex
import jax
import jax.numpy as jnp
import optax


def normalize_patches(patches: jax.Array) -> jax.Array:
    """Each patch [..., P] to mean 0 and variance 1 (unbiased, eps 1e-6), the target of `norm_pix_loss`."""
    mean = patches.mean(axis=-1, keepdims=True)
    var = patches.var(axis=-1, ddof=1, keepdims=True)
    return (patches - mean) * jax.lax.rsqrt(var + 1e-6)


def reconstruction(pred: jax.Array, patches: jax.Array, is_masked: jax.Array, *, norm_pix_loss: bool) -> jax.Array:
    """MAE's loss: squared error of the masked ones of `patches` [B, L, P], each normalised if `norm_pix_loss`; [B].

    Every image masks the same number of patches, so the mean of this over B is the batch's.
    """
    target = normalize_patches(patches) if norm_pix_loss else patches
    chex.assert_equal_shape([pred, target])
    chex.assert_equal_shape([pred, is_masked], dims=(0, 1))
    error = jnp.square(pred.astype(jnp.float32) - target).mean(axis=-1)
    return jnp.sum(error * is_masked, axis=1) / jnp.sum(is_masked, axis=1)


def is_beyond(labels: jax.Array, num_classes: int) -> jax.Array:
    """Labels [B] -> whether there is no such class; bool [B]. tfds has -1 where it has no label."""
    return (labels < 0) | (labels >= num_classes)


def pixel_cross_entropy(logits: jax.Array, mask: jax.Array, ignored: int) -> jax.Array:
    """-log softmax(logits) at each pixel's class, summed: [B, H, W, C] and [B, H, W] -> [B], float32."""
    chex.assert_equal_shape([logits[..., 0], mask])
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    counts = mask != ignored
    own = jnp.take_along_axis(log_p, jnp.where(counts, mask, 0)[..., None].astype(jnp.int32), axis=-1)[..., 0]
    return -jnp.where(counts, own, 0.0).sum(axis=(1, 2))


def soft_distillation(logits: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
    """t^2 KL(teacher || student) over classes at temperature t, divided by C: two [B, C] -> [B], float32.

    The scale is that of DeiT (losses.py), which divides the sum by the number of logits.
    """
    chex.assert_equal_shape([logits, teacher])
    log_p, log_q = (jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (logits, teacher))
    return temperature**2 * jnp.mean(jnp.exp(log_q) * (log_q - log_p), axis=-1)


def contrastive(queries: jax.Array, keys: jax.Array, is_valid: jax.Array, temperature: float) -> jax.Array:
    """2 t times the cross entropy of finding each query's own among all valid keys, two [B, C] -> [B] (MoCo v3).

    B is the whole batch, over all devices.
    """
    queries, keys = (
        x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24)) for x in (queries, keys)
    )
    logits = jnp.where(is_valid, jnp.einsum("nc,mc->nm", queries, keys) / temperature, -jnp.inf)
    own = jnp.sum(queries * keys, axis=-1) / temperature
    return 2 * temperature * (jax.nn.logsumexp(jnp.where(is_valid.any(), logits, 0), axis=-1) - own)


def mse(pred: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error: two [B, ...] -> [B], float32."""
    chex.assert_equal_shape([pred, target])
    error = jnp.square(pred.astype(jnp.float32) - target)
    return error.mean(axis=tuple(range(1, error.ndim)))


def smooth_l1(pred: jax.Array, target: jax.Array, beta: float) -> jax.Array:
    """Squared within beta of the target, linear beyond: two [B, ...] -> their means [B], float32 (TinyMIM Eq. 8)."""
    chex.assert_equal_shape([pred, target])
    values = optax.huber_loss(pred.astype(jnp.float32), target, delta=beta) / beta
    return values.mean(axis=tuple(range(1, values.ndim)))
