# ruff: noqa: E402 (torch is looked for before what needs it)
"""D-MAE and D2-MAE against PyTorch in float64: each term, its gradients and what it reaches, and fifty steps.

The losses, the mask and AdamW's loop are written here from what is known of MAE-Lite; embedding, blocks and decoder are
`bridge.torch_reference`'s.
"""

import copy
import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity is measured against PyTorch; install tinymim_jax[test]")

from tests import torch_files as files
from tests.tasks import stages
from tests.test_parity import DECODER, IMAGE, assert_close, channels_first
from tests.test_parity_training import BATCH, RNG, STEPS, noise_at, rngs_at
from tinymim_jax.bridge import formats
from tinymim_jax.bridge.torch_reference import mae as torch_mae
from tinymim_jax.bridge.torch_reference import vit as torch_vit
from tinymim_jax.experiment import mae_lite
from tinymim_jax.experiment.config import Init, Mae, Run, ViT
from tinymim_jax.training.setup import StageSetup, make_setup
from tinymim_jax.training.step import TrainState, make_train_step
from tinymim_jax.weights.parameters import flatten, unflatten

KINDS = {"d_mae": (3, 3), "d2_mae": (5, 2)}  # the student's blocks, and which of them the decoder reads
TEACHER = ViT(36, 3, 4, **IMAGE)
TERMS = ("reconstruction_reconstruction", "attention_mse_attention")  # as our metrics name them
WARMUP, PEAK = 5, 2e-3
OURS = {**stages.batch(BATCH), "stop": np.zeros(BATCH, np.uint8)}
THEIRS = channels_first(stages.normalised(OURS["image"]))


def attention_logits(block: torch_vit.BlockTrace) -> torch.Tensor:
    """What goes into the softmax: Q K^T / sqrt(d) [B, H, N, N], of all tokens."""
    return block.q @ block.k.transpose(2, 3) * block.q.shape[-1] ** -0.5


