import pytest

from tinymim_jax.experiment import recipes
from tinymim_jax.experiment.config import Config, Init, Teacher
from tinymim_jax.experiment.validate import check
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.training import optim
from tinymim_jax.training.setup import make_setup
from tinymim_jax.weights.handoff import flatten

SUFFIX = {"tiny": "t", "small": "s", "base": "b"}


def pretrain(size, **options):
    teacher = recipes.teacher_from({"base": "large", "small": "base", "tiny": "small"}[size], Init(path="/t"), size)
    code = options.get("code", False)
    return recipes.distill(recipes.student(size, code=code), teacher, recipes.imagenet(True), **options)


def finetune(size, code=False):
    return recipes.finetune_imagenet(size, Init(stage="s"), code=code)


# Options of a config file


def test_options():
    defaults = {"data": "", "teacher": "runs/x", "short": False, "code": False}
    assert recipes.options("", **defaults) == defaults == recipes.options(None, **defaults)
    found = recipes.options("short,data=/a=b/c", **defaults)
    assert found == {"data": "/a=b/c", "teacher": "runs/x", "short": True, "code": False}
    assert recipes.options("teacher=,code", **defaults) == {**defaults, "teacher": "", "code": True}
    assert defaults["short"] is False


@pytest.mark.parametrize("arg", ["typo", "typo=1", "short=1", "data", "code,short=", "CODE", " code"])
def test_options_that_are_unknown(arg):
    bad = arg.split(",")[-1]
    with pytest.raises(InputError) as error:
        recipes.options(arg, data="", short=False, code=False)
    assert str(error.value) == f"config option {bad!r}: unknown; the options are: data=..., short, code"


def test_no_options():
    assert recipes.options("") == {}
    with pytest.raises(InputError, match="the options are: none"):
        recipes.options("x")


# Sizes and data


@pytest.mark.parametrize(
    ("size", "width", "depth", "heads", "patch"),
    [
        ("tiny", 192, 12, 3, 16),
        ("small", 384, 12, 6, 16),
        ("base", 768, 12, 12, 16),
        ("large", 1024, 24, 16, 16),
        ("huge", 1280, 32, 16, 14),
    ],
)
def test_sizes(size, width, depth, heads, patch):
    model = recipes.vit(size)
    assert (model.width, model.depth, model.num_heads, model.patch_size) == (width, depth, heads, patch)
    assert (model.mlp_ratio, model.image_size, model.last_block_heads) == (4.0, 224, None)
    assert recipes.vit(size, depth=3, dtype="bfloat16").depth == 3


def test_an_unknown_size():
    for make, choices in ((recipes.vit, ", large, huge"), (recipes.classifier, ", large, huge"), (recipes.student, "")):
        with pytest.raises(ValueError, match=f"unknown size 'mini'; choose one of tiny, small, base{choices}$"):
            make("mini")


@pytest.mark.parametrize(
    "make",
    [
        lambda: recipes.student("large"),
        lambda: recipes.teacher_from("huge", Init("x"), "base"),
        lambda: recipes.teacher_from("base", Init("x"), "large"),
    ],
    ids=["student", "teacher", "student of a teacher"],
)
def test_a_size_without_a_published_value(make):
    """Rule 13: an unknown name is a ValueError that lists the choices, not a KeyError."""
    with pytest.raises(ValueError, match=r"tiny|small"):
        make()


def test_imagenet_from_a_folder():
    train, val = recipes.imagenet(True, "/data"), recipes.imagenet(False, "/data")
    assert (train.source, train.path, train.split, train.transform) == ("folder", "/data", "train", "train")
    assert (val.source, val.path, val.split, val.transform) == ("folder", "/data", "val", "eval")
    assert (train.num_examples, val.num_examples) == (1_281_167, 50_000)


def test_prepared_shards():
    train, val = recipes.imagenet(True, "array_record:/data"), recipes.imagenet(False, "array_record:/data")
    assert (train.source, train.path, train.split) == ("array_record", "/data", "train")
    assert (val.source, val.path, val.split) == ("array_record", "/data", "val")
    small = recipes.small_set("pets", "array_record:~/pets")
    assert [(data.source, data.path, data.split) for data in small[:2]] == [
        ("array_record", "~/pets", "train"),
        ("array_record", "~/pets", "test"),
    ]
    assert recipes.imagenet(True).fast_crop


