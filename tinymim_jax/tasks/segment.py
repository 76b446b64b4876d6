"""Semantic segmentation: a class for each pixel, by a head on the tokens of several blocks (UPerNet, Semantic-FPN)."""

import dataclasses
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.data import class_list, sources
from tinymim_jax.data.dense import IGNORED, IMAGE_MASK
from tinymim_jax.data.device_augment import to_float
from tinymim_jax.data.photometric import model_input
from tinymim_jax.models import batch_norm
from tinymim_jax.models.contract import Encoder, Outputs
from tinymim_jax.models.pyramid import Pyramid
from tinymim_jax.models.segment_heads import Fcn, Fpn, Linear, SegmentHead, UPer
from tinymim_jax.models.torch_ops import resize
from tinymim_jax.objectives.losses import pixel_cross_entropy
from tinymim_jax.objectives.metrics import Mean
from tinymim_jax.runtime.codec import ranged
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.tasks.classify import replace_by_partner
from tinymim_jax.tasks.contract import Aux, Batch, Context, Frozen, Panels, Params, Rngs, Task, TaskConfig, Variables

HEADS = 1  # folded into the key of their dropout, which is not the encoder's drop path


@dataclasses.dataclass
class Segment(TaskConfig):
    """Semantic segmentation; the data needs `masks`."""

    num_classes: int = ranged(at_least=2)
    head: UPer | Fpn | Linear
    taps: tuple[int, ...] = ranged((4, 6, 8, 12), at_least=1)  # blocks whose tokens are read, from 1
    pyramid: Pyramid = dataclasses.field(default_factory=Pyramid)  # of maps, where a head reads them
    aux: Fcn | None = None  # a second head, for training alone
    aux_weight: float = ranged(0.4, at_least=0)  # of its loss
    average: Literal["all", "counted"] = "all"  # the loss is a mean over all pixels, the ignored too (mmseg), or not
    kind: Literal["segment"] = "segment"

    gives_pixels: ClassVar[bool] = True

    def build(self, context: Context) -> "SegmentTask":
        return SegmentTask(self, context)

    def summary(self) -> str:
        read = self.taps if self.reads_maps() else self.taps[-1:]
        aux = f" beside {self.aux.kind}" if self.aux else ""
        return (
            f"segmentation into {self.num_classes} classes by {self.head.kind}{aux}, blocks {', '.join(map(str, read))}"
        )

    def check(self, where: str, model: Encoder) -> None:
        if model.num_classes:
            raise InputError(f"{where}: segmentation has heads of its own; set model.num_classes=0")
        if self.reads_maps():
            self.pyramid.check(f"{where}.pyramid", model)
            self.pyramid.check_blocks(f"{where}.taps", model, self.taps)
        elif list(self.taps) != sorted(set(self.taps)) or self.taps[-1] > model.depth:
            raise InputError(f"{where}.taps is {self.taps}; name blocks in order, of 1 to {model.depth}")
        for name, head in self.heads().items():
            head.check(f"{where}.{name}", model)

    def reads_maps(self) -> bool:
        """Whether any head reads the pyramid's maps."""
        return any(head.reads_pyramid for head in self.heads().values())

    def heads(self) -> dict[str, SegmentHead]:
        """Those that there are, by field."""
        return {"head": self.head, **({"aux": self.aux} if self.aux else {})}


class Decode(nn.Module):
    """A `Segment`'s pyramid and heads."""

    cfg: Segment
    dtype: str

    def setup(self) -> None:
        self.pyramid = self.cfg.pyramid.build(self.dtype)
        for name, head in self.cfg.heads().items():
            setattr(self, name, head.build(self.cfg.num_classes, self.dtype))

    def __call__(self, taps: tuple[jax.Array, ...], train: bool) -> dict[str, jax.Array]:
        """Tokens of blocks, [B, g, g, D] each -> logits [B, h, w, C] of each head, float32."""
        heads = self.cfg.heads()
        maps = self.pyramid(taps, train) if self.cfg.reads_maps() else taps
        return {name: getattr(self, name)(maps if head.reads_pyramid else taps, train) for name, head in heads.items()}


