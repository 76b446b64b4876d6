import copy
import dataclasses

import pytest

from tests.experiment.stages import EVAL_DATA, SIZE, full_config, make_distill, make_stage
from tinymim_jax.experiment.config import (
    Classification,
    Compare,
    Config,
    Corruptions,
    Data,
    Decoder,
    Distill,
    Feature,
    Init,
    Knn,
    Mae,
    Masks,
    Mesh,
    Optim,
    Relation,
    Run,
    ViT,
)
from tinymim_jax.experiment.validate import check
from tinymim_jax.runtime.errors import InputError


def distill(*targets, **init):
    return Distill(Init(**init), {str(i): target for i, target in enumerate(targets)})


FIELDS = [
    # One of each sort of range; tests/runtime/test_codec.py has the rest.
    ({"run.seed": -1}, "config.stages.s.run.seed is -1; it must be at least 0"),
    ({"run.epochs": float("inf")}, "config.stages.s.run.epochs is inf; it must be finite"),
    ({"run.batch_size": 0}, "config.stages.s.run.batch_size is 0; it must be at least 1"),
    ({"run.replicas": 0}, "config.stages.s.run.replicas is 0; it must be at least 1"),
    ({"data.per_class": 0}, "config.stages.s.data.per_class is 0; it must be at least 1"),
    ({"data.crop_pct": 1.1}, "config.stages.s.data.crop_pct is 1.1; it must be above 0 and at most 1"),
    ({"model.drop_path": 1.0}, "config.stages.s.model.drop_path is 1.0; it must be at least 0 and below 1"),
    ({"model.num_heads": 0}, "config.stages.s.model.num_heads is 0; it must be at least 1"),
    ({"optim.ema": 1.5}, "config.stages.s.optim.ema is 1.5; it must be above 0 and below 1"),
    ({"data.std": (1.0, 0.0, 1.0)}, "config.stages.s.data.std is (1.0, 0.0, 1.0); it must be above 0"),
    ({"task": Mae(mask_ratio=1.5)}, "config.stages.s.task.mask_ratio is 1.5; it must be above 0 and below 1"),
    (
        {"task": distill(Relation(1, 0), path="p")},
        "config.stages.s.task.targets.0.student_block is 0; it must be at least 1",
    ),
]
SEMANTIC = [
    ({"model.image_size": 10}, "stages.s.model: image_size 10 is not a multiple of patch_size 4"),
    ({"data.image_size": 16}, "stages.s: data.image_size 16 differs from model.image_size 8"),
    ({"model.width": 6}, "stages.s.model: width 6 is not a multiple of 4"),
    ({"model.num_heads": 3}, "stages.s.model: width 8 is not a multiple of num_heads 3"),
    ({"model.last_block_heads": 5}, "stages.s.model: width 8 is not a multiple of last_block_heads 5"),
    ({"model.neck": 4}, "stages.s.model: neck 4 needs pool 'mean' and num_classes"),
    ({"run.steps": 3}, "stages.s.run: set exactly one of epochs and steps"),
    ({"run.epochs": None}, "stages.s.run: set exactly one of epochs and steps"),
    (
        {"optim.warmup_epochs": 1.0, "optim.warmup_steps": 5},
        "stages.s.optim: set warmup_epochs or warmup_steps, and the other to 0",
    ),
    ({"optim.accum_steps": 3}, "stages.s: batch_size 4 is not a multiple of accum_steps 3"),
    ({"run.steps_per_call": 4}, "stages.s.run: log_every 50 is not a multiple of steps_per_call 4"),
    ({"init": Init()}, "stages.s.init needs exactly one of stage and path"),
    ({"init": Init("a", path="b")}, "stages.s.init needs exactly one of stage and path"),
    ({"init": Init(path="b", rename={"(": ""})}, "stages.s.init: '(' is not a regular expression"),
    ({"task": distill(Relation(1, 1))}, "stages.s.task.teacher needs exactly one of stage and path"),
    ({"optim.freeze": ("encoder/(",)}, "stages.s: 'encoder/(' is not a regular expression"),
    ({"optim.lr_scale": {"encoder/(": 2.0}}, "stages.s: 'encoder/(' is not a regular expression"),
    ({"optim.lr_scale": {"x": -1.0}}, "stages.s.optim.lr_scale: the factor of 'x' is -1.0; it must be at least 0"),
    ({"data.crop_scale": (1.0, 0.2)}, "stages.s.data.crop_scale is (1.0, 0.2); it must be (low, high)"),
    (
        {"data.resident": True, "data.rand_augment": "rand-m9-mstd0.5-inc1"},
        "stages.s.data.rand_augment is made on the host",
    ),
    *(
        ({"data.source": "scenes", "data.masks": masks, **others}, f"stages.s.data.{message}")
        for masks, others, message in (
            (Masks(11), {"data.source": "folder"}, "masks: source 'folder' has none; choose pairs, scenes, tfds or"),
            (Masks(11), {"data.per_class": 3}, "per_class is not made of images with masks; set it to None"),
            (Masks(11), {"data.corruption": "fog"}, "corruption is not made of images with masks; set it to ''"),
            (
                Masks(11),
                {"data.rand_augment": "rand-m9"},
                "rand_augment is not made of images with masks; set it to ''",
            ),
            (Masks(11, scale=(50, 100)), {}, "masks.scale is (50, 100); it must be (longer side, shorter side)"),
            (Masks(11, ratio=(2.0, 1.0)), {}, "masks.ratio is (2.0, 1.0); it must be (low, high)"),
            (Masks(11, scale=(9, 3), ratio=(0.1, 1.0)), {}, "masks: scale (9, 3) times ratio 0.1 is no pixel"),
            (Masks(11, stride=9), {}, "masks.stride 9 leaves out pixels; make it at most image_size 8"),
        )
    ),
    ({"model.num_classes": 1}, "stages.s.task: classify needs model.num_classes of at least 2, got 1"),
    ({"task": Mae()}, "stages.s.task: mae needs model.pool 'cls'"),
    ({"task": Mae(decoder=Decoder(16, 1, 3)), "model.num_classes": 0}, "stages.s.task.decoder: width 16"),
    (
        {"task": distill(Relation(1, 1), Feature(1, 3), path="p")},
        "stages.s.task.targets.1: student_block 3 is beyond the student's 2 blocks",
    ),
    (
        {"task": distill(path="p")},
        "stages.s.task.targets: none reads the teacher; name what of it the student is to match",
    ),
    (
        {"model.attention": "cudnn"},
        "stages.s.model: attention 'cudnn' does not compute in float32; set model.dtype=bfloat16",
    ),
    (
        {"model.attention": "cudnn", "model.dtype": "bfloat16"},
        "stages.s.model: attention 'cudnn' takes heads of a width that is a multiple of 8 and at most 128, and"
        " 2 heads are 4 wide; set model.attention=xla",
    ),
    (
        {"model": ViT(272, 2, 17, last_block_heads=2, attention="cudnn", dtype="bfloat16", num_classes=2, **SIZE)},
        "stages.s.model: attention 'cudnn' takes heads of a width that is a multiple of 8 and at most 128, and"
        " 2 heads are 136 wide",
    ),
    (
        {"task": Mae(decoder=Decoder(16, 1, 4)), "model": ViT(8, 2, 1, attention="cudnn", dtype="bfloat16", **SIZE)},
        "stages.s.task.decoder: attention 'cudnn' takes heads of a width that is a multiple of 8 and at most 128, and"
        " 4 heads are 4 wide",
    ),
]


