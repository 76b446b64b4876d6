import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import reference
from tinymim_jax.objectives.relation_kl import relation_kl

B, N, H = 2, 5, 3


def pair(seed, width=4, scale=1.5):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(0, scale, (B, N, H, width)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize(("teacher_width", "student_width"), [(4, 4), (8, 3), (3, 6)])
def test_against_float64(teacher_width, student_width):
    teacher, student = pair(0, teacher_width), pair(1, student_width)
    out = relation_kl(teacher, student)
    assert out.shape == (B,)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out.mean(), reference.relation_kl(teacher, student), rtol=1e-5)
    for i in range(B):  # image by image
        one = [tuple(x[i : i + 1] for x in p) for p in (teacher, student)]
        np.testing.assert_allclose(out[i], reference.relation_kl(*one), rtol=1e-5)


def test_zero_when_equal_and_only_then():
    np.testing.assert_allclose(relation_kl(pair(0), pair(0)), 0, atol=1e-6)
    assert (relation_kl(pair(0), pair(1)) > 0.01).all()


def test_it_is_not_symmetric():
    a, b = pair(0), pair(1)
    assert not np.allclose(relation_kl(a, b), relation_kl(b, a), rtol=1e-2)
    # A teacher that looks at one token only: KL is -log P of that token.
    sharp = (np.zeros((1, 2, 1, 1), np.float32) + 40, np.array([1, -1], np.float32).reshape(1, 2, 1, 1))
    flat = (np.zeros((1, 2, 1, 1), np.float32), np.zeros((1, 2, 1, 1), np.float32))
    np.testing.assert_allclose(relation_kl(sharp, flat), np.log(2), rtol=1e-5)


def test_every_token_counts_the_class_token_too():
    teacher, student = pair(0), pair(1)
    base = relation_kl(teacher, student)
    for which in range(2):
        for token in range(N):
            moved = tuple(x.copy() for x in student)
            moved[which][:, token] += 1
            assert (np.abs(relation_kl(teacher, moved) - base) > 1e-4).all()


grads = jax.jit(jax.grad(lambda t, s: relation_kl(t, s).mean(), argnums=(0, 1)))


def test_no_gradient_reaches_the_teacher():
    to_teacher, to_student = grads(pair(0), pair(1))
    assert not np.any(to_teacher)
    assert all(np.any(g) for g in to_student)


