import jax
import numpy as np
import pytest

from tinymim_jax.experiment import recipes
from tinymim_jax.experiment.config import Classify, Data, Distill, Init, Mae, Optim, Relation, Run, Stage, ViT
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.training.setup import StageSetup, example_batch, make_setup
from tinymim_jax.weights.parameters import flatten

SMALL = {"width": 8, "depth": 2, "num_heads": 2, "image_size": 8, "patch_size": 4}


def make_stage(task=None, **changes):
    parts = {
        "task": task or Classify(),
        "model": ViT(**SMALL, num_classes=10),
        "data": Data("digits", image_size=8),
        "optim": Optim(lr=1e-3),
        "run": Run(batch_size=4, epochs=2.0),
    }
    return Stage(**{**parts, **changes})


def setup_of(stage, num_examples=43, **sources) -> StageSetup:
    return make_setup(stage, "stage", sources, num_examples)


def test_an_epoch_of_imagenet():
    """1,281,167 images in batches of 4096: 312 whole ones."""
    plan = setup_of(make_stage(run=Run(4096, epochs=300.0)), 1_281_167)
    assert (plan.steps_per_epoch, plan.total_steps) == (312, 93_600)
    assert setup_of(make_stage(run=Run(1024, epochs=100.0)), 1_281_167).total_steps == 125_100


def test_length_in_epochs_and_in_steps():
    assert setup_of(make_stage(run=Run(4, epochs=2.5))).total_steps == 25
    assert setup_of(make_stage(run=Run(4, epochs=0.26))).total_steps == 3
    plan = setup_of(make_stage(run=Run(4, steps=7)))
    assert (plan.steps_per_epoch, plan.total_steps) == (10, 7)
    assert setup_of(make_stage(run=Run(4, steps=0))).total_steps == 0


def test_the_schedule_is_that_of_the_stage():
    stage = make_stage(optim=Optim(2.56e-2, warmup_epochs=2, min_lr=1e-4), run=Run(4, epochs=10.0))
    plan = setup_of(stage, 41)
    # lr 2.56e-2 x 4 / 256 = 4e-4; 20 of 100 steps of warm-up
    assert [float(plan.schedule(s)) for s in (0, 10, 20, 60, 100)] == pytest.approx([0, 2e-4, 4e-4, 2.5e-4, 1e-4])


def test_a_batch_larger_than_the_data():
    with pytest.raises(InputError, match="batch_size 44 is more than the 43 images"):
        setup_of(make_stage(run=Run(44, steps=1)))
    assert setup_of(make_stage(run=Run(43, steps=1))).steps_per_epoch == 1


def test_a_warmup_longer_than_the_run():
    with pytest.raises(
        InputError, match="the warm-up of 50 steps is not shorter than the run, which has 20; lower optim.warmup_epochs"
    ):
        setup_of(make_stage(optim=Optim(1e-3, warmup_epochs=5), run=Run(4, epochs=2.0)))


def test_what_distillation_does_not_train():
    """Spec A.3, on a student of 2 blocks: behind q, k, v of the last, and the fixed positions."""
    task = Distill(Init("t"), {"relation": Relation(teacher_block=1, student_block=2)})
    plan = setup_of(make_stage(task, model=ViT(**SMALL)), teacher=ViT(**SMALL))
    assert set(plan.untrained()) == {
        "encoder/pos_embed",
        "encoder/norm/scale",
        "encoder/norm/bias",
        "encoder/block2/norm2/scale",
        "encoder/block2/norm2/bias",
        *(f"encoder/block2/{m}/{v}" for m in ("attn/proj", "mlp/fc1", "mlp/fc2") for v in ("kernel", "bias")),
    }
    (line,) = plan.untrained_line()
    assert line.startswith("not trained, not decayed: ")
    assert set(line.split(": ")[1].split(", ")) == {
        "encoder/pos_embed",
        "encoder/norm",
        "encoder/block2/norm2",
        "encoder/block2/attn/proj",
        "encoder/block2/mlp",
    }
    teacher = flatten(plan.frozen["teacher"])
    assert "encoder/block1/attn/qkv/kernel" in teacher and "encoder/block2/attn/qkv/kernel" not in teacher


