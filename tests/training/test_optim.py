import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tinymim_jax.experiment import config, recipes
from tinymim_jax.experiment.config import Optim
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.training import optim
from tinymim_jax.training.setup import make_setup
from tinymim_jax.weights.parameters import flatten, unflatten

TWO_BLOCKS = config.ViT(8, 2, 2)


def encoder_shapes(model):
    """The real tree of a model, as shapes."""
    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    return {"encoder": jax.eval_shape(model.build().init, jax.random.key(0), images)["params"]}


@pytest.fixture(scope="module")
def data():
    return recipes.imagenet(True)


@pytest.fixture(scope="module")
def pretrain(data):
    stage = recipes.distill(recipes.student("small"), config.Init("b"), data, **recipes.target("base", "small"))
    return stage, encoder_shapes(stage.model)


@pytest.fixture(scope="module")
def tuned():
    stage = recipes.finetune_imagenet("small", config.Init("s"))
    return stage, encoder_shapes(stage.model)


# Schedule (spec A.4: MAE util/lr_sched.py)


def lr_sched(epoch, lr, min_lr, warmup_epochs, epochs):
    """The rate at a fractional epoch."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    angle = math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(angle))


def test_peak_lr():
    assert optim.peak_lr(Optim(1.5e-4), 4096) == pytest.approx(2.4e-3, rel=1e-12)
    assert optim.peak_lr(Optim(6.25e-4), 2048) == pytest.approx(5e-3, rel=1e-12)
    assert optim.peak_lr(Optim(1e-3, lr_batch=512), 256) == pytest.approx(5e-4, rel=1e-12)
    assert optim.peak_lr(Optim(1e-3, lr_batch=None), 4096) == 1e-3


def test_schedule_by_hand():
    """10 steps an epoch, 2 epochs of warm-up, 10 epochs: peak at step 20, the middle at 60, the end at 100."""
    schedule = optim.make_schedule(Optim(8e-3, lr_batch=None, min_lr=2e-3, warmup_epochs=2), 256, 10, 100)
    expected = {0: 0.0, 1: 4e-4, 5: 2e-3, 10: 4e-3, 19: 7.6e-3, 20: 8e-3, 60: 5e-3, 100: 2e-3, 120: 2e-3}
    assert {step: float(schedule(step)) for step in expected} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("min_lr", "warmup", "epochs", "steps_per_epoch"),
    [(1e-5, 15, 300, 312), (0.0, 5, 100, 312), (1e-6, 0, 10, 7), (1e-6, 0.5, 3, 7), (1e-5, 2.25, 9.5, 4)],
)
def test_schedule_is_that_of_mae(min_lr, warmup, epochs, steps_per_epoch):
    total = round(epochs * steps_per_epoch)
    cfg = Optim(1.5e-4, min_lr=min_lr, warmup_epochs=warmup)
    schedule = jax.jit(optim.make_schedule(cfg, 4096, steps_per_epoch, total))
    steps = np.unique(np.linspace(0, total - 1, 200).astype(int))
    expected = [lr_sched(s / steps_per_epoch, 2.4e-3, min_lr, warmup, epochs) for s in steps]
    actual = jax.vmap(schedule)(jnp.asarray(steps))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-9)


def rates(total, steps, **fields):
    """A peak of 8 after two steps of warm-up."""
    schedule = jax.jit(optim.make_schedule(Optim(8.0, lr_batch=None, warmup_steps=2, **fields), 256, 10, total))
    return [float(schedule(step)) for step in steps]


def test_poly_behind_the_warm_up_by_hand():
    assert rates(10, (0, 1, 2, 6, 10), schedule="poly_behind", min_lr=1.0) == pytest.approx([0, 4, 8, 4.5, 1])


def test_poly_by_hand():
    """From the first of 10 steps on, times the share of the warm-up."""
    assert rates(10, (0, 1, 2, 6, 10, 12), schedule="poly", min_lr=1.0) == pytest.approx([0, 7.3 / 2, 6.6, 3.8, 1, 1])
    assert rates(10, (2, 4, 6, 8, 10), schedule="poly", power=2.0) == pytest.approx([5.12, 2.88, 1.28, 0.32, 0])


def test_step_by_hand():
    """Drops at half and three quarters of the 10 steps, each to a tenth."""
    steps = (0, 1, 2, 5, 6, 7, 8, 10)
    expected = [0, 4, 8, 0.8, 0.8, 0.8, 0.08, 0.08]
    assert rates(10, steps, schedule="step", drops=(0.5, 0.75)) == pytest.approx(expected)
    assert rates(10, (6, 8), schedule="step", drops=(0.5, 0.75), drop_factor=0.5) == pytest.approx([4, 2])
    assert rates(10, (5, 10), schedule="step") == [8, 8]


def test_constant_by_hand():
    assert rates(10, (0, 1, 2, 9, 10), schedule="constant", min_lr=1.0) == [0, 4, 8, 8, 8]


@pytest.mark.parametrize(("epochs", "steps_per_epoch", "warmup"), [(300, 1251, 5), (20, 3, 4), (6, 1, 0)])
def test_cosine_epochs_is_what_deit_runs(epochs, steps_per_epoch, warmup):
    """main.py: the optimiser begins with the warm-up's first rate; behind epoch e the scheduler is told e."""

    def timm(t):
        if t < warmup:
            return 1e-6 + t * (1e-3 - 1e-6) / warmup
        return 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * t / epochs))

    by_epoch, rate = [], timm(0)
    for epoch in range(epochs):
        by_epoch.append(rate)
        rate = timm(epoch)
    cfg = Optim(5e-4, 512, "cosine_epochs", min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=warmup)
    schedule = jax.jit(optim.make_schedule(cfg, 1024, steps_per_epoch, epochs * steps_per_epoch))
    firsts = np.arange(epochs) * steps_per_epoch
    for steps in (firsts, firsts + steps_per_epoch - 1):
        np.testing.assert_allclose(jax.vmap(schedule)(jnp.asarray(steps)), by_epoch, rtol=1e-5)


