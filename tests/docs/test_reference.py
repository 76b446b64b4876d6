"""docs/reference/ and the tables of benchmarks are what docs/generate.py makes of code and files, and every link in the documentation leads somewhere."""

import importlib.util
import json
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


def test_the_benchmarks_are_of_these_files(generate):
    page = (ROOT / "docs" / "BENCHMARKS.md").read_text()
    assert page == generate.benchmarks(page), "run python docs/generate.py"
    named = {match[2] for match in generate.MEASURED.finditer(page)}
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("docs/benchmarks/*")} <= named and named


def test_a_folder_of_measurements_takes_the_place_of_what_stood_there(generate, tmp_path):
    page = "a\n\n<!-- bench table docs/x -->\n\nby hand\n\n<!-- end of it -->\n\nb\n"
    assert generate.benchmarks(page, tmp_path) == page
    file = tmp_path / "docs" / "x" / "step-b.json"
    file.parent.mkdir(parents=True)
    made = []
    for seconds in (1, 2):
        file.write_text(json.dumps({"benchmark": "step", "device": "a device", "step_s": seconds}))
        made.append(generate.benchmarks(page, tmp_path))
        assert made[-1] == generate.benchmarks(made[-1], tmp_path)
        assert f"| step-b |  |  | {seconds}000.00 |" in made[-1] and "by hand" not in made[-1]
    assert made[0] != made[1] and made[1].startswith("a\n") and made[1].endswith("<!-- end of it -->\n\nb\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target
    # Files of this repository that the text names.
    for name in re.findall(
        r"`((?:tests|configs|launch|docs|tinymim_jax)/[\w./]+\.(?:py|sh|md|sbatch))`", page.read_text()
    ):
        assert (ROOT / name).exists(), name
