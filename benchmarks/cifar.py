"""Train, evaluate and save a network on CIFAR-10, CIFAR-100 or digits.

    python benchmarks/cifar.py --dataset digits            # about a minute on two CPU cores, no download
    python benchmarks/cifar.py                             # ran_att56_cifar on CIFAR-10 from the Hub
    python benchmarks/cifar.py --data-dir DIR              # ... from Parquet files on disk
    torchrun --nproc-per-node 2 benchmarks/cifar.py  # ... data-parallel
    python benchmarks/cifar.py --initial-checkpoint FILE   # ... from the weights of another run
    python benchmarks/cifar.py --resume --out DIR          # go on after an interruption
    python benchmarks/cifar.py --eval-only --out DIR       # the accuracy of a finished run
    python benchmarks/cifar.py --eval-only --model NAME    # ... of the weights that timm has under a name
"""
from harness import ctrl_c, extras, openmp  # noqa: F401  (before torch, see there)

# isort: split
import argparse
import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

import ran_layers  # noqa: F401  (registers the networks with timm)
from harness.checkpoint import FILE_NAME, CheckpointWriter, claim, load_checkpoint
from harness.data import Dataset, corrupt_labels, load_dataset
from harness.display import Display, count, duration, show_plan
from harness.distributed import join_world, leave_world
from harness.environment import hardware, keep_freed_memory, pick_device, synchronize, versions
from harness.errors import RunError, one_line_errors
from harness.evaluate import evaluate
from harness.export import export_model, load_exported, load_pretrained
from harness.gpu import choose_kernels, price_of_determinism
from harness.network import build_model, load_initial_weights
from harness.options import check_eval_only, parse_args
from harness.precision import exact_float32, pick_precision
from harness.recipes import Recipe
from harness.result import print_final, selection, write_result
from harness.resume import check_data, check_folder, command_to_resume, other_hardware, saved_arguments
from harness.run import Run, Tensors, decide, folder_of
from harness.trainer import Trainer

Split = tuple[torch.Tensor, torch.Tensor]  # images and labels


def train(
        args: argparse.Namespace, until_done: contextlib.ExitStack,
        resumed: tuple[Tensors, dict[str, Any]] | None) -> None:
    """Train as ``args`` say, from the checkpoint ``resumed`` if it is read already.

    What ``until_done`` holds is let go of after that.
    """
    keep_freed_memory()
    world, device = join_world(args.device)
    saved = resumed[1] if resumed else None
    run, weights = decide(args, world, device, saved)
    choose_kernels(args.deterministic)
    with world.main_first() if args.data_dir is None else contextlib.nullcontext():
        data = load_dataset(args.dataset, args.data_dir)
    (images, labels), watched = split_training_set(args, data, run.recipe)
    run.digests = digests_of(args, data, labels)
    if saved:
        check_data(run.out, run.digests, saved)

    torch.manual_seed(args.seed)
    model, macs = build_model(args, run.recipe, data)
    if weights is not None:
        load_initial_weights(model, weights, args.initial_checkpoint)
    run.decide_precision(model)
    if world.main:
        until_done.enter_context(claim(run.out))
        if not saved:
            check_folder(run.out, run.settings, None)  # again: until now another process may have trained there
    costs = dict(params=sum(p.numel() for p in model.parameters()), macs=macs)
    model = model.to(device, memory_format=torch.channels_last)
    if not world.main:
        torch.manual_seed(args.seed + world.rank)  # dropout and stochastic depth differ between the slices
    # The whole data set lives on the training device.
    trainer = Trainer(
        model, run.recipe, images.to(device), labels.to(device), autocast=run.autocast, seed=args.seed, world=world,
        sync_bn=run.sync_bn, compile_mode=run.compile, cpu_kernels=run.settings["cpu_kernels"],
        gpu_kernels=args.gpu_kernels)
    if resumed:
        trainer.restore(*resumed)
    if world.main:
        show_plan(plan(run, trainer, costs, len(data.test_images), saved is not None))
    price = prepare(run, trainer, saved)

    stopped = run_epochs(run, trainer, watched)
    if stopped and trainer.step < trainer.total_steps:
        if world.main:
            print(f"stopped at step {trainer.step} of {trainer.total_steps}, saved; go on with: "
                  f"{command_to_resume(args, run.out, world.size)}", flush=True)
        sys.exit(128 + stopped)
    if world.main:
        finish(run, trainer, data, dict(costs, deterministic_price=price))


def digests_of(args: argparse.Namespace, data: Dataset, labels: torch.Tensor) -> dict[str, str]:
    """Return the digests of what is trained on: the images, and ``labels`` where some were made wrong."""
    digests = {"data_sha256": data.digest()}
    if args.label_noise:
        digests["labels_sha256"] = hashlib.sha256(labels.numpy()).hexdigest()
    return digests


