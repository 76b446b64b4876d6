"""`predict`: the classes of the images of a folder, or of their pixels."""

import csv
import io

from etils.epath import Path

from tinymim_jax.commands.flags import FOLDER_FLAGS, new_flags, output, parse_positional
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError

USAGE = """python -m tinymim_jax predict CHECKPOINT FOLDER --out=FILE.csv|FOLDER [--top=5] ...

  CHECKPOINT  the folder of a finished stage or replica with a head, or a converted checkpoint that has one
  FOLDER      images, in any sub-folders
  --out       a line for each image: its name in FOLDER, its best classes (numbers from 0, where the model does not know
              their names) and their probabilities; of a model that segments a folder, of NAME.png, whose values are
              classes, and NAME_over.jpg, their colours over the image
"""


def main(argv: list[str]) -> None:
    """Runs the command with its arguments; raises InputError on bad ones."""
    values = new_flags(top=(int, 5, "classes of each image"), **FOLDER_FLAGS)
    checkpoint, folder = parse_positional(values, argv, ["CHECKPOINT", "FOLDER"], USAGE)

    from tinymim_jax.evals import painting
    from tinymim_jax.evals.inference import TrainedModel
    from tinymim_jax.experiment import stage_file
    from tinymim_jax.runtime.metric_log import write_whole

    if stage_file.read_segmentation(checkpoint):
        if not values.out or Path(values.out).suffix == ".csv":
            raise InputError(f"--out={values.out or ''}: the model segments; name a folder for its pictures")
        painting.check_out(out := storage.path(values.out), folder)
        subject = stage_file.read_subject(checkpoint)
        storage.check_writable(out)
        windows = values.batch_size if values["batch_size"].present else painting.WINDOWS
        done = painting.paint(subject, folder, out, windows, values.on_bad_image)
        print(f"wrote {out}: {done} images")
        return
    out = output(values.out, [".csv"])
    model = TrainedModel(stage_file.read_subject(checkpoint))
    storage.check_writable(out.parent)
    options = {"batch_size": values.batch_size, "on_bad_image": values.on_bad_image}
    names, (probabilities, classes) = model.predictions(folder, values.top, **options)
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    numbers = range(1, classes.shape[1] + 1)
    lines.writerow(["name", *(f"class_{i}" for i in numbers), *(f"probability_{i}" for i in numbers)])
    for name, best, shares in zip(names, classes.tolist(), probabilities.tolist(), strict=True):
        called = best if model.classes is None else [model.classes[i] for i in best]
        lines.writerow([name, *called, *(f"{share:.6f}" for share in shares)])
    write_whole(out, text.getvalue().encode("utf-8", "surrogateescape"))
    print(f"wrote {out}: {len(names)} images")