def changed(changes, stage=None):
    stage = stage or make_stage()
    for path, value in changes.items():
        *parents, last = path.split(".")
        node = stage
        for key in parents:
            node = node[key] if isinstance(node, dict) else getattr(node, key)
        setattr(node, last, value)
    return stage


def test_check_accepts_and_copies():
    cfg = full_config()
    before = copy.deepcopy(cfg)
    checked = check(cfg)
    assert checked == cfg == before and checked is not cfg
    checked.stages["mae"].optim.lr = 9.0
    checked.stages["tuned"].init.rename["p"] = "q"
    assert cfg == before


@pytest.mark.parametrize(
    "name",
    [
        "../out",
        "a/b",
        "..",
        ".",
        "",
        ".hidden",
        "a[1]",
        "a*",
        "a\\b",
        "a\nb",
        "report",
        "Report",
        "converted",
        "jax_cache",
    ]
    + ["run.lock", "chain.json", "results.json", "replica_0", "REPLICA_x", "-a", " a"],
)
def test_stage_names_that_cannot_be_folders(name):
    with pytest.raises(InputError, match=r"^stages\.[\s\S]*: cannot name a folder in the workdir beside report, "):
        check(Config("c", {name: make_stage()}))


@pytest.mark.parametrize("name", ["mae", "mae_l", "0", "größe", "a b", "a+b-c.d", "reports", "my_replica_0"])
def test_stage_names(name):
    assert list(check(Config("c", {name: make_stage()})).stages) == [name]


