"""Our weights -> what timm, Hugging Face and MAE's code read, and ONNX; each with a model card."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils.epath import Path

from tinymim_jax.bridge import card, formats, hiera_export
from tinymim_jax.bridge.convert import names, new_folder, shapes
from tinymim_jax.bridge.files import need, save_safetensors
from tinymim_jax.bridge.hugging_face import to_hugging_face
from tinymim_jax.experiment import config, stage_file
from tinymim_jax.runtime import codec, storage
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.metric_log import write_json
from tinymim_jax.weights import handoff
from tinymim_jax.weights.parameters import flatten

TIMM = {(192, 16): "vit_tiny_patch16_224", (384, 16): "vit_small_patch16_224", (768, 16): "vit_base_patch16_224",
        (1024, 16): "vit_large_patch16_224", (1280, 14): "vit_huge_patch14_224"}  # fmt: skip
LIBRARY = {"timm": "timm", "hf": "transformers", "onnx": "onnx"}  # that reads a format, by the hub's name
OF_PIXELS = ("hf", "mae")  # formats that hold a model which segments
ONNX_LIMIT = 1e-4  # relative difference between onnxruntime and our model


class Weights:
    """A stage's (or converted checkpoint's) model, settings and arrays by MAE's names."""

    def __init__(self, folder: Path, regroup_heads: bool = False):
        """Raises InputError if `folder` is no finished stage."""
        folder = storage.absolute(folder)  # what it was made from lies beside it
        content, variables = stage_file.read(folder), handoff.read_variables(folder)
        self.folder, self.classes = folder, content.get("classes")
        self.model, self.params = stage_file.read_model(folder).stateless(variables)
        self.task, self.data = stage_file.read_segmentation(folder) or (None, None)  # if it has a head for pixels
        self.pixels = stage_file.read_preprocessing(folder)
        if converted := content.get("converted"):
            self.decoder, self.norm_pix = converted["decoder"], converted["norm_pix_loss"]
            self.mask_ratio = 0.75  # MAE's
        else:
            stage = stage_file.read_stage(folder)
            found = stage.task.reconstruction()
            self.decoder = codec.to_dict(found.decoder) if found else None
            self.norm_pix, self.mask_ratio = (found.norm_pix_loss, found.mask_ratio) if found else (None, None)
        held = ("encoder/", *([formats.DECODER] if self.decoder else []))  # what others have a place for
        arrays, bins = flatten(self.params), formats.bins_of(self.task)
        if self.task:
            held = ("encoder/", "pretext/", "batch_stats/")
            state = flatten({"batch_stats": variables["batch_stats"]}) if "batch_stats" in variables else {}
            arrays |= {key: array for key, array in state.items() if not key.endswith("/count")}
        arrays = {key: formats.to_mae(key, a) for key, a in arrays.items() if key.startswith(held)}
        self.arrays = {formats.mae_name(key, bins): np.ascontiguousarray(array) for key, array in arrays.items()}
        last = self.model.last_block_heads
        self.regrouped = regroup_heads and last not in (None, self.model.num_heads)
        self.left_out = ""  # for the model card

    @property
    def encoder(self) -> dict[str, np.ndarray]:
        """The arrays without a decoder's or those of heads for pixels."""
        return {name: self.arrays[name] for name in map(formats.mae_name, names(self.model))}

    @property
    def model_as_read(self) -> config.ViT:
        """The model whose heads are those that the format's readers will use."""
        return dataclasses.replace(self.model, last_block_heads=None) if self.regrouped else self.model

    def leave_out_decoder(self) -> None:
        """Notes that the format holds the encoder only."""
        if self.decoder:
            self.decoder, self.left_out = None, "MAE's decoder is left out: this format holds the encoder alone."
            print(self.left_out)

    def check(self, what: str, needs_equal_heads: bool = True) -> None:
        """Raises InputError if `what`, with a norm somewhere and one number of heads, cannot hold the model."""
        m = self.model
        if m.pool == "mean" and not m.num_classes and not self.task:
            raise InputError(
                f"the model pools patches and has no head, so no final norm, which {what} needs; fine-tune it"
            )
        if needs_equal_heads and m.last_block_heads not in (None, m.num_heads) and not self.regrouped:
            raise InputError(
                f"block {m.depth} has {m.last_block_heads} heads and the others {m.num_heads}, which {what} cannot"
                " express; give --regroup_heads to have it read with those of the others (its output changes, as in"
                " fine-tuning), or --format=mae"
            )