def prepare(run: Run, trainer: Trainer, saved: dict[str, Any] | None) -> float | None:
    """Compile and record the steps, and note what trains; return the price of ``--deterministic`` where it has one."""
    compile_seconds = trainer.compile()
    if run.world.main and compile_seconds:
        print(f"prepared the steps in {duration(compile_seconds)}", flush=True)
    run.machine = dict(
        hardware=hardware(run.device), versions=versions(), processes=run.world.size, compile=run.compile,
        compile_seconds=compile_seconds)
    if saved and trainer.step == trainer.total_steps:  # nothing is left to train on this one
        run.machine = saved.get("machine", run.machine)
        run.eval_every = saved.get("eval_every", run.eval_every)
    elif run.world.main and saved and (change := other_hardware(run.machine["hardware"], saved)):
        print(f"resumed with other hardware or threads ({change}): equal to an undisturbed run but for rounding",
              flush=True)
    if not (run.args.deterministic and trainer.replayed):
        return None
    price = price_of_determinism(trainer.model, trainer.empty_batches()[-1][0], run.autocast)
    if run.world.main:
        print(f"--deterministic: {price:.1%} more time for an uncompiled forward and backward pass", flush=True)
    return price


def finish(run: Run, trainer: Trainer, data: Dataset, facts: dict[str, Any]) -> None:
    """Write the trained model, its accuracy, and the record of the training, with ``facts`` known before it."""
    model, recipe, seconds = trainer.model, run.recipe, sum(row["seconds"] for row in trainer.epochs)
    trainer.averaged.pretrained_cfg = model.pretrained_cfg
    result = dict(
        model=run.args.model, dataset=run.args.dataset, recipe=run.settings["recipe"], seed=run.args.seed, **facts,
        **run.record, epochs=trainer.epochs, seconds=trainer.seconds,
        images_per_s=trainer.total_steps * recipe.batch_size / seconds, **run.machine,
        selection=selection(run.args.holdout, recipe, trainer.epochs))
    try:
        with ctrl_c.all_as_ctrl_c():
            export_model(trainer.averaged, run.out, model.model_kwargs)
            write_result(run.out, data, result, run.device, run.autocast)
    except KeyboardInterrupt:
        print("trained, but stopped before the result was written; that is done by: "
              f"{command_to_resume(run.args, run.out, run.world.size)}", flush=True)
        raise


def plan(run: Run, trainer: Trainer, costs: dict[str, int], test_images: int, resumed: bool) -> dict[str, str]:
    """Return the rows of the plan that is shown before the training."""
    args, recipe, processes = run.args, run.recipe, run.world.size
    kernels = run.settings["cpu_kernels"] or run.settings["gpu_kernels"]
    return {
        "model": f"{args.model}, {costs['params'] / 1e6:.2f} M parameters, {costs['macs'] / 1e6:.1f} MMACs an image",
        "data set": f"{args.dataset}, {len(trainer.images)} training and {test_images} test images"
                    + (f", {args.holdout} held out" if args.holdout else ""),
        "device": f"{hardware(run.device)['name']} ({trainer.device}), {run.settings['precision']}"
                  + (", fused kernels" if kernels else "") + (f", {processes} processes" if processes > 1 else ""),
        "recipe": f"{run.settings['recipe']}, {count(recipe.epochs, 'epoch')} of "
                  f"{count(trainer.steps_per_epoch, 'step')} of {recipe.batch_size} images, {recipe.optimizer}, "
                  f"lr {recipe.lr:g}",
        **row_of_weights(args, resumed),
        "out": f"{run.out}" + (f", resumed at step {trainer.step} of {trainer.total_steps}" if resumed else ""),
    }


def row_of_weights(args: argparse.Namespace, resumed: bool) -> dict[str, str]:
    """Return the row of the plan about the weights that a run begins with, where a reader may expect others."""
    if resumed:
        return {}
    if args.initial_checkpoint:
        return {"begins with": str(args.initial_checkpoint)}
    if "." in args.model:
        return {"begins with": "random weights, not those of the name; --initial-checkpoint takes a file of weights"}
    return {}


