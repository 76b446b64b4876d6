import io

from tinymim_jax.report import tables


def test_a_table_keeps_to_the_characters_of_standard_output(monkeypatch):
    results = {"config": "digits", "stages": {"mae": {"loss": 0.5}}, "compare": {}}
    for encoding in ("ascii", "latin-1", "cp1252"):
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        assert "mae" in tables.text(results).encode(encoding).decode(encoding)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    assert not tables.text(results).isascii()


def test_the_table_names_everything():
    row = {"mean": 84.0, "stderr": 2.31, "values": [80.0, 84.0, 88.0]}
    results = {
        "config": "digits",
        "stages": {"mae_l": {"loss": 0.47321, "knn/top1_k10": 86.4}, "untrained": {"knn/top1_k10": 54.0}},
        "compare": {"T": {"metric": "val/top1", "rows": {"chain": row, "one": {**row, "stderr": None}}}},
    }
    text = tables.text(results)
    for word in ("mae_l", "0.4732", "knn/top1_k10 86.40", "untrained", "T (val/top1)", "84.00", "2.31", "3"):
        assert word in text


def test_of_replicas_the_standard_error_of_the_mean_is_shown():
    metrics = {"loss": 1.0, "val/top1": 84.0, "val/images": 9.0}
    metrics |= {f"replica{i}/val/top1": value for i, value in enumerate((80.0, 84.0, 88.0))}
    assert tables.measured(metrics) == {"loss": "1.0000", "val/top1": "84.00 ± 2.31"}
    assert tables.measured({"val/top1": 84.0}) == {"val/top1": "84.00"}


def test_names_are_printed_as_they_stand():
    row = {"mean": 1.0, "stderr": None, "values": [1.0]}
    compare = {"T": {"metric": "val/top1", "rows": dict.fromkeys(("[mask]", "[/x]", ":x: y"), row)}}
    text = tables.text({"config": "[red]c", "stages": {"[a]": {"loss": 1.0}}, "compare": compare})
    for name in ("[mask]", "[/x]", ":x: y", "[red]c", "[a]"):
        assert name in text
