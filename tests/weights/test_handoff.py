import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tinymim_jax
from tinymim_jax.experiment import config, stage_file
from tinymim_jax.experiment.config import Classify, Data, Init, Optim, Run, Stage, ViT
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.weights import handoff
from tinymim_jax.weights.checkpoint import Checkpoints
from tinymim_jax.weights.parameters import flatten, shapes_of, unflatten

SMALL = ViT(width=12, depth=1, num_heads=2, image_size=8, patch_size=4)


def block_shapes(i, heads, width=12, where="encoder"):
    return {
        f"{where}/block{i}/attn/qkv/kernel": (width, 3, heads, width // heads),
        f"{where}/block{i}/attn/qkv/bias": (3, heads, width // heads),
        f"{where}/block{i}/norm1/scale": (width,),
    }


def source_shapes(heads=2):
    return {
        "encoder/pos_embed": (1, 5, 12),
        **block_shapes(1, heads),
        **block_shapes(2, heads),
        "encoder/norm/scale": (12,),
        "encoder/norm/bias": (12,),
    }


# match


def test_everything_is_loaded():
    report = handoff.match(source_shapes(), source_shapes(), Init("a"))
    assert report.moves == {key: key for key in source_shapes()}
    assert (report.fresh, report.skipped, report.regrouped, report.resized, report.untrained) == ([], [], {}, {}, [])
    assert report.lines() == ["loaded 9 arrays"]


def test_fresh_and_skipped():
    target = {key: shape for key, shape in source_shapes().items() if "/norm/" not in key}
    target |= {"encoder/fc_norm/scale": (12,), "encoder/head/kernel": (12, 3), "encoder/head/bias": (3,)}
    init = Init("a", skip=("encoder/norm/.*",), fresh=("encoder/(fc_norm|head)/.*",))
    report = handoff.match(target, source_shapes(), init)
    assert len(report.moves) == 7
    assert report.fresh == ["encoder/fc_norm/scale", "encoder/head/kernel", "encoder/head/bias"]
    assert report.skipped == ["encoder/norm/scale", "encoder/norm/bias"]
    assert report.lines() == [
        "loaded 7 arrays",
        "re-initialised: encoder/fc_norm, encoder/head",
        "skipped: encoder/norm",
    ]


def test_what_may_be_left_out_is_loaded_where_it_fits():
    report = handoff.match(source_shapes(), source_shapes(), Init("a", skip=(".*",)))
    assert len(report.moves) == 9 and not report.fresh and not report.skipped


def test_fresh_is_fresh_whatever_the_source_has():
    """A head of other classes, or of the same; the source's own are excused."""
    for classes in (3, 5):
        target = {**source_shapes(), "encoder/head/kernel": (12, 3), "encoder/new": (1,)}
        source = {**source_shapes(), "encoder/head/kernel": (12, classes), "encoder/head/bias": (classes,)}
        report = handoff.match(target, source, Init("a", fresh=("encoder/(head/.*|new)",)))
        assert report.fresh == ["encoder/head/kernel", "encoder/new"]
        assert report.skipped == ["encoder/head/kernel", "encoder/head/bias"] and len(report.moves) == 9


def test_pretext_is_neither_taken_nor_missed():
    target = {**source_shapes(), "pretext/relation/kernel": (3,), "pretext/decoder/x": (2,)}
    source = {**source_shapes(), "pretext/decoder/x": (2,), "pretext/decoder/y": (2,)}
    report = handoff.match(target, source, Init("a"))
    assert len(report.moves) == 9 and report.fresh == ["pretext/relation/kernel", "pretext/decoder/x"]
    assert report.skipped == ["pretext/decoder/x", "pretext/decoder/y"]
    assert report.lines()[1:] == ["re-initialised: pretext", "skipped: pretext"]


def test_pretext_is_taken_where_a_new_name_leads_there():
    target = {**source_shapes(), "pretext/pyramid/fc/kernel": (12, 40), "pretext/head/x": (2,)}
    source = {**source_shapes(), "encoder/neck/kernel": (12, 40)}
    rename = {"encoder/neck/": "pretext/pyramid/fc/"}
    report = handoff.match(target, source, Init("a", rename=rename))
    assert report.moves["pretext/pyramid/fc/kernel"] == "encoder/neck/kernel" and not report.skipped
    assert report.fresh == ["pretext/head/x"]
    report = handoff.match(target, source_shapes(), Init("a", rename=rename))
    assert report.fresh == ["pretext/pyramid/fc/kernel", "pretext/head/x"]
    with pytest.raises(InputError, match=r"pretext/pyramid/fc/kernel is \(12, 30\) in the source and \(12, 40\) here"):
        handoff.match(target, {**source, "encoder/neck/kernel": (12, 30)}, Init("a", rename=rename))


def test_a_missing_key_is_bad_input():
    target = {**source_shapes(), "encoder/head/kernel": (12, 3), "encoder/head/bias": (3,), "encoder/x": (1,)}
    with pytest.raises(InputError, match=r"the source lacks encoder/head, encoder/x; .*init\.fresh"):
        handoff.match(target, source_shapes(), Init("a"))
    with pytest.raises(InputError, match=r"the source lacks encoder/head/kernel, encoder/x;"):
        handoff.match(target, source_shapes(), Init("a", fresh=(".*bias",)))
    with pytest.raises(InputError, match="the source lacks"):  # the whole name must match
        handoff.match(target, source_shapes(), Init("a", fresh=("encoder/head", "x")))


def test_a_surplus_key_is_bad_input():
    target = {key: shape for key, shape in source_shapes().items() if "/norm/" not in key}
    with pytest.raises(InputError, match=r"this model has no encoder/norm; .*init\.skip"):
        handoff.match(target, source_shapes(), Init("a"))
    with pytest.raises(InputError, match=r"this model has no encoder/norm/scale; "):
        handoff.match(target, source_shapes(), Init("a", skip=(".*bias",)))
    with pytest.raises(InputError, match="this model has no encoder/norm; "):  # the whole name must match
        handoff.match(target, source_shapes(), Init("a", skip=("norm", "encoder/norm/")))


def test_regrouping_must_be_asked_for():
    with pytest.raises(InputError, match=r"block1/attn/qkv/kernel has 2 heads in the source and 3 here"):
        handoff.match(source_shapes(3), source_shapes(2), Init("a"))
    report = handoff.match(source_shapes(3), source_shapes(2), Init("a", regroup_heads=True))
    qkv = [f"encoder/block{i}/attn/qkv/{v}" for i in (1, 2) for v in ("kernel", "bias")]
    assert report.regrouped == dict.fromkeys(qkv, (2, 3))
    assert report.lines() == ["loaded 9 arrays", "regrouped 2 -> 3 heads: encoder/block1-2/attn"]


def test_regrouping_is_for_qkv_of_the_same_channels():
    init = Init("a", regroup_heads=True)
    for key, old, new in [
        ("encoder/block1/attn/qkv/kernel", (12, 3, 2, 6), (12, 3, 2, 4)),
        ("encoder/block1/attn/qkv/kernel", (6, 3, 2, 6), (12, 3, 3, 4)),
        ("encoder/block1/other/kernel", (12, 3, 2, 6), (12, 3, 3, 4)),
        ("encoder/head/kernel", (12, 3), (12, 4)),
    ]:
        with pytest.raises(InputError) as error:
            handoff.match({key: new}, {key: old}, init)
        assert f"{key} is {old} in the source and {new} here: the two models differ in size" in str(error.value)


def test_resizing_must_be_asked_for():
    target = {**source_shapes(), "encoder/pos_embed": (1, 17, 12)}
    with pytest.raises(InputError, match=r"encoder/pos_embed is for 2 x 2 patches in the source and 4 x 4 here"):
        handoff.match(target, source_shapes(), Init("a"))
    report = handoff.match(target, source_shapes(), Init("a", resize_posembed=True))
    assert report.resized == {"encoder/pos_embed": (2, 4)}
    assert report.lines() == ["loaded 9 arrays", "resized 2 x 2 -> 4 x 4 patches: encoder/pos_embed"]
    with pytest.raises(InputError, match="the two models differ in size"):
        handoff.match({"pos_embed": (1, 17, 8)}, {"pos_embed": (1, 5, 12)}, Init("a", resize_posembed=True))


def test_rename():
    source = {key.replace("encoder/", "model/vit/"): shape for key, shape in source_shapes().items()}
    init = Init("a", rename={"^model/": "", "vit": "encoder"})  # one after the other
    report = handoff.match(source_shapes(), source, init)
    assert report.moves["encoder/block2/attn/qkv/bias"] == "model/vit/block2/attn/qkv/bias"
    assert len(report.moves) == 9
    shifted = handoff.match(block_shapes(2, 2), block_shapes(1, 2), Init("a", rename={r"block(\d)/": r"block2/"}))
    assert shifted.moves["encoder/block2/norm1/scale"] == "encoder/block1/norm1/scale"


def test_skip_goes_by_the_names_of_the_source():
    source = {**source_shapes(), "old/extra": (1,)}
    init = Init("a", rename={"old": "new"}, skip=("old/.*",))
    assert handoff.match(source_shapes(), source, init).skipped == ["old/extra"]
    with pytest.raises(InputError, match="this model has no old; "):
        handoff.match(source_shapes(), source, Init("a", rename={"old": "new"}, skip=("new/.*",)))


def test_two_keys_renamed_to_one_are_bad_input():
    """Strict: one of them would be lost without a word."""
    source = {**block_shapes(1, 2), **block_shapes(2, 2)}
    with pytest.raises(InputError, match="block1"):
        handoff.match(block_shapes(1, 2), source, Init("a", rename={r"block\d": "block1"}))


def test_what_the_source_did_not_train_is_named():
    untrained = ["encoder/norm/scale", "encoder/norm/bias", "encoder/pos_embed", "encoder/not/here"]
    report = handoff.match(source_shapes(), source_shapes(), Init("a"), untrained)
    assert report.untrained == ["encoder/pos_embed", "encoder/norm/scale", "encoder/norm/bias"]
    assert "not trained by the source: encoder/pos_embed, encoder/norm" in report.lines()
    renamed = {f"old/{key}": shape for key, shape in source_shapes().items()}
    report = handoff.match(source_shapes(), renamed, Init("a", rename={"old/": ""}), ["old/encoder/norm/bias"])
    assert report.untrained == ["encoder/norm/bias"]


def test_lines_of_several_regroupings():
    target = {**block_shapes(1, 2), **block_shapes(2, 2), **block_shapes(3, 2), **block_shapes(4, 6)}
    source = {**block_shapes(1, 4), **block_shapes(2, 4), **block_shapes(3, 3), **block_shapes(4, 4)}
    lines = handoff.match(target, source, Init("a", regroup_heads=True)).lines()
    assert lines == [
        "loaded 12 arrays",
        "regrouped 4 -> 2 heads: encoder/block1-2/attn",
        "regrouped 3 -> 2 heads: encoder/block3/attn",
        "regrouped 4 -> 6 heads: encoder/block4/attn",
    ]


# transfer


def transfer(target, source, init):
    """Both flat."""
    report = handoff.match({k: v.shape for k, v in target.items()}, {k: np.shape(v) for k, v in source.items()}, init)
    return flatten(handoff.transfer(unflatten(target), unflatten(source), report))


def test_transfer_moves_values_and_keeps_the_rest():
    draw = np.random.default_rng(0)
    source = {"e/a/k": draw.normal(size=(2, 3)).astype(np.float32), "e/b": np.arange(3.0), "e/gone": np.ones(1)}
    target = {"e/a/k": jnp.zeros((2, 3)), "e/b": jnp.zeros(3, jnp.bfloat16), "e/new": jnp.full(2, 7.0)}
    out = transfer(target, source, Init("a", skip=("e/gone",), fresh=("e/new",)))
    assert set(out) == set(target)
    np.testing.assert_array_equal(out["e/a/k"], source["e/a/k"])
    np.testing.assert_array_equal(np.asarray(out["e/b"], np.float32), [0, 1, 2])
    np.testing.assert_array_equal(out["e/new"], 7.0)
    assert out["e/a/k"].dtype == np.float32 and out["e/b"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(target["e/a/k"], 0.0)


def test_transfer_fills_shapes():
    """The target of a teacher is shapes only."""
    out = transfer({"a": jax.ShapeDtypeStruct((2,), np.float32)}, {"a": np.array([1.0, 2.0])}, Init("a"))
    assert out["a"].dtype == np.float32
    np.testing.assert_array_equal(out["a"], [1.0, 2.0])


def test_transfer_renames():
    out = transfer({"new/a": jnp.zeros(1)}, {"old/a": np.ones(1)}, Init("a", rename={"old": "new"}))
    np.testing.assert_array_equal(out["new/a"], 1.0)


def test_regrouping_is_that_of_a_fused_torch_linear():
    """Spec A.2: output channel c of [3D] is (3, heads, d), head-major; only its reading changes."""
    width, key = 12, "block1/attn/qkv/"
    torch_weight = np.arange(3 * width * width, dtype=np.float32).reshape(3 * width, width)  # [3D, D]
    torch_bias = np.arange(3 * width, dtype=np.float32)

    def ours(heads):
        size = width // heads
        kernel, bias = np.zeros((width, 3, heads, size), np.float32), np.zeros((3, heads, size), np.float32)
        for part in range(3):
            for head in range(heads):
                for channel in range(size):
                    row = part * width + head * size + channel
                    kernel[:, part, head, channel] = torch_weight[row]
                    bias[part, head, channel] = torch_bias[row]
        return {f"{key}kernel": kernel, f"{key}bias": bias}

    for old, new in ((2, 3), (3, 2), (4, 1), (2, 6)):
        out = transfer({k: jnp.zeros(v.shape) for k, v in ours(new).items()}, ours(old), Init("a", regroup_heads=True))
        for name, expected in ours(new).items():
            np.testing.assert_array_equal(out[name], expected)


def test_resizing_keeps_cls_and_is_bicubic():
    table = np.random.default_rng(0).normal(size=(1, 1 + 9, 4)).astype(np.float32)
    out = transfer({"pos_embed": jnp.zeros((1, 37, 4))}, {"pos_embed": table}, Init("a", resize_posembed=True))
    new = out["pos_embed"]
    assert new.shape == (1, 37, 4) and new.dtype == np.float32
    np.testing.assert_array_equal(new[:, 0], table[:, 0])
    # Doubling: output 2 lies at input 0.75, whose neighbours -1, 0, 1, 2 (-1 repeats 0) weigh, with a = -0.75:
    rows = np.array([-0.03515625 + 0.26171875, 0.87890625, -0.10546875])
    grid = table[0, 1:].reshape(3, 3, 4).astype(np.float64)
    expected = np.einsum("r,c,rcd->d", rows, rows, grid)
    np.testing.assert_allclose(new[0, 1:].reshape(6, 6, 4)[2, 2], expected, rtol=1e-5, atol=1e-6)


# What is on disk


def make_stage(model=SMALL):
    task = Classify() if model.num_classes else config.Mae()
    return Stage(task, model, Data("digits", image_size=8), Optim(1e-3), Run(4, steps=1))


def write_stage(folder, stage, params, *, ema=None, done=True, untrained=(), model_state=None, classes=None):
    with Checkpoints(folder, keep=1) as checkpoints:
        model = {"params": params, "model_state": model_state or {}, "ema": ema or {}}
        optimizer = {"opt_state": {"m": np.zeros(2)}, "step": np.asarray(3)}
        checkpoints.save(3, {"model": model, "optim": optimizer}, {})
    (folder / "stage.json").write_text(json.dumps(stage_file.describe(stage, untrained, classes)))
    if done:
        (folder / "DONE").write_text('{"step": 3, "metrics": {}}')


@pytest.fixture(scope="module")
def params():
    images = jnp.zeros((1, 8, 8, 3))
    return {
        "encoder": jax.jit(SMALL.build().init)(jax.random.key(0), images)["params"],
        "pretext": {"decoder": {"x": jnp.ones(3)}},
    }


def test_read_params(tmp_path, params):
    write_stage(tmp_path, make_stage(), params)
    found = flatten(handoff.read_variables(tmp_path)["params"])
    assert set(found) == set(flatten(params))
    for key, value in flatten(params).items():
        assert type(found[key]) is np.ndarray
        np.testing.assert_array_equal(found[key], value)


def test_read_params_prefers_the_average(tmp_path, params):
    average = jax.tree.map(lambda p: p + 1, params)
    write_stage(tmp_path, make_stage(), params, ema=average)
    np.testing.assert_array_equal(handoff.read_variables(tmp_path)["params"]["pretext"]["decoder"]["x"], 2.0)


def test_an_unfinished_stage_is_bad_input(tmp_path, params):
    write_stage(tmp_path, make_stage(), params, done=False)
    assert not handoff.finished(tmp_path)
    with pytest.raises(InputError, match="has no finished stage: run that stage first"):
        handoff.read_variables(tmp_path)["params"]
    with pytest.raises(InputError, match="has no finished stage"):
        tinymim_jax.load(tmp_path)


def test_replicas_of_a_source(tmp_path, params):
    """One that is chosen, else the one of the same number; of a stage without replicas, the stage."""
    for number in (0, 1):
        write_stage(
            tmp_path / "seeds" / f"replica_{number}", make_stage(), jax.tree.map(lambda x, n=number: x + n, params)
        )
    for name in ("seeds", "single"):
        write_stage(tmp_path / name, make_stage(), params)
    assert handoff.replicas(tmp_path / "seeds") == ["replica_0", "replica_1"] and not handoff.replicas(
        tmp_path / "single"
    )
    for init in (Init("seeds", replica=1), Init(path=str(tmp_path / "seeds"), replica=1)):
        assert handoff.source_folder(init, tmp_path) == tmp_path / "seeds" / "replica_1"
        assert handoff.source_folder(init, tmp_path, 0) == tmp_path / "seeds" / "replica_1"
    assert handoff.source_folder(Init("seeds"), tmp_path, 0) == tmp_path / "seeds" / "replica_0"
    assert handoff.source_folder(Init("single"), tmp_path, 1) == tmp_path / "single"
    found = handoff.read_variables(tmp_path / "seeds" / "replica_1")["params"]
    np.testing.assert_array_equal(found["pretext"]["decoder"]["x"], 2.0)
    with pytest.raises(InputError, match=r"seeds has 2 replicas; choose one, e\.g\. .*replica_0 \(init\.replica=0\)"):
        handoff.read_variables(tmp_path / "seeds")["params"]


def test_source_folder(tmp_path, monkeypatch):
    assert handoff.source_folder(Init("mae"), tmp_path) == tmp_path / "mae"
    assert handoff.source_folder(Init(path="/runs/x"), tmp_path).as_posix() == "/runs/x"
    monkeypatch.setenv("HOME", "/home/someone")
    assert handoff.source_folder(Init(path="~/x"), tmp_path).as_posix() == "/home/someone/x"


# Teachers


def test_a_teacher_skips_what_lies_behind_its_block():
    init = handoff.for_teacher(Init("a", rename={"x": "y"}, regroup_heads=True, resize_posembed=True))
    assert (init.rename, init.regroup_heads, init.resize_posembed) == ({"x": "y"}, True, True)
    cut = {key: shape for key, shape in source_shapes().items() if "block2" not in key and "/norm/" not in key}
    report = handoff.match(cut, source_shapes(), init)
    assert len(report.moves) == 4 and len(report.skipped) == 5


def test_no_part_of_a_teacher_is_fresh():
    """Its target is shapes only: what is not loaded has no value at all."""
    cut = {**source_shapes(), "encoder/block3/norm1/scale": (12,)}
    with pytest.raises(InputError, match="the source lacks encoder/block3"):
        handoff.match(cut, source_shapes(), handoff.for_teacher(Init("a", fresh=(".*",))))


@pytest.mark.parametrize("k", [0, 1, 2])
def test_the_first_blocks_alone(k):
    """Spec D.3: embeddings and k blocks are taken over, the rest starts fresh."""
    model = config.ViT(8, 2, 2, image_size=8, patch_size=4, pool="mean", num_classes=3)
    target = shapes_of(
        {"encoder": jax.eval_shape(model.build().init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]}
    )
    report = handoff.match(target, target, Init("a", keep_blocks=k), layer_id=model.layer_id)
    kept = {key.split("/")[1] for key in report.moves}
    assert kept == {"cls_token", "pos_embed", "patch_embed", *(f"block{i}" for i in range(1, k + 1))}
    assert set(report.fresh) == set(target) - set(report.moves) == set(report.skipped)
    assert len(handoff.match(target, target, Init("a")).moves) == len(target)
