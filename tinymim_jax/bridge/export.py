"""Our weights -> what timm, Hugging Face and MAE's code read, and ONNX; each with a model card."""

import dataclasses
import logging
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils.epath import Path

from tinymim_jax.bridge import card, formats
from tinymim_jax.bridge.convert import new_folder, shapes
from tinymim_jax.bridge.files import need
from tinymim_jax.data.fast_jpeg import RESAMPLE
from tinymim_jax.experiment import config, stage_file
from tinymim_jax.runtime import codec, storage
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.metric_log import write_json
from tinymim_jax.weights import handoff
from tinymim_jax.weights.parameters import flatten

TIMM = {(192, 16): "vit_tiny_patch16_224", (384, 16): "vit_small_patch16_224", (768, 16): "vit_base_patch16_224",
        (1024, 16): "vit_large_patch16_224", (1280, 14): "vit_huge_patch14_224"}  # fmt: skip
LIBRARY = {"timm": "timm", "hf": "transformers", "onnx": "onnx"}  # that reads a format, by the hub's name
ONNX_LIMIT = 1e-4  # relative difference between onnxruntime and our model


class Weights:
    """A stage's (or converted checkpoint's) model, settings and arrays by MAE's names."""

    def __init__(self, folder: Path, regroup_heads: bool = False):
        """Raises InputError if `folder` is no finished stage."""
        folder = storage.absolute(folder)  # what it was made from lies beside it
        content = stage_file.read(folder)
        self.folder, self.classes = folder, content.get("classes")
        self.model, self.params = stage_file.read_model(folder).stateless(handoff.read_variables(folder))
        self.pixels = stage_file.read_preprocessing(folder)
        if converted := content.get("converted"):
            self.decoder, self.norm_pix = converted["decoder"], converted["norm_pix_loss"]
            self.mask_ratio = 0.75  # MAE's
        else:
            stage = stage_file.read_stage(folder)
            found = stage.task.reconstruction()
            self.decoder = codec.to_dict(found.decoder) if found else None
            self.norm_pix, self.mask_ratio = (found.norm_pix_loss, found.mask_ratio) if found else (None, None)
        held = ("encoder/", formats.DECODER) if self.decoder else ("encoder/",)  # what others have a place for
        params = {key: a for key, a in flatten(self.params).items() if key.startswith(held)}
        self.arrays = {formats.mae_name(key): np.ascontiguousarray(formats.to_mae(key, a)) for key, a in params.items()}
        last = self.model.last_block_heads
        self.regrouped = regroup_heads and last not in (None, self.model.num_heads)
        self.left_out = ""  # for the model card

    @property
    def encoder(self) -> dict[str, np.ndarray]:
        """The arrays without the decoder's."""
        return {k: v for k, v in self.arrays.items() if not k.startswith(formats.OF_DECODER)}

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
        if m.pool == "mean" and not m.num_classes:
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
    model = stage_file.read_model(folder)
    if form not in model.export_formats:
        can = f"choose one of {', '.join(model.export_formats)}" if model.export_formats else "none here can"
        raise InputError(f"--format={form} cannot hold this encoder of kind {model.kind!r} ({model.summary()}): {can}")
    weights = Weights(folder, regroup_heads)
    with new_folder(destination) as partial:
        usage = FORMATS[form](weights, partial)
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


def to_hugging_face(weights: Weights, folder: Path) -> str:
    """A folder that `from_pretrained` reads: ViTMAEForPreTraining, ViTModel, or a classifier."""
    weights.check("Hugging Face")
    m = weights.model
    if m.neck or m.dist_token:
        raise InputError("Hugging Face's ViT has no distillation token and no neck; export it with --format=mae")
    if weights.decoder:
        name, extra, arrays = "ViTMAEForPreTraining", _mae_settings(weights), formats.to_hf(weights.arrays, "vit.")
    elif not m.num_classes:
        name, extra, arrays = "ViTModel", {"model_type": "vit"}, formats.to_hf(weights.encoder, "")
    elif m.pool == "cls":
        name, extra, arrays = "ViTForImageClassification", {"model_type": "vit"}, formats.to_hf(weights.encoder, "vit.")
    else:
        name, extra, arrays = "BeitForImageClassification", dict(BEIT), _beit_arrays(weights.encoder)
    settings = {
        "architectures": [name], "hidden_size": m.width, "num_hidden_layers": m.depth,
        "num_attention_heads": m.num_heads,
        "intermediate_size": int(m.width * m.mlp_ratio), "image_size": m.image_size, "patch_size": m.patch_size,
        "num_channels": 3, "hidden_act": "gelu", "layer_norm_eps": m.layer_norm_eps, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "dtype": "float32", **extra,
    }  # fmt: skip
    if m.num_classes:
        names = weights.classes or [f"LABEL_{i}" for i in range(m.num_classes)]
        settings["id2label"] = {str(i): name for i, name in enumerate(names)}
        settings["label2id"] = {label: int(i) for i, label in settings["id2label"].items()}
    save_safetensors(arrays, folder / "model.safetensors")
    write_json(folder / "config.json", settings)
    write_json(folder / "preprocessor_config.json", _processor(weights))
    argument = ", add_pooling_layer=False" if name == "ViTModel" else ""
    return f'from transformers import {name}\n\nmodel = {name}.from_pretrained("PATH"{argument})  # PATH: this folder'