@pytest.mark.parametrize("field", [{"keep_blocks": 1}, {"keep_blocks": 0}, {"fresh": ("encoder/block1/.*",)}])
def test_a_teacher_is_taken_whole(field):
    with pytest.raises(InputError, match=r"^stages\.d\.task\.teacher: keep_blocks and fresh are for a stage itself"):
        check(Config("c", {"d": make_distill(Init(path="p", **field))}))
    check(Config("c", {"d": make_stage(init=Init(path="p", **field))}))


def test_evaluation_is_split_as_training():
    cfg = Config("c", {"s": make_stage(evals={"val": Classification(dataclasses.replace(EVAL_DATA, val_seed=1))})})
    with pytest.raises(InputError, match=r"stages\.s\.evals\.val: data\.val_seed differs from the stage's, 0"):
        check(cfg)


def test_check_accepts_cudnn_where_it_computes():
    for model in (ViT(128, 2, 1, **SIZE), ViT(32, 2, 4, last_block_heads=2, **SIZE)):
        model = dataclasses.replace(model, attention="cudnn", dtype="bfloat16")
        check(Config("c", {"a": make_stage(task=Mae(decoder=Decoder(16, 1, 2)), model=model)}))


def test_check_separates_what_stages_share():
    data, optim, init = Data("digits", image_size=8), Optim(1e-3), Init(path="/p")
    stages = {name: make_stage(data=data, optim=optim, init=init) for name in "ab"}
    checked = check(Config("shared", stages))
    checked.stages["a"].data.threads = 9
    checked.stages["a"].optim.lr = 9.0
    checked.stages["a"].init.rename["x"] = "y"
    assert (checked.stages["b"].data.threads, checked.stages["b"].optim.lr) == (2, 1e-3)
    assert checked.stages["b"].init.rename == {} and init.rename == {} and data.threads == 2


def test_check_makes_ints_floats_and_lists_tuples():
    cfg = Config("types", {"a": make_stage(optim=Optim(1, freeze=["x"]), run=Run(4, epochs=2))})
    checked = check(cfg).stages["a"]
    assert type(checked.optim.lr) is float and type(checked.run.epochs) is float
    assert checked.optim.freeze == ("x",)


def check_fails(*args):
    """The message; of a config, or of the stages and more that one is made of, which is where ranges are looked at."""
    with pytest.raises(InputError) as error:
        check(args[0] if isinstance(args[0], Config) else Config("c", *args))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_check_finds_wrong_types_with_the_whole_path():
    cfg = Config("bad", {"a": make_stage()})
    cfg.stages["a"].optim.lr = "fast"
    assert check_fails(cfg) == "config.stages.a.optim.lr: expected float, got 'fast'"


def test_check_finds_what_a_config_file_sets_by_a_misspelt_name():
    cfg = Config("bad", {"a": make_stage()})
    cfg.stages["a"].optim.weigth_decay = 0.1
    assert check_fails(cfg).startswith("config.stages.a.optim.weigth_decay: no such field; Optim has lr, ")


def test_check_finds_stages_that_are_not_earlier():
    unknown = check_fails({"a": make_stage(init=Init("zzz"))})
    assert "stages.a" in unknown and "'zzz'" in unknown and "those are: none" in unknown
    later = check_fails({"a": make_stage(init=Init("b")), "b": make_stage()})
    assert "stages.a" in later and "'b'" in later
    own = check_fails({"x": make_stage(), "a": make_stage(init=Init("a"))})
    assert "stages.a" in own and "those are: x" in own
    teacher = check_fails({"x": make_stage(), "y": make_stage(), "a": make_distill(Init("q"))})
    assert "'q'" in teacher and "those are: x, y" in teacher
    check(Config("c", {"x": make_stage(), "a": make_distill(Init("x")), "b": make_stage(init=Init("a"))}))


def test_check_finds_unknown_stages_in_tables():
    cfg = Config("c", {"a": make_stage()}, compare={"T": Compare("m", {"r": ("b",)})})
    assert check_fails(cfg) == "compare.T: there is no stage 'b'"


def test_check_finds_metrics_that_no_eval_measures():
    cfg = Config("c", {"a": make_stage(evals={"knn": Knn(EVAL_DATA, EVAL_DATA, k=(10,))})})
    for metric, error in (
        ("top1", "compare.T: metric 'top1' is of no eval of stage 'a'"),
        ("knn/top1", "compare.T: eval 'knn' measures no 'top1'; choose one of top1_k10"),
    ):
        cfg.compare = {"T": Compare(metric, {"r": ("a",)})}
        assert check_fails(cfg) == error


@pytest.mark.parametrize(("changes", "expected"), FIELDS + SEMANTIC, ids=[str(c)[:60] for c, _ in FIELDS + SEMANTIC])
def test_check_finds_what_does_not_fit_together(changes, expected):
    assert check_fails({"s": changed(changes)}).startswith(expected)


