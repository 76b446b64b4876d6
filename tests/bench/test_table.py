import json

import pytest
from etils.epath import Path

from tinymim_jax.__main__ import main
from tinymim_jax.bench.table import table
from tinymim_jax.runtime.errors import InputError

STEP = {
    "benchmark": "step", "device": "a device", "batch_size": 8, "images_per_s": 12.345, "step_s": 0.648,
    "floor_share": 0.5, "peak_memory_bytes": 3 * 10**9, "torch_eager": {"ratio": 1.25},
}  # fmt: skip
RELATION = {
    "benchmark": "relation", "device": "a device",
    "tokens": {"197": {"kernel": "xla", "ours_s": 0.002, "time_ratio": 0.75, "bytes_ratio": 0.1}, "4097": {"kernel": "xla", "ours_s": 0.2}},
}  # fmt: skip


def test_a_table_of_what_is_there(tmp_path, capsys):
    (tmp_path / "step-b.json").write_text(json.dumps(STEP))
    (tmp_path / "relation.json").write_text(json.dumps(RELATION))
    assert main(["bench", "table", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a device; ") and "| step-b | 8 | 12.3 | 648.00 | 0.50 | 1.25 |  |  | 3.00 |" in lines
    assert (
        "| relation | 197 | xla | 2.000 | 0.75 | 0.10 |" in lines
        and "| relation | 4097 | xla | 200.000 |  |  |" in lines
    )


def test_files_of_before_and_of_others(tmp_path):
    (tmp_path / "old.json").write_text(
        json.dumps({name: value for name, value in STEP.items() if name != "floor_share"})
    )
    assert "| old | 8 | 12.3 | 648.00 |  | 1.25 |" in table(Path(tmp_path))
    for text in ("{", "[]"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(InputError, match=r"x\.json is no measurement of bench"):
            table(Path(tmp_path))


def test_a_folder_without_measurements(tmp_path):
    with pytest.raises(InputError, match="has no measurement"):
        table(Path(tmp_path))
