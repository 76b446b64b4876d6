"""Operations of convolutional heads as torch has them: the same values, and the same initial parameters.

Shapes: B batch, H and W rows and columns, D channels in, C channels out.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.models.layers import torch_uniform
from tinymim_jax.runtime.interpolation import Method, resize_matrix


def resize(x: jax.Array, size: tuple[int, int], method: Method = "bilinear") -> jax.Array:
    """[B, H, W, C] -> [B, *size, C], as `interpolate` with align_corners=False and without antialiasing."""
    if x.shape[1:3] == size:
        return x
    return _by_matrices(x, *(resize_matrix(old, new, method) for old, new in zip(x.shape[1:3], size, strict=True)))


def adaptive_average_pool(x: jax.Array, bins: int) -> jax.Array:
    """[B, H, W, C] -> [B, bins, bins, C]: means over bins that may overlap, as `adaptive_avg_pool2d`."""
    return _by_matrices(x, *(_bin_matrix(old, bins) for old in x.shape[1:3]))


def _bin_matrix(source: int, bins: int) -> np.ndarray:
    """[bins, source] rows of weights: bin i is from floor(i source / bins) to ceil((i + 1) source / bins)."""
    weights = np.zeros((bins, source))
    for i in range(bins):
        begin, end = i * source // bins, -(-(i + 1) * source // bins)
        weights[i, begin:end] = 1 / (end - begin)
    return weights


def _by_matrices(x: jax.Array, of_rows: np.ndarray, of_columns: np.ndarray) -> jax.Array:
    """x [B, H, W, C] multiplied by [h, H] along its rows' axis and by [w, W] along its columns': [B, h, w, C].

    Both products are plainly batched, so that neither they nor their gradients move the channels from the end. Columns
    are first: their matrix is repeated for each row, of which there are fewer before rows are made more.
    """
    b, h, w, c = x.shape
    rows, columns = (jnp.asarray(matrix, x.dtype) for matrix in (of_rows, of_columns))
    columns = jnp.broadcast_to(columns, (b * h, *columns.shape))
    x = jnp.einsum("nvw,nwc->nvc", columns, x.reshape(b * h, w, c), precision="highest")
    rows = jnp.broadcast_to(rows, (b, *rows.shape))
    x = jnp.einsum("buh,bhk->buk", rows, x.reshape(b, h, -1), precision="highest")
    return x.reshape(b, len(of_rows), len(of_columns), c)


def max_pool2(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H // 2, W // 2, C], the largest of each 2 x 2; a last odd row or column is left out."""
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    above, below = (_larger(x[:, i::2, ::2], x[:, i::2, 1::2]) for i in (0, 1))
    return _larger(above, below)


def _larger(x: jax.Array, y: jax.Array) -> jax.Array:
    """x where both are the same, so that one of them has the gradient.

    That of `max` looks for its result among what it was given: 0 / 0, if a compiler makes one of these anew and rounds
    it otherwise.
    """
    return jnp.where((y > x) | jnp.isnan(y), y, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """[B, H, W, D] by a kernel [k, k, D, C] of odd k, padded by k // 2 zeros, -> [B, h, w, C]."""
    return _by_xla(x, kernel, stride)


def _by_xla(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    padding, names = [(len(kernel) // 2,) * 2] * 2, ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=names)


def _convolve_backward(stride: int, kept: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept

    def by_xla(x: jax.Array, grad: jax.Array) -> jax.Array:
        return jax.vjp(lambda kernel: _by_xla(x, kernel, stride), kernel)[1](grad)[0]

    def by_matmuls(x: jax.Array, grad: jax.Array) -> jax.Array:
        (_, h, w, d), side = x.shape, len(kernel)
        padded = jnp.pad(x, ((0, 0), (side // 2,) * 2, (side // 2,) * 2, (0, 0)))
        shifted = [padded[:, i : i + h, j : j + w].reshape(-1, d) for i in range(side) for j in range(side)]
        grad = grad.reshape(-1, grad.shape[-1])
        found = [jnp.matmul(part.T, grad, preferred_element_type=jnp.float32) for part in shifted]
        return jnp.stack(found).reshape(kernel.shape).astype(kernel.dtype)

    # Of maps 128 a side matmuls, one for each place in the kernel, take a third of the time of XLA's own on a CPU.
    on_cpu = by_matmuls if stride == 1 else by_xla
    for_kernel = jax.lax.platform_dependent(x, grad, cpu=on_cpu, default=by_xla)
    return jax.vjp(lambda x: _by_xla(x, kernel, stride), x)[1](grad)[0], for_kernel


convolve.defvjp(lambda x, kernel, stride: (convolve(x, kernel, stride), (x, kernel)), _convolve_backward)


class ChannelDropout(nn.Module):
    """Dropout of whole channels (Dropout2d); in training it needs the rng "drop_path"."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] -> the same."""
        drop = nn.Dropout(self.rate, broadcast_dims=(1, 2), rng_collection="drop_path")
        return drop(x, deterministic=not train)


class Conv(nn.Module):
    """A convolution with a kernel [size, size, D, C], padded by size // 2 zeros (Conv2d)."""

    features: int
    dtype: jnp.dtype
    size: int = 1
    stride: int = 1
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer | None = None  # None: torch's default
    bias_init: nn.initializers.Initializer | None = None
    out_dtype: jnp.dtype | None = None  # None: dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, D] -> [B, h, w, C]."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        default = torch_uniform(shape[-2] * self.size**2)
        kernel = self.param("kernel", self.kernel_init or default, shape).astype(self.dtype)
        x, out_dtype = x.astype(self.dtype), self.out_dtype or self.dtype
        if self.size == self.stride == 1:
            out = jnp.matmul(x.reshape(-1, shape[-2]), kernel[0, 0], preferred_element_type=out_dtype)
            out = out.reshape(*x.shape[:-1], self.features)
        else:
            out = convolve(x, kernel, self.stride).astype(out_dtype)
        if not self.use_bias:
            return out
        return out + self.param("bias", self.bias_init or default, (self.features,)).astype(out_dtype)


class UpConv(nn.Module):
    """A transposed convolution of 2 x 2 with stride 2, kernel [D, 2, 2, C] (ConvTranspose2d): one matmul."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, D] -> [B, 2 H, 2 W, C]."""
        b, h, w, d = x.shape
        init = torch_uniform(4 * self.features)  # torch counts the channels that come out
        kernel = self.param("kernel", init, (d, 2, 2, self.features)).astype(self.dtype)
        bias = self.param("bias", init, (self.features,)).astype(self.dtype)
        out = x.astype(self.dtype).reshape(-1, d) @ kernel.reshape(d, -1)
        out = out.reshape(b, h, w, 2, 2, self.features).swapaxes(2, 3)
        return out.reshape(b, 2 * h, 2 * w, self.features) + bias
