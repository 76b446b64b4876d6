import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import tinymim_jax
from tinymim_jax.runtime.errors import InputError


def output(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, tinymim_jax; print(sorted({'jax', 'torch', 'tensorflow', 'orbax'} & set(sys.modules)))"
    assert output(code)[0] == "[]\n"


def test_running_needs_neither_torch_nor_tensorflow():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['tensorflow'] = None;"  # importing either is an error
        "import tinymim_jax.commands.run, tinymim_jax.training.chain, tinymim_jax.report.figures;"
        "import tinymim_jax.planning.dry_run, tinymim_jax.planning.preflight; print('ran')"
    )
    assert output(code)[0] == "ran\n"


def test_a_dry_run_does_not_wait_for_torch():
    code = "import sys, tinymim_jax.planning.dry_run; print('torch' in sys.modules)"
    assert output(code)[0] == "False\n"


def test_load_gives_a_model_with_relations(finished):
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
    model, variables = loaded = tinymim_jax.load(finished / "distill")
    assert loaded[0] is model and loaded[1] is variables
    out = model.apply(variables, images, capture=(1, 2))
    assert out.tokens.shape == (2, 5, 12) and out.logits is None
    assert out.trace[1].q.shape == (2, 5, 2, 6) and out.trace[2].q.shape == (2, 5, 6, 2)
    model, variables = tinymim_jax.load(str(finished / "finetune"))
    assert model.apply(variables, images).logits.shape == (2, 10)
    assert model.cfg.pool == "mean"


def test_load_of_something_else(tmp_path):
    with pytest.raises(InputError, match="gone does not exist; run that stage first"):
        tinymim_jax.load(tmp_path / "gone")
    (tmp_path / "work" / "mae").mkdir(parents=True)
    (tmp_path / "work" / "mae" / "stage.json").write_text("{}")
    with pytest.raises(InputError, match="work is not the folder of a stage: name one of the stages in it: mae"):
        tinymim_jax.load(tmp_path / "work")
    with pytest.raises(InputError, match=r"is not the folder of a stage: it has no stage\.json"):
        tinymim_jax.load(tmp_path)


def test_loading_is_silent(finished):
    assert output(f"import tinymim_jax; tinymim_jax.load('{finished}/mae')") == ("", "")
