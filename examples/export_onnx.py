"""Export a network to ONNX, run it in ONNX Runtime, and compare outputs and speed with PyTorch.

    python examples/export_onnx.py
    python examples/export_onnx.py --model ran_att92_cifar.cifar100
    python examples/export_onnx.py --model ran_att92_cifar_orig --weights runs/RUN/model.safetensors
"""
import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
from training import Parser, RunError, check_model, check_out, names_weights, one_line_errors, positive, write_report

import ran_layers


def milliseconds(function: Callable[[], Any], repeats: int) -> float:
    """Return the median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="ran_att56_cifar.cifar10",
                        help="any timm model: with its trained weights if the name has a tag or is local-dir:FOLDER, "
                             "random ones otherwise")
    parser.add_argument("--weights", type=Path, help="safetensors file of the model, instead")
    parser.add_argument("--onnx", type=Path, default=Path("runs/model.onnx"), help="where the exported network goes")
    parser.add_argument("--repeats", type=positive, default=20, help="timings of each, whose median counts")
    parser.add_argument("--out", type=Path, default=Path("runs/export_onnx.json"), help="the figures")
    args = parser.parse_args(argv)
    with one_line_errors():
        export(args)


def export(args: argparse.Namespace) -> None:
    """Export, compare, and write the figures.

    Raises:
        RunError: There are no such weights, a file cannot be written, or the exported network computes something else.
    """
    check_model(args.model, "--model", args.weights)
    check_out(args.out)
    torch.manual_seed(0)
    pretrained = bool(args.weights) or names_weights(args.model)
    if not pretrained:
        print(f"random weights: {args.model} names none; ran_att56_cifar.cifar10 does, or --weights takes a file")
    model = timm.create_model(
        args.model, pretrained=pretrained,
        pretrained_cfg_overlay={"file": str(args.weights)} if args.weights else {}).eval()
    fused = ran_layers.fuse(model)  # ONNX Runtime would fold the BN behind convolutions itself, but not those in front

    args.onnx.parent.mkdir(parents=True, exist_ok=True)
    images = torch.randn(2, *model.pretrained_cfg["input_size"])
    torch.onnx.export(
        fused, (images,), args.onnx, input_names=["images"], output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(args.onnx, providers=["CPUExecutionProvider"])

    figures = {}
    with torch.inference_mode():
        for batch_size in (1, 16):  # the batch size is free; it was exported with two images
            images = torch.randn(batch_size, *images.shape[1:])
            logits, = session.run(None, {"images": images.numpy()})
            expected = model(images)
            # Of the largest logit, which without trained weights may be far from 1.
            difference = float((torch.from_numpy(logits) - expected).abs().max() / expected.abs().max().clamp(min=1))
            feed = {"images": images.numpy()}
            figures[str(batch_size)] = {
                "largest_difference": difference,
                "milliseconds": {
                    "PyTorch": round(milliseconds(lambda x=images: model(x), args.repeats), 2),
                    "PyTorch, fused": round(milliseconds(lambda x=images: fused(x), args.repeats), 2),
                    "ONNX Runtime": round(milliseconds(lambda x=feed: session.run(None, x), args.repeats), 2),
                },
            }
            times = ", ".join(f"{name} {ms} ms" for name, ms in figures[str(batch_size)]["milliseconds"].items())
            print(f"batch {batch_size}: outputs differ by at most {difference:.1e}; {times}")
    if not all(figure["largest_difference"] <= 1e-4 for figure in figures.values()):  # nor NaN
        raise RunError("the exported network computes something else")
    write_report(args.out, torch.device("cpu"), model=args.model, weights=args.weights and str(args.weights),
                 trained=pretrained, batch_sizes=figures)


if __name__ == "__main__":
    main()
