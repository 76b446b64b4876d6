import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import reference
from tinymim_jax.experiment.config import Relation
from tinymim_jax.objectives import relations

SHAPE = (2, 5, 3, 4)  # B, N, H, E


def normal(seed, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, SHAPE).astype(np.float32)


def logits(a, b):
    out = np.zeros((2, 3, 5, 5))
    for i, h, n, m in np.ndindex(out.shape):
        out[i, h, n, m] = reference.f64(a[i, n, h]) @ reference.f64(b[i, m, h]) / 4**0.5
    return out


def test_pair():
    trace = types.SimpleNamespace(q="q", k="k", v="v")
    assert relations.pair(trace, "qk") == ("q", "k")
    assert relations.pair(trace, "vv") == ("v", "v")
    assert relations.pair(trace, "qq") == ("q", "q")
    assert relations.pair(trace, "kk") == ("k", "k")


def test_the_config_offers_every_relation():
    choices = Relation.__annotations__["relations"].__args__[0].__args__
    assert set(choices) == relations.PAIRS.keys()


def test_logits_against_a_loop():
    a, b = normal(0), normal(1)
    out = relations.relation_logits(a, b)
    assert out.dtype == jnp.float32
    reference.close(out, logits(a, b))


def test_relation_is_a_softmax_over_keys():
    a, b = normal(0, 3.0), normal(1, 3.0)
    out = relations.relation(a, b)
    reference.close(out, reference.softmax(logits(a, b)))
    np.testing.assert_allclose(out.sum(axis=-1), 1, rtol=1e-5)


def test_the_class_token_is_query_and_key():
    a, b = normal(0), normal(1)
    assert relations.relation(a, b).shape == (2, 3, 5, 5)
    other = a.copy()
    other[:, 0] += 1
    changed = np.asarray(relations.relation_logits(other, b) != relations.relation_logits(a, b))
    assert changed[:, :, 0].all() and not changed[:, :, 1:].any()
    assert np.asarray(relations.relation_logits(a, other) != relations.relation_logits(a, a))[..., 0].all()


def test_bfloat16_products_are_summed_in_float32():
    a, b = (jnp.asarray(normal(s, 10.0), jnp.bfloat16) for s in (0, 1))
    out = relations.relation_logits(a, b)
    assert out.dtype == jnp.float32
    reference.close(out, logits(np.asarray(a, np.float32), np.asarray(b, np.float32)), 1e-5)  # E 4: the scale is exact


def test_shapes_are_asserted():
    with pytest.raises(AssertionError):
        relations.relation_logits(normal(0), normal(1)[:, :4])
    with pytest.raises(AssertionError):
        relations.relation_logits(normal(0)[0], normal(1)[0])


def test_bfloat16_inputs_are_scaled_in_float32():
    # 1 / sqrt(48) is not a bfloat16: scaling the inputs would bias every logit.
    a, b = (jax.random.normal(jax.random.key(i), (1, 5, 2, 48)).astype(jnp.bfloat16) for i in range(2))
    expected = np.einsum("bnhe,bmhe->bhnm", np.float64(a), np.float64(b)) / 48**0.5
    np.testing.assert_allclose(relations.relation_logits(a, b), expected, rtol=1e-5, atol=1e-5)
