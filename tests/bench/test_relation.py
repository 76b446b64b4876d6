import json

import jax
import numpy as np
import pytest

from tests.models import reference
from tinymim_jax.__main__ import main
from tinymim_jax.bench import relation

HEADS = 8  # of the stage
CALL = ["bench", "relation", "--config=configs/digits/chain.py", "--stage=distill_t", "--batch_size=2", "--rounds=1"]


@pytest.mark.slow
def test_relation_prints_one_json_object(capsys, monkeypatch):
    monkeypatch.setattr(relation, "free_memory", lambda: 2 * 4 * HEADS * 6 * 600**2)  # of six maps at 600 tokens
    assert main([*CALL, "--tokens=17,577,1200"]) == 0
    result = json.loads(capsys.readouterr().out)
    small, large, largest = result["tokens"].values()
    assert result["heads"] == HEADS and small["kernel"] == "xla"
    assert small["time_ratio"] == pytest.approx(small["ours_s"] / small["plain_s"])
    assert large["bytes_ratio"] == large["ours_bytes"] / large["plain_bytes"] < 0.5  # blocks of rows
    assert "plain_s" not in largest and largest["bytes_ratio"] < large["bytes_ratio"]  # would not fit


def test_a_plain_one_that_xla_refuses_is_left_out(capsys, monkeypatch):
    compiled = relation._compile

    def compile_small(function, *pairs):
        if function is relation.plain:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm")
        return compiled(function, *pairs)

    monkeypatch.setattr(relation, "_compile", compile_small)
    assert main(CALL) == 0
    out, err = capsys.readouterr()
    assert "plain does not fit" in err and not any("plain" in key for key in json.loads(out)["tokens"]["17"])


def test_rows_at_a_time(capsys):
    found = {}
    for rows in ("8", "64"):
        assert main([*CALL, "--tokens=64", f"--rows={rows}"]) == 0
        result = json.loads(capsys.readouterr().out)
        found[result["rows"]] = result["tokens"]["64"]["ours_bytes"]
    assert list(found) == [8, 64] and found[8] < found[64]


def test_a_kernel_that_does_not_run_here_is_not_named(capsys):
    assert main([*CALL, "--config.stages.distill_t.task.targets.relation.kernel=pallas"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"]["17"]["kernel"] == "xla"


def test_memory_that_may_be_taken():
    assert 2**20 < relation.free_memory() < 2**50


def test_the_stages_own_number_of_tokens(capsys):
    assert main(CALL) == 0
    assert list(json.loads(capsys.readouterr().out)["tokens"]) == ["17"]


def test_the_plain_one_against_float64():
    rng = np.random.default_rng(0)
    teacher, student = (tuple(rng.normal(size=(2, 5, 3, 4)).astype(np.float32) for _ in range(2)) for _ in range(2))
    np.testing.assert_allclose(
        relation.plain(teacher, student).mean(), reference.relation_kl(teacher, student), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*CALL, "--tokens=x"], "--tokens: 'x' is not a positive whole number"),
        ([*CALL, "--tokens=0"], "--tokens: '0' is not a positive whole number"),
        ([*CALL[:3], "--stage=mae_l"], "--stage=mae_l matches no relations; choose a stage whose task is distill"),
    ],
)
def test_bad_input(argv, message, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err
