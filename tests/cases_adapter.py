"""The project's names, for a collection of cases that users brought, which is kept apart from this project.

It takes from here, in place of its own, what is in capitals (texts of configs) and `install_fork`. It is imported by the
collection's command alone, whose `cases_models` is then at hand.
"""

import shutil
from pathlib import Path

import cases_models

# In the collection's config file -> here.
RENAMED = {
    "from tinymim_jax import recipes": "from tinymim_jax.experiment import recipes",
    "from tinymim_jax.config import": "from tinymim_jax.experiment.config import",
    ", Run, Teacher, ViT": ", Run, ViT",
    "Teacher(teacher, 2), train)": "teacher, train, block=2)",
}


def renamed(text: str) -> str:
    """`text` with this project's names; what is not found there is left, for a config that does not fit says so."""
    for old, new in RENAMED.items():
        text = text.replace(old, new)
    return text


CHAIN = renamed(cases_models.CHAIN)

FORK_CHAIN = """

_chain = get_config


def get_config(arg=""):
    from tinymim_jax.tasks.rotation import Rotation

    config = _chain(arg)
    config.stages["mae"].task = Rotation()
    return config
"""


def install_fork(package: Path) -> None:
    """Adds the task of tests/fork to a copy of the package: its file, and its entry in the dict of tasks."""
    shutil.copy(Path(__file__).parent / "fork" / "rotation.py", package / "tasks" / "rotation.py")
    registry = package / "tasks" / "__init__.py"
    text, old = registry.read_text(), "TASKS = {"
    assert text.count(old) == 1, f"{registry} lists tasks in another way"
    new = 'from tinymim_jax.tasks.rotation import Rotation\n\nTASKS = {"rotation": Rotation, '
    registry.write_text(text.replace(old, new))