def test_a_warm_up_can_begin_above_zero():
    assert rates(10, (0, 1, 2), schedule="constant", warmup_lr=2.0) == [2, 5, 8]
    assert rates(10, (0, 1, 2), warmup_lr=2.0) == [2, 5, 8]


def test_the_rate_is_that_of_the_updates_made():
    """What `keep_if_bad` leaves out is not counted by the optimiser."""
    params, cfg = {"a": {"kernel": jnp.ones(3)}}, Optim(8.0, None, warmup_steps=2)
    schedule = optim.make_schedule(cfg, 1, 5, 10)
    tx = optim.make_optimizer(cfg, schedule, optim.rules(params, cfg), {"a": {"kernel": 1.0}})
    state = tx.init(params)
    assert float(optim.current_lr(schedule, state)) == 0.0
    state = tx.update(params, state, params)[1]
    assert float(optim.current_lr(schedule, state)) == 4.0


def test_schedule_without_steps():
    optim.make_schedule(Optim(1e-3, warmup_epochs=5), 256, 10, 0)  # a stage that only evaluates


def test_warmup_longer_than_the_run():
    with pytest.raises(
        InputError, match="the warm-up of 50 steps is not shorter than the run, which has 50; lower optim.warmup_epochs"
    ):
        optim.make_schedule(Optim(1e-3, warmup_epochs=5), 256, 10, 50)
    optim.make_schedule(Optim(1e-3, warmup_epochs=5), 256, 10, 51)


# Rules, parameter by parameter


BLOCK_KERNELS = ["attn/qkv/kernel", "attn/proj/kernel", "mlp/fc1/kernel", "mlp/fc2/kernel"]
BLOCK_VECTORS = [f"{m}/{v}" for m in ("norm1", "norm2") for v in ("scale", "bias")]
BLOCK_VECTORS += [k.replace("kernel", "bias") for k in BLOCK_KERNELS]


def names(blocks, parts):
    return {f"encoder/block{i}/{part}" for i in blocks for part in parts}


def by_label(labels):
    flat = flatten(labels)
    return {label: {k for k, v in flat.items() if v == label} for label in ("decay", "no_decay", "freeze")}


