"""The masked auto-encoder: a ViT on the visible patches and a small decoder (He et al. 2022, models_mae.py)."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from tinymim_jax.experiment import config
from tinymim_jax.models import layers, posembed, vit


@flax.struct.dataclass
class MAEOutput:
    """pred [B, L, P] for every patch; is_masked [B, L] bool, True where the encoder did not look."""

    pred: jax.Array
    is_masked: jax.Array
    encoded: vit.ViTOutput


class Decoder(nn.Module):
    """Mask tokens put back in place, a few narrow blocks, one linear layer to pixels."""

    width: int
    depth: int
    num_heads: int
    patch_values: int
    dtype: str
    attention: str

    @nn.compact
    def __call__(self, tokens: jax.Array, restore: jax.Array) -> jax.Array:
        """Visible tokens [B, 1 + K, D] and restore [B, L] -> pixels [B, L, P], float32."""
        dtype = jnp.dtype(self.dtype)
        b, num_patches = restore.shape
        grid = round(num_patches**0.5)
        pos = self.param("pos_embed", lambda _: jnp.asarray(posembed.sincos(grid, self.width))).astype(dtype)
        mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width)).astype(dtype)
        x = nn.Dense(self.width, kernel_init=layers.xavier, dtype=dtype, name="embed")(tokens)
        masks = jnp.broadcast_to(mask_token, (b, num_patches - (x.shape[1] - 1), self.width))
        patches = permute(jnp.concatenate([x[:, 1:], masks], axis=1), restore)
        x = jnp.concatenate([x[:, :1], patches], axis=1) + pos
        for i in range(1, self.depth + 1):
            block = layers.Block(self.num_heads, 4 * self.width, 0.0, dtype, self.attention, name=f"block{i}")
            x, _ = block(x, False)
        x = layers.layer_norm(dtype, "norm")(x[:, 1:])
        pred = nn.Dense(self.patch_values, kernel_init=layers.xavier, dtype=dtype, name="pred")(x)
        return pred.astype(jnp.float32)


class MAE(nn.Module):
    """Encoder and decoder; parameters under `encoder` and `decoder`."""

    encoder: vit.VisionTransformer
    decoder: Decoder
    mask_ratio: float

    def __call__(self, images: jax.Array, noise: jax.Array, *, train: bool = False) -> MAEOutput:
        """Normalised images [B, S, S, 3]; noise [B, L], uniform: the patches with the smallest are kept."""
        keep, restore, is_masked = mask_by_noise(noise, self.mask_ratio)
        encoded = self.encoder(images, keep=keep, train=train)
        return MAEOutput(self.decoder(encoded.tokens, restore), is_masked, encoded)


def mask_by_noise(noise: jax.Array, mask_ratio: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """noise [B, L] -> keep [B, K] (K = int(L (1 - ratio))), restore [B, L], is_masked [B, L] bool."""
    num_keep = int(noise.shape[1] * (1 - mask_ratio))
    shuffle = jnp.argsort(noise, axis=1)
    restore = jnp.argsort(shuffle, axis=1)
    return shuffle[:, :num_keep], restore, restore >= num_keep


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array) -> jax.Array:
    """Rows of x [B, L, D] in `order` [B, L], each row once.

    The gradient of a gather is a scatter, which is slow; that of a permutation is the inverse permutation.
    """
    return jnp.take_along_axis(x, order[..., None], axis=1)


permute.defvjp(
    lambda x, order: (permute(x, order), order),
    lambda order, grad: (permute(grad, jnp.argsort(order, axis=1)), None),
)


def build(cfg: config.ViT, task: config.Mae) -> MAE:
    """The module that a stage's model and task describe."""
    dec = task.decoder
    decoder = Decoder(dec.width, dec.depth, dec.num_heads, 3 * cfg.patch_size**2, cfg.dtype, cfg.attention)
    return MAE(vit.build(cfg), decoder, task.mask_ratio)