def test_imagenet_from_tfds():
    train, val = recipes.imagenet(True), recipes.imagenet(False)
    assert (train.source, train.name, train.split, train.path) == ("tfds", "imagenet2012", "train", "")
    assert (val.source, val.name, val.split, val.transform) == ("tfds", "imagenet2012", "validation", "eval")
    assert recipes.imagenet(True, threads=3).threads == 3


def test_images():
    """Spec A.4 and E.1: crops, sizes, interpolation, normalisation."""
    for data in (recipes.imagenet(True), recipes.imagenet(False)):
        assert data.image_size == 224 and data.interpolation == "bicubic"
        assert data.mean == (0.485, 0.456, 0.406) and data.std == (0.229, 0.224, 0.225)
        assert int(data.image_size / data.crop_pct) == 256
    train = recipes.imagenet(True)
    assert train.crop_scale == (0.2, 1.0) and train.hflip == 0.5 and train.rand_augment == ""
    assert train.crop_ratio == pytest.approx((0.75, 1.3333333))


# Pre-training (spec F, A.2, A.4)


@pytest.mark.parametrize("code", [False, True])
@pytest.mark.parametrize(("epochs", "warmup"), [(300, 15), (100, 5)])
@pytest.mark.parametrize(
    ("size", "width", "heads", "heads_of_code", "last"),
    [("tiny", 192, 3, 6, 12), ("small", 384, 6, 6, 12), ("base", 768, 12, 12, 16)],
)
def test_distill(size, width, heads, heads_of_code, last, epochs, warmup, code):
    stage = pretrain(size, epochs=epochs, code=code)
    model, o, task, run = stage.model, stage.optim, stage.task, stage.run
    assert (model.width, model.depth, model.patch_size, model.image_size) == (width, 12, 16, 224)
    assert int(model.width * model.mlp_ratio) == {192: 768, 384: 1536, 768: 3072}[width]
    assert (model.num_heads, model.last_block_heads) == (heads_of_code if code else heads, last)
    assert (model.drop_path, model.drop_path_shape) == (0.1, "constant")
    assert (model.posembed, model.pool, model.num_classes, model.dtype) == ("fixed", "cls", 0, "bfloat16")
    assert (run.batch_size, run.epochs, run.steps, o.warmup_epochs) == (4096, epochs, None, warmup)
    assert optim.peak_lr(o, run.batch_size) == pytest.approx(2.4e-3)
    assert o.min_lr == (0.0 if code else 1e-5)
    assert (o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm) == (0.9, 0.95, 1e-8, 0.05, None)
    assert (o.layer_decay, o.ema, o.accum_steps, o.freeze) == (1.0, None, 1, ())
    assert task.relations == ("qk", "vv") and task.color_jitter == 0.4 and task.student_block == 12
    assert stage.data.crop_scale == (0.2, 1.0) and stage.data.hflip == 0.5 and stage.init is None


def test_distilling_is_300_epochs_by_default():
    assert pretrain("base").run.epochs == 300


def test_the_matched_block_is_the_last():
    stage = recipes.distill(recipes.vit("tiny", depth=4), Teacher(Init("t"), 3), recipes.imagenet(True))
    assert stage.task.student_block == 4


def test_teachers():
    """Spec A.2, G 4 and 5: L's block 18 of 24; B is re-read with 12 heads; S keeps the 12 it was trained with."""
    large = recipes.teacher_from("large", Init("l"), "base")
    assert (large.block, large.heads, large.init) == (18, None, Init("l"))
    base = recipes.teacher_from("base", Init(path="/b"), "small")
    assert (base.block, base.heads, base.init) == (12, 12, Init(path="/b", regroup_heads=True))
    small = recipes.teacher_from("small", Init("s"), "tiny")
    assert (small.block, small.heads, small.init) == (12, None, Init("s"))


def test_the_heads_of_teacher_and_student_agree():
    trained = {"large": 16, "base": recipes.student("base").last_block_heads}
    trained["small"] = recipes.student("small").last_block_heads
    for size, teacher in (("base", "large"), ("small", "base"), ("tiny", "small")):
        spec = recipes.teacher_from(teacher, Init("x"), size)
        for code in (False, True):
            assert recipes.student(size, code=code).last_block_heads == (spec.heads or trained[teacher])


# MAE (spec B.1)


