"""Contrastive learning with a momentum encoder (MoCo v3), the baseline of MAE-Lite's study (projects/mocov3)."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.data.contrastive_augment import VIEWS, make_view
from tinymim_jax.data.device_augment import normalize, to_float
from tinymim_jax.data.fields import TWO_CROPS
from tinymim_jax.models.contract import Encoder, Outputs, Pool
from tinymim_jax.models.layers import torch_uniform
from tinymim_jax.objectives.losses import contrastive
from tinymim_jax.objectives.metrics import Mean
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.contract import Aux, Batch, Context, Frozen, Panels, Params, Rngs, Task, TaskConfig, Variables

STATE = "moco"  # the collection of the momentum encoder, its projector and the step


@dataclasses.dataclass
class Moco(TaskConfig):
    """Two views of an image find each other among all images of the batch (MoCo v3).

    With optim.accum_steps, "all" are those of a micro-batch.
    """

    dim: int = ranged(256, at_least=1)  # of what is compared
    hidden: int = ranged(4096, at_least=1)  # width of projector and predictor
    temperature: float = ranged(0.2, above=0)
    momentum: float = ranged(0.99, at_least=0, at_most=1)  # of the second encoder at first; rises to 1 by half a cosine
    kind: Literal["moco"] = "moco"

    def build(self, context: Context) -> "MocoTask":
        return MocoTask(self, context)

    def summary(self) -> str:
        return "MoCo v3 pre-training"

    def features_pool(self) -> Pool:
        return "cls"

    def check(self, where: str, model: Encoder) -> None:
        if not model.num_prefix or model.num_classes:
            raise InputError(f"{where}: moco compares class tokens; give it an encoder with one, and num_classes=0")
        model.check_norm(where)  # what is compared is normed


class Affine(nn.Module):
    """The scale and bias behind a normalisation."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, D] -> [B, D]."""
        scale = self.param("scale", nn.initializers.ones, x.shape[1:])
        return x * scale + self.param("bias", nn.initializers.zeros, x.shape[1:])


class Mlp(nn.Module):
    """Linear layers without bias, each in front of BatchNorm, which has an affine and ReLU behind it but at the end.

    Moments are those of the valid images of the batch, over all devices; no others are kept, as nothing reads them.
    """

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array, is_valid: jax.Array) -> jax.Array:
        """[B, D] and [B] -> [B, widths[-1]], float32."""
        share = (is_valid / jnp.maximum(is_valid.sum(), 1))[:, None]
        for i, width in enumerate(self.widths, 1):
            init = torch_uniform(x.shape[-1])
            x = nn.Dense(width, use_bias=False, kernel_init=init, name=f"fc{i}")(x)
            x = x - jnp.sum(share * x, axis=0)
            x = x * jax.lax.rsqrt(jnp.sum(share * x**2, axis=0) + 1e-5)
            if i < len(self.widths):
                x = nn.relu(Affine(name=f"bn{i}")(x))
        return x