def test_check_allows_the_borders():
    good = [
        {"data.crop_pct": 1.0, "data.workers": 0, "data.threads": 1, "data.prefetch": 1},
        {"run.seed": 0, "data.subset_seed": None, "run.log_every": 1, "run.checkpoint_every": 1, "run.keep": 1},
        {"model.drop_path": 0.0, "model.last_block_heads": 8, "optim.accum_steps": 4},
        {"model.num_classes": 2},
        {"run.epochs": None, "run.steps": 0},
        {"task": distill(Relation(1, 2), path="p"), "model.num_classes": 0},
    ]
    for changes in good:
        check(Config("c", {"s": changed(changes)}))


@pytest.mark.parametrize("mesh", [Mesh(fsdp=0), Mesh(data=0), Mesh(data=-2)], ids=str)
def test_check_refuses_an_impossible_mesh(mesh):
    assert "it must be at least 1" in check_fails({"s": make_stage()}, mesh)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (make_stage(evals={"v": Classification(dataclasses.replace(EVAL_DATA, transform="train"))}), "transform"),
        (make_stage(evals={"v": Classification(dataclasses.replace(EVAL_DATA, image_size=16))}), "image_size"),
        (make_stage(evals={"v": Knn(EVAL_DATA, dataclasses.replace(EVAL_DATA, image_size=16))}), "image_size"),
        (make_stage(evals={"v": Classification(EVAL_DATA, batch_size=0)}), "batch_size"),
        (make_stage(evals={"v": Corruptions(EVAL_DATA, severities=())}), "severities are empty"),
        (make_stage(evals={"v": Classification(EVAL_DATA, subset="imagenet_a")}), "ImageNet's 1000 classes"),
        (
            make_stage(task=Mae(), evals={"v": Classification(EVAL_DATA)}, model=ViT(8, 2, 2, **SIZE)),
            "num_classes",
        ),
    ],
    ids=["transform", "image_size", "bank image_size", "batch_size", "no severity", "subset", "no head"],
)
def test_check_refuses_evals_that_cannot_run(stage, expected):
    """Otherwise the error comes after the training, and mending the config makes the stage one "run with another"."""
    message = check_fails({"s": stage})
    assert "stages.s.evals.v" in message and expected in message


def replicas(count=1, **changes):
    return make_stage(run=Run(4, epochs=1.0, replicas=count), **changes)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (
            replicas(1, init=Init("three")),
            "stages.s.init is a stage of 3 replicas: choose one with stages.s.init.replica",
        ),
        (replicas(2, init=Init("three")), "stages.s.init is a stage of 3 replicas"),
        (make_distill(Init("three")), "stages.s.task.teacher is a stage of 3 replicas"),
        # As many replicas: initial weights come one from one, a teacher is the same for all.
        (make_distill(Init("three"), run=Run(4, 1.0, replicas=3)), "stages.s.task.teacher is a stage of 3 replicas"),
        (replicas(1, init=Init("three", replica=3)), "stages.s.init.replica is 3, and its stage has 3 (run.replicas)"),
        (replicas(1, init=Init("one", replica=1)), "stages.s.init.replica is 1, and its stage has 1 (run.replicas)"),
        (replicas(1, init=Init("one", replica=-1)), "config.stages.s.init.replica is -1; it must be at least 0"),
    ],
    ids=["none chosen", "other number", "teacher", "teacher of as many", "beyond", "beyond one", "negative"],
)
def test_check_refuses_replicas_that_are_not_there(stage, expected):
    assert check_fails({"one": make_stage(), "three": replicas(3), "s": stage}).startswith(expected)


def test_check_allows_replicas_that_are_chosen_or_paired():
    stages = {
        "one": make_stage(),
        "three": replicas(3),
        "paired": replicas(3, init=Init("three")),
        "from one": replicas(3, init=Init("one")),
        "of one": replicas(1, init=Init("three", replica=2)),
        "all of one": replicas(2, init=Init("three", replica=2)),
        "taught": make_distill(Init("three", replica=0), run=Run(4, 1.0, replicas=2)),
    }
    check(Config("c", stages))


def test_published_values_are_of_rows():
    stage = make_stage(evals={"val": Classification(EVAL_DATA)})
    cfg = Config("c", {"a": stage}, compare={"T": Compare("val/top1", {"r": ("a",)}, {"r": 1.0, "s": 2.0})})
    with pytest.raises(InputError, match=r"compare\.T\.paper: there is no row 's'; choose from r"):
        check(cfg)