def test_what_the_others_do_not_train():
    trained = setup_of(make_stage(model=ViT(**SMALL, num_classes=10, posembed="trainable")))
    assert trained.untrained() == [] == trained.untrained_line()
    assert setup_of(make_stage()).untrained() == ["encoder/pos_embed"]
    mae = setup_of(make_stage(Mae(), model=ViT(**SMALL)))
    assert set(mae.untrained()) == {"encoder/pos_embed", "pretext/decoder/pos_embed"}
    assert mae.frozen == {}


def test_freezing_by_hand_adds_to_it():
    plan = setup_of(make_stage(optim=Optim(1e-3, freeze=("encoder/block1/.*",))))
    assert {name.split("/")[1] for name in plan.untrained()} == {"pos_embed", "block1"}


def test_a_parameter_without_a_rule():
    with pytest.raises(InputError, match=r"in none of optim\.decay and optim\.no_decay"):
        setup_of(make_stage(optim=Optim(1e-3, decay=())))


def test_shapes_come_without_arrays():
    plan = setup_of(make_stage())
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(plan.params))
    assert plan.params["encoder"]["head"]["kernel"].shape == (8, 10)
    assert plan.params["encoder"]["block1"]["attn"]["qkv"]["kernel"].shape == (8, 3, 2, 4)
    assert jax.tree.structure(plan.labels) == jax.tree.structure(plan.params)


def test_layer_decay_counts_the_blocks_of_the_stage():
    """One step from parameters and moments of zero: each moves by lr x 0.5^(3 - id)."""
    optimizer = Optim(1.0, None, weight_decay=0.0, layer_decay=0.5, eps=1e-12)
    plan = setup_of(make_stage(optim=optimizer, run=Run(4, steps=10)))
    params = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), plan.params)
    updates, _ = jax.jit(plan.tx.update)(jax.tree.map(np.ones_like, params), plan.tx.init(params), params)
    moved = {name: -float(u.ravel()[0]) for name, u in flatten(updates).items()}
    assert moved["encoder/cls_token"] == pytest.approx(1 / 8, rel=1e-4)
    assert moved["encoder/block1/norm1/scale"] == pytest.approx(1 / 4, rel=1e-4)
    assert moved["encoder/block2/mlp/fc2/bias"] == pytest.approx(1 / 2, rel=1e-4)
    assert moved["encoder/head/kernel"] == pytest.approx(1.0, rel=1e-4)
    assert moved["encoder/pos_embed"] == 0.0


def test_numbers_of_parameters():
    """Spec A.3: sizes of the students, all positions counted."""
    expected = {"tiny": 5_524_416, "small": 21_665_664}
    for size, teacher in (("tiny", "small"), ("small", "base")):
        target = recipes.target(teacher, size)
        stage = recipes.distill(recipes.student(size), Init("x"), recipes.imagenet(True), **target)
        plan = setup_of(stage, 10_000, teacher=recipes.student(teacher))
        assert sum(leaf.size for leaf in jax.tree.leaves(plan.params)) == expected[size]
        assert plan.total_steps == 600


def test_example_batch():
    stage = make_stage()
    task = setup_of(stage).task
    batch = example_batch(task, stage, 3)
    shapes = {key: (value.shape, value.dtype) for key, value in batch.items()}
    assert shapes == {
        "image": ((3, 8, 8, 3), np.uint8),
        "label": ((3,), np.int32),
        "is_valid": ((3,), bool),
        "index": ((3,), np.int32),
        "stop": ((3,), np.uint8),
    }
    assert batch["is_valid"].all() and len(example_batch(task, stage)["image"]) == 1