def test_rules_of_pretraining(pretrain):
    """Spec A.3 and A.4: nothing behind q, k, v of block 12 is trained; CLS is decayed."""
    stage, shapes = pretrain
    task = make_setup(stage, "s", {"teacher": recipes.student("base")}, 10_000).task
    found = by_label(optim.rules(shapes, stage.optim, task.is_untrained))
    first = range(1, 12)
    assert found["decay"] == {"encoder/cls_token", "encoder/patch_embed/kernel", *names(first, BLOCK_KERNELS)} | {
        "encoder/block12/attn/qkv/kernel"
    }
    assert found["no_decay"] == {"encoder/patch_embed/bias", *names(first, BLOCK_VECTORS)} | names(
        [12], ["norm1/scale", "norm1/bias", "attn/qkv/bias"]
    )
    assert found["freeze"] == {"encoder/pos_embed", "encoder/norm/scale", "encoder/norm/bias"} | names(
        [12],
        ["attn/proj/kernel", "attn/proj/bias", "norm2/scale", "norm2/bias"]
        + [f"mlp/{fc}/{v}" for fc in ("fc1", "fc2") for v in ("kernel", "bias")],
    )


def test_rules_of_finetuning(tuned):
    """Spec A.5: decayed are the matrices only; CLS and positions are trained and not decayed."""
    stage, shapes = tuned
    found = by_label(optim.rules(shapes, stage.optim))
    blocks = range(1, 13)
    assert found["decay"] == names(blocks, BLOCK_KERNELS) | {"encoder/patch_embed/kernel", "encoder/head/kernel"}
    assert found["no_decay"] == names(blocks, BLOCK_VECTORS) | {
        "encoder/cls_token",
        "encoder/pos_embed",
        "encoder/patch_embed/bias",
        "encoder/fc_norm/scale",
        "encoder/fc_norm/bias",
        "encoder/head/bias",
    }
    assert found["freeze"] == set()


def test_a_distillation_token_decays(data):
    """timm 0.3.2's no_weight_decay names pos_embed and cls_token alone, and DeiT's distilled models do not change it."""
    stage = recipes.tinymim_star(config.Init("s"), config.Init("t"), data, data)
    found = by_label(optim.rules(encoder_shapes(stage.model), stage.optim))
    assert "encoder/dist_token" in found["decay"]
    assert {"encoder/cls_token", "encoder/pos_embed"} <= found["no_decay"]


def test_vectors_are_never_decayed(pretrain, tuned):
    """What is one-dimensional or a bias in the released code, a fused bias [3, H, E] among it."""
    for stage, shapes in (pretrain, tuned):
        labels = flatten(optim.rules(shapes, stage.optim))
        for name, leaf in flatten(shapes).items():
            if leaf.ndim == 1 or name.endswith("/bias"):
                assert labels[name] == "no_decay", name
        assert flatten(shapes)["encoder/block12/attn/qkv/bias"].ndim == 3


def test_rules_of_mae():
    """Spec B.1: both tokens are decayed, both tables of positions are fixed."""
    stage = recipes.mae(config.ViT(16, 2, 2, image_size=32), recipes.imagenet(True, image_size=32))
    setup = make_setup(stage, "mae", {}, 10_000)
    found = by_label(setup.labels)
    assert found["freeze"] == {"encoder/pos_embed", "pretext/decoder/pos_embed"}
    assert {
        "encoder/cls_token",
        "pretext/decoder/mask_token",
        "pretext/decoder/embed/kernel",
        "pretext/decoder/pred/kernel",
    } <= found["decay"]
    assert {
        "pretext/decoder/norm/scale",
        "pretext/decoder/embed/bias",
        "pretext/decoder/block1/attn/qkv/bias",
    } <= found["no_decay"]
    assert sum(map(len, found.values())) == len(flatten(setup.params))


def test_a_parameter_without_a_rule():
    with pytest.raises(InputError, match=r"parameter a/gamma is in none of optim\.decay and optim\.no_decay"):
        optim.rules({"a": {"kernel": 0, "gamma": 0}}, Optim(1.0))
    with pytest.raises(InputError, match=r"parameter kernel is in none"):
        optim.rules({"kernel": 0}, Optim(1.0))  # regexes match whole names


