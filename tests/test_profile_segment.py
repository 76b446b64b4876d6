import json

import pytest

from tests import profile_segment


@pytest.mark.slow
def test_one_json_object(capsys):
    profile_segment.main(["--size=tiny", "--pixels=64", "--rounds=1"])
    found = json.loads(capsys.readouterr().out)
    assert found["ratio"] == pytest.approx(found["torch_step_s"] / found["step_s"])
