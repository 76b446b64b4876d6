"""Config files: Python with a function `get_config`."""

import runpy
from pathlib import Path

from tinymim_jax.experiment.config import Config


def load(file: str | Path, *options: str) -> Config:
    """What the config file gives with `options`, one text or none; an error in it is raised as it is there."""
    return runpy.run_path(str(file))["get_config"](*options)


def beside(file: str, name: str, **chosen: bool | str) -> Config:
    """What the config file `name` in the folder of `file` gives with these options, as `recipes.options` reads them."""
    given = {key: value for key, value in chosen.items() if value}
    parts = [key if value is True else f"{key}={value}".replace(",", r"\,") for key, value in given.items()]
    return load(Path(file).with_name(name), ",".join(parts))
