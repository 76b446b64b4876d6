"""Your own images: a teacher, a student that learns its relations and, where there are classes, the student's fine-tuning.

python -m tinymim_jax run --config=configs/own.py:data=PATH --workdir=runs/own
python -m tinymim_jax run --config=configs/own.py:data=PATH,teacher=converted/mae_l,size=s --workdir=runs/own_s

Options, after the colon and separated by commas:
  data=PATH      class folders of images, PATH/<class>/*, or PATH/train/<class>/* with or without PATH/val/<class>/* (or
                 test/): without, about a tenth of each class is kept to measure on; or images without classes, which are not
                 fine-tuned on; or array_record:PATH, as `prepare` packs them
  teacher=PATH   a trained ViT: a stage's folder, or what `convert` has made of a checkpoint; its normalisation and patches
                 are taken. Without it, a ViT-B is pre-trained by MAE on your images
  size=t|s       the student: ViT-T (default) or ViT-S
  image_size=N   pixels a side (default: the teacher's, or 224)
  short          for a first look, or a CPU: 64 px, a ViT-S for a teacher, a twentieth of the epochs

The losses and optimisers are those of MAE and TinyMIM. These are choices of this project, not published ones: as many
epochs as show 4 million images in pre-training (200 to 1600 epochs), 2 million in distillation (100 to 400) and 400,000 in
fine-tuning (30 to 200); warm-up in a twentieth of them; batches of up to a quarter of the images (at least 32, if there are
so many, at most 512, in fine-tuning 256), with learning rates as for 128 images or more; a ViT-B for small data sets; the
relations of the block at three quarters of the teacher's depth (the paper's block 18 of 24), or of the last block of a
teacher that was distilled itself; the values of `recipes.finetune_small`. Images that cannot be decoded are named and left
out.
Cost: not measured; with a teacher, MAE's pre-training, the longest part, is left out.
Expected: no published number; a teacher that has seen more images is better than one of your own unless you have very many.
"""

import dataclasses

from tinymim_jax.data.sources import open_source
from tinymim_jax.experiment import recipes, stage_file
from tinymim_jax.experiment.config import Config, Data, Decoder, Init, Knn, Stage
from tinymim_jax.models.contract import Encoder
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError

SIZES = {"t": "tiny", "s": "small"}
EPOCHS = {"mae": (4_000_000, 200, 1600), "distill": (2_000_000, 100, 400), "finetune": (400_000, 30, 200)}
LARGEST_BATCH = {"mae": 512, "distill": 512, "finetune": 256}


def own_data(path: str, **pixels: object) -> tuple[Data, Data, tuple[str, ...]]:
    """Training and validation set, and the classes; fewer than two are none, and then nothing is validated."""
    where = recipes.stored(path)
    root = storage.path(where["path"])
    has_train, *has_val = ((root / name).is_dir() for name in ("train", "val", "test", "validation"))
    if has_train and not any(has_val):  # as a tree of class folders, it is split
        where["path"] = str(root / "train")
    train = Data(**where, split="train", on_bad_image="skip", **pixels)
    classes = open_source(train).classes
    if classes is None:
        raise InputError(f"{path} does not name its classes; run `prepare` again, or give the folder of images")
    return train, dataclasses.replace(train, split="val", transform="eval"), classes if len(classes) > 1 else ()


def teacher_of(path: str) -> tuple[Encoder, dict[str, tuple[float, ...]]]:
    """The model in a folder, and the normalisation that it was trained with."""
    folder = storage.path(path)
    model, converted = stage_file.read_model(folder), stage_file.read(folder).get("converted")
    pixels = converted["preprocessing"] if converted else vars(stage_file.read_stage(folder).data)
    return model, {name: tuple(pixels[name]) for name in ("mean", "std") if name in pixels}


def new_teacher(image_size: int, short: bool) -> Encoder:
    """What MAE pre-trains, in the largest patches of which there are eight a side."""
    fitting = (patch for patch in (16, 8, 4) if image_size % patch == 0 and image_size // patch >= 8)
    size = "small" if short else "base"
    return recipes.vit(size, image_size=image_size, patch_size=next(fitting, 4), dtype="bfloat16")


def scaled(stage: Stage, kind: str, images: int, short: bool) -> Stage:
    """`stage` in batches and for epochs that suit so many images."""
    passes, fewest, most = EPOCHS[kind]
    epochs = min(max(passes // images, fewest), most) // (20 if short else 1)
    batch = min(LARGEST_BATCH[kind], max(images // 4, min(images, 32)))
    batch = 1 << (batch.bit_length() - 1)
    stage.run.batch_size, stage.run.epochs = batch, epochs
    stage.optim.warmup_epochs, stage.optim.min_lr = epochs / 20, 0.0
    stage.optim.lr_batch = stage.optim.lr_batch * batch // max(batch, 128)
    return stage


def get_config(arg: str = "") -> Config:
    o = recipes.options(arg, data="", teacher="", size="t", image_size="", short=False)
    size, short = recipes.choose(SIZES, o["size"]), o["short"]
    if not o["data"]:
        raise InputError("your images are needed: --config=configs/own.py:data=PATH")
    if o["image_size"] and not o["image_size"].isdecimal():
        raise InputError(f"config option image_size={o['image_size']}: not a number of pixels")
    side = int(o["image_size"] or 0)
    if o["teacher"]:
        teacher, pixels = teacher_of(o["teacher"])
        side = side or teacher.image_size
        init = Init(path=o["teacher"], resize_posembed=side != teacher.image_size)
    else:
        side = side or (64 if short else 224)
        teacher, pixels, init = new_teacher(side, short), {}, Init("teacher")
    shape = {"image_size": side, "patch_size": teacher.patch_size}
    train, val, classes = own_data(o["data"], image_size=side, **pixels)
    images = len(open_source(train))
    stages = {}
    if not o["teacher"]:
        stages["teacher"] = scaled(recipes.mae(teacher, train), "mae", images, short)
        if short:
            stages["teacher"].task.decoder = Decoder(192, 4, 6)
    was_distilled = teacher.heads_of(teacher.depth) != teacher.heads_of(1)
    block = teacher.depth if was_distilled else round(0.75 * teacher.depth)
    student = dataclasses.replace(recipes.student(size), last_block_heads=teacher.heads_of(block), **shape)
    stages["student"] = scaled(recipes.distill(student, init, train, block=block), "distill", images, short)
    if classes:
        bank = dataclasses.replace(train, transform="eval")
        for stage in stages.values():
            stage.evals = {"knn": Knn(val, bank, k=(min(20, images),))}
        model = dataclasses.replace(recipes.classifier(size, len(classes)), **shape)
        stages["finetune"] = scaled(
            recipes.finetune_small(model, Init("student"), train, val), "finetune", images, short
        )
        run = stages["finetune"].run
        run.eval_every = max(1, images // run.batch_size * run.epochs // 10)
    return Config("own", stages)
