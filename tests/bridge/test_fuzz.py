"""Damaged files: every one is converted or ends in an InputError, in time, and nothing in it is run.

More of them than the test reads: python -m tests.bridge.test_fuzz 5000 [SEED]
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="most of the files are PyTorch's")

import numpy as np
import torch

from tests import torch_files as files
from tinymim_jax.bridge import convert, formats
from tinymim_jax.bridge import files as bridge_files
from tinymim_jax.bridge.layout import Told
from tinymim_jax.bridge.torch_reference import vit
from tinymim_jax.experiment import config
from tinymim_jax.runtime.errors import InputError

SECONDS = 10  # for one file of some kilobytes; the machine may be busy
CFG = config.ViT(8, 1, 2, image_size=4, patch_size=2)
DECODER = config.Decoder(8, 1, 2)
JUNK = (
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    10**30,
    1e400,
    float("nan"),
    0.5,
    "",
    "x",
    "\n",
    "\udcff",
    [],
    [[]],
    {},
    [0.5] * 3,
)
SETTINGS = {
    "architectures": ["ViTMAEForPreTraining"], "num_attention_heads": 2, "decoder_num_attention_heads": 2,
    "hidden_act": "gelu", "qkv_bias": True, "layer_norm_eps": 1e-12, "norm_pix_loss": True, "model_type": "vit_mae",
}  # fmt: skip
TIMM = {
    "architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 2, "global_pool": "token"}, "num_classes": 3,
    "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}  # fmt: skip
OURS = {
    "made_by": "tinymim_jax", "norm_pix_loss": True, "decoder": {"width": 8, "depth": 1, "num_heads": 2},
    "model": {"width": 8, "depth": 1, "num_heads": 2, "image_size": 4, "patch_size": 2},
}  # fmt: skip


class TooSlow(BaseException):
    """No handler of errors takes it for one."""


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


# The files to damage


def seeds(folder):
    """{kind: path} of small whole checkpoints."""
    full = files.mae_full(folder / "full.pth", CFG, DECODER).state_dict()
    head = dataclasses.replace(CFG, num_classes=3)
    made = {"pth": folder / "full.pth", "run.pth": folder / "run.pth", "safetensors": folder / "x.safetensors"}
    files.mae_finetuned(made["run.pth"], head)
    files.timm_safetensors(made["safetensors"], dataclasses.replace(head, dist_token=True))
    for kind, content, options in (
        ("old.pth", {"model": full, "args": argparse.Namespace(model="x")}, {"_use_new_zipfile_serialization": False}),
        ("ours.pth", {"model": full, "tinymim_jax": OURS}, {}),
        ("probe.pth", _probe(files.build(lambda: vit.ViT(head), seed=0).state_dict()), {}),
        ("code.pth", {"args": Runs(folder / "PROOF"), "model": full}, {}),
        ("old code.pth", {"args": Runs(folder / "PROOF"), "model": full}, {"_use_new_zipfile_serialization": False}),
    ):
        made[kind] = folder / kind
        torch.save(content, made[kind], **options)
    made["hf"] = _folder(folder / "hf", SETTINGS, _to_hf(full))
    made["shards"] = _shards(folder / "shards", _to_hf(full))
    made["timm"] = _folder(folder / "timm", TIMM, files.build(lambda: vit.ViT(head), seed=0).state_dict())
    return made


def _to_hf(state):
    split = {}
    for name, tensor in state.items():
        parts = formats.hf_names(name)
        split |= dict(zip(parts, (t.contiguous() for t in tensor.chunk(len(parts))), strict=True))
    return split


def _probe(state):
    """A linear probe with LayerScale and no bias of q, k, v, averaged, beside numbers."""
    state = {f"_orig_mod.{key}": v for key, v in state.items() if "head" not in key and "qkv.bias" not in key}
    state |= {f"_orig_mod.blocks.0.ls{i}.gamma": torch.ones(8) for i in (1, 2)}
    state |= {"_orig_mod.head.0.running_mean": torch.ones(8), "_orig_mod.head.0.running_var": torch.ones(8)}
    state |= {"_orig_mod.head.1.weight": torch.ones(3, 8), "_orig_mod.head.1.bias": torch.ones(3)}
    state |= {"_orig_mod.head.0.num_batches_tracked": torch.tensor(3)}
    return {"model_state_dict": {"module": state, "n": 3}, "best": np.float64(0.5), "state_dict_ema": state}


def _shards(path, weights):
    path.mkdir()
    names = list(weights)
    for i in (0, 1):
        torch.save({name: weights[name] for name in names[i::2]}, path / f"{i}.bin")
    index = {"weight_map": {name: f"{i % 2}.bin" for i, name in enumerate(names)}}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(SETTINGS))
    return path


def _folder(path, settings, weights):
    from safetensors.torch import save_file

    path.mkdir()
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(settings))
    (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return path


# The damage


def _flip(data, rng):
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _overwrite(data, rng):
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice((1, 4, 64)))
    data[start:end] = bytes(rng.choice((0, 255, rng.randrange(256))) for _ in range(start, end))


def _truncate(data, rng):
    del data[rng.randrange(len(data)) :]


def _insert(data, rng):
    start = rng.randrange(len(data))
    data[start:start] = rng.randbytes(rng.choice((1, 3, 100)))


def _remove(data, rng):
    start = rng.randrange(len(data))
    del data[start : start + rng.choice((1, 3, 100))]


def _swap(data, rng):
    size = rng.choice((1, 8, 200))
    i, j = sorted(rng.randrange(len(data)) for _ in range(2))
    size = min(size, j - i, len(data) - j)
    data[i : i + size], data[j : j + size] = data[j : j + size], data[i : i + size]


def _edit_head(data, rng):
    """In the first bytes, where sizes stand, and digits anywhere in the text."""
    if rng.random() < 0.5:
        data[rng.randrange(min(16, len(data)))] = rng.randrange(256)
        return
    digits = [i for i, byte in enumerate(data[:6000]) if 48 <= byte <= 57] or [0]
    for _ in range(rng.choice((1, 2, 5))):
        data[rng.choice(digits)] = rng.choice(b"0123456789-.[e")


BYTES = (_flip, _flip, _overwrite, _truncate, _insert, _remove, _swap, _edit_head, _edit_head)


def damage_bytes(path, rng):
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 3))):
        if data:
            rng.choice(BYTES)(data, rng)
    path.write_bytes(data)


def damage_json(value, rng):
    """Another value somewhere in a tree of JSON, or of a pickled checkpoint."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        how = rng.random()
        if how < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if how < 0.2:
            return {rng.choice((k, f"{k}x", "\n")) if k == key else k: v for k, v in value.items()}
        return {k: damage_json(v, rng) if k == key else v for k, v in value.items()}
    if isinstance(value, torch.Tensor) and value.ndim and rng.random() < 0.9:
        return rng.choice(TENSORS)(value)
    return rng.choice(JUNK)


