"""`convert`: other people's checkpoint -> a folder that `Init(path=...)`, `load`, `inspect` and `export` read."""

import dataclasses
import math
from typing import TYPE_CHECKING

from absl import flags

from tinymim_jax.commands.flags import new_flags, parse_positional
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError

if TYPE_CHECKING:
    from tinymim_jax.bridge.layout import Told

USAGE = """python -m tinymim_jax convert SRC DST [--verify] [--num_heads=N] ...

  SRC  a .pth or .safetensors file, an index of shards (*.index.json), or a Hugging Face or timm folder: MAE, TinyMIM,
       MAE-Lite, DeiT, timm's ViT, ViTMAEForPreTraining, ViTMAEModel, ViTModel, ViTForImageClassification, BEiT's
       classes, UPerNet behind BEiT, TinyMIM or MAE (mmseg's files, or Hugging Face's), Hiera (Meta's and MAE-Lite's
       files, Hugging Face's or timm's)
  DST  a new folder
"""
TOLD = {  # what shapes do not say: the fields of `bridge.layout.Told`
    "num_heads": (int, None, "where the weights' shapes cannot tell and the report's guess is wrong"),
    "last_block_heads": (int, None, "of the last block, if it differs"),
    "decoder_heads": (int, None, "of MAE's decoder"),
    "norm_pix": (bool, None, "whether the decoder was trained on normalised pixels"),
    "ema": (bool, None, "take the averaged weights (model_ema, state_dict_ema, ema, ...), not the plain ones"),
    "layer_norm_eps": (float, None, "of its norms, e.g. 1e-6, where the file does not say or says something else"),
    "mean": (list, None, "R,G,B in [0, 1]: how the pixels that it was trained on were normalised"),
    "std": (list, None, "likewise"),
    "taps": (list, None, "of a model that segments: the blocks whose tokens its heads read, e.g. 4,6,8,12"),
    "zero_is_ignored": (bool, None, "of a model that segments: whether 0 in masks is no class, as in ADE20K's"),
    "half": (bool, None, "take float16 or bfloat16 weights, which have been rounded"),
}
VERIFY = (
    "run it in PyTorch too, and compare block by block: a Hugging Face folder in transformers, other files in"
    " our PyTorch reference with the heads and pooling of the report, which is taken on trust"
)


def main(argv: list[str]) -> None:
    """Runs the command with its arguments; raises InputError on bad ones."""
    values = new_flags(**TOLD, verify=(bool, False, VERIFY))
    source, destination = parse_positional(values, argv, ["SRC", "DST"], USAGE)
    storage.check_checkpoints(destination)

    from tinymim_jax.bridge import convert

    def read() -> convert.Converted:
        converted = convert.read(source, told(values))
        print("\n".join(converted.lines()), flush=True)
        if values.verify:
            from tinymim_jax.bridge import verify

            differences = verify.verify(converted)
            print(verify.table(differences), flush=True)
            verify.check(differences)
        return converted

    convert.write(read, destination)
    print(f"wrote {destination}")


def told(values: flags.FlagValues) -> "Told":
    """What the flags `TOLD` say; raises InputError on a mean or std that is none."""
    from tinymim_jax.bridge.layout import Told

    found = Told(**{f.name: getattr(values, f.name) for f in dataclasses.fields(Told)})
    for name in ("mean", "std"):
        if (given := getattr(values, name)) is None:
            continue
        try:
            red, green, blue = map(float, given)
        except ValueError:  # no numbers, or not three
            red = green = blue = math.nan
        if not all(0 <= x < 1e6 and (x or name == "mean") for x in (red, green, blue)):
            raise InputError(f"--{name}={','.join(given)}: give three numbers, e.g. 0.5,0.5,0.5")
        setattr(found, name, [red, green, blue])
    if found.taps:
        try:
            found.taps = [int(block) for block in found.taps]
        except ValueError:
            raise InputError(f"--taps={','.join(found.taps)}: give numbers of blocks, e.g. 4,6,8,12") from None
    return found