class Student(torch_mae.MAE):
    """An MAE whose decoder reads block `decoded`, and a 1x1 convolution over the heads of its last block's logits."""

    def __init__(self, model: ViT, decoded: int):
        super().__init__(model, Mae(decoder=DECODER))
        self.decoded = decoded
        self.adapter = torch.nn.Conv2d(model.num_heads, TEACHER.num_heads, 1, bias=False)

    def terms(self, teacher: torch_vit.ViT, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """L_rec and L_attn; both models see the quarter of the patches that has the least noise."""
        noise = torch.from_numpy(noise_at(step)).double()
        order = noise.argsort(dim=1)
        seen = order[:, : noise.shape[1] // 4]
        mask = torch.ones_like(noise).scatter(1, seen, 0.0)
        with torch.no_grad():
            target = attention_logits(teacher.encode(THEIRS, seen)[1][-1])
        trace = self.encode(THEIRS, seen)[1]
        own = self.adapter(attention_logits(trace[-1]))
        pred = self.decode(self.norm(trace[self.decoded - 1].out), order.argsort(dim=1))
        pixels = THEIRS.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(pred.shape)
        pixels = (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, unbiased=True, keepdim=True) + 1e-6).sqrt()
        error = ((pred - pixels) ** 2).mean(dim=-1)
        return (error * mask).sum() / mask.sum(), ((own - target) ** 2).mean()


@dataclasses.dataclass
class Pair:
    """A stage here and its models in PyTorch; the same weights of both in our layout."""

    setup: StageSetup
    student: Student
    teacher: torch_vit.ViT
    params: Any
    frozen: Any


@functools.cache
def pair(kind: str) -> Pair:
    """MAE-Lite's recipe, made tiny."""
    depth, decoded = KINDS[kind]
    stage = getattr(mae_lite, kind)("tiny", Init("teacher"), stages.DATA)
    stage.model, targets = ViT(24, depth, 3, **IMAGE), stage.task.targets
    targets["reconstruction"] = dataclasses.replace(targets["reconstruction"], student_block=decoded, decoder=DECODER)
    targets["attention"] = dataclasses.replace(targets["attention"], teacher_block=3, student_block=depth)
    stage.optim = dataclasses.replace(stage.optim, lr=PEAK, lr_batch=None, warmup_epochs=WARMUP)  # an epoch is a step
    stage.run = Run(batch_size=BATCH, steps=STEPS)
    setup = make_setup(stage, "stage", {"teacher": TEACHER}, BATCH)
    models = files.build(lambda: Student(stage.model, decoded), 0), files.build(lambda: torch_vit.ViT(TEACHER), 1)
    for model in models:
        model.double().requires_grad_()
        for block in model.blocks:
            block.attn.qkv.weight.data *= 2  # initial ones are so small that logits are, too
    arrays = map(in_our_layout, (model.state_dict() for model in models), (setup.params, setup.frozen["teacher"]))
    params, teacher = (jax.tree.map(jnp.float32, unflatten(flat)) for flat in arrays)
    return Pair(setup, *models, params, {"teacher": teacher})


def in_our_layout(tensors: dict[str, Any], shapes: Any) -> dict[str, np.ndarray]:
    """{our name: array} of PyTorch's weights or gradients; zeros where it has no gradient."""
    found = {}
    for name, leaf in flatten(shapes).items():
        theirs = formats.mae_name(name.replace("pretext/reconstruction/", formats.DECODER))
        tensor = tensors["adapter.weight" if name == "pretext/attention/kernel" else theirs]
        found[name] = np.zeros(leaf.shape) if tensor is None else formats.from_mae(name, tensor.numpy(), leaf.shape)
    return found


def reached(arrays: dict[str, Any]) -> dict[str, Any]:
    """Those that are not zero throughout."""
    return {name: array for name, array in arrays.items() if np.any(array)}


@functools.cache
def ours(kind: str) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    """The loss, L_rec and L_attn of step 0, and the gradients of each by every parameter, fixed or not."""
    both = pair(kind)

    def values(params: Any) -> jax.Array:
        loss, aux = both.setup.task.loss(params, {}, both.frozen, OURS, rngs_at(0), train=True)
        return jnp.stack([loss, *(aux.metrics[name].value() for name in TERMS)])

    found, grads = jax.jit(lambda params: (values(params), jax.jacrev(values)(params)))(both.params)
    return np.asarray(found), [{name: np.asarray(g[i]) for name, g in flatten(grads).items()} for i in range(3)]


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind):
    both, (values, gradients) = pair(kind), ours(kind)
    terms = both.student.terms(both.teacher, 0)
    names, parameters = zip(*both.student.named_parameters(), strict=True)
    for value, found, exact in zip(values, gradients, (sum(terms), *terms), strict=True):
        print(f"{exact:.4f}, relative difference {abs(float(value) / exact.item() - 1):.2g}")
        assert value == pytest.approx(exact.item(), rel=1e-6)
        grads = torch.autograd.grad(exact, parameters, retain_graph=True, allow_unused=True)
        wanted = in_our_layout(dict(zip(names, grads, strict=True)), both.setup.params)
        assert_close(reached(found), reached(wanted), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_each_term_reaches(kind):
    (depth, decoded), (_, gradients), task = KINDS[kind], ours(kind), pair(kind).setup.task
    start = "encoder/(cls_token|pos_embed|patch_embed/.*)"
    rec = rf"{start}|encoder/(block[1-{decoded}]|norm)/.*|pretext/reconstruction/.*"
    attn = rf"{start}|encoder/(block[1-{depth - 1}]|block{depth}/(norm1|attn/qkv))/.*|pretext/attention/kernel"
    for pattern, found in zip((f"{rec}|{attn}", rec, attn), gradients, strict=True):
        assert set(reached(found)) == {name for name in found if re.fullmatch(pattern, name)}
    for name in ("kernel", "bias"):
        q, k, v = np.moveaxis(gradients[2][f"encoder/block{depth}/attn/qkv/{name}"], -3, 0)
        assert q.any() and k.any() and not v.any()
    fixed = {"encoder/pos_embed", "pretext/reconstruction/pos_embed"}
    unread = gradients[0].keys() - reached(gradients[1]).keys() - reached(gradients[2]).keys()
    assert {name for name in gradients[0] if task.is_untrained(name)} == unread | fixed


def train_reference(both: Pair) -> tuple[list[float], dict[str, Any]]:
    """AdamW, which decays all but vectors, and leaves alone what gets no gradient."""
    model, losses = copy.deepcopy(both.student), []
    trained = [p for name, p in model.named_parameters() if not name.endswith("pos_embed")]
    kinds = ((0.0, [p for p in trained if p.ndim == 1]), (0.05, [p for p in trained if p.ndim > 1]))
    groups = [{"params": params, "weight_decay": decay} for decay, params in kinds]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step in range(STEPS):
        cosine = (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2
        for group in optimizer.param_groups:
            group["lr"] = PEAK * (step / WARMUP if step < WARMUP else cosine)
        loss = sum(model.terms(both.teacher, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, in_our_layout(model.state_dict(), both.setup.params)


@pytest.mark.parametrize("kind", KINDS)
def test_fifty_steps(kind):
    both, last, losses = pair(kind), f"encoder/block{KINDS[kind][0]}/", []
    state = TrainState(jnp.zeros((), jnp.int32), both.params, {}, both.setup.tx.init(both.params), {})
    step = jax.jit(make_train_step(both.setup))
    for _ in range(STEPS):
        state, metrics = step(state, both.frozen, OURS, RNG)
        losses.append(float(metrics["loss"].value()))
    wanted, exact = train_reference(both)
    found = max(abs(a / b - 1) for a, b in zip(losses, wanted, strict=True))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, largest relative difference {found:.2g}")
    assert losses[-1] < 0.8 * losses[0]
    assert found < 1e-5
    # Where logits are not learnt, softmax cancels k's bias: its gradient is rounding, which Adam blows up.
    start = {name: np.float64(p) for name, p in flatten(both.params).items()}
    parts = {name: [0, 2] if name.endswith("qkv/bias") and not name.startswith(last) else ... for name in start}
    ends = flatten(state.params), exact
    moved = [{name: (np.float64(end[name]) - start[name])[part] for name, part in parts.items()} for end in ends]
    assert_close(*map(reached, moved), 1e-4)