TENSORS = (
    lambda t: t[None],
    lambda t: t.flatten(),
    lambda t: t[:0],
    lambda t: t.flatten()[: t.numel() // 2].clone(),
    lambda t: torch.cat([t, t]),
    lambda t: t * float("nan"),
    lambda t: t.half(),
    lambda t: t.double(),
    lambda t: t.long(),
    lambda t: t.to(torch.float8_e5m2),
    lambda t: t.to("meta"),
    lambda t: t + 1j,
    lambda t: t.flatten()[:1].expand(1000, 1000),
    lambda t: torch.tensor(1.0),
    lambda t: t.mT.contiguous() if t.ndim > 1 else t.repeat(2),
)  # fmt: skip


def damage_pth(path, rng):
    """A whole file with wrong contents."""
    content = torch.load(path, weights_only=False)
    torch.save(damage_json(content, rng), path)


def damage_header(path, rng):
    """Of safetensors: well-formed, with other names, types, shapes or places."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    entry = header[rng.choice(list(header))]
    key = rng.choice(list(entry))
    choices = {
        "dtype": ("F16", "BF16", "F64", "I32", "U8", "BOOL", "F8_E4M3", "X"),
        "shape": ([], [0], [-1], [2**40], [2**63, 2], [1] * 300, *([*entry.get("shape", []), n] for n in (1, 2))),
        "data_offsets": ([0, 0], [0, 2**62], [8, 4], [-4, 0], [0]),
    }
    entry[key] = rng.choice(choices.get(key, JUNK)) if rng.random() < 0.8 else rng.choice(JUNK)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) + rng.choice((0, 0, 0, 1, -1))) + text + data[8 + size :])


def damage(path, kind, rng):
    """Damages the checkpoint at `path`, a copy; the name of what was done."""
    if path.is_dir():
        file = rng.choice(sorted(path.iterdir()))
        if file.suffix == ".json" and rng.random() < 0.7:
            file.write_text(json.dumps(damage_json(json.loads(file.read_text()), rng)))
            return "value"
        path = file
    if path.suffix == ".safetensors" and rng.random() < 0.5:
        damage_header(path, rng)
        return "header"
    if "code" not in kind and path.suffix == ".pth" and rng.random() < 0.4:
        damage_pth(path, rng)
        return "value"
    damage_bytes(path, rng)
    return "bytes"


# The run


@contextlib.contextmanager
def time_limit(seconds):
    def stop(*_):
        raise TooSlow

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def outcome(path, told):
    """ "converted", "refused", or what went wrong."""
    try:
        with time_limit(SECONDS):
            converted = convert.read(path, told)
            text = "\n".join(converted.lines())
            json.dumps(convert.describe(converted), allow_nan=False)
        result = "converted"
    except InputError as error:
        text, result = str(error), "refused"
        if "\n" in text:
            return f"InputError of several lines: {text!r}"
    except (Exception, TooSlow) as error:
        return f"{type(error).__name__}: {error}"
    return (
        result if bridge_files.printable(text.replace("\n", "")) == text.replace("\n", "") else f"unprintable: {text!r}"
    )


def fuzz(n, seed=0):
    """Damages and reads `n` files: ({(kind, damage, outcome): count}, [what went wrong], seconds of the slowest)."""
    counts, wrong, slowest = collections.Counter(), [], 0.0
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        whole = seeds(root)
        for i in range(n):
            rng = random.Random(f"{seed} {i}")  # so that one file can be made again
            kind = rng.choice(list(whole))
            # A name of its own: a file that is mapped into memory must not be written to.
            path = root / f"{i}{whole[kind].suffix}"
            (shutil.copytree if whole[kind].is_dir() else shutil.copyfile)(whole[kind], path)
            done = damage(path, kind, rng)
            told = Told(num_heads=2, decoder_heads=2, half=rng.random() < 0.3) if rng.random() < 0.7 else Told()
            start = time.monotonic()
            result = outcome(path, told)
            slowest = max(slowest, time.monotonic() - start)
            if (root / "PROOF").exists():
                result = "ran code"
                (root / "PROOF").unlink()
            if result not in ("converted", "refused"):
                wrong.append(f"seed {seed}, file {i}, {kind}, {done}: {result}")
            counts[kind, done, result if result in ("converted", "refused") else "WRONG"] += 1
            (shutil.rmtree if path.is_dir() else os.remove)(path)
    return counts, wrong, slowest


def total(counts, result):
    return sum(count for key, count in counts.items() if key[2] == result)


def test_the_whole_files_are_good(tmp_path):
    """What is refused below is refused because of the damage."""
    for kind, path in seeds(tmp_path).items():
        expected = "refused" if "code" in kind else "converted"
        assert outcome(path, Told(num_heads=2, decoder_heads=2)) == expected, kind
    assert not (tmp_path / "PROOF").exists()


@pytest.mark.slow
def test_damaged_files():
    counts, wrong, slowest = fuzz(500)
    print(f"converted {total(counts, 'converted')}, refused {total(counts, 'refused')}, slowest {slowest:.2f} s")
    assert wrong == []
    assert total(counts, "refused") > 250 and total(counts, "converted") > 50


def main(argv):
    """[N [SEED]]; the exit status is 1 if anything went wrong."""
    n, seed = (int(value) for value in (argv + ["500", "0"][len(argv) :])[:2])
    counts, wrong, slowest = fuzz(n, seed)
    for key, count in sorted(counts.items()):
        print(f"{count:7} {', '.join(key)}")
    print(f"converted {total(counts, 'converted')}, refused {total(counts, 'refused')}, slowest {slowest:.2f} s")
    print("\n".join(wrong) or "nothing went wrong")
    return bool(wrong)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main(sys.argv[1:]))
