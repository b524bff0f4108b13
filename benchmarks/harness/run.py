"""What is decided of a training before its first step: by the command line, the machine, and a checkpoint."""
import argparse
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from harness.arguments import check_models
from harness.checkpoint import load_weights
from harness.distributed import World
from harness.environment import command_line, default_compile_mode
from harness.errors import RunError
from harness.gpu import check_gpu_kernels
from harness.kernels.cpu_choice import kernels_pay, why_no_kernels
from harness.precision import pick_precision
from harness.recipes import Recipe, make_recipe
from harness.result import earlier_runs
from harness.resume import check_folder

Tensors = dict[str, torch.Tensor]


@dataclass
class Run:
    """A training: where it goes on, by what, and what is to be known of it later."""

    args: argparse.Namespace  # as given, or as saved where it is resumed
    world: World
    device: torch.device
    recipe: Recipe
    out: Path
    compile: str
    settings: dict[str, Any]  # all that decides the result, as in JSON; a checkpoint made under others is refused
    command: str  # that began it
    eval_every: int
    earlier: list[dict[str, Any]]  # the runs that led to the weights it begins with
    digests: dict[str, str] = field(default_factory=dict)  # of the training images, and of wrong labels
    machine: dict[str, Any] = field(default_factory=dict)  # what it trains on, and with which versions

    @property
    def sync_bn(self) -> bool:
        return self.world.size > 1 and bool(self.args.sync_bn)

    @property
    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings["precision"] == "bf16")

    @property
    def record(self) -> dict[str, Any]:
        """What a checkpoint and a result say of the training, beside how far it is and what came of it."""
        return dict(
            settings=self.settings, **self.digests, earlier=self.earlier, command=self.command,
            eval_every=self.eval_every, deterministic=self.args.deterministic)

    def decide_precision(self, model: torch.nn.Module) -> None:
        """Take what all processes find fast for ``model``, where nobody said it."""
        if self.settings["precision"] is None:
            slow = pick_precision(self.device, model, self.settings["cpu_kernels"]) == "fp32"
            self.settings["precision"] = "fp32" if self.world.max_flag(int(slow)) else "bf16"


def recipe_name(args: argparse.Namespace, device: torch.device) -> str:
    """Return the name of the recipe."""
    return args.recipe or ("best" if device.type == "cuda" else "quick")


def folder_of(args: argparse.Namespace, device: torch.device) -> Path:
    """Return the folder of the run."""
    further = "-further" if args.initial_checkpoint else ""  # the folder without it may be that of those weights
    default = f"{args.model}-{args.dataset}-{recipe_name(args, device)}-{args.seed}{further}"
    return args.out or Path("runs") / default


def decide(
        args: argparse.Namespace, world: World, device: torch.device, saved: dict[str, Any] | None,
) -> tuple[Run, Tensors | None]:
    """Return the training that ``args`` ask for, and the weights to begin with where a file of them is named.

    ``saved`` is the state of the checkpoint where one is resumed.

    Raises:
        RunError: It cannot be had here, or the folder has another one.
    """
    for name in ("holdout", "limit", "eval_every"):
        if getattr(args, name) < 0:
            raise RunError(f"--{name.replace('_', '-')} must not be negative, got {getattr(args, name)}")
    if not 0 <= args.seed < 2 ** 32:
        raise RunError(f"--seed must be from 0 to 2**32 - 1, got {args.seed}")
    recipe = make_recipe(recipe_name(args, device), args.dataset, args.overrides)
    check_models([args.model], "--model")
    if recipe.batch_size % world.size:
        raise RunError(f"--batch-size {recipe.batch_size} must be a multiple of the {world.size} processes")
    compile_mode, cpu_kernels = _compile_mode_and_kernels(args, world, device, saved or {})
    settings = dict(
        model=args.model, model_kwargs=args.model_kwargs, dataset=args.dataset, recipe=recipe_name(args, device),
        **asdict(recipe), seed=args.seed, precision=args.precision, cpu_kernels=cpu_kernels,
        gpu_kernels=args.gpu_kernels, holdout=args.holdout, limit=args.limit, label_noise=args.label_noise,
        bn_batch=recipe.batch_size // (1 if args.sync_bn else world.size), initial_checkpoint=None)
    run = Run(
        args=args, world=world, device=device, recipe=recipe, out=folder_of(args, device), compile=compile_mode,
        settings=json.loads(json.dumps(settings)), command=command_line("cifar.py", args.argv, processes=world.size),
        eval_every=args.eval_every, earlier=[])
    weights = None
    if saved:
        # The settings of a resumed run are those of the command that began it, which need not be given again.
        run.command = saved.get("command", run.command)
    if args.initial_checkpoint:
        weights, run.settings["initial_checkpoint"] = load_weights(args.initial_checkpoint)
        run.earlier = earlier_runs(args.initial_checkpoint)
    elif saved:
        run.settings["initial_checkpoint"] = saved["settings"].get("initial_checkpoint")
        run.earlier = saved.get("earlier", [])
    check_folder(run.out, run.settings, saved)
    if saved and args.deterministic and not saved.get("deterministic", False):
        raise RunError(f"--resume: the run in {run.out} began without --deterministic; leave it out, or start again in "
                       "another --out")
    return run, weights


def _compile_mode_and_kernels(
        args: argparse.Namespace, world: World, device: torch.device, saved: dict[str, Any]) -> tuple[str, bool]:
    """Return what is compiled and whether the kernels for CPUs are taken, where the command leaves it open.

    What is measured for that may come out otherwise another time or in another process, so the settings of a run that
    is resumed, whose state is ``saved``, hold, and all processes do as the most careful of them.

    Raises:
        RunError: The kernels that are asked for are not to be had here.
    """
    machine = saved.get("machine", {})
    compile_mode = args.compile
    if machine and machine["hardware"]["device"] == device.type:
        compile_mode = compile_mode or machine["compile"]
    compile_mode = compile_mode or default_compile_mode(device)
    cpu_kernels = args.cpu_kernels  # of a resumed run, its setting
    if cpu_kernels is not False:
        obstacle = why_no_kernels(device, compile_mode)
        if cpu_kernels and obstacle:
            began = "the run began with --cpu-kernels, which" if saved else "--cpu-kernels"
            raise RunError(f"{began} are not available here: {obstacle}")
        if cpu_kernels is None:
            cpu_kernels = not world.max_flag(int(obstacle is not None or not kernels_pay()))
    if args.gpu_kernels:
        check_gpu_kernels(device, compile_mode, world.size, args.deterministic, args.precision)
    return compile_mode, cpu_kernels
