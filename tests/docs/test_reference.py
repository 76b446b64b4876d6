"""docs/reference/ is what docs/generate.py makes of the code, and every link in the documentation leads somewhere."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "make"), [("commands", "commands"), ("config", "fields")])
def test_the_reference_is_of_this_code(name, make, generate):
    made = (ROOT / "docs" / "reference" / f"{name}.md").read_text()
    assert made == getattr(generate, make)(), "run python docs/generate.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target
    # Files of this repository that the text names.
    for name in re.findall(
        r"`((?:tests|configs|launch|docs|tinymim_jax)/[\w./]+\.(?:py|sh|md|sbatch))`", page.read_text()
    ):
        assert (ROOT / name).exists(), name
