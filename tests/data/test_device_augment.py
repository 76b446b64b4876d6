import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinymim_jax.data import device_augment as da


def pictures(batch, size=8, seed=0):
    return np.random.default_rng(seed).uniform(size=(batch, size, size, 3)).astype(np.float32)


def test_to_float_and_normalize():
    raw = np.arange(2 * 2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 2, 3) * 10
    out = da.normalize(da.to_float(raw), (0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
    assert out.dtype == jnp.float32
    expected = (raw / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.25, 2.0])
    np.testing.assert_allclose(out, expected, atol=1e-6)


def jittered(image, factors, order):
    """One image, step by step, from the definition of each adjustment."""
    for op in order:
        grey = 0.299 * image[..., 0] + 0.587 * image[..., 1] + 0.114 * image[..., 2]
        if op == 0:
            image = image * factors[0]
        elif op == 1:
            image = grey.mean() + factors[1] * (image - grey.mean())
        else:
            image = grey[..., None] + factors[2] * (image - grey[..., None])
        image = np.minimum(np.maximum(image, 0), 1)
    return image


def test_jitter_against_a_loop_in_every_order():
    orders = np.array([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
    factors = np.random.default_rng(1).uniform(0.4, 1.6, (6, 3)).astype(np.float32)
    images = pictures(6)
    out = da.jitter_in_order(images, factors, orders)
    expected = [jittered(i.astype(np.float64), f, o) for i, f, o in zip(images, factors, orders, strict=True)]
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_jitter_draws():
    # A grey image does not change in contrast or saturation: its level shows the factor of the brightness.
    images = np.full((4000, 2, 2, 3), 0.5, np.float32)
    level = np.asarray(da.color_jitter(jax.random.key(0), images, 0.4))[:, 0, 0, 0] / 0.5
    np.testing.assert_allclose([level.min(), level.max()], [0.6, 1.4], atol=0.01)
    np.testing.assert_allclose([level.mean(), level.std()], [1, 0.8 / math.sqrt(12)], atol=0.01)
    assert len(np.unique(level)) > 3900  # one draw an image


def test_jitter_order_is_uniform(monkeypatch):
    seen = []
    monkeypatch.setattr(da, "jitter_in_order", lambda images, factors, order: seen.append((factors, order)) or images)
    da.color_jitter(jax.random.key(1), pictures(6000, 1), 1.5)
    factors, order = map(np.asarray, seen[0])
    _, counts = np.unique(order, axis=0, return_counts=True)
    assert len(counts) == 6
    np.testing.assert_allclose(counts / 6000, 1 / 6, atol=0.02)
    np.testing.assert_allclose([factors.min(), factors.max()], [0, 2.5], atol=0.01)
    np.testing.assert_allclose(np.corrcoef(factors.T), np.eye(3), atol=0.05)


def test_no_strength_is_the_identity():
    images = jnp.asarray(pictures(2))
    assert da.color_jitter(jax.random.key(0), images, 0.0) is images
    assert da.random_erasing(jax.random.key(0), images, 0.0) is images
    labels = jnp.eye(2)
    for off in ({"mixup": 0.0, "cutmix": 0.0}, {"mix_prob": 0.0}):
        assert da.mix(jax.random.key(0), images, labels, **{**MIX, **off}) == (images, labels)


MIX = {"mixup": 0.8, "cutmix": 1.0, "mix_prob": 1.0, "switch_prob": 0.5}


def coded(batch, size):
    """Image i is constant i, its label one-hot i: what was mixed can be read off both."""
    images = np.broadcast_to(np.arange(batch, dtype=np.float32)[:, None, None, None], (batch, size, size, 3))
    return images, np.eye(batch, dtype=np.float32)


def partners(rows):
    """Row i's partner is half a block of eight rows away (of the largest even block, where eight do not fit)."""
    n = len(rows)
    block = next((b for b in (8, 4, 2) if n % b == 0), None)
    return np.asarray(rows)[[i // block * block + (i + block // 2) % block for i in range(n)]]


def test_partners_are_mutual_near_and_never_a_repetition():
    for n in (2, 4, 6, 8, 12, 24):
        index = np.asarray(da.partner(jnp.arange(n)))
        np.testing.assert_array_equal(index, partners(np.arange(n)))
        np.testing.assert_array_equal(index[index], np.arange(n))
        assert (index // 8 == np.arange(n) // 8).all() and (index != np.arange(n)).all()
    np.testing.assert_array_equal(da.partner(jnp.arange(3)), [2, 1, 0])
    for repeats in (2, 3, 4):
        image = np.arange(24) // repeats
        assert (image != partners(image)).all()


def own_share(mixed, batch):
    """float [B, H, W, 3]: the share of each pixel that is the image's own."""
    own = np.arange(batch)[:, None, None, None]
    return (mixed - partners(own)) / (own - partners(own))


@pytest.mark.parametrize("own", [{"cutmix": 0.0}, {"mixup": 0.0}, {}])
def test_label_mass_is_the_share_of_pixels(own):
    images, labels = coded(4, 12)
    cfg = {**MIX, **own}
    mixing = jax.jit(lambda key: da.mix(key, images, labels, **cfg))
    kinds = set()
    for seed in range(40):
        mixed, soft = map(np.asarray, mixing(jax.random.key(seed)))
        share = own_share(mixed, 4)
        np.testing.assert_allclose(share, np.broadcast_to(share[:1], share.shape), atol=1e-5)  # one draw a batch
        lam = share.mean()
        np.testing.assert_allclose(soft, lam * labels + (1 - lam) * partners(labels), atol=1e-5)
        if lam < 1 - 1e-4:  # an empty box leaves the batch as it was
            kinds.add("mixup" if np.ptp(share) < 1e-5 else "cutmix")
        if np.ptp(share) > 1e-5:
            assert set(np.round(share, 4).ravel()) == {0.0, 1.0}
    expected = {kind for kind in ("mixup", "cutmix") if cfg[kind]}
    assert kinds == expected


def test_mix_prob_and_switch_prob():
    images, labels = coded(2, 16)
    cfg = {"mixup": 1.0, "cutmix": 1.0, "mix_prob": 0.6, "switch_prob": 0.25}
    mixed, soft = jax.jit(jax.vmap(lambda key: da.mix(key, images, labels, **cfg)))(
        jax.random.split(jax.random.key(0), 3000)
    )
    share = np.stack([own_share(m, 2)[0] for m in np.asarray(mixed)])
    lam, is_box = share.mean(axis=(1, 2, 3)), np.ptp(share, axis=(1, 2, 3)) > 1e-4
    np.testing.assert_allclose(soft[:, 0, 0], lam, atol=1e-5)
    np.testing.assert_allclose(is_box.mean(), 0.6 * 0.25, atol=0.03)
    is_mixup = ~is_box & (lam < 1 - 1e-4)
    np.testing.assert_allclose(is_mixup.mean(), 0.6 * 0.75, atol=0.03)
    np.testing.assert_allclose([lam[is_mixup].mean(), lam[is_mixup].std()], [0.5, 1 / math.sqrt(12)], atol=0.03)


def mixed_in_groups(key, images, labels, group, mix_prob=1.0, **how):
    """timm's Mixup in each process, as a loop: one draw, applied to the process' own images; other partners."""
    mixed, soft, draws = images.copy(), labels.copy(), []
    starts = range(0, len(images), group)
    for start, own_key in zip(starts, jax.random.split(key, len(starts)), strict=True):
        on_key, *keys = jax.random.split(own_key, 5)
        own = np.asarray(da.own_share(keys, images.shape[1:3], how["mixup"], how["cutmix"], how["switch_prob"]))
        if not jax.random.bernoulli(on_key, mix_prob):
            own = np.ones_like(own)
        draws.append(own)
        lam = own.mean()
        for i in range(start, min(start + group, len(images))):
            other = partners(np.arange(len(images)))[i]
            mixed[i] = images[i] * own[..., None] + images[other] * (1 - own[..., None])
            soft[i] = labels[i] * lam + labels[other] * (1 - lam)
    return mixed, soft, draws


@pytest.mark.parametrize(("batch", "group"), [(16, 8), (24, 8), (12, 5), (8, 1)])
@pytest.mark.parametrize("mix_prob", [1.0, 0.5])
def test_each_group_has_a_draw_of_its_own(batch, group, mix_prob):
    images, labels = pictures(batch), np.eye(batch, dtype=np.float32)
    mixing = jax.jit(lambda key: da.mix(key, images, labels, mix_group=group, **{**MIX, "mix_prob": mix_prob}))
    kinds = set()
    for seed in range(6):
        mixed, soft, draws = mixed_in_groups(
            jax.random.key(seed), images, labels, group, **{**MIX, "mix_prob": mix_prob}
        )
        for ours, plain in zip(mixing(jax.random.key(seed)), (mixed, soft), strict=True):
            np.testing.assert_allclose(ours, plain, atol=1e-5)
        assert len({float(own.mean()) for own in draws}) > 1 or mix_prob < 1  # no two are alike
        kinds |= {"off" if own.min() == 1 else "mixup" if np.ptp(own) == 0 else "cutmix" for own in draws}
    assert kinds >= {"mixup", "cutmix"} and ("off" in kinds or mix_prob == 1)


def test_a_group_as_large_as_the_batch_is_one_draw_for_all():
    images, labels = pictures(6), np.eye(6, dtype=np.float32)
    for group in (6, 128):
        for one, all_in_one in zip(
            da.mix(jax.random.key(1), images, labels, mix_group=group, **MIX),
            da.mix(jax.random.key(1), images, labels, **MIX),
            strict=True,
        ):
            np.testing.assert_array_equal(one, all_in_one)


@pytest.mark.parametrize(("field", "alpha"), [("mixup", 0.8), ("mixup", 5.0)])
def test_lambda_is_beta(field, alpha):
    images, labels = coded(2, 4)
    cfg = {**MIX, "mixup": 0.0, "cutmix": 0.0, field: alpha}
    keys = jax.random.split(jax.random.key(0), 4000)
    lam = np.asarray(jax.jit(jax.vmap(lambda key: da.mix(key, images, labels, **cfg)[1][0, 0]))(keys))
    np.testing.assert_allclose([lam.mean(), lam.var()], [0.5, 1 / (4 * (2 * alpha + 1))], atol=0.02)


def test_cutmix_box():
    lam, height, width = 0.75, 20, 32
    boxes = jax.jit(jax.vmap(lambda key: da.cutmix_box(key, lam, height, width)))(
        jax.random.split(jax.random.key(0), 3000)
    )
    boxes = np.asarray(boxes)
    rows, cols = boxes.any(axis=2), boxes.any(axis=1)
    np.testing.assert_array_equal(boxes, rows[:, :, None] & cols[:, None, :])
    # Sides of sqrt(1 - 0.75) = a half, less where the border cuts them.
    assert rows.sum(axis=1).max() == 10 and cols.sum(axis=1).max() == 16
    assert rows.sum(axis=1).min() == 5 and cols.sum(axis=1).min() == 8
    # Row r is inside when the centre is among r - 4 .. r + 5.
    expected = [sum(0 <= c < height for c in range(r - 4, r + 6)) / height for r in range(height)]
    np.testing.assert_allclose(rows.mean(axis=0), expected, atol=0.04)


def test_erasing_boxes_follow_the_definition():
    height = width = 64
    boxes = np.asarray(da.erasing_boxes(jax.random.key(0), 4000, height, width))
    rows, cols = boxes.any(axis=2), boxes.any(axis=1)
    np.testing.assert_array_equal(boxes, rows[:, :, None] & cols[:, None, :])
    h, w = rows.sum(axis=1), cols.sum(axis=1)
    assert (h > 0).all() and (h < height).all() and (w < width).all()
    sizes, places = reference_erasing(4000, height, width)
    for got, want in ((h, sizes[0]), (w, sizes[1]), (rows.argmax(axis=1), places[0]), (cols.argmax(axis=1), places[1])):
        np.testing.assert_allclose([got.mean(), got.std()], [want.mean(), want.std()], rtol=0.06)
    np.testing.assert_allclose((h * w).std(), (sizes[0] * sizes[1]).std(), rtol=0.06)
    np.testing.assert_allclose(np.log(h / w).std(), np.log(sizes[0] / sizes[1]).std(), rtol=0.06)
    assert (rows[:, -1].any() and cols[:, -1].any()) and (rows[:, 0].any() and cols[:, 0].any())


def reference_erasing(n, height, width):
    """(h, w), (top, left) as arrays [2, n], drawn one by one."""
    rng = np.random.default_rng(0)
    sizes, places = [], []
    while len(sizes) < n:
        area = rng.uniform(0.02, 1 / 3) * height * width
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            sizes.append((h, w))
            places.append((rng.integers(0, height - h, endpoint=True), rng.integers(0, width - w, endpoint=True)))
    return np.array(sizes).T, np.array(places).T


def test_random_erasing():
    images = np.full((2000, 16, 16, 3), 9.0, np.float32)
    out = np.asarray(jax.jit(lambda key: da.random_erasing(key, images, 0.25))(jax.random.key(0)))
    erased = (out != 9).any(axis=-1)
    np.testing.assert_allclose(erased.any(axis=(1, 2)).mean(), 0.25, atol=0.03)
    noise = out[erased]  # [k, 3]: each channel of each pixel is drawn
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.02)
    np.testing.assert_allclose(np.corrcoef(noise.T), np.eye(3), atol=0.03)


def test_same_key_same_result():
    images = pictures(4)

    @jax.jit
    def everything(key):
        return da.color_jitter(key, images, 0.4), da.random_erasing(key, images, 1.0)

    first, again, other = (everything(jax.random.key(seed)) for seed in (0, 0, 1))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


def test_pixel_noise_is_standard_normal():
    noise = np.asarray(jax.jit(lambda key: da.pixel_noise(key, (8, 64, 64, 3)))(jax.random.key(0)), np.float64)
    n = noise.size
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        spread = math.sqrt(math.prod(range(1, 2 * power, 2)) - moment**2)  # of x^power: E x^2p = (2p - 1)!!
        assert abs((noise**power).mean() - moment) < 4 * spread / math.sqrt(n)
    assert np.isfinite(noise).all() and 4 < np.abs(noise).max() < 6
    images = noise.reshape(8, -1)
    pixels = noise.reshape(-1, 3)
    neighbours = np.stack([noise[:, 1:].ravel(), noise[:, :-1].ravel()])
    for rows in (images, pixels.T, neighbours):
        np.testing.assert_allclose(np.corrcoef(rows), np.eye(len(rows)), atol=4 / math.sqrt(rows.shape[1]))
    assert len(np.unique(noise)) > 0.98 * n