def test_gradient_against_finite_differences():
    teacher, student = pair(0, 6), pair(1, 3)
    expected = [np.zeros(x.shape) for x in student]
    for which, g in enumerate(expected):
        for index in np.ndindex(g.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [reference.f64(x).copy() for x in student]
                moved[which][index] += step
                ends.append(reference.relation_kl(teacher, moved))
            g[index] = (ends[0] - ends[1]) / 2e-5
    for actual, wanted in zip(grads(teacher, student)[1], expected, strict=True):
        reference.close(actual, wanted, 1e-4)


def test_gradient_when_both_operands_are_one():
    teacher, (v, _) = pair(0), pair(1)
    out = jax.grad(lambda x: relation_kl(teacher, (x, x)).sum())(v)
    both = jax.grad(lambda a, b: relation_kl(teacher, (a, b)).sum(), argnums=(0, 1))(v, v)
    reference.close(out, np.add(*both))


@pytest.mark.parametrize("gap", [200.0, 1000.0])
def test_finite_where_softmax_underflows(gap):
    rng = np.random.default_rng(0)
    key = np.zeros((1, 3, 1, 1), np.float32)
    key[0, 0] = gap
    one = np.ones((1, 3, 1, 1), np.float32)
    flat = tuple(rng.normal(size=(1, 3, 1, 1)).astype(np.float32) for _ in range(2))
    assert jax.nn.softmax(jnp.array([gap, 0.0]))[1] == 0
    for teacher, student in ((flat, (one, key)), ((one, key), flat), ((one, key), (one, key[:, ::-1].copy()))):
        value = relation_kl(teacher, student)
        np.testing.assert_allclose(value, reference.relation_kl(teacher, student), rtol=1e-5)
        for g in grads(teacher, student)[1]:
            assert np.isfinite(g).all()
    # Not driven to 0 by an underflow: log P is off by the gap, and the gradient with respect to key 0 pulls it down.
    assert relation_kl(flat, (one, key))[0] > gap / 10


def test_bfloat16_loss_is_float32():
    low = [tuple(jnp.asarray(x, jnp.bfloat16) for x in pair(s)) for s in (0, 1)]
    out = relation_kl(*low)
    assert out.dtype == jnp.float32
    exact = reference.relation_kl(*[tuple(np.asarray(x, np.float32) for x in p) for p in low])
    np.testing.assert_allclose(out.mean(), exact, rtol=1e-4)  # E 4: the scale is exact


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_batch_tokens_and_heads_must_agree(axis):
    smaller = tuple(np.delete(x, 0, axis=axis) for x in pair(1))
    with pytest.raises(AssertionError):
        relation_kl(pair(0), smaller)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("tokens", "heads", "widths", "rows"),
    [
        (17, 3, (5, 7), 4),
        (17, 3, (5, 7), None),
        (65, 1, (24, 9), 64),
        (197, 3, (64, 24), 50),
        (197, 5, (32, 13), None),
        (1025, 1, (16, 11), None),
    ],
)
def test_blocks_of_rows_against_float64(tokens, heads, widths, rows, dtype):
    """Value and gradient, also where the last block is not full."""
    rng = np.random.default_rng(0)
    teacher, student = (
        tuple(jnp.asarray(rng.normal(0, 1.3, (1, tokens, heads, width)), dtype) for _ in range(2)) for width in widths
    )
    value, found = jax.value_and_grad(lambda s: relation_kl(teacher, s, rows).mean())(student)
    exact = [[reference.f64(np.asarray(x, np.float32)) for x in p] for p in (teacher, student)]
    np.testing.assert_allclose(value, reference.relation_kl(*exact), rtol=1e-5 if dtype == "float32" else 1e-4)
    for actual, wanted in zip(found, reference_gradient(*exact), strict=True):
        assert actual.dtype == dtype
        error = np.abs(np.asarray(actual, np.float64) - wanted).max() / np.abs(wanted).max()
        assert error < (1e-5 if dtype == "float32" else 2e-2)  # bfloat16: P - T is rounded before the products


def reference_gradient(teacher, student):
    """By hand, float64: (P - T) / (H N sqrt(E)) times the other operand."""

    def relation(a, b):
        logits = np.einsum("bnhe,bmhe->bhnm", a, b) / np.sqrt(a.shape[-1])
        e = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    q, k = student
    d = (relation(q, k) - relation(*teacher)) / (q.shape[1] * q.shape[2] * np.sqrt(q.shape[-1]))
    return np.einsum("bhnm,bmhe->bnhe", d, k), np.einsum("bhnm,bnhe->bmhe", d, q)


def test_more_rows_than_tokens_are_all_of_them():
    def program(rows):
        pair = [jax.ShapeDtypeStruct((2, 9, 3, 4), "float32")] * 2
        return jax.jit(lambda t, s: relation_kl(t, s, rows)).lower(pair, pair).as_text()

    assert program(1000) == program(9) != program(8)


def test_memory_grows_with_the_tokens_and_not_with_their_square():
    def extra(tokens):
        arrays = [tuple(jax.ShapeDtypeStruct((1, tokens, 2, 8), jnp.float32) for _ in range(2)) for _ in range(2)]
        step = jax.jit(jax.value_and_grad(lambda s, t: relation_kl(t, s).mean()))
        return step.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    assert extra(4096) < 2.3 * extra(2048)
    assert extra(4096) < 0.2 * 2 * 4096**2 * 4  # a fifth of one relation


def test_off_a_tpu_the_kernel_is_not_asked_for():
    plain, asked = (relation_kl(pair(0), pair(1), kernel=kernel) for kernel in ("xla", "pallas"))
    np.testing.assert_array_equal(plain, asked)
    ours, theirs = (
        jax.grad(lambda s, kernel=kernel: relation_kl(pair(0), s, kernel=kernel).sum())(pair(1))
        for kernel in ("xla", "pallas")
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
