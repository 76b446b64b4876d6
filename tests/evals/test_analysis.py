"""The analyses against plain loops in float64."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import IMAGE, TEST
from tinymim_jax.data.sources import open_source
from tinymim_jax.evals import AttentionSpan, Cka, NearestImages, RelationAgreement, Spectrum
from tinymim_jax.evals.analysis import Viewer
from tinymim_jax.evals.attention_span import grid_distances
from tinymim_jax.evals.contract import Context, Measurement, Other
from tinymim_jax.evals.similarity import cka_of_batches, gram, hsic
from tinymim_jax.evals.spectrum import effective_rank
from tinymim_jax.experiment.config import Init, ViT
from tinymim_jax.models.contract import BlockTrace, Outputs
from tinymim_jax.runtime import sharding
from tinymim_jax.runtime.errors import InputError

ONE = sharding.make_mesh(devices=jax.devices()[:1])
STUDENT, TEACHER = ViT(24, 3, 6, **IMAGE), ViT(48, 4, 6, **IMAGE)
PIXELS = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
RANDOM = np.random.default_rng(0)


@functools.cache
def variables(model, seed=0):
    """Of a whole model, initialised, and so moved that heads differ."""
    shape = (1, model.image_size, model.image_size, 3)
    params = jax.jit(model.build().init)(jax.random.key(seed), jnp.zeros(shape))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    moved = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return {"params": {"encoder": jax.tree.unflatten(tree, moved)}}


def found(cfg, model=STUDENT, other=None, mesh=ONE):
    """What `cfg` finds of `model`, beside `other`, by the field of its config."""
    fields = {name: Other(m, variables(m, 5), *PIXELS) for name, m in (other or {}).items()}

    def predict(whole, _, batch):
        return Outputs(batch["image"].astype(jnp.float32).reshape(len(batch["image"]), -1)[:, ::7] @ whole["w"]["w"])

    whole = {**variables(model), "w": {"w": RANDOM_PROJECTION}}
    evaluator = cfg.build(Context(mesh, predict, model, fields))
    return Measurement({"x": evaluator}).run(whole, {}, "x")()["x"]


RANDOM_PROJECTION = RANDOM.normal(size=(110, 5)).astype(np.float32)


def images(cfg):
    """The images that `cfg` looks at, uint8."""
    batches = cfg.batches(Context(ONE, None))
    return np.stack([batches.image(i) for i in range(len(batches.source))])


def apply(model, whole, pixels, mean, std, capture=(), keep=None):
    x = (pixels.astype(np.float32) / 255 - np.array(mean, np.float32)) / np.array(std, np.float32)
    run = jax.jit(lambda params, x: model.build().apply({"params": params}, x, capture=tuple(capture), keep=keep))
    return run(whole["params"]["encoder"], x)


def tokens_of(model, whole, pixels, mean, std):
    """The 13 layers of a 12-block model, as MAE-Lite hooks them."""
    trace = apply(model, whole, pixels, mean, std, range(1, model.depth + 1)).trace
    layers = [trace[i].norm1 for i in range(1, model.depth + 1)] + [trace[model.depth].normed]
    return [np.asarray(x, np.float64)[:, model.num_prefix :].reshape(len(x), -1) for x in layers]


def plain_hsic(k, m):
    """Song et al. 2012, Eq. 4, term by term, in float64, without centring."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    ones = np.ones(n)
    first = np.trace(k @ m)
    second = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return (first + second - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))


def plain_hsics(batches):
    """HSIC of each batch of (layers [n, D] of one model, of the other): [batches, rows, columns, 3]."""
    out = []
    for x, y in batches:
        pairs = [[(a @ a.T, b @ b.T) for b in y] for a in x]
        out.append([[[plain_hsic(k, m), plain_hsic(k, k), plain_hsic(m, m)] for k, m in row] for row in pairs])
    return np.array(out)


def plain_cka(hsics):
    cross, own, other = np.moveaxis(hsics.mean(axis=0), -1, 0)
    return cross / np.sqrt(own) / np.sqrt(other)


