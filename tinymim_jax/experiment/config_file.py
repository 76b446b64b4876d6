"""One config file that builds on another."""

import importlib.util
from pathlib import Path

from tinymim_jax.experiment.config import Config


def beside(file: str, name: str, **chosen: bool | str) -> Config:
    """What the config file `name` in the folder of `file` gives with these options, as `recipes.options` reads them."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, Path(file).with_name(name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    given = {key: value for key, value in chosen.items() if value}
    parts = [key if value is True else f"{key}={value}".replace(",", r"\,") for key, value in given.items()]
    return module.get_config(",".join(parts))