def test_a_parameter_with_two_rules():
    cfg = Optim(1.0, no_decay=(".*/bias", ".*/ker.*"))
    with pytest.raises(InputError, match="parameter a/kernel is in decay and no_decay"):
        optim.rules({"a": {"kernel": 0, "bias": 0}}, cfg)


def test_freezing_comes_first():
    params = {"a": {"kernel": 0, "gamma": 0, "bias": 0}, "b": {"kernel": 0}}
    labels = optim.rules(params, Optim(1.0, freeze=("a/(gamma|kernel)",)), lambda name: name.startswith("b/"))
    assert labels == {"a": {"kernel": "freeze", "gamma": "freeze", "bias": "no_decay"}, "b": {"kernel": "freeze"}}


# Layer decay (spec A.5)


def test_layer_decay(tuned):
    stage, shapes = tuned
    scales = flatten(optim.lr_scales(shapes, stage.optim, stage.model))
    assert set(scales) == set(flatten(shapes))
    for name, scale in scales.items():
        part = name.split("/")[1]
        if part in ("cls_token", "pos_embed", "patch_embed"):
            expected = 0.0036972  # 0.65^13
        elif part in ("fc_norm", "head"):
            expected = 1.0
        else:
            expected = 0.65 ** (13 - int(part.removeprefix("block")))
        assert scale == pytest.approx(expected, rel=1e-5), name
    assert scales["encoder/block1/norm1/scale"] == pytest.approx(0.0056880, rel=1e-4)  # 0.65^12
    assert scales["encoder/block12/mlp/fc2/kernel"] == pytest.approx(0.65)
    assert scales["encoder/head/kernel"] == scales["encoder/fc_norm/bias"] == 1.0


def test_layer_decay_of_the_last_norm_and_of_what_is_no_encoder():
    params = {"encoder": {"norm": {"scale": 0}}, "pretext": {"adapter": {"kernel": 0}}}
    scales = optim.lr_scales(params, Optim(1.0, layer_decay=0.5), TWO_BLOCKS)
    assert scales == {"encoder": {"norm": {"scale": 1.0}}, "pretext": {"adapter": {"kernel": 1.0}}}


def test_layer_decay_of_an_unknown_parameter():
    with pytest.raises(InputError, match=r"encoder/x"):
        optim.lr_scales({"encoder": {"x": 0}}, Optim(1.0, layer_decay=0.9), TWO_BLOCKS)


def test_rates_by_name_multiply_layer_decay():
    params = {"encoder": {"block1": {"norm1": {"scale": 0}}, "head": {"kernel": 0}}}
    cfg = Optim(1.0, layer_decay=0.5, lr_scale={".*/head/.*": 10.0, "encoder/.*": 3.0})
    scales = flatten(optim.lr_scales(params, cfg, TWO_BLOCKS))
    assert scales == {"encoder/block1/norm1/scale": 3 * 0.25, "encoder/head/kernel": 30.0}
    optim.rules(params, cfg)
    cfg.lr_scale["encoder/heads/.*"] = 2.0
    with pytest.raises(InputError, match=r"optim\.lr_scale: 'encoder/heads/\.\*' matches no parameter"):
        optim.rules(params, cfg)


# AdamW