# Mean-pooled patches, then a norm: BEiT's classifier. Its keys have no bias, which softmax does not see.
BEIT = {
    "model_type": "beit", "use_absolute_position_embeddings": True, "use_mean_pooling": True,
    "layer_scale_init_value": 0.0,
    "use_relative_position_bias": False, "use_shared_relative_position_bias": False, "use_mask_token": False,
    "drop_path_rate": 0.0,
}  # fmt: skip


def _mae_settings(weights: Weights) -> dict[str, Any]:
    d = codec.from_dict(config.Decoder, weights.decoder)
    return {
        "model_type": "vit_mae", "norm_pix_loss": bool(weights.norm_pix), "mask_ratio": weights.mask_ratio,
        "qkv_bias": True,
        "decoder_hidden_size": d.width, "decoder_num_hidden_layers": d.depth,
        "decoder_num_attention_heads": d.num_heads, "decoder_intermediate_size": d.hidden,
    }  # fmt: skip


def _beit_arrays(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    kept = {name: array for name, array in formats.to_hf(arrays, "beit.").items() if not name.endswith(".key.bias")}
    return {name.replace("beit.fc_norm.", "beit.pooler.layernorm."): array for name, array in kept.items()}


def _processor(weights: Weights) -> dict[str, Any]:
    """preprocessor_config.json, of the class of transformers that resizes and crops as our evaluation does."""
    pixels, final = weights.pixels, weights.model.image_size
    edge, is_squashed = int(final / pixels["crop_pct"]), pixels["crop_mode"] == "squash"
    name = "CLIPImageProcessor"
    if is_squashed:
        name = "ViTImageProcessor" if edge == final else "DeiTImageProcessor"
    crop = {"do_center_crop": True, "crop_size": {"height": final, "width": final}}
    return {
        "image_processor_type": name, "do_resize": True, "resample": int(RESAMPLE[pixels["interpolation"]]),
        "size": {"height": edge, "width": edge} if is_squashed else {"shortest_edge": edge},
        **({} if name == "ViTImageProcessor" else crop),
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": pixels["mean"], "image_std": pixels["std"], "do_convert_rgb": True,
    }  # fmt: skip


def to_mae(weights: Weights, folder: Path) -> str:
    """checkpoint.pth in MAE's layout, {"model": state_dict}, with our own settings beside it."""
    torch = need("torch", "torch", "this format")
    settings = {
        "made_by": "tinymim_jax",
        "model": codec.to_dict(weights.model_as_read),
        "decoder": weights.decoder,
        "norm_pix_loss": weights.norm_pix,
        "preprocessing": weights.pixels,
        "classes": weights.classes,
        "untrained": stage_file.read_untrained(weights.folder),
        "made_from": card.provenance(weights.folder),
    }
    state = {name: torch.from_numpy(array) for name, array in weights.arrays.items()}
    torch.save({"model": state, "tinymim_jax": settings}, folder / "checkpoint.pth")
    m = weights.model
    last = f", {m.last_block_heads} in the last block, which timm's class has not" if m.last_block_heads else ""
    return (
        'import torch\n\nstate_dict = torch.load("PATH/checkpoint.pth")["model"]  # PATH: this folder\n'
        f"# for MAE's classes, or timm's VisionTransformer with img_size={m.image_size}, patch_size={m.patch_size},\n"
        f"# embed_dim={m.width}, depth={m.depth}, num_heads={m.num_heads}{last}, eps {m.layer_norm_eps:g},"
        f" global_pool={'avg' if m.pool == 'mean' else 'token'!r}"
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


def save_safetensors(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Writes `arrays`; the metadata is what transformers looks for."""
    import safetensors.numpy

    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    safetensors.numpy.save_file(plain, path, metadata={"format": "pt"})
    os.umask(umask := os.umask(0))
    os.chmod(path, 0o666 & ~umask)  # it was made for its owner alone
