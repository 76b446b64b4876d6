"""ViT, MAE and their parts in float64 numpy, from the papers and torch's conventions; loops where they are clearer.

Weights are taken in torch's layout: a linear layer is y = x W^T + b, and the rows of the fused qkv weight are
(q, k, v), each head by head.
"""

import functools
import math
import re

import jax
import numpy as np

erf = np.vectorize(math.erf, otypes=[float])


def random_params(init, *args, seed=0):
    """Parameters in the shapes that `init(key, *args)` gives, none of which is 0 or 1 as by initialisation."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(init, jax.random.key(0)), *args)["params"]

    def draw(path, leaf):
        return rng.normal(path[-1].key == "scale", 0.2, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def f64(x):
    return np.asarray(x, np.float64)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def gelu(x):
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def linear(p, x):
    return x @ f64(p["kernel"]) + f64(p["bias"])


def layer_norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * f64(p["scale"]) + f64(p["bias"])


def patchify(images, p):
    """[B, S, S, 3] -> [B, L, p * p * 3], by a loop over (patch row, patch column, row, column, channel)."""
    b, size, _, channels = images.shape
    grid = size // p
    out = np.zeros((b, grid * grid, p * p * channels), images.dtype)
    for i in range(grid):
        for j in range(grid):
            for r in range(p):
                for c in range(p):
                    for ch in range(channels):
                        out[:, i * grid + j, (r * p + c) * channels + ch] = images[:, i * p + r, j * p + c, ch]
    return out


def sincos(grid, width):
    """[1 + grid^2, width]: CLS zeros; then sin and cos of the column, then sin and cos of the row."""
    table = np.zeros((1 + grid * grid, width))
    quarter = width // 4
    for row in range(grid):
        for col in range(grid):
            for k in range(quarter):
                omega = 1 / 10000 ** (k / quarter)
                token = table[1 + row * grid + col]
                token[k], token[quarter + k] = math.sin(col * omega), math.cos(col * omega)
                token[2 * quarter + k], token[3 * quarter + k] = math.sin(row * omega), math.cos(row * omega)
    return table


def split_heads(x, heads):
    """[B, N, D] -> list of [B, N, d], head-major."""
    d = x.shape[-1] // heads
    return [x[..., h * d : (h + 1) * d] for h in range(heads)]


def attention(p, x, heads):
    """Output [B, N, D] and q, k, v [B, N, H, d]."""
    width = x.shape[-1]
    weight = f64(p["qkv"]["kernel"]).reshape(width, 3 * width).T  # torch's [3D, D]
    qkv = x @ weight.T + f64(p["qkv"]["bias"]).reshape(3 * width)
    q, k, v = (split_heads(qkv[..., i * width : (i + 1) * width], heads) for i in range(3))
    d = width // heads
    out = [softmax(qh @ kh.swapaxes(1, 2) / math.sqrt(d)) @ vh for qh, kh, vh in zip(q, k, v, strict=True)]
    return linear(p["proj"], np.concatenate(out, axis=-1)), [np.stack(part, axis=2) for part in (q, k, v)]


def block(p, x, heads):
    """Everything on the way, as a dict with the names of a trace."""
    norm1 = layer_norm(p["norm1"], x)
    attn_out, (q, k, v) = attention(p["attn"], norm1, heads)
    mid = x + attn_out
    mlp_out = linear(p["mlp"]["fc2"], gelu(linear(p["mlp"]["fc1"], layer_norm(p["norm2"], mid))))
    after = {"attn_out": attn_out, "mid": mid, "mlp_out": mlp_out, "out": mid + mlp_out}
    return {"norm1": norm1, "q": q, "k": k, "v": v, **after}


def vit(p, images, patch_size, heads, keep=None):
    """heads: one number a block -> traces, block 1 first, of a ViT's blocks. keep [B, K]: the patches that it sees."""
    x = linear(p["patch_embed"], patchify(f64(images), patch_size)) + f64(p["pos_embed"])[:, 1:]
    if keep is not None:
        x = np.stack([x[i, keep[i]] for i in range(len(x))])
    cls = np.broadcast_to(f64(p["cls_token"]) + f64(p["pos_embed"])[:, :1], (len(x), 1, x.shape[-1]))
    x, traces = np.concatenate([cls, x], axis=1), []
    for i, h in enumerate(heads, 1):
        traces.append(block(p[f"block{i}"], x, h))
        x = traces[-1]["out"]
    return traces


def random_mask(noise, ratio):
    """noise [B, L] -> kept patches [B, K], lowest noise first, and mask [B, L], 1 where removed."""
    keep = int(noise.shape[1] * (1 - ratio))
    order = np.argsort(noise, axis=1)[:, :keep]
    mask = np.ones(noise.shape)
    for i, kept in enumerate(order):
        mask[i, kept] = 0
    return order, mask


def mae(p, images, noise, *, patch_size, ratio, heads, decoder_heads):
    """Predictions [B, L, P] for every patch, mask [B, L], normed tokens of the encoder, kept patches."""
    order, mask = random_mask(np.asarray(noise), ratio)
    trace = vit(p["encoder"], images, patch_size, heads, order)
    tokens = layer_norm(p["encoder"]["norm"], trace[-1]["out"])
    dec = p["pretext"]["decoder"]
    seen = linear(dec["embed"], tokens)
    x = np.tile(f64(dec["mask_token"]), (len(seen), 1 + noise.shape[1], 1))
    x[:, 0] = seen[:, 0]
    for i, kept in enumerate(order):
        x[i, 1 + kept] = seen[i, 1:]
    x = x + f64(dec["pos_embed"])
    for i, h in enumerate(decoder_heads, 1):
        x = block(dec[f"block{i}"], x, h)["out"]
    return linear(dec["pred"], layer_norm(dec["norm"], x))[:, 1:], mask, tokens, order


def mae_loss(pred, images, mask, patch_size, norm_pix):
    target = patchify(f64(images), patch_size)
    if norm_pix:
        variance = ((target - target.mean(-1, keepdims=True)) ** 2).sum(-1, keepdims=True) / (target.shape[-1] - 1)
        target = (target - target.mean(-1, keepdims=True)) / np.sqrt(variance + 1e-6)
    return ((((pred - target) ** 2).mean(-1)) * mask).sum() / mask.sum()


def relation_kl(teacher, student):
    """Mean over batch, heads and queries of the sum over keys of T (log T - log P); pairs of [B, N, H, E]."""

    def log_relation(a, b):
        b_, n, heads, d = a.shape
        logits = np.zeros((b_, heads, n, n))
        for h in range(heads):
            logits[:, h] = f64(a[:, :, h]) @ f64(b[:, :, h]).swapaxes(1, 2) / math.sqrt(d)
        return log_softmax(logits)

    log_t, log_p = log_relation(*teacher), log_relation(*student)
    return (np.exp(log_t) * (log_t - log_p)).sum() / np.prod(log_t.shape[:3])


def close(actual, expected, rtol=1e-5):
    """Relative to the largest value of the tensor."""
    actual, expected = f64(actual), f64(expected)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error < rtol, f"relative error {error:.2g}"


def times_called(text: str, target: str) -> int:
    """How often a program, as StableHLO, comes to `target`, when each function counts as often as it is called."""
    bodies = {re.search(r"@([\w.\-]+)", part)[1]: part for part in text.split("func.func ")[1:]}

    def count(name: str) -> int:
        called = re.findall(r"\bcall @([\w.\-]+)", bodies[name])
        return bodies[name].count(f"@{target}(") + sum(map(count, called))

    return count("main")