def split_training_set(args: argparse.Namespace, data: Dataset, recipe: Recipe) -> tuple[Split, Split]:
    """Return images and labels to train on, and those to watch: held-out ones, otherwise the test set."""
    images, labels = data.train_images, data.train_labels
    watched = data.test_images, data.test_labels
    if args.limit:
        images, labels = images[:args.limit], labels[:args.limit]
    if args.holdout:
        if args.holdout >= len(images):
            raise RunError(f"--holdout must be below the {len(images)} training images, got {args.holdout}")
        watched = images[-args.holdout:], labels[-args.holdout:]
        images, labels = images[:-args.holdout], labels[:-args.holdout]
    if recipe.pad >= images.shape[1]:
        raise RunError(f"--pad must be below the {images.shape[1]} pixels of the images, got {recipe.pad}")
    if recipe.cutout > images.shape[1]:
        raise RunError(f"--cutout must be at most the {images.shape[1]} pixels of the images, got {recipe.cutout}")
    if not 0 <= args.label_noise <= 1:
        raise RunError(f"--label-noise must be from 0 to 1, got {args.label_noise:g}")
    if args.label_noise:
        labels = corrupt_labels(labels, len(data.class_names), args.label_noise, args.seed)
    if len(images) < recipe.batch_size:
        raise RunError(f"--batch-size {recipe.batch_size} is above the {len(images)} training images")
    return (images, labels), watched


def run_epochs(run: Run, trainer: Trainer, watched: Split) -> int:
    """Train to the end with a checkpoint each epoch, or to the first signal; return that signal or 0."""
    args, out, world, stopped = run.args, run.out, run.world, 0
    received: list[int] = []
    trainer.model.train()
    with ctrl_c.handled_by(lambda number, _: received.append(number)), CheckpointWriter(out) as writer, Display(
            trainer.recipe.epochs, trainer.steps_per_epoch, trainer.recipe.batch_size, trainer.step,
            work=trainer.work, quiet=not world.main, wait=lambda: synchronize(trainer.device)) as display:
        while trainer.step < trainer.total_steps and not stopped:
            try:
                stopped = trainer.train_epoch(display, lambda: received[-1] if received else 0)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise RunError(f"--batch-size {trainer.recipe.batch_size} is too small for the batch normalisation of "
                               f"this network ({error})") from error
            except RunError as error:
                writer.wait()
                there = (out / FILE_NAME).exists()
                kept = "there was no checkpoint yet; try a lower --lr"
                if there:
                    kept = (f"the last good checkpoint is kept in {out}; try a lower --lr in another --out, also from "
                            f"there with --initial-checkpoint {out / FILE_NAME}")
                raise RunError(f"{error}; {kept}") from error
            row = trainer.epochs[-1] if trainer.step % trainer.steps_per_epoch == 0 else None
            if row:
                if args.holdout or (run.eval_every and row["epoch"] % run.eval_every == 0):
                    world.average_buffers(trainer.model, trainer.ema)
                    scores = evaluate(trainer.averaged, *watched, trainer.device, trainer.autocast, world=world)
                    row.update(eval_split="held-out" if args.holdout else "test", eval_top1=scores["top1"])
            tensors, state = trainer.state()
            if world.main:
                # The folder of the data may be another when the run is resumed, so it is not a setting.
                data_dir = args.data_dir and str(Path(args.data_dir).resolve())
                writer.save(tensors, dict(state, **run.record, data_dir=data_dir, machine=run.machine))
            if row:
                display.epoch(row)  # after its checkpoint: there may be nobody to print to any more
    return stopped


def eval_only(args: argparse.Namespace) -> None:
    """Print the accuracy of the run in ``--out`` or, without that, of timm's pretrained weights of ``--model``."""
    given = check_eval_only(args)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0":
        return  # under torchrun the first process alone prints
    device = pick_device(args.device)
    if args.out is None:
        if given.model is None:
            raise RunError("--eval-only needs --out, the folder of a finished run, or --model, a name that has weights")
        result: dict[str, Any] = {"model": args.model, "dataset": args.dataset, "final": {}}
        precision = None
    else:
        try:
            result = json.loads((args.out / "result.json").read_text())
            precision, _ = result["settings"]["precision"], result["final"]["top1"]
            of_the_run = {name: result[name] for name in ("model", "dataset")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"--eval-only: no finished run in {args.out} ({error!r})") from error
        for name, value in of_the_run.items():
            if getattr(given, name) not in (None, value):
                raise RunError(f"--{name} {getattr(given, name)}: the run in {args.out} is of {value}; leave it out")
    precision = args.precision or precision or pick_precision(device)
    data = load_dataset(result["dataset"], args.data_dir)
    model = load_exported(args.out) if args.out else load_pretrained(args.model, len(data.class_names))
    model = model.to(device, memory_format=torch.channels_last)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    result["final"].update(evaluate(model, data.test_images, data.test_labels, device, autocast))
    print_final(result, precision)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with contextlib.ExitStack() as at_the_end, one_line_errors(), contextlib.ExitStack() as until_done:
        at_the_end.push(leave_world)  # after an error is told
        exact_float32()
        resumed = None
        if args.resume and not args.eval_only:
            args.out = folder_of(args, pick_device(args.device))
            resumed = load_checkpoint(args.out)
            args = parse_args(argv, {**saved_arguments(resumed[1]), "out": args.out})
        eval_only(args) if args.eval_only else train(args, until_done, resumed)


if __name__ == "__main__":
    main()
