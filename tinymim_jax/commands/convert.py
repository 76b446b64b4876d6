"""`convert`: other people's checkpoint -> a folder that `Init(path=...)`, `load`, `inspect` and `export` read."""

import dataclasses
from typing import TYPE_CHECKING

from absl import flags

from tinymim_jax.commands.flags import new_flags, parse_positional
from tinymim_jax.runtime import storage

if TYPE_CHECKING:
    from tinymim_jax.bridge.layout import Told

USAGE = """python -m tinymim_jax convert SRC DST [--verify] [--num_heads=N] ...

  SRC                   a .pth or .safetensors file, or a Hugging Face or timm folder: MAE, TinyMIM, MAE-Lite, DeiT,
                        timm's ViT, ViTMAEForPreTraining, ViTMAEModel, ViTModel, ViTForImageClassification
  DST                   a new folder
  --verify              run it in PyTorch too, and compare block by block: a Hugging Face folder in transformers, other
                        files in our PyTorch reference with the report's heads and pooling, which are taken on trust
  --num_heads=N         where the weights' shapes cannot tell and the report's guess is wrong
  --last_block_heads=N  of the last block, if it differs
  --decoder_heads=N     of MAE's decoder
  --[no]norm_pix        whether the decoder was trained on normalised pixels
  --half                take float16 or bfloat16 weights, which have been rounded"""


def main(argv: list[str]) -> None:
    """Runs the command with its arguments; raises InputError on bad ones."""
    values = new_flags(USAGE)
    define_told(values)
    flags.DEFINE_bool("verify", False, "compare", flag_values=values)
    source, destination = parse_positional(values, argv, ["SRC", "DST"])
    storage.check_checkpoints(destination)

    from tinymim_jax.bridge import convert

    with convert.new_folder(destination) as folder:
        converted = convert.read(source, told(values))
        print("\n".join(converted.lines()), flush=True)
        if values.verify:
            from tinymim_jax.bridge import verify

            differences = verify.verify(converted)
            print(verify.table(differences), flush=True)
            verify.check(differences)
        convert.fill(converted, folder)
    convert.finish(destination)
    print(f"wrote {destination}")


def define_told(values: flags.FlagValues) -> None:
    """The flags that say what shapes do not: the fields of `bridge.layout.Told`."""
    for name in ("num_heads", "last_block_heads", "decoder_heads"):
        flags.DEFINE_integer(name, None, "heads", lower_bound=1, flag_values=values)
    for name in ("norm_pix", "half"):
        flags.DEFINE_bool(name, None, name, flag_values=values)


def told(values: flags.FlagValues) -> "Told":
    """What these flags say."""
    from tinymim_jax.bridge.layout import Told

    return Told(**{f.name: getattr(values, f.name) for f in dataclasses.fields(Told)})
