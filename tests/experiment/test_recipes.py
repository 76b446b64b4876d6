"""What recipes work out; the published values themselves stand in them once."""

import pytest

from tinymim_jax.experiment import recipes
from tinymim_jax.experiment.config import Config, Init
from tinymim_jax.experiment.validate import check
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.training import optim
from tinymim_jax.training.setup import make_setup
from tinymim_jax.weights.parameters import flatten

TEACHERS = {"base": "large", "small": "base", "tiny": "small"}
IMAGES = recipes.imagenet(True).num_examples


def pretrain(size, **options):
    model = recipes.student(size, code=options.get("code", False))
    target = recipes.target(TEACHERS[size], size)
    return recipes.distill(model, Init(path="/t"), recipes.imagenet(True), **target, **options)


def peak(stage):
    return optim.peak_lr(stage.optim, stage.run.batch_size)


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
    known = "the options are: data=..., short, code; a comma in a value is \\,"
    assert str(error.value) == f"config option {bad!r}: unknown; {known}"


def test_a_comma_in_a_value():
    found = recipes.options(r"data=/a\, b\,c/d\e,short", data="", short=False)
    assert found == {"data": r"/a, b,c/d\e", "short": True}


def test_no_options():
    assert recipes.options("") == {}
    with pytest.raises(InputError, match="the options are: none"):
        recipes.options("x")


# Sizes and data


@pytest.mark.parametrize(
    ("make", "choices"),
    [
        (lambda: recipes.vit("mini"), "tiny, small, base, large, huge"),
        (lambda: recipes.classifier("mini"), "tiny, small, base, large, huge"),
        (lambda: recipes.student("large"), "tiny, small, base"),
        (lambda: recipes.target("huge", "base"), "large, base, small"),
        (lambda: recipes.target("base", "large"), "tiny, small, base"),
    ],
    ids=["vit", "classifier", "student", "teacher", "student of a teacher"],
)
def test_a_size_without_a_published_value(make, choices):
    with pytest.raises(InputError, match=f"unknown size '(mini|large|huge)'; choose one of {choices}$"):
        make()


@pytest.mark.parametrize(
    ("path", "source", "stored", "val"),
    [
        ("", "tfds", "", "validation"),
        ("/data", "folder", "/data", "val"),
        ("array_record:~/data", "array_record", "~/data", "val"),
    ],
)
def test_imagenet(path, source, stored, val):
    train, test = recipes.imagenet(True, path, threads=3), recipes.imagenet(False, path)
    assert (train.source, train.path, train.split, train.transform) == (source, stored, "train", "train")
    assert (test.source, test.path, test.split, test.transform) == (source, stored, val, "eval")
    assert (train.num_examples, test.num_examples, train.threads) == (1_281_167, 50_000, 3)
    assert int(test.image_size / test.crop_pct) == 256


def test_small_sets_are_tested_on_what_is_not_trained_on():
    for name in recipes.SMALL_SETS:
        train, test, num_classes = recipes.small_set(name, image_size=96)
        assert train.split != test.split and (train.transform, test.transform) == ("train", "eval")
        assert train.image_size == test.image_size == 96 and num_classes >= 10
        train, test, _ = recipes.small_set(name, "array_record:~/x")
        assert (train.source, train.path, train.split, test.split) == ("array_record", "~/x", "train", "test")
        assert train.num_examples is None  # those at hand are counted
    with pytest.raises(InputError, match="unknown data set 'mnist'; choose one of cifar10"):
        recipes.small_set("mnist")


# Stages


@pytest.mark.parametrize("code", [False, True])
@pytest.mark.parametrize("size", TEACHERS)
def test_a_student_s_last_block_has_the_heads_of_its_teacher_s(size, code):
    """Spec A.2: L's block 18 has 16; B's, which was trained with 16, is read with 12; S's has 12."""
    stage = pretrain(size, code=code)
    teacher = recipes.vit("large") if size == "base" else recipes.student(TEACHERS[size])
    make_setup(stage, "x", {"teacher": teacher}, IMAGES)  # which raises if they differ
    target = stage.task.targets["relation"]
    assert (target.student_block, target.teacher_block) == (12, 18 if size == "base" else 12)
    assert target.heads == (12 if size == "small" else None)
    assert stage.optim.min_lr == (0.0 if code else 1e-5) and peak(stage) == pytest.approx(2.4e-3)


def test_the_matched_block_is_the_last_and_warm_up_a_twentieth():
    stage = recipes.distill(recipes.vit("tiny", depth=4), Init("t"), recipes.imagenet(True), block=3, epochs=100)
    assert stage.task.targets["relation"].student_block == 4 and stage.optim.warmup_epochs == 5
    assert pretrain("base").run.epochs == 300