def export(folder: Path, destination: Path, form: str, regroup_heads: bool = False) -> list[Path]:
    """Writes the new folder `destination`, with README.md; returns its files. Raises InputError, nothing left."""
    if form not in FORMATS:
        raise InputError(f"--format={form}: unknown; choose one of {', '.join(FORMATS)}")
    storage.check_on_disk(destination, "exports")
    model, segmentation = stage_file.read_model(folder), stage_file.read_segmentation(folder)
    possible = [name for name in model.export_formats if not segmentation or name in OF_PIXELS]
    if form not in possible:
        can = f"choose one of {', '.join(possible)}" if possible else "none here can"
        what = f"{'a head for pixels on ' if segmentation else ''}this encoder of kind {model.kind!r}"
        raise InputError(f"--format={form} cannot hold {what} ({model.summary()}): {can}")
    weights = Weights(folder, regroup_heads)
    with new_folder(destination) as partial:
        usage = BY_KIND[model.kind][form](weights, partial)
        (partial / "README.md").write_text(card.text(weights, usage, LIBRARY.get(form)))
    return sorted(destination.iterdir())


def to_timm(weights: Weights, folder: Path) -> str:
    """model.safetensors and config.json as `timm.create_model("local-dir:...")` reads them."""
    weights.check("timm")
    weights.leave_out_decoder()
    m = weights.model
    if m.neck:
        raise InputError("timm has no model with a neck before the head (TinyMIM*-T); export it with --format=mae")
    if m.layer_norm_eps != 1e-6:
        raise InputError(
            f"timm's ViT has LayerNorm eps 1e-6 and this one {m.layer_norm_eps:g}; export it with --format=hf, mae or"
            " onnx, or convert its source again with --layer_norm_eps=1e-6"
        )
    name = TIMM.get((m.width, m.patch_size), "vit_base_patch16_224")
    args = {
        "img_size": m.image_size, "patch_size": m.patch_size, "embed_dim": m.width, "depth": m.depth,
        "num_heads": m.num_heads, "mlp_ratio": m.mlp_ratio, "global_pool": "avg" if m.pool == "mean" else "token",
    }  # fmt: skip
    if m.dist_token:
        name = "deit_base_distilled_patch16_224"
    pixels = weights.pixels
    settings = {
        "architecture": name,
        "num_classes": m.num_classes,
        "model_args": args,
        "pretrained_cfg": {"num_classes": m.num_classes, "input_size": [3, m.image_size, m.image_size], **pixels},
    }
    settings |= {"label_names": weights.classes} if weights.classes else {}
    save_safetensors(weights.encoder, folder / "model.safetensors")
    write_json(folder / "config.json", settings)
    return 'import timm\n\nmodel = timm.create_model("local-dir:PATH", pretrained=True)  # PATH: this folder'


def own_settings(weights: Weights) -> dict[str, Any]:
    """What shapes do not say, for files that are read here again."""
    return {
        "made_by": "tinymim_jax",
        "model": codec.to_dict(weights.model_as_read),
        "decoder": weights.decoder,
        "norm_pix_loss": weights.norm_pix,
        "preprocessing": weights.pixels,
        "classes": weights.classes,
        "untrained": stage_file.read_untrained(weights.folder),
        "made_from": card.provenance(weights.folder),
    }


