import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import reference
from tinymim_jax.objectives import losses

reconstruction = functools.partial(losses.reconstruction, norm_pix_loss=False)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(1, 2, shape).astype(np.float32)


def test_normalize_patches_has_the_unbiased_variance():
    patches = normal(2, 3, 12)
    expected = np.zeros(patches.shape)
    for i, j in np.ndindex(2, 3):
        patch = reference.f64(patches[i, j])
        variance = sum((x - patch.mean()) ** 2 for x in patch) / 11
        expected[i, j] = (patch - patch.mean()) / np.sqrt(variance + 1e-6)
    reference.close(losses.normalize_patches(patches), expected, 3e-6)  # sums of 12: 14 roundings of 6e-8 each, twice


def test_normalize_patches_of_one_colour():
    patches = np.full((1, 2, 48), 0.7, np.float32)
    np.testing.assert_allclose(losses.normalize_patches(patches), 0, atol=1e-3)
    faint = np.tile(np.float32([0.001, -0.001]), 24)[None, None]  # a variance of 1e-6: eps halves it
    np.testing.assert_allclose(np.abs(losses.normalize_patches(faint)), (48 / 47 + 1) ** -0.5, rtol=1e-5)


def test_reconstruction_counts_masked_patches_only():
    pred, target = normal(3, 4, 6), normal(3, 4, 6, seed=1)
    is_masked = np.array([[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1]], bool)
    out = reconstruction(pred, target, is_masked)
    assert out.shape == (3,)
    error = ((reference.f64(pred) - reference.f64(target)) ** 2).mean(-1)
    np.testing.assert_allclose(out, [error[i][is_masked[i]].mean() for i in range(3)], rtol=1e-6)
    np.testing.assert_allclose(out.mean(), (error * is_masked).sum() / is_masked.sum(), rtol=1e-6)


def test_reconstruction_in_float32():
    pred = jnp.asarray(normal(1, 2, 6), jnp.bfloat16)
    out = reconstruction(pred, normal(1, 2, 6, seed=1), np.ones((1, 2), bool))
    assert out.dtype == jnp.float32
    expected = ((np.asarray(pred, np.float64) - normal(1, 2, 6, seed=1)) ** 2).mean()
    np.testing.assert_allclose(out, [expected], rtol=1e-6)


def test_reconstruction_asserts_shapes():
    with pytest.raises(AssertionError):
        reconstruction(normal(2, 4, 6), normal(2, 4, 5), np.ones((2, 4), bool))
    with pytest.raises(AssertionError):
        reconstruction(normal(2, 4, 6), normal(2, 4, 6), np.ones((2, 3), bool))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_distillation_is_deit_s(temperature):
    """losses.py of DeiT: KL of log-probabilities, summed, times t^2, over the number of logits."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 4, 7))

    def log_softmax(x):
        x = x / temperature
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    p, q = log_softmax(student), log_softmax(teacher)
    expected = (np.exp(q) * (q - p)).sum() * temperature**2 / student.size
    found = losses.soft_distillation(jnp.asarray(student), jnp.asarray(teacher), temperature)
    assert found.shape == (4,) and float(found.mean()) == pytest.approx(expected, rel=1e-5)
    assert np.allclose(losses.soft_distillation(jnp.asarray(student), jnp.asarray(student), temperature), 0, atol=1e-6)


@pytest.mark.parametrize("beta", [2.0, 0.5])
def test_smooth_l1_and_its_gradient_are_torch_s(beta):
    torch = pytest.importorskip("torch", reason="measured against PyTorch; install tinymim_jax[test]")
    pred, target = normal(3, 4, 6), normal(3, 4, 6, seed=1)
    pred[0, 0, :2] = target[0, 0, :2] + [beta, 0]  # where the two parts meet, and at the bottom
    theirs = torch.tensor(pred, requires_grad=True)
    value = torch.nn.functional.smooth_l1_loss(theirs, torch.tensor(target), beta=beta)
    value.backward()
    found = losses.smooth_l1(pred, target, beta)
    assert found.shape == (3,) and found.dtype == jnp.float32
    np.testing.assert_allclose(found.mean(), value.item(), rtol=1e-6)
    for i in range(3):  # image by image
        np.testing.assert_allclose(found[i], losses.smooth_l1(pred[i : i + 1], target[i : i + 1], beta)[0], rtol=1e-6)
    gradient = jax.grad(lambda x: losses.smooth_l1(x, target, beta).mean())(pred)
    np.testing.assert_allclose(gradient, theirs.grad, rtol=1e-5, atol=1e-8)
    assert {*np.sign(np.abs(pred - target) - beta).ravel()} >= {-1, 1}  # both parts are met


def test_smooth_l1_is_of_equal_shapes_and_in_float32():
    with pytest.raises(AssertionError):
        losses.smooth_l1(normal(2, 3), normal(2, 4), 1.0)
    assert losses.smooth_l1(jnp.asarray(normal(2, 3), jnp.bfloat16), normal(2, 3), 1.0).dtype == jnp.float32
