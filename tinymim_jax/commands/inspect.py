"""`inspect`: what is in a checkpoint."""

from tinymim_jax.commands.convert import TOLD, told
from tinymim_jax.commands.flags import new_flags, parse_positional
from tinymim_jax.runtime.errors import InputError

USAGE = """python -m tinymim_jax inspect PATH [--num_heads=N] ...

  PATH   a stage's folder, a converted checkpoint, or anything that `convert` reads, with the same flags
"""


def main(argv: list[str]) -> None:
    """Runs the command with its arguments; raises InputError if it is no checkpoint."""
    values = new_flags(**TOLD)
    (path,) = parse_positional(values, argv, ["PATH"], USAGE)
    if not path.exists():
        raise InputError(f"{path} does not exist")

    from tinymim_jax.bridge import card, convert
    from tinymim_jax.weights import handoff, parameters

    if not handoff.is_foreign(path):
        print("\n".join(card.lines(path)))
        return
    converted = convert.read(path, told(values))
    last = card.last_block(converted.layout.model, parameters.flatten(converted.params), converted.untrained)
    print("\n".join([*converted.lines(), last]))