def to_mae(weights: Weights, folder: Path) -> str:
    """checkpoint.pth in MAE's layout, {"model": state_dict}, with our own settings beside it.

    Of a model that segments it is mmseg's, {"state_dict", "meta"}.
    """
    torch, settings = need("torch", "torch", "this format"), own_settings(weights)
    state = {name: torch.from_numpy(array) for name, array in weights.arrays.items()}
    m = weights.model
    last = f", {m.last_block_heads} in the last block, which timm's class has not" if m.last_block_heads else ""
    sizes = (
        f"img_size={m.image_size}, patch_size={m.patch_size},\n"
        f"# embed_dim={m.width}, depth={m.depth}, num_heads={m.num_heads}{last}, eps {m.layer_norm_eps:g}"
    )
    if weights.task:
        settings |= {"task": codec.to_dict(weights.task), "masks": codec.to_dict(weights.data.masks)}
        state = {name if name.startswith(formats.HEADS) else f"backbone.{name}": a for name, a in state.items()}
        meta = {"CLASSES": weights.classes}
        torch.save({"meta": meta, "state_dict": state, "tinymim_jax": settings}, folder / "checkpoint.pth")
        entry, reads = "state_dict", f"mmsegmentation's EncoderDecoder with TinyMIM's backbone of {sizes}"
    else:
        torch.save({"model": state, "tinymim_jax": settings}, folder / "checkpoint.pth")
        pool = "avg" if m.pool == "mean" else "token"
        entry, reads = "model", f"MAE's classes, or timm's VisionTransformer with {sizes}, global_pool={pool!r}"
    return (
        f'import torch\n\nstate_dict = torch.load("PATH/checkpoint.pth")["{entry}"]  # PATH: this folder\n# for {reads}'
    )


def to_onnx(weights: Weights, folder: Path) -> str:
    """model.onnx: normalised images float32 [B, 3, S, S] -> logits [B, C] or tokens [B, N, D]; run once to check."""
    torch, runtime, _ = (need(package, "onnx", "this format") for package in ("torch", "onnxruntime", "onnxscript"))
    from tinymim_jax.bridge.torch_reference.vit import ViT

    weights.leave_out_decoder()
    weights.check("ONNX", needs_equal_heads=False)
    model = ViT(weights.model_as_read).eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.encoder.items()})
    field, output = ("logits", "logits") if weights.model.num_classes else ("tokens", "last_hidden_state")

    class Only(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Any) -> Any:
            return getattr(self.model(images), field)

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # what it skips is not in these models
    size = weights.model.image_size
    images = np.random.default_rng(0).normal(size=(2, 3, size, size)).astype(np.float32)
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(
        Only().eval(), (torch.from_numpy(images),), folder / "model.onnx", dynamo=True, dynamic_shapes=(batch,),
        input_names=["images"], output_names=[output], external_data=False, verbose=False,
    )  # fmt: skip
    theirs = runtime.InferenceSession(folder / "model.onnx").run(None, {"images": images})[0]
    _check_onnx(weights, images, theirs)
    return (
        'import onnxruntime\n\nsession = onnxruntime.InferenceSession("PATH/model.onnx")  # PATH: this folder\n'
        f'(out,) = session.run(["{output}"], {{"images": images}})  # float32 [B, 3, {size}, {size}], normalised'
    )


def _check_onnx(weights: Weights, images: np.ndarray, theirs: np.ndarray) -> None:
    """Raises RuntimeError, for that is a bug, if `theirs` are not what our model gives."""
    module = dataclasses.replace(weights.model_as_read, dtype="float32").build()
    tree = weights.params["encoder"]
    params = jax.tree.map(lambda a, s: a.reshape(s.shape), tree, shapes(weights.model_as_read, None)["encoder"])
    with jax.default_matmul_precision("highest"):
        out = module.apply({"params": params}, images.transpose(0, 2, 3, 1))
    ours = np.asarray(out.tokens if out.logits is None else out.logits)
    relative = np.max(np.abs(ours - theirs)) / np.max(np.abs(ours))
    if not relative <= ONNX_LIMIT:
        raise RuntimeError(f"onnxruntime's output differs from ours by {relative:.1e}; --format=timm does without it")


FORMATS: dict[str, Callable[[Weights, Path], str]] = {
    "timm": to_timm,
    "hf": to_hugging_face,
    "mae": to_mae,
    "onnx": to_onnx,
}
BY_KIND = {"vit": FORMATS, "hiera": hiera_export.FORMATS}  # of the encoder