def test_mae():
    stage = recipes.mae(recipes.vit("large"), recipes.imagenet(True))
    o, decoder = stage.optim, stage.task.decoder
    assert (decoder.width, decoder.depth, decoder.num_heads) == (512, 8, 16)
    assert stage.task.mask_ratio == 0.75 and stage.task.norm_pix_loss is True
    assert (stage.run.batch_size, stage.run.epochs, o.warmup_epochs) == (4096, 1600, 40)
    assert optim.peak_lr(o, 4096) == pytest.approx(2.4e-3)
    assert (o.min_lr, o.b1, o.b2, o.eps, o.weight_decay, o.layer_decay) == (0.0, 0.9, 0.95, 1e-8, 0.05, 1.0)
    assert (stage.model.drop_path, stage.model.posembed, stage.model.pool) == (0.0, "fixed", "cls")
    assert stage.data.crop_scale == (0.2, 1.0) and stage.data.rand_augment == ""
    shorter = recipes.mae(recipes.vit("large"), recipes.imagenet(True), epochs=800, warmup_epochs=20)
    assert (shorter.run.epochs, shorter.optim.warmup_epochs) == (800, 20)


# Fine-tuning (spec F, A.5)


@pytest.mark.parametrize("code", [False, True])
@pytest.mark.parametrize(
    ("size", "heads", "lr", "epochs", "batch", "drop_path"),
    [("tiny", 3, 5e-3, 200, 2048, 0.1), ("small", 6, 5e-3, 200, 2048, 0.1), ("base", 12, 2e-3, 100, 1024, 0.2)],
)
def test_finetune(size, heads, lr, epochs, batch, drop_path, code):
    stage = finetune(size, code)
    model, o, task, run = stage.model, stage.optim, stage.task, stage.run
    assert (run.batch_size, run.epochs, run.steps) == (batch, epochs, None)
    assert run.eval_every == 10 * (1_281_167 // batch)
    assert optim.peak_lr(o, batch) == pytest.approx(lr)
    assert (o.min_lr, o.warmup_epochs, o.layer_decay, o.weight_decay) == (1e-6, 5, 0.65, 0.05)
    assert (o.b1, o.b2, o.eps, o.clip_norm, o.ema) == (0.9, 0.999 if code else 0.95, 1e-8, None, None)
    assert (model.num_heads, model.last_block_heads, model.num_classes) == (heads, None, 1000)
    assert (model.drop_path, model.drop_path_shape) == (drop_path, "linear")
    assert (model.posembed, model.pool, model.image_size, model.dtype) == ("trainable", "mean", 224, "bfloat16")
    assert (task.label_smoothing, task.mixup, task.cutmix) == (0.1, 0.8, 1.0)
    assert (task.mix_prob, task.switch_prob, task.erasing) == (1.0, 0.5, 0.25)
    data = stage.data
    assert data.rand_augment == "rand-m9-mstd0.5-inc1" and data.crop_scale == (0.08, 1.0) and data.hflip == 0.5
    assert data.split == "train"
    val = stage.evals["val"].data
    assert (val.split, val.transform, val.num_examples) == ("validation", "eval", 50_000)
    assert stage.init == Init(
        stage="s", skip=("encoder/norm/.*", "decoder/.*"), fresh=("encoder/(fc_norm|head)/.*",), regroup_heads=True
    )


def test_finetune_of_any_model():
    """The values of T and S, whatever the model; from scratch without an init."""
    train, val = recipes.imagenet(True, "/d"), recipes.imagenet(False, "/d")
    stage = recipes.finetune(recipes.classifier("tiny", num_classes=10), None, train, val)
    assert stage.init is None and stage.model.num_classes == 10 and stage.data.path == "/d"
    assert (stage.run.batch_size, stage.run.epochs, stage.optim.lr) == (2048, 200, 6.25e-4)
    assert train.crop_scale == (0.2, 1.0)  # the caller's is as it was


def test_finetune_from_a_folder():
    stage = recipes.finetune_imagenet("base", Init(path="/b"), "/data")
    assert (stage.data.path, stage.evals["val"].data.path, stage.init.path) == ("/data", "/data", "/b")


# All of them together


def all_stages():
    stages = {"mae_l": recipes.mae(recipes.vit("large"), recipes.imagenet(True))}
    stages |= {f"distill_{s}": pretrain(s) for s in SUFFIX}
    return stages | {f"finetune_{s}": recipes.finetune_imagenet(s, Init(stage=f"distill_{s}")) for s in SUFFIX}


def test_recipes_are_valid_configs():
    check(Config("all", all_stages()))


def objects(value):
    """Every mutable object in a config."""
    if isinstance(value, dict):
        return [value, *(o for v in value.values() for o in objects(v))]
    return [value, *(o for v in vars(value).values() for o in objects(v))] if hasattr(value, "__dict__") else []


def test_each_call_is_fresh():
    first, second = all_stages(), all_stages()
    for name in first:
        ids = {id(o) for o in objects(first[name])}
        assert not [o for o in objects(second[name]) if id(o) in ids]


def test_stages_made_from_the_same_parts_do_not_share_them():
    """Design 6: `--config.stages.a.data.threads=9` must not change stage b as well."""
    model, train, val = recipes.vit("tiny"), recipes.imagenet(True), recipes.imagenet(False)
    teacher, init = Teacher(Init("t"), 12), Init("i")
    pairs = [
        [recipes.mae(model, train) for _ in range(2)],
        [recipes.distill(model, teacher, train) for _ in range(2)],
        [recipes.finetune(recipes.classifier("tiny"), init, train, val) for _ in range(2)],
    ]
    for first, second in pairs:
        stages = Config("c", {"first": first, "second": second}).stages
        assert stages == {"first": first, "second": second}
        ids = {id(o) for o in objects(stages["first"])}
        assert not [type(o).__name__ for o in objects(stages["second"]) if id(o) in ids]


def test_deit_from_scratch():
    """Spec A.7: lr 5e-4 a batch of 512, min lr 1e-5, EMA, repeated augmentation."""
    stage = recipes.deit(recipes.classifier("tiny"), recipes.imagenet(True), recipes.imagenet(False))
    o = stage.optim
    assert (o.lr * stage.run.batch_size / o.lr_batch, o.min_lr, o.b2, o.ema) == (1e-3, 1e-5, 0.999, 0.99996)
    assert (stage.init, stage.data.repeats, stage.run.epochs, o.layer_decay) == (None, 3, 300, 1.0)


def test_tinymim_star():
    """Spec A.7: 12 heads, distillation token, 192 -> 1280, 1000 epochs."""
    stage = recipes.tinymim_star(Init("s"), Init("t"), recipes.imagenet(True), recipes.imagenet(False))
    m = stage.model
    assert (m.width, m.num_heads, m.dist_token, m.neck, m.pool) == (192, 12, True, 1280, "mean")
    assert (stage.run.epochs, stage.task.teacher.labels, stage.task.teacher.weight) == (1000, "hard", 0.5)


def test_linear_probe():
    """Spec B.2: LARS, lr 6.4 at batch 16384, nothing but the head is trained."""
    stage = recipes.linear_probe(recipes.vit("base"), Init("m"), recipes.imagenet(True), recipes.imagenet(False))
    o = stage.optim
    assert (o.name, o.lr * stage.run.batch_size / o.lr_batch, o.weight_decay) == ("lars", 6.4, 0.0)
    assert (stage.run.epochs, o.warmup_epochs, stage.model.head_norm, stage.model.pool) == (90, 10, True, "cls")
    plan = make_setup(stage, None, 1_281_167)
    trained = {k for k, v in flatten(plan.labels).items() if v != "freeze"}
    assert trained == {"encoder/head/kernel", "encoder/head/bias"}


def test_transfer():
    """Spec C.4: SGD, momentum 0.9, lr 0.1, layer decay 0.75, clip 1."""
    stage = recipes.transfer(recipes.classifier("tiny"), Init("m"), recipes.imagenet(True), recipes.imagenet(False))
    o = stage.optim
    assert (o.name, o.lr, o.lr_batch, o.weight_decay, o.layer_decay, o.clip_norm) == ("sgd", 0.1, None, 0.0, 0.75, 1.0)
    assert (stage.run.batch_size, stage.run.epochs, o.warmup_epochs) == (512, 50, 10)


def test_small_sets_are_tested_on_what_is_not_trained_on():
    for name in recipes.SMALL_SETS:
        train, test, num_classes = recipes.small_set(name, image_size=96)
        assert train.split != test.split and (train.transform, test.transform) == ("train", "eval")
        assert train.image_size == test.image_size == 96 and num_classes >= 10
