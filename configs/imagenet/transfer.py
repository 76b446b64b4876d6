"""Fine-tuning of a pre-trained or fine-tuned model on a small data set, at 224 px.

python -m tinymim_jax run --config=configs/imagenet/transfer.py:data_set=flowers,init=runs/imagenet/distill_t --workdir=runs/flowers_t

Options: data_set=cifar10, cifar100, flowers or pets; init=PATH, what is fine-tuned; size=tiny, small or base; data=PATH, an
ImageFolder tree with train/ and test/ (default: tfds); sgd, MAE-Lite's recipe (SGD, 50 epochs) for AdamW, 100 epochs.
Cost: not measured. Expected: no published number with these models.
"""

from tinymim_jax.experiment import config, recipes


def get_config(arg: str = "") -> config.Config:
    o = recipes.options(arg, data_set="cifar10", init="runs/imagenet/distill_t", size="tiny", data="", sgd=False)
    train, test, num_classes = recipes.small_set(o["data_set"], o["data"])
    recipe = recipes.transfer if o["sgd"] else recipes.finetune_small
    stage = recipe(recipes.classifier(o["size"], num_classes), config.Init(path=o["init"]), train, test)
    return config.Config(f"transfer_{o['data_set']}", {o["data_set"]: stage})
