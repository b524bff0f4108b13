"""The command line of `cifar.py`."""
import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from harness.arguments import Parser, not_empty
from harness.data import DATASETS
from harness.errors import RunError
from harness.recipes import CHOICES, RECIPES, Recipe


def parse_args(argv: list[str] | None = None, defaults: dict[str, Any] | None = None) -> argparse.Namespace:
    """Parse the command line; ``defaults`` by argument take the place of the parser's own."""
    parser = Parser(description="Train, evaluate and save a network on CIFAR-10, CIFAR-100 or digits.")
    parser.add_argument("--model", default="ran_att56_cifar", help="any timm model name")
    parser.add_argument("--model-kwargs", nargs="*", action="extend", default=[], metavar="KEY=VALUE",
                        help="arguments of the model, values as JSON, e.g. attention_args='{\"learning\": \"naive\"}'")
    parser.add_argument("--initial-checkpoint", type=Path, metavar="FILE",
                        help="begin with the weights of another run, its model.safetensors or checkpoint.safetensors; "
                             "a classifier of other classes begins anew")
    parser.add_argument("--dataset", default="cifar10", choices=DATASETS, help="what to train on")
    parser.add_argument("--data-dir", type=not_empty,
                        help="Parquet files on disk, in the Hub's layout (default: the Hub)")
    parser.add_argument("--recipe", choices=RECIPES, help="hyper-parameters (default: best on a GPU, quick on a CPU)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order, augmentation and wrong labels")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--precision", choices=("bf16", "fp32"),
                        help="of the computations (default: bf16 where the processor is clearly faster in it)")
    parser.add_argument("--compile", choices=("off", "units", "model"),
                        help="what torch.compile compiles (default: units on a GPU, off on a CPU)")
    parser.add_argument("--sync-bn", action=argparse.BooleanOptionalAction, default=True,
                        help="under torchrun, batch normalisation over the global batch, not each process's slice")
    parser.add_argument("--cpu-kernels", action=argparse.BooleanOptionalAction, default=None,
                        help="on a CPU, fused kernels for normalisations, convolutions and masks, which a C++ compiler "
                             "builds (default: where they can be had and do not take twice the time of torch's)")
    parser.add_argument("--gpu-kernels", action=argparse.BooleanOptionalAction, default=False,
                        help="on a GPU, our Triton kernels for units, mask heads and gates instead of compiled ones")
    parser.add_argument("--holdout", type=int, default=0, metavar="ROWS",
                        help="keep so many training images out and evaluate each epoch on them")
    parser.add_argument("--eval-every", type=int, default=0, metavar="EPOCHS",
                        help="evaluate on the test set as training goes on, for curves; nothing is picked by it")
    parser.add_argument("--limit", type=int, default=0, metavar="ROWS", help="train on the first ROWS images only")
    parser.add_argument("--label-noise", type=float, default=0.0, metavar="SHARE",
                        help="give this share of the training images a wrong label (the paper's section 4.1)")
    parser.add_argument("--deterministic", action="store_true",
                        help="same weights from the same seed on a GPU too, and what that costs; a CPU always gives "
                             "them, with as many threads, the same precision and the same kernels")
    parser.add_argument("--out", type=out_folder,
                        help="folder of the run (default: runs/MODEL-DATASET-RECIPE-SEED, with -further at the end "
                             "where --initial-checkpoint is given)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, with its settings")
    parser.add_argument("--eval-only", action="store_true",
                        help="evaluate the finished run in --out or, without --out, the pretrained weights of --model")
    group = parser.add_argument_group(
        "hyper-parameters", "in place of the recipe's, of which docs/training.md has a table")
    for field in fields(Recipe):
        flag = "--" + field.name.replace("_", "-")
        default: Any = field.default
        kind: dict[str, Any] = dict(type=type(default), choices=CHOICES.get(field.name))
        if isinstance(default, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(default, tuple):
            kind = dict(type=float, nargs="*")
        group.add_argument(flag, default=None, help=field.metadata["help"], **kind)
    parser.set_defaults(**defaults or {})
    args = parser.parse_args(argv)
    # The last of each counts, whether from one flag, from several, or from a run that is resumed.
    args.model_kwargs = list({item.partition("=")[0]: item for item in args.model_kwargs}.values())
    args.overrides = {
        field.name: tuple(value) if isinstance(value, list) else value
        for field in fields(Recipe) if (value := getattr(args, field.name)) is not None
    }
    args.argv = sys.argv[1:] if argv is None else argv
    return args


def out_folder(text: str) -> Path:
    """Parse a folder that timm loads from, as ``local-dir:FOLDER``."""
    if not_empty(text).startswith("//") or {"#", "?"} & set(text) or not text.isprintable():
        raise argparse.ArgumentTypeError(
            f"must be of printable characters without # and ?, and begin with one slash at most, got {text!r}")
    return Path(text)


def check_eval_only(args: argparse.Namespace) -> argparse.Namespace:
    """Return what the command line gives, with None for a model and a data set that it does not.

    Raises:
        RunError: It has something that only a training takes.
    """
    given, default = (parse_args(argv, {"model": None, "dataset": None}) for argv in (args.argv, []))
    of_both = {"model", "dataset", "data_dir", "device", "precision", "out", "eval_only", "argv", "overrides"}
    for name in vars(given).keys() - of_both:
        if getattr(given, name) != getattr(default, name):
            raise RunError(f"--eval-only trains nothing; leave out --{name.replace('_', '-')}")
    return given