@pytest.mark.parametrize("other", [None, TEACHER], ids=["itself", "another"])
def test_cka_is_that_of_a_plain_loop_in_float64(other):
    cfg = Cka(TEST, other=other and Init("x"), batch_size=18)  # 40 images: two batches, and one of 4
    result = found(cfg, other=other and {"other": other})
    pixels, own = images(cfg), (TEST.mean, TEST.std)
    assert len(pixels) == 40
    batches = []
    for start in (0, 18, 36):
        part = pixels[start : start + 18]
        rows = tokens_of(STUDENT, variables(STUDENT), part, *own)
        batches.append((rows, tokens_of(other, variables(other, 5), part, *PIXELS) if other else rows))
    hsics = plain_hsics(batches)
    np.testing.assert_allclose(result.arrays["cka"], plain_cka(hsics), atol=1e-5)
    assert result.scalars["mean"] == pytest.approx(plain_cka(hsics).mean(), abs=1e-5)
    assert list(result.arrays["rows"]) == ["patches", "block 1", "block 2", "block 3"]
    assert len(result.arrays["columns"]) == (5 if other else 4)
    if other is None:
        np.testing.assert_allclose(np.diag(result.arrays["cka"]), 1, atol=1e-12)
    without = [plain_cka(np.delete(hsics, i, axis=0)) for i in range(3)]
    jackknife = np.sqrt(2 / 3 * sum((x - np.mean(without, axis=0)) ** 2 for x in without))
    np.testing.assert_allclose(result.arrays["cka_error"], jackknife, atol=1e-5)


def test_a_batch_of_fewer_than_four_is_left_out():
    result = found(Cka(TEST, batch_size=38))
    np.testing.assert_allclose(
        result.arrays["cka"], found(Cka(TEST, batch_size=38, images=38)).arrays["cka"], atol=0.05
    )
    assert np.isnan(result.arrays["cka_error"]).all()  # of one batch


def test_cka_of_block_outputs_with_the_class_token_differs():
    plain, whole = (found(Cka(TEST, layers="blocks", cls=cls)) for cls in (False, True))
    assert list(plain.arrays["rows"]) == ["block 1", "block 2", "block 3"]
    assert not np.allclose(plain.arrays["cka"], whole.arrays["cka"], atol=1e-4)


def test_cka_knows_no_rotation_no_scale_and_no_shift():
    x = RANDOM.normal(size=(24, 7, 6)).astype(np.float32) + 3
    rotation, _ = np.linalg.qr(RANDOM.normal(size=(42, 42)))
    turned = (5 * x.reshape(24, 42) @ rotation + RANDOM.normal(size=42)).reshape(24, 7, 6)
    valid = np.ones(24, bool)
    a, b = (np.asarray(gram(jnp.asarray(m, jnp.float32), jnp.asarray(valid)))[None] for m in (x, turned))
    value, _ = cka_of_batches([[hsic(*pair, valid) for pair in ((a, b), (a, a), (b, b))]])
    assert value == pytest.approx(1, abs=1e-5)
    noise = RANDOM.normal(size=(24, 7, 6)).astype(np.float32)
    c = np.asarray(gram(jnp.asarray(noise), jnp.asarray(valid)))[None]
    value, _ = cka_of_batches([[hsic(*pair, valid) for pair in ((a, c), (a, a), (c, c))]])
    assert abs(value) < 0.5  # unbiased: near 0 for what is independent


def test_rows_that_are_not_valid_change_nothing():
    x = RANDOM.normal(size=(12, 3, 5)).astype(np.float32)
    valid = np.arange(12) < 9
    padded, short = gram(jnp.asarray(x), jnp.asarray(valid)), gram(jnp.asarray(x[:9]), jnp.ones(9, bool))
    np.testing.assert_allclose(padded[:9, :9], short, rtol=1e-5, atol=1e-5)
    found_in = [np.asarray(m)[None] for m in (padded, short)]
    both = hsic(found_in[0], found_in[0], valid), hsic(found_in[1], found_in[1], np.ones(9, bool))
    np.testing.assert_allclose(*both, rtol=1e-5)


