import pytest

from tinymim_jax.commands.flags import new_flags, parse
from tinymim_jax.runtime.errors import InputError

DIGITS = "--config=configs/digits/chain.py"


def parsed(*argv):
    return parse(new_flags(), [DIGITS, *argv], "usage")


def test_overrides_reach_every_kind_of_field():
    stage = parsed(
        "--config.stages.mae_l.optim.lr=2e-3",
        "--config.stages.mae_l.optim.lr_batch=none",
        "--config.stages.mae_l.optim.freeze=('encoder/block1/.*',)",
        "--config.stages.mae_l.model.dtype=bfloat16",
        "--config.stages.mae_l.model.remat=true",
        "--config.stages.mae_l.run.epochs=none",
        "--config.stages.mae_l.run.steps=7",
        "--config.stages.mae_l.data.crop_scale=(0.1,0.9)",
        "--config.stages.mae_l.evals.knn.k=(3,)",
    ).stages["mae_l"]
    assert (stage.optim.lr, stage.optim.lr_batch, stage.optim.freeze) == (2e-3, None, ("encoder/block1/.*",))
    assert (stage.model.dtype, stage.model.remat, stage.run.epochs, stage.run.steps) == ("bfloat16", True, None, 7)
    assert (stage.data.crop_scale, stage.evals["knn"].k) == ((0.1, 0.9), (3,))


def test_an_override_of_one_stage_leaves_the_others():
    cfg = parsed("--config.stages.distill_b.data.crop_scale=(0.1,0.9)", "--config.stages.distill_b.evals.knn.k=(3,)")
    assert cfg.stages["distill_s"].data.crop_scale == (0.5, 1.0)
    assert cfg.stages["distill_s"].evals["knn"].k == (10,)


def test_a_space_after_config():
    assert parse(new_flags(), ["--config", "configs/digits/chain.py"], "usage").name == "digits"


def test_help_is_printed_and_exits_with_0(capsys):
    values = new_flags(depth=(int, 3, "how deep"))
    with pytest.raises(SystemExit) as stop:
        parse(values, ["--help"], "usage")
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.startswith("usage\n") and "config.py" in out
    assert "--depth: how deep\n    (default: '3')\n    (a positive integer)" in out
    with pytest.raises(SystemExit):
        parsed("--help")
    assert "The demo: MAE-L -> B -> S -> T" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config.stages.mae_l.optim"], "optim"),
        (["--config.stages.mae_l.optim.lr.x=1"], "there is no 'x'"),
        (["--config.nme=x"], "there is no 'nme'; choose one of name, stages, mesh, compare"),
        (["--config.stages.mae_l.data.crop_scale=(1,)"], "data.crop_scale"),
        (["--config.stages.mae_l.init.stage=x"], "init"),
        (["--config.stages.mae_l.run=3"], "holds batch_size, epochs, steps"),
        (["--stages.mae_l.run.epochs=3"], "--config.stages.mae_l.run.epochs=3"),
        (["--config.stages.mae_l.run.epochs=twenty"], "'twenty' is not a number"),
        (["--config.stages.mae_l.run.batch_size=1.5"], "'1.5' is not a whole number"),
    ],
)
def test_bad_overrides(argv, message):
    with pytest.raises(InputError, match=r"^[^\n]+$") as error:
        parsed(*argv)
    assert message in str(error.value)


def test_a_bug_in_a_config_file_is_shown_as_it_is(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def get_config(arg=''):\n    return 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        parse(new_flags(), [f"--config={path}"], "")


def test_an_unknown_option_lists_the_known_ones():
    with pytest.raises(InputError, match="config option 'long': unknown; the options are: data=..., short"):
        parse(new_flags(), ["--config=configs/cifar10/chain.py:long"], "")