class Reference:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) in float64, the rate and the decay of each array its own."""

    def __init__(self, b1, b2, eps):
        self.b1, self.b2, self.eps, self.t = b1, b2, eps, 0
        self.m, self.v = {}, {}

    def step(self, params, grads, lr, scales, decays, clip_norm=None):
        self.t += 1
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        factor = min(1.0, clip_norm / norm) if clip_norm else 1.0
        new = {}
        for key, p in params.items():
            g = grads[key] * factor
            self.m[key] = self.b1 * self.m.get(key, 0.0) + (1 - self.b1) * g
            self.v[key] = self.b2 * self.v.get(key, 0.0) + (1 - self.b2) * g**2
            m_hat, v_hat = self.m[key] / (1 - self.b1**self.t), self.v[key] / (1 - self.b2**self.t)
            new[key] = p - lr * scales[key] * (m_hat / (np.sqrt(v_hat) + self.eps) + decays[key] * p)
        return new


SHAPES = {
    "encoder/patch_embed/kernel": (5, 4),
    "encoder/block1/mlp/kernel": (4, 3),
    "encoder/block2/mlp/kernel": (3, 4),
    "encoder/block2/mlp/bias": (4,),
    "encoder/head/kernel": (4, 2),
}
SCALES = dict(zip(SHAPES, (0.5**3, 0.5**2, 0.5, 0.5, 1.0), strict=True))


@pytest.mark.parametrize("clip_norm", [None, 1.5])
@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_adamw(clip_norm, eps):
    draw = np.random.default_rng(0)
    cfg = Optim(
        2e-2, None, min_lr=1e-3, warmup_epochs=0.5, eps=eps, weight_decay=0.3, layer_decay=0.5, clip_norm=clip_norm
    )
    reference = {key: draw.normal(size=shape) for key, shape in SHAPES.items()}
    params = unflatten({k: jnp.asarray(v, jnp.float32) for k, v in reference.items()})
    schedule = optim.make_schedule(cfg, 1, 8, 20)
    tx = optim.make_optimizer(cfg, schedule, optim.rules(params, cfg), optim.lr_scales(params, cfg, TWO_BLOCKS))
    state = tx.init(params)
    adamw = Reference(0.9, 0.95, eps)
    decays = {key: 0.3 if key.endswith("kernel") else 0.0 for key in SHAPES}
    start, update = dict(reference), jax.jit(tx.update)
    for step in range(20):
        # Norms about 2.4 and 7.6, but well below the limit at every third step.
        grads = {k: draw.normal(size=s) * (0.1, 0.4, 1.0)[step % 3] for k, s in SHAPES.items()}
        lr = lr_sched(step / 8, 2e-2, 1e-3, 0.5, 20 / 8)
        reference = adamw.step(reference, grads, lr, SCALES, decays, clip_norm)
        updates, state = update(unflatten({k: jnp.asarray(v, jnp.float32) for k, v in grads.items()}), state, params)
        params = optax.apply_updates(params, updates)
    for key, value in flatten(params).items():
        moved = reference[key] - start[key]
        assert np.abs(moved).max() > 1e-3
        np.testing.assert_allclose(value - start[key].astype(np.float32), moved, atol=3e-6, err_msg=key)


def test_the_first_step_moves_nothing():
    params = {"a": {"kernel": jnp.ones(3)}}
    cfg = Optim(1.0, None, warmup_epochs=1)
    tx = optim.make_optimizer(cfg, optim.make_schedule(cfg, 1, 5, 10), optim.rules(params, cfg), {"a": {"kernel": 1.0}})
    updates, state = tx.update({"a": {"kernel": jnp.ones(3)}}, tx.init(params), params)
    np.testing.assert_array_equal(updates["a"]["kernel"], 0.0)
    updates, _ = tx.update({"a": {"kernel": jnp.ones(3)}}, state, params)
    # lr 1/5, m / sqrt(v) = 1, decay 0.05 of a parameter of 1
    np.testing.assert_allclose(updates["a"]["kernel"], -0.2 * 1.05, rtol=1e-5)


def test_frozen_parameters():
    params = {"a": {"kernel": jnp.full(3, 2.0), "bias": jnp.ones(2)}, "b": {"kernel": jnp.full((2, 7), 3.0)}}
    cfg = Optim(0.1, None, freeze=("b/.*",), weight_decay=0.5)
    labels = optim.rules(params, cfg)
    tx = optim.make_optimizer(cfg, lambda _: 0.1, labels, jax.tree.map(lambda _: 1.0, params))
    state = tx.init(params)
    assert (2, 7) not in {leaf.shape for leaf in jax.tree.leaves(state)}
    assert sorted(leaf.shape for leaf in jax.tree.leaves(state)) == [(), (), (2,), (2,), (3,), (3,)]
    grads = jax.tree.map(jnp.ones_like, params)  # even if there were a gradient
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["b"]["kernel"], 3.0)
    assert (params["a"]["kernel"] < 1.8).all() and (params["a"]["bias"] < 0.8).all()


def test_decay_is_decoupled_and_selective():
    """With no gradient at all, a decayed parameter shrinks by lr x decay each step and the others stay."""
    params = {"a": {"kernel": jnp.full(3, 2.0), "bias": jnp.full(3, 2.0), "cls_token": jnp.full(3, 2.0)}}
    cfg = Optim(0.1, None, weight_decay=0.5)
    tx = optim.make_optimizer(cfg, lambda _: 0.1, optim.rules(params, cfg), jax.tree.map(lambda _: 1.0, params))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["a"]["kernel"], -0.1 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_allclose(updates["a"]["cls_token"], -0.1 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["a"]["bias"], 0.0)


def test_stop_frozen():
    params = {"a": jnp.array(2.0), "b": jnp.array(3.0), "c": jnp.array(5.0)}
    labels = {"a": "decay", "b": "freeze", "c": "no_decay"}

    def product(p):
        p = optim.stop_frozen(p, labels)
        return p["a"] * p["b"] * p["c"]

    assert jax.tree.map(float, jax.grad(product)(params)) == {"a": 15.0, "b": 0.0, "c": 6.0}
    assert float(product(params)) == 30.0


# SGD and LARS against plain loops


def steps_of(cfg, gradients, params, lr):
    """The parameters after each of several updates at a rate that changes."""
    labels = {"w": "decay", "b": "no_decay", "f": "freeze"}
    tx = optim.make_optimizer(cfg, lambda step: jnp.asarray(lr)[step], labels, dict.fromkeys(labels, 1.0))
    state, path = tx.init(params), []
    for gradient in gradients:
        updates, state = tx.update(gradient, state, params)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
        path.append(params)
    return path


def draw(seed=0, n=4):
    rng = np.random.default_rng(seed)
    shapes = {"w": (3, 5), "b": (5,), "f": (2, 2)}
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    return params, [{k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()} for _ in range(n)]


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_momentum_and_trust(name):
    """MAE util/lars.py: no decay and no trust ratio for vectors; the rate comes after the momentum."""
    params, gradients = draw()
    lr, decay, trust = [0.5, 0.4, 0.1, 0.3], 0.1, 0.02
    cfg = Optim(1.0, name=name, weight_decay=decay, trust=trust, momentum=0.9)
    path = steps_of(cfg, gradients, params, lr)
    expected, speed = dict(params), {"w": 0.0, "b": 0.0}
    for step, gradient in enumerate(gradients):
        for key in ("w", "b"):
            p, g = expected[key].astype(np.float64), gradient[key].astype(np.float64)
            if key == "w":
                g = g + decay * p
                g *= trust * np.linalg.norm(p) / np.linalg.norm(g) if name == "lars" else 1.0
            speed[key] = 0.9 * speed[key] + g
            expected[key] = p - lr[step] * speed[key]
            np.testing.assert_allclose(path[step][key], expected[key], rtol=2e-5, atol=1e-6)
        np.testing.assert_array_equal(path[step]["f"], params["f"])


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torch_s(nesterov):
    torch = pytest.importorskip("torch")
    params, gradients = draw()
    theirs = {name: torch.tensor(params[name], requires_grad=True) for name in ("w", "b")}
    groups = [{"params": [theirs["w"]], "weight_decay": 0.1}, {"params": [theirs["b"]], "weight_decay": 0.0}]
    sgd = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=nesterov)
    lr = [0.5, 0.4, 0.1, 0.3]
    cfg = Optim(1.0, name="sgd", weight_decay=0.1, momentum=0.9, nesterov=nesterov)
    for step, ours in enumerate(steps_of(cfg, gradients, params, lr)):
        for group in sgd.param_groups:
            group["lr"] = lr[step]
        for name, value in theirs.items():
            value.grad = torch.tensor(gradients[step][name])
        sgd.step()
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value.detach().numpy(), rtol=2e-5, atol=1e-6)