def test_learning_rates_are_the_published_ones_at_the_published_batch():
    train, val = recipes.imagenet(True), recipes.imagenet(False)
    assert peak(recipes.mae(recipes.vit("large"), train)) == pytest.approx(2.4e-3)
    for size, lr, batch in (("tiny", 5e-3, 2048), ("small", 5e-3, 2048), ("base", 2e-3, 1024)):
        stage = recipes.finetune_imagenet(size, Init("s"))
        assert peak(stage) == pytest.approx(lr) and stage.run.batch_size == batch
        assert stage.run.eval_every == 10 * (1_281_167 // batch)
    assert peak(recipes.deit(recipes.classifier("tiny"), train, val)) == pytest.approx(1e-3)
    assert peak(recipes.linear_probe(recipes.vit("base"), Init("m"), train, val)) == pytest.approx(6.4)
    assert peak(recipes.transfer(recipes.classifier("tiny"), Init("m"), train, val)) == pytest.approx(0.1)


def test_finetuning_takes_over_all_but_norm_and_head():
    train, val = recipes.imagenet(True, "/d"), recipes.imagenet(False, "/d")
    stage = recipes.finetune(recipes.classifier("tiny"), Init("s", keep_blocks=3), train, val)
    assert (stage.init.stage, stage.init.keep_blocks, stage.init.regroup_heads) == ("s", 3, True)
    assert stage.evals["val"].data == val and train.crop_scale == (0.2, 1.0)  # the caller's is as it was
    stage = recipes.finetune(recipes.classifier("tiny", num_classes=10), None, train, val)
    assert stage.init is None and stage.model.num_classes == 10


def test_a_linear_probe_trains_nothing_but_its_head():
    stage = recipes.linear_probe(recipes.vit("base"), Init("m"), recipes.imagenet(True), recipes.imagenet(False))
    setup = make_setup(stage, "probe", {}, IMAGES)
    trained = {k for k, v in flatten(setup.labels).items() if v != "freeze"}
    assert trained == {"encoder/head/kernel", "encoder/head/bias"}


def test_tinymim_star_is_taught_its_labels():
    stage = recipes.tinymim_star(Init("s"), Init("t"), recipes.imagenet(True), recipes.imagenet(False))
    assert (stage.model.num_heads, stage.model.dist_token, stage.model.neck) == (12, True, 1280)
    make_setup(stage, "star", {"teacher": recipes.classifier("base")}, IMAGES)


def test_a_draw_of_mixing_is_for_the_images_of_one_published_process():
    """TinyMIM README 128; DeiT README 256 for T and S, main.py 64 for B; MAE FINETUNE.md is in configs/."""
    train, val = recipes.imagenet(True), recipes.imagenet(False)
    for size, deit in (("tiny", 256), ("small", 256), ("base", 64)):
        assert recipes.finetune_imagenet(size, Init("s")).task.mix_group == 128
        assert recipes.deit(recipes.classifier(size), train, val).task.mix_group == deit
    assert recipes.tinymim_star(Init("s"), Init("t"), train, val).task.mix_group == 128


def test_deit_evaluates_the_weights_that_it_trains():
    stage = recipes.deit(recipes.classifier("tiny"), recipes.imagenet(True), recipes.imagenet(False))
    assert stage.optim.ema is None
    setup = make_setup(stage, "deit", {}, IMAGES)
    assert [float(setup.schedule(step)) for step in (0, 2 * setup.steps_per_epoch - 1)] == pytest.approx([1e-6, 1e-6])
    assert setup.steps_per_epoch == 1251  # len(images) // 256 * 256 // 1024


def test_transfer_is_mae_lite_s():
    """finetuning_transfer_exp.py on finetuning_mae_exp.py: nothing regularises but decay of the rate and clipping."""
    stage = recipes.transfer(recipes.classifier("base", 100), Init("m"), *recipes.small_set("cifar100")[:2])
    task, cfg = stage.task, stage.optim
    assert (task.label_smoothing, task.mixup, task.cutmix, task.erasing, stage.model.drop_path) == (0, 0, 0, 0, 0)
    assert (cfg.name, cfg.nesterov, cfg.min_lr, cfg.weight_decay, cfg.clip_norm) == ("sgd", True, 1e-6, 0, 1)
    setup = make_setup(stage, "transfer", {}, 50_000)
    assert float(setup.schedule(setup.total_steps)) == pytest.approx(1e-6)


# All of them together


def all_stages():
    train, val = recipes.imagenet(True), recipes.imagenet(False)
    stages = {"mae_l": recipes.mae(recipes.vit("large"), train)}
    stages |= {f"distill_{s}": pretrain(s) for s in TEACHERS}
    stages |= {f"finetune_{s}": recipes.finetune_imagenet(s, Init(stage=f"distill_{s}")) for s in TEACHERS}
    stages["deit"] = recipes.deit(recipes.classifier("tiny"), train, val)
    stages["star"] = recipes.tinymim_star(Init("distill_tiny"), Init("deit"), train, val)
    stages["probe"] = recipes.linear_probe(recipes.vit("large"), Init("mae_l"), train, val)
    stages["transfer"] = recipes.transfer(recipes.classifier("tiny", 10), Init("distill_tiny"), train, val)
    stages["small"] = recipes.finetune_small(recipes.classifier("tiny", 10), Init("distill_tiny"), train, val)
    return stages


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
    """`--config.stages.a.data.threads=9` must not change stage b as well."""
    model, train, val = recipes.vit("tiny"), recipes.imagenet(True), recipes.imagenet(False)
    init = Init("i")
    pairs = [
        [recipes.mae(model, train) for _ in range(2)],
        [recipes.distill(model, init, train, block=12) for _ in range(2)],
        [recipes.finetune(recipes.classifier("tiny"), init, train, val) for _ in range(2)],
    ]
    for first, second in pairs:
        stages = Config("c", {"first": first, "second": second}).stages
        assert stages == {"first": first, "second": second}
        ids = {id(o) for o in objects(stages["first"])}
        assert not [type(o).__name__ for o in objects(stages["second"]) if id(o) in ids]
