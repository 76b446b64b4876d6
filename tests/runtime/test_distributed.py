import json
import sys

import jax

from tinymim_jax.runtime import distributed


def test_own_facts_are_versions_code_and_what_is_given():
    facts = distributed.own_facts(config={"a": 1})
    assert facts["jax"] == jax.__version__ and len(facts["code"]) == 12 and facts["config"] == {"a": 1}
    assert facts["Python"] == f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert json.loads(json.dumps(facts)) == facts
