import json

import pytest

from tests import profile_cka


@pytest.mark.slow
def test_one_json_object(capsys):
    profile_cka.main(["--width=24", "--depth=2", "--heads=2", "--pixels=32", "--batch_size=8", "--rounds=1"])
    found = json.loads(capsys.readouterr().out)
    assert found["ratio"] == pytest.approx(found["cka_s"] / found["forward_s"])
