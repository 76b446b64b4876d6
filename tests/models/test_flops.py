import jax
import numpy as np
import pytest

from tinymim_jax.experiment import recipes
from tinymim_jax.experiment.config import ViT
from tinymim_jax.models import flops
from tinymim_jax.objectives.relation_kl import relation_kl

# Wide enough for the matmuls to be nearly all of XLA's count, which has the element-wise operations too.
WIDE = ViT(256, 3, 4, image_size=64, patch_size=8, pool="mean", num_classes=10)
BATCH = 2


def matmul(m, k, n):
    return 2 * m * k * n


def block(n, d, hidden):
    """(q, k, v; the rest)."""
    attention = matmul(n, d, n) + matmul(n, n, d) + matmul(n, d, d)
    return matmul(n, d, 3 * d), attention + matmul(n, d, hidden) + matmul(n, hidden, d)


def compiled(f, *args):
    return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]


@pytest.fixture(scope="module")
def wide():
    model = WIDE.build()
    images = jax.ShapeDtypeStruct((BATCH, 64, 64, 3), "float32")
    return model, jax.eval_shape(model.init, jax.random.key(0), images), images


def test_num_tokens():
    assert flops.num_tokens(recipes.vit("base")) == 197
    assert flops.num_tokens(recipes.vit("huge")) == 257


def test_forward_against_a_list_of_matmuls():
    cfg = ViT(12, 5, 3, mlp_ratio=2.5, image_size=20, patch_size=5, num_classes=7)
    n, (qkv, rest) = 17, block(17, 12, 30)
    embed, head = matmul(16, 75, 12), matmul(1, 12, 7)
    assert flops.embed(cfg) == embed
    assert flops.forward(cfg) == embed + 5 * (qkv + rest) + head
    qkv, rest = block(5, 12, 30)
    assert flops.forward(cfg, tokens=5) == matmul(4, 75, 12) + 5 * (qkv + rest) + head
    assert flops.num_tokens(cfg) == n


def test_target_block_stops_behind_its_qkv():
    cfg = ViT(12, 5, 3, image_size=20, patch_size=5)
    qkv, rest = block(17, 12, 48)
    assert flops.forward(cfg, target_block=3) == matmul(16, 75, 12) + 2 * (qkv + rest) + qkv
    # The backward pass: two matmuls for each, but none for the pixels.
    assert flops.forward_backward(cfg, target_block=3) == 2 * matmul(16, 75, 12) + 3 * (2 * (qkv + rest) + qkv)


def test_target_block_does_not_reach_the_head():
    cfg = ViT(12, 5, 3, image_size=20, patch_size=5, num_classes=7)
    headless = ViT(12, 5, 3, image_size=20, patch_size=5)
    assert flops.forward(cfg, target_block=3) == flops.forward(headless, target_block=3)


def test_vit_b_16_has_its_known_cost():
    np.testing.assert_allclose(flops.forward(recipes.vit("base", num_classes=1000)), 2 * 17.56e9, rtol=2e-3)


def test_forward_against_xla(wide):
    model, variables, images = wide
    ratio = compiled(lambda v, x: model.apply(v, x).logits, variables, images) / BATCH / flops.forward(WIDE)
    assert 1 < ratio < 1.05


@pytest.mark.parametrize("target", [1, 2])
def test_blocks_behind_the_target_are_not_computed(wide, target):
    model, variables, images = wide

    def qkv(v, x):
        trace = model.apply(v, x, capture=(target,)).trace[target]
        return trace.q, trace.k, trace.v

    np.testing.assert_allclose(
        compiled(qkv, variables, images) / BATCH,
        flops.forward(ViT(256, 3, 4, image_size=64, patch_size=8), target_block=target),
        rtol=0.05,
    )


def test_forward_backward_against_xla(wide):
    model, variables, images = wide

    def loss(v, x):
        return (model.apply(v, x, capture=(3,)).trace[3].out ** 2).mean()

    expected = flops.forward_backward(ViT(256, 3, 4, image_size=64, patch_size=8))
    np.testing.assert_allclose(compiled(jax.grad(loss), variables, images) / BATCH, expected, rtol=0.05)


def test_relations_against_xla():
    teacher = tuple(jax.ShapeDtypeStruct((BATCH, 65, 2, 256), "float32") for _ in "qk")
    student = tuple(jax.ShapeDtypeStruct((BATCH, 65, 2, 192), "float32") for _ in "qk")
    count = compiled(jax.grad(lambda s, t: relation_kl(t, s).mean()), student, teacher)
    sizes = {"image_size": 64, "patch_size": 8}
    expected = flops.relations(ViT(512, 1, 2, **sizes), ViT(384, 1, 2, **sizes), 1)
    np.testing.assert_allclose(count / BATCH, expected, rtol=0.05)
    assert expected == matmul(65, 512, 65) + 3 * matmul(65, 384, 65)
    assert flops.relations(ViT(512, 1, 2, **sizes), ViT(384, 1, 2, **sizes), 4) == 4 * expected