class MocoTask(Task):
    """Parameters: `encoder`, `pretext/projector`, `pretext/predictor`; state: the encoder and projector that follow."""

    fields = TWO_CROPS

    def __init__(self, cfg: Moco, context: Context):
        super().__init__(context)
        self.task = cfg
        self.projector, self.predictor = Mlp((cfg.hidden, cfg.hidden, cfg.dim)), Mlp((cfg.hidden, cfg.dim))

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Variables, Frozen]:
        keys, token = jax.random.split(rng, 3), jnp.zeros((1, self.cfg.width_of(self.cfg.depth)))
        encoder = self.model.init(keys[0], self.images(batch))["params"]
        projector = self.projector.init(keys[1], token, jnp.ones(1))["params"]
        predictor = self.predictor.init(keys[2], jnp.zeros((1, self.task.dim)), jnp.ones(1))["params"]
        params = {"encoder": encoder, "pretext": {"projector": projector, "predictor": predictor}}
        copies = jax.tree.map(jnp.copy, {"encoder": encoder, "projector": projector})
        return {"params": params, STATE: {**copies, "step": jnp.zeros((), jnp.int32)}}, {}

    def merge_state(self, before: Any, parts: Any, rows: int) -> Any:
        return jax.tree.map(lambda values: values[0], parts)  # each micro-batch does the same to it

    def views(self, batch: Batch, rng: jax.Array) -> list[jax.Array]:
        """Both, in [0, 1]."""
        keys = jax.random.split(rng)
        crops = (to_float(batch[name]) for name in ("image", "second"))
        return [make_view(key, crop, view) for key, crop, view in zip(keys, crops, VIEWS, strict=True)]

    def _projected(self, params: Params, images: jax.Array, is_valid: jax.Array, **train: Any) -> jax.Array:
        tokens = self.model.apply({"params": params["encoder"]}, images, **train).tokens[:, 0].astype(jnp.float32)
        return self.projector.apply({"params": params["projector"]}, tokens, is_valid)

    def loss(
        self, params: Params, model_state: Any, frozen: Frozen, batch: Batch, rngs: Rngs, *, train: bool
    ) -> tuple[jax.Array, Aux]:
        old, is_valid = model_state[STATE], batch["is_valid"]
        own = {"encoder": params["encoder"], "projector": params["pretext"]["projector"]}
        views = self.views(batch, rngs["augment"]) if train else [to_float(batch[k]) for k in ("image", "second")]
        views = [normalize(view, self.data.mean, self.data.std) for view in views]
        new = {**self.followed(old, own), "step": old["step"] + 1} if train else old
        queries, keys = [], []
        for i, view in enumerate(views):
            drop = {"train": train, "rngs": {"drop_path": jax.random.fold_in(rngs["drop_path"], i)}}
            projected = self._projected(own, view, is_valid, **drop)
            queries.append(self.predictor.apply({"params": params["pretext"]["predictor"]}, projected, is_valid))
            keys.append(jax.lax.stop_gradient(self._projected(new, view, is_valid)))
        pairs = zip(queries, reversed(keys), strict=True)
        values = sum(contrastive(*pair, is_valid, self.task.temperature) for pair in pairs)
        loss = Mean.of(values, is_valid)
        return loss.value(), Aux({"loss": loss}, {**model_state, STATE: new})

    def followed(self, old: Any, own: Any) -> dict[str, Any]:
        """The momentum encoder and its projector, a step nearer to the trained ones; at the first step, these."""
        done = old["step"] / max(self.context.total_steps, 1)
        momentum = 1 - 0.5 * (1 + jnp.cos(jnp.pi * done)) * (1 - self.task.momentum)
        momentum = jnp.where(old["step"] == 0, 0.0, momentum)
        old = {name: old[name] for name in own}
        return jax.tree.map(lambda kept, new: momentum * kept + (1 - momentum) * jax.lax.stop_gradient(new), old, own)

    def predict(self, variables: Variables, frozen: Frozen, batch: Batch) -> Outputs:
        """Features: the class token."""
        return self.cfg.outputs(variables, self.images(batch), pool=self.task.features_pool())

    def flops_per_image(self) -> float:
        width, cfg = self.cfg.width_of(self.cfg.depth), self.task
        project = 2.0 * (width * cfg.hidden + cfg.hidden**2 + cfg.hidden * cfg.dim)
        predict = 4.0 * cfg.hidden * cfg.dim
        return 2 * (self.cfg.train_flops() + self.cfg.forward_flops() + 4 * project + 3 * predict)

    def panels(self, variables: Variables, frozen: Frozen, batch: Batch, rngs: Rngs) -> Panels:
        """The images, and two views of each."""
        views = self.views({**batch, "second": batch["image"]}, rngs["augment"])
        rows = [list(np.asarray(row)) for row in (to_float(batch["image"]), *views)]
        return Panels("what two views of an image differ in, but for their crops", rows, ["image", "view 1", "view 2"])