@pytest.mark.skipif(len(jax.devices()) < 2, reason="one device")
def test_several_devices_find_the_same():
    two = sharding.make_mesh(devices=jax.devices()[:2])
    a, b = (found(Cka(TEST, batch_size=10), mesh=mesh).arrays["cka"] for mesh in (ONE, two))
    np.testing.assert_allclose(a, b, atol=1e-5)


def spans(cfg, model, keep=None):
    """Distance and entropy [blocks][heads] by a plain loop over images, heads and queries."""
    whole, pixels = variables(model), images(cfg)
    trace = apply(model, whole, pixels, TEST.mean, TEST.std, range(1, model.depth + 1), keep).trace
    grid, side = model.grid, cfg.patch_px or model.patch_size
    out = []
    for i in range(1, model.depth + 1):
        q, k = (np.asarray(x, np.float64)[:, model.num_prefix :] for x in (trace[i].q, trace[i].k))
        bias = model.attention_bias(whole["params"], i)
        rows = []
        for head in range(q.shape[2]):
            far, spread = [], []
            for b in range(len(q)):
                place = np.arange(grid**2) if keep is None else np.asarray(keep[b])
                for n in range(q.shape[1]):
                    logits = k[b, :, head] @ q[b, n, head] / math.sqrt(q.shape[3])
                    if bias is not None:
                        logits = logits + np.asarray(bias, np.float64)[head, model.num_prefix :, model.num_prefix :][n]
                    p = np.exp(logits - logits.max())
                    p /= p.sum()
                    steps = [math.hypot(place[n] // grid - m // grid, place[n] % grid - m % grid) for m in place]
                    far.append(side * float(p @ steps))
                    spread.append(-float(p @ np.log(p + 1e-6)))
            rows.append((np.mean(far), np.mean(spread)))
        out.append(rows)
    return np.array(out)


@pytest.mark.parametrize(("model", "patch_px"), [(STUDENT, None), (ViT(24, 2, 3, relative_position=True, **IMAGE), 14)])
def test_attention_is_that_of_a_plain_loop(model, patch_px):
    cfg = AttentionSpan(TEST, patch_px=patch_px, images=10, batch_size=8)
    result = found(cfg, model)
    expected = spans(cfg, model)
    np.testing.assert_allclose(result.arrays["distance"], expected[..., 0], rtol=1e-5)
    np.testing.assert_allclose(result.arrays["entropy"], expected[..., 1], rtol=1e-5)
    assert result.scalars["distance"] == pytest.approx(expected[..., 0].mean(), rel=1e-5)


def test_of_masked_images_attention_is_between_the_patches_that_are_seen():
    model = ViT(24, 2, 3, image_size=16, patch_size=4)
    cfg = AttentionSpan(TEST, mask_ratio=0.5, images=6)
    keys = jax.vmap(jax.random.key)(jnp.arange(6))
    keep = jnp.argsort(jax.vmap(lambda key: jax.random.uniform(key, (16,)))(keys), axis=1)[:, :8]
    result, expected = found(cfg, model), spans(cfg, model, keep)
    np.testing.assert_allclose(result.arrays["distance"], expected[..., 0], rtol=1e-5)
    np.testing.assert_allclose(result.arrays["entropy"], expected[..., 1], rtol=1e-5)
    assert result.arrays["uniform_entropy"] == pytest.approx(math.log(8))


def test_uniform_attention_has_the_distance_and_entropy_of_the_published_check():
    model = ViT(24, 2, 2, last_block_heads=3)
    evaluator = AttentionSpan(dataclasses.replace(TEST, image_size=224)).build(Context(ONE, None, model))
    nothing = BlockTrace(q=jnp.zeros((1, 197, 2, 12)), k=jnp.zeros((1, 197, 2, 12)))
    distance, entropy = evaluator._span(nothing, None, jnp.asarray(grid_distances(14), jnp.float32))
    np.testing.assert_allclose(distance, 7.281, atol=1e-3)
    np.testing.assert_allclose(entropy, math.log(196), atol=3e-4)  # 196 times the 1e-6 within the logarithm
    sums = [np.ones((2, 2)), np.ones((2, 3))]
    arrays = evaluator.finish({"data": [(sums, 1)]}).arrays
    assert arrays["uniform_distance"] == pytest.approx(116.5, abs=0.05)
    assert arrays["uniform_entropy"] == pytest.approx(math.log(196))
    assert arrays["distance"].shape == (2, 3) and np.isnan(arrays["distance"][0, 2])  # that block has two heads


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def test_relations_are_compared_head_by_head():
    cfg = RelationAgreement(data=TEST, teacher=Init("x"), teacher_block=4, student_block=3, batch_size=16)
    result = found(cfg, other={"teacher": TEACHER})
    pixels = images(cfg)
    of = {
        "teacher": apply(TEACHER, variables(TEACHER, 5), pixels, *PIXELS, (4,)).trace[4],
        "student": apply(STUDENT, variables(STUDENT), pixels, TEST.mean, TEST.std, (3,)).trace[3],
    }
    for row, (a, b) in enumerate((("q", "k"), ("v", "v"))):
        maps = {}
        for who, trace in of.items():
            x, y = (np.asarray(getattr(trace, name), np.float64) for name in (a, b))
            maps[who] = softmax(np.einsum("bnhe,bmhe->bhnm", x, y) / math.sqrt(x.shape[-1]))
        kl = (maps["teacher"] * np.log(maps["teacher"] / maps["student"])).sum(-1).mean(axis=(0, 2))
        np.testing.assert_allclose(result.arrays["kl"][0, row], kl, rtol=1e-4)
        assert result.scalars[f"kl_{a}{b}"] == pytest.approx(kl.mean(), rel=1e-4)
        assert result.scalars[f"kl_{a}{b}_head2"] == pytest.approx(kl[1], rel=1e-4)
        top = np.maximum(*(m[:2].max(axis=(2, 3)) for m in maps.values()))
        np.testing.assert_allclose(result.arrays["top"][:, 0, row], top, rtol=1e-4)
        for who in of:
            shown = result.arrays[who][:, 0, row] / 255 * top[..., None, None]
            np.testing.assert_allclose(shown, maps[who][:2], atol=top.max() / 400)
    np.testing.assert_array_equal(result.arrays["images"], pixels[:2])


def test_an_image_that_cannot_be_read_is_not_drawn():
    cfg = RelationAgreement(data=TEST, teacher=Init("x"), teacher_block=4, student_block=3, images=4)
    other = Other(TEACHER, variables(TEACHER, 5), *PIXELS)
    evaluator = cfg.build(Context(ONE, None, STUDENT, {"teacher": other}))
    (batch,) = evaluator.passes["data"]
    batch = {**batch, "is_valid": batch["is_valid"].at[0].set(False)}
    one = jax.device_get(evaluator.update(variables(STUDENT), {}, evaluator.others, batch))
    arrays = evaluator.finish({"data": [one]}).arrays
    np.testing.assert_array_equal(arrays["images"], batch["image"][1:2])
    assert [len(arrays[name]) for name in ("teacher", "student", "top")] == [1, 1, 1]


def test_relations_of_other_heads_are_split_alike():
    narrow = ViT(24, 3, 3, **IMAGE)
    cfg = RelationAgreement(data=TEST, teacher=Init("x"), teacher_block=2, student_block=1, relations=("kk",))
    with pytest.raises(InputError, match="3 and 6 heads; split both into as many"):
        found(cfg, narrow, {"teacher": TEACHER})
    split = found(dataclasses.replace(cfg, heads=2), narrow, {"teacher": TEACHER})
    assert split.arrays["kl"].shape == (1, 1, 2)


def test_effective_rank_counts_directions():
    basis = np.linalg.qr(RANDOM.normal(size=(50, 7)))[0]
    assert effective_rank(basis @ np.eye(7)) == pytest.approx(7)
    assert effective_rank(np.outer(np.ones(9), np.arange(1, 5))) == pytest.approx(1)
    result = found(Spectrum(TEST, batch_size=16))
    trace = apply(STUDENT, variables(STUDENT), images(Spectrum(TEST)), TEST.mean, TEST.std, (1, 2, 3)).trace
    for i in (1, 2, 3):
        out = np.asarray(trace[i].out, np.float64)[:, 1:]
        values = np.linalg.svd(out.mean(axis=1), compute_uv=False)
        p = values / values.sum()
        assert result.arrays["effective_rank"][i - 1] == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-4)
        assert result.arrays["norm"][i - 1] == pytest.approx(np.sqrt((out**2).sum(axis=2)).mean(), rel=1e-4)
    first = found(Spectrum(TEST, pool="cls")).arrays
    assert not np.allclose(first["norm"], result.arrays["norm"])


def test_the_nearest_images_are_those_of_a_plain_loop():
    cfg = NearestImages(TEST, queries=4, k=3, batch_size=16)
    result, pixels = found(cfg), images(cfg)
    features = pixels.astype(np.float64).reshape(len(pixels), -1)[:, ::7] @ RANDOM_PROJECTION.astype(np.float64)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for row, query in enumerate((0, 10, 20, 30)):
        cosines = unit @ unit[query]
        nearest = sorted((i for i in range(40) if i != query), key=lambda i: -cosines[i])[:3]
        np.testing.assert_array_equal(result.arrays["queries"][row], pixels[query])
        np.testing.assert_array_equal(result.arrays["nearest"][row], pixels[nearest])
        np.testing.assert_allclose(result.arrays["similarity"][row], cosines[nearest], rtol=1e-5)


def test_images_are_spread_over_the_set_or_its_first():
    source = open_source(TEST)
    spread, first = (images(AttentionSpan(TEST, images=4, spread=spread)) for spread in (True, False))
    for pixels, numbers in ((spread, (0, 10, 20, 30)), (first, range(4))):
        expected = [AttentionSpan(TEST).batches(Context(ONE, None)).image(i) for i in numbers]
        np.testing.assert_array_equal(pixels, expected)
    assert len(source) == 40


def test_an_encoder_of_another_size_sees_the_images_resized():
    large = ViT(24, 2, 3, image_size=32, patch_size=8)
    pixels = RANDOM.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    seen = Viewer(large, *PIXELS)(variables(large), jnp.asarray(pixels), ()).tokens
    grown = np.asarray(jax.image.resize(pixels.astype(np.float32) / 255, (2, 32, 32, 3), "cubic"))
    direct = large.build().apply(
        {"params": variables(large)["params"]["encoder"]}, (grown - np.array(PIXELS[0])) / np.array(PIXELS[1])
    )
    np.testing.assert_allclose(seen, direct.tokens, atol=1e-4)


@pytest.mark.parametrize(
    ("cfg", "match"),
    [
        (Cka(TEST, images=3), "cka needs 4 images in a batch, not 3"),
        (Cka(TEST, batch_size=2), "set batch_size"),
        (NearestImages(TEST, k=40), "k 40 is not less than the 40 images"),
        (AttentionSpan(TEST, mask_ratio=0.9), "cannot see 0.1 of its patches"),
        (
            RelationAgreement(data=TEST, teacher=Init("x"), teacher_block=5, student_block=1),
            "teacher_block 5 is beyond the 4 blocks",
        ),
        (
            RelationAgreement(data=TEST, teacher=Init("x"), teacher_block=1, student_block=1, heads=5),
            "heads 5 does not divide 48, the teacher's width",
        ),
    ],
)
def test_what_cannot_be_looked_at_is_refused(cfg, match):
    with pytest.raises(InputError, match=match):
        found(cfg, other={"teacher": TEACHER} if isinstance(cfg, RelationAgreement) else None)


def test_a_relation_between_other_tokens_is_refused():
    fine = ViT(48, 4, 6, image_size=16, patch_size=4)
    cfg = RelationAgreement(data=TEST, teacher=Init("x"), teacher_block=1, student_block=1)
    with pytest.raises(InputError, match="other numbers of tokens"):
        found(cfg, other={"teacher": fine})