class SegmentTask(Task):
    """Parameters: `encoder`, and under `pretext` the pyramid and the heads."""

    fields = IMAGE_MASK

    def __init__(self, cfg: Segment, context: Context):
        super().__init__(context)
        self.task, self.decode = cfg, Decode(cfg, self.cfg.dtype)
        if self.data.masks is None:
            raise InputError(
                "task 'segment' learns a class for each pixel: set data.masks, and a source that has masks"
            )
        if self.data.masks.num_classes != cfg.num_classes:
            raise InputError(
                f"data.masks.num_classes is {self.data.masks.num_classes} and task.num_classes {cfg.num_classes}; make"
                " them equal"
            )

    def images(self, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
        """As `Task.images`, of crops and windows 0 where they hold no image; with `rng`, to train on."""
        if "extent" not in batch:  # of evaluators that read whole images
            return super().images(batch)
        return model_input(batch["image"], batch["extent"], self.data, rng)

    def is_untrained(self, name: str) -> bool:
        if name.startswith("pretext/"):
            return False
        return super().is_untrained(name) or not self.cfg.reads(name, self.task.taps[-1])

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Variables, Frozen]:
        encoder_rng, head_rng = jax.random.split(rng)
        out, encoder = self.model.init_with_output(encoder_rng, self.images(batch), capture=self.task.taps)
        own = dict(self.decode.init(head_rng, self._maps(out), False))
        return {"params": {"encoder": encoder["params"], "pretext": own.pop("params")}, **own}, {}

    def _maps(self, out: Any) -> tuple[jax.Array, ...]:
        grid, front = self.cfg.grid, self.cfg.num_prefix
        tokens = [out.trace[block].out[:, front:] for block in self.task.taps]
        return tuple(x.reshape(len(x), grid, grid, x.shape[-1]) for x in tokens)

    def loss(
        self, params: Params, model_state: Any, frozen: Frozen, batch: Batch, rngs: Rngs, *, train: bool
    ) -> tuple[jax.Array, Aux]:
        # Unreadable images reach others by batch statistics.
        fields, is_valid = ("image", "mask", "extent"), batch["is_valid"]
        batch = {**batch, **{name: replace_by_partner(batch[name], is_valid) for name in fields}}
        drop = rngs["drop_path"]
        images = self.images(batch, rngs["augment"] if train else None)
        how = {"capture": self.task.taps, "train": train, "rngs": {"drop_path": drop}}
        out = self.model.apply({"params": params["encoder"]}, images, **how)
        heads, new = self.decode.apply(
            {"params": params["pretext"], **model_state}, self._maps(out), train,
            rngs={"drop_path": jax.random.fold_in(drop, HEADS)}, mutable=list(model_state),
        )  # fmt: skip
        size, counts = batch["mask"].shape[1:], (batch["mask"] != IGNORED).sum((1, 2))
        pixels = size[0] * size[1] if self.task.average == "all" else counts
        terms = {}
        for name, logits in heads.items():
            summed = pixel_cross_entropy(resize(logits, size), batch["mask"], IGNORED)
            many = jnp.where(is_valid, pixels, 0).sum()
            terms[name] = Mean(jnp.where(is_valid, summed, 0.0).sum(), many.astype(jnp.float32))
        loss = terms["head"]
        if "aux" in terms:
            loss = Mean(loss.sum + self.task.aux_weight * terms["aux"].sum, loss.count)
        metrics = {"loss": loss, **({f"loss_{name}": term for name, term in terms.items()} if "aux" in terms else {})}
        return loss.sum / jnp.maximum(loss.count, 1.0), Aux(metrics, {**model_state, **new})

    def merge_state(self, before: Any, parts: Any, rows: int) -> Any:
        return batch_norm.merge(before, parts, rows)

    def predict(self, variables: Variables, frozen: Frozen, batch: Batch) -> Outputs:
        """Logits of the pixels, as fine as the head makes them, and the mean patch token of the last tap."""
        params = variables["params"]
        out = self.model.apply({"params": params["encoder"]}, self.images(batch), capture=self.task.taps)
        maps, state = self._maps(out), {key: value for key, value in variables.items() if key != "params"}
        heads = self.decode.apply({"params": params["pretext"], **state}, maps, False)
        return Outputs(maps[-1].astype(jnp.float32).mean((1, 2)), pixels=heads["head"])

    def flops_per_image(self) -> float:
        grid, width, own = self.cfg.grid, self.cfg.width_of(self.task.taps[-1]), 0.0
        for head in self.task.heads().values():
            channels = self.task.pyramid.channels(width) if head.reads_pyramid else width
            own += head.flops(grid, channels, self.task.num_classes)
        if self.task.reads_maps():
            own += self.task.pyramid.flops(grid, width)
        return self.cfg.train_flops(block=self.task.taps[-1]) + 3 * own

    def panels(self, variables: Variables, frozen: Frozen, batch: Batch, rngs: Rngs) -> Panels:
        """Image, truth, prediction and where they differ, a row each."""
        logits = jax.jit(self.predict)(variables, frozen, batch).pixels
        predicted = np.asarray(jnp.argmax(resize(logits, batch["mask"].shape[1:]), axis=-1))
        truth = np.asarray(batch["mask"])
        colours = class_list.colours(sources.open_source(self.data), self.task.num_classes) / 255
        counted = truth != IGNORED
        wrong = np.where((counted & (predicted != truth))[..., None], 0.1, np.full(3, 0.9))
        painted = [np.where(counted[..., None], colours[np.where(counted, x, 0)], 0.0) for x in (truth, predicted)]
        columns = {"image": np.asarray(to_float(batch["image"])), "truth": painted[0], "prediction": painted[1]}
        share = 100 * (predicted == truth)[counted].mean() if counted.any() else 0.0
        rows = [list(row) for row in zip(*columns.values(), wrong, strict=True)]
        return Panels(f"{share:.1f} % of these pixels right", rows, [], [*columns, "dark: wrong"])
