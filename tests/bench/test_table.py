import json

import pytest
from etils.epath import Path

from tinymim_jax.__main__ import main
from tinymim_jax.bench.table import table
from tinymim_jax.runtime.errors import InputError

STEP = {
    "benchmark": "step", "device": "a device", "time": "2026-11-29T08:00+00:00", "batch_size": 8, "images_per_s": 12.345, "step_s": 0.648,
    "floor_share": 0.5, "peak_memory_bytes": 3 * 10**9, "torch_eager": {"ratio": 1.25},
}  # fmt: skip
RELATION = {
    "benchmark": "relation", "device": "a device", "time": "2026-11-30T08:00+00:00",
    "tokens": {"197": {"kernel": "xla", "ours_s": 0.002, "time_ratio": 0.75, "bytes_ratio": 0.1}, "4097": {"kernel": "xla", "ours_s": 0.2}},
}  # fmt: skip


def test_a_table_of_what_is_there(tmp_path, capsys):
    (tmp_path / "step-b.json").write_text(json.dumps(STEP))
    (tmp_path / "relation.json").write_text(json.dumps(RELATION))
    assert main(["bench", "table", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0].startswith("a device, 2026-11-29 to 2026-11-30; ")
        and "| step-b | 8 | 12.3 | 648.00 | 0.50 | 1.25 |  |  | 3.00 |  |" in lines
    )
    assert (
        "| relation | 197 | xla | 2.000 | 0.75 | 0.100 |" in lines
        and "| relation | 4097 | xla | 200.000 |  |  |" in lines
    )


def test_the_others_have_tables_of_their_own_and_the_oldest_is_first(tmp_path):
    beside = {
        "benchmark": "beside",
        "students": 3,
        "alone_s": 0.3,
        "together_s": 0.2,
        "ratio": 1.5,
        "alone_bytes": 10**9,
    }
    cores = [{"workers": 0, "transform_images_per_s": 150.4}, {"workers": 2}]
    loader = {"benchmark": "loader", "processor": "a CPU", "pil_images_per_s": 50.0, "all_cores": cores}
    segment = {"benchmark": "segment", "batch_size": 2, "step_s": 4.0, "torch_step_s": 3.0, "ratio": 0.75}
    older = {**STEP, "time": "2026-11-28T08:00+00:00"}
    files = {"b": beside, "l": loader, "s": segment, "x": STEP, "y": older}
    for name, one in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(one))
    text = table(Path(tmp_path))
    assert "| b | 3 | 300.00 | 200.00 | 1.50 |  | 1.00 |  |" in text and "| l |  | 50 |  |  |  |  | 150 |" in text
    assert "| s | 2 | 4000.00 | 3000.00 | 0.75 |" in text and text.index("| y |") < text.index("| x |")


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
