"""Each target's value, and its gradient by every parameter and by what the student computed, against torch's autograd."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinymim_jax.experiment.config import AttentionLogits, ClassToken, Decoder, Feature, Reconstruction, Relation, ViT
from tinymim_jax.models.contract import BlockTrace
from tinymim_jax.models.mae import mask_by_noise
from tinymim_jax.tasks.targets.contract import Pass
from tinymim_jax.weights.parameters import flatten

torch = pytest.importorskip("torch")
F = torch.nn.functional

B, N = 3, 17
TEACHER = ViT(24, 4, 3, image_size=16, patch_size=4)
STUDENT = ViT(12, 3, 3, image_size=16, patch_size=4)
NARROW = ViT(12, 3, 2, image_size=16, patch_size=4)
TENSORS = ("mlp_out", "mid", "attn_out", "q", "k", "v")


def trace(model, seed):
    rng = np.random.default_rng(seed)
    wide, heads = (B, N, model.width), (B, N, model.num_heads, model.width // model.num_heads)
    whole = ("norm1", "attn_out", "mid", "mlp_out", "out", "normed")
    shapes = {**dict.fromkeys(whole, wide), "q": heads, "k": heads, "v": heads}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def flat(x):
    return x.reshape(B, x.shape[1], -1)


def products(a, b):
    a, b = a.transpose(1, 2), b.transpose(1, 2)
    return a @ b.transpose(2, 3) / a.shape[-1] ** 0.5


def relations(cfg, teacher, student):
    pairs = {"qk": ("q", "k"), "vv": ("v", "v"), "qq": ("q", "q"), "kk": ("k", "k")}
    total = 0
    for a, b in (pairs[name] for name in cfg.relations):
        t, s = ([one[a], one[b]] for one in (teacher, student))
        if cfg.relation_heads:
            t, s = ([x.reshape(B, N, cfg.relation_heads, -1) for x in both] for both in (t, s))
        if not cfg.cls:
            t, s = ([x[:, 1:] for x in both] for both in (t, s))
        t, s = (products(*both) / cfg.temperature for both in (t, s))
        if cfg.softmax:
            log_t, log_s = t.log_softmax(-1), s.log_softmax(-1)
            total = total + (log_t.exp() * (log_t - log_s)).sum(-1).mean(dim=(1, 2))
        else:
            total = total + ((t - s) ** 2).mean(dim=(1, 2, 3))
    return total


def features(cfg, params, teacher, student):
    total = 0
    for name in cfg.tensors:
        target = flat(teacher[name])
        target = F.layer_norm(target, (TEACHER.width,), eps=1e-6) if cfg.norm else target
        own = flat(student[name]) @ params[f"{name}/kernel"] + (params[f"{name}/bias"] if cfg.bias else 0)
        error = F.mse_loss if cfg.loss == "mse" else lambda a, b, **how: F.smooth_l1_loss(a, b, beta=cfg.beta, **how)
        total = total + error(own, target, reduction="none").mean(dim=(1, 2))
    return total


def class_token(cfg, params, teacher, student):
    own = F.layer_norm(student["out"][:, 0], (STUDENT.width,), params["norm/scale"], params["norm/bias"], 1e-6)
    own = own @ params["projection/kernel"] + params["projection/bias"]
    log_s, log_t = ((x / cfg.temperature).log_softmax(-1) for x in (own, teacher["out"][:, 0]))
    return cfg.temperature**2 * F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)


def attention(cfg, params, teacher, student):
    own = products(student["q"], student["k"])
    if cfg.adapter:
        own = F.conv2d(own, params["kernel"].T[:, :, None, None])
    return F.mse_loss(own, products(teacher["q"], teacher["k"]), reduction="none").mean(dim=(1, 2, 3))


CASES = [
    (Relation(4, 3), STUDENT, lambda cfg, params, *traces: relations(cfg, *traces)),
    (Relation(4, 3, ("qq", "kk", "vv"), temperature=0.5), STUDENT, lambda cfg, params, *t: relations(cfg, *t)),
    (Relation(4, 3, ("qq", "kk", "vv"), softmax=False), STUDENT, lambda cfg, params, *t: relations(cfg, *t)),
    (Relation(4, 3, softmax=False, cls=False), STUDENT, lambda cfg, params, *t: relations(cfg, *t)),
    (Relation(4, 3, cls=False), STUDENT, lambda cfg, params, *t: relations(cfg, *t)),
    (Relation(4, 3, relation_heads=6), NARROW, lambda cfg, params, *t: relations(cfg, *t)),
    (Feature(4, 3), STUDENT, features),
    (Feature(4, 3, TENSORS), NARROW, features),
    (Feature(4, 3, ("q", "k", "v"), "mse"), STUDENT, features),
    (Feature(4, 3, beta=0.3), STUDENT, features),
    (Feature(4, 3, ("norm1", "normed"), "mse", norm=False, bias=False), STUDENT, features),
    (ClassToken(4, 3), STUDENT, class_token),
    (ClassToken(4, 3, temperature=2.0), STUDENT, class_token),
    (AttentionLogits(4, 3), NARROW, attention),
    (AttentionLogits(4, 3, adapter=False), STUDENT, attention),
]


@pytest.mark.parametrize(("cfg", "student", "expected"), CASES, ids=lambda x: getattr(x, "kind", "") or None)
def test_value_and_gradients(cfg, student, expected):
    target = cfg.build("task.targets.x", TEACHER, student)
    params = jax.tree.map(lambda x: x + 0.1, target.init(jax.random.key(0)))
    arrays = trace(TEACHER, 1), trace(student, 2)

    def loss(params, own):
        terms = target.loss(params, {4: BlockTrace(**arrays[0])}, {3: BlockTrace(**own)})
        return sum(terms.values()).sum(), sum(terms.values())

    (_, values), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, jax.tree.map(jnp.asarray, arrays[1]))
    theirs = {name: torch.tensor(np.asarray(x, np.float64), requires_grad=True) for name, x in flatten(params).items()}
    teacher, own = ({name: torch.tensor(x.astype(np.float64)) for name, x in one.items()} for one in arrays)
    for x in own.values():
        x.requires_grad_()
    wanted = expected(cfg, theirs, teacher, own)
    wanted.sum().backward()
    np.testing.assert_allclose(values, wanted.detach(), rtol=2e-6)
    for found, others in ((flatten(grads[0]), theirs), (grads[1], own)):
        for name, x in others.items():
            exact = np.zeros(x.shape) if x.grad is None else x.grad.numpy()
            np.testing.assert_allclose(found[name], exact, rtol=1e-5, atol=1e-5 * max(np.abs(exact).max(), 1e-3))


@pytest.mark.parametrize("rows", [5, 17])
def test_products_are_compared_in_blocks_of_rows(rows):
    from tinymim_jax.objectives.relation_mse import relation_mse

    (t, s) = ([jnp.asarray(trace(model, 1)[name]) for name in ("q", "k")] for model in (TEACHER, STUDENT))
    np.testing.assert_allclose(relation_mse(t, s, rows), relation_mse(t, s), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_reconstruction_and_its_gradients(norm_pix_loss):
    """Of a decoder of one block, on 4 of 16 patches."""
    from tinymim_jax.bridge.torch_reference import mae as theirs
    from tinymim_jax.experiment.config import Mae

    cfg = Reconstruction(3, Decoder(16, 1, 4), norm_pix_loss)
    target = cfg.build("task.targets.x", TEACHER, STUDENT)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), target.init(jax.random.key(0))
    )
    images, noise = rng.normal(size=(B, 16, 16, 3)).astype(np.float32), rng.uniform(size=(B, 16)).astype(np.float32)
    tokens = rng.normal(size=(B, 5, STUDENT.width)).astype(np.float32)
    mask = mask_by_noise(jnp.asarray(noise), 0.75)[1:]

    def loss(params, tokens):
        values = target.loss(params, None, Pass({3: BlockTrace(normed=tokens)}, jnp.asarray(images), *mask))
        return values["reconstruction"].sum(), values["reconstruction"]

    (_, values), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, jnp.asarray(tokens))
    model = theirs.MAE(STUDENT, Mae(cfg.decoder, 0.75, norm_pix_loss)).double()
    own = decoder_arrays(model, params)
    seen = torch.tensor(tokens.astype(np.float64), requires_grad=True)
    _, restore, hidden = theirs.random_masking(torch.tensor(noise.astype(np.float64)), 0.75)
    pixels = theirs.patchify(torch.tensor(images.astype(np.float64)).permute(0, 3, 1, 2), 4)
    pixels = theirs.normalise_patches(pixels) if norm_pix_loss else pixels
    error = (model.decode(seen, restore) - pixels).square().mean(-1)
    wanted = (error * hidden).sum(1) / hidden.sum(1)
    wanted.sum().backward()
    np.testing.assert_allclose(values, wanted.detach(), rtol=2e-6)
    gradients = {name: own[name](tensor.grad) for name, tensor in model.named_parameters() if name in own}
    found = decoder_arrays(model, grads[0], read=True)
    for name, exact in {**gradients, "seen": seen.grad.numpy()}.items():
        actual = grads[1] if name == "seen" else found[name]
        np.testing.assert_allclose(actual, exact, rtol=1e-5, atol=2e-5 * np.abs(exact).max())


def decoder_arrays(model, params, read=False):
    """Fills the torch decoder with `params`; or (read) those that it has a gradient of, by its names."""
    state, found, back = model.state_dict(), {}, {}
    names = {"embed": "decoder_embed", "pred": "decoder_pred", "norm": "decoder_norm", "mask_token": "mask_token",
             "pos_embed": "decoder_pos_embed", "block1": "decoder_blocks.0"}  # fmt: skip
    for name, array in flatten(params).items():
        first, *rest = name.split("/")
        parts = [names[first], *({"kernel": "weight", "scale": "weight"}.get(part, part) for part in rest)]
        key, array = ".".join(parts), np.asarray(array)
        if "qkv" in rest:
            array = array.reshape(*array.shape[: array.ndim - 3], -1)
        found[key] = array.T if key.endswith("weight") and array.ndim == 2 else array
        back[key] = np.asarray
        if not read:
            state[key].copy_(torch.tensor(found[key].astype(np.float64)).reshape(state[key].shape))
    return {key: value for key, value in (found if read else back).items() if key != "decoder_pos_embed"}
