"""The relation loss and its gradient in float64, for the tests of its kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.models import reference
from tinymim_jax.objectives.kernels import per_device
from tinymim_jax.objectives.relation_kl import relation_kl


def operands(b, h, n, widths, dtype=jnp.float32, scale=1.5):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(0, scale, (b, h, n, e)), dtype) for e in (*widths[:1] * 2, *widths[1:] * 2)]


def run(kernels, *args, gradient=True):
    """What `kernels`, a module, makes of them in Pallas' interpreter."""
    return jax.jit(functools.partial(per_device, functools.partial(kernels.kl_sums, gradient, interpret=True)))(*args)


def exact(tq, tk, q, k):
    """KL summed over heads and queries [B], and its gradients by q and k, in float64."""
    tq, tk, q, k = (reference.f64(np.asarray(x, np.float32)) for x in (tq, tk, q, k))
    t, s = (a @ b.swapaxes(2, 3) / np.sqrt(a.shape[-1]) for a, b in ((tq, tk), (q, k)))
    kl = (reference.softmax(t) * (reference.log_softmax(t) - reference.log_softmax(s))).sum((1, 2, 3))
    d = (reference.softmax(s) - reference.softmax(t)) / np.sqrt(q.shape[-1])
    return kl, d @ k, d.swapaxes(2, 3) @ q


def check_against_pure_jax(kernels, n, dtype):
    """That `kernels`, a module, and `relation_kl` in pure JAX agree on value and gradient."""
    args = operands(2, 3, n, (24, 32), dtype)
    weights = jnp.array([0.5, 2.0])

    def loss(*pair):
        teacher, student = ([x.swapaxes(1, 2) for x in p] for p in (args[:2], pair))
        return jnp.sum(weights * relation_kl(teacher, student)) * 3 * n

    value, expected = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*args[2:])
    np.testing.assert_allclose(jnp.sum(weights * run(kernels, *args, gradient=False)[0]), value, rtol=1e-5)
    for grad, wanted in zip(run(kernels, *args)[1:], expected, strict=True):
        scaled = weights[:, None, None, None] * grad.astype(jnp.float32)
        reference.close(scaled, wanted.astype(jnp.float32), 1e-5 if dtype == jnp.float32 else 2**-7)


def check(kernels, args):
    """That value and gradients of `kernels`, a module, are right."""
    value, *grads = run(kernels, *args)
    kl, *expected = exact(*args)
    # Products of bfloat16 are exact in float32, so the value is as good as from float32.
    np.testing.assert_allclose(value, kl, rtol=1e-5)
    for x, grad, wanted in zip(args[2:], grads, expected, strict=True):
        assert grad.dtype == x.dtype
        # The difference of relations and the result are rounded to 8 bits each.
        reference.close(grad.astype(jnp.float32), wanted, 1e-5 if x.dtype == jnp.float32 else 2**-7)
