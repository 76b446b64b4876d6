"""`export`: our checkpoint in the formats of others."""

from tinymim_jax.commands.flags import new_flags, parse_positional
from tinymim_jax.runtime.errors import InputError

USAGE = """python -m tinymim_jax export SRC DST --format=timm|hf|mae|onnx [--regroup_heads]

  SRC            a stage's folder or a converted checkpoint
  DST            a new folder, with README.md, a model card
  --format=timm  model.safetensors and config.json, for timm.create_model("local-dir:DST")
  --format=hf    a folder for Hugging Face's from_pretrained
  --format=mae   checkpoint.pth in the layout of MAE's code (needs PyTorch)
  --format=onnx  model.onnx, compared with our own output (needs PyTorch, onnxscript, onnxruntime)
"""


def main(argv: list[str]) -> None:
    """Runs the command with its arguments; raises InputError on bad ones."""
    values = new_flags(
        format=(str, None, "of DST"),
        regroup_heads=(bool, False, "read a last block of other heads with those of the others, as fine-tuning does"),
    )
    source, destination = parse_positional(values, argv, ["SRC", "DST"], USAGE)
    if values.format is None:
        raise InputError("--format is needed: timm, hf, mae or onnx")

    from tinymim_jax.bridge.export import export

    for file in export(source, destination, values.format, values.regroup_heads):
        print(f"wrote {file}")
