"""Compile the Triton kernels for an H100, without a GPU, and print the shared memory of each in bytes.

A process of its own: one in which Triton interprets cannot compile.
"""
import sys
from pathlib import Path

import torch
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from harness.kernels import gpu_kernels, gpu_mask_kernels
from harness.kernels.gpu_kernels import launch_shape

INTEGERS, NUMBERS = {"rows", "height", "width", "size"}, {"eps", "momentum"}
FLOATS = {"sums", "weight", "bias", "running_mean", "running_var", "sums_of_y", "dsums", "dmatrix"}


def shared_memory(kernel, constants, options):
    # The maps and the weights that they are multiplied with are bfloat16.
    types = {name: "i32" if name in INTEGERS else "fp32" if name in NUMBERS else "*fp32" if name in FLOATS else "*bf16"
             for name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types[name] for name in types}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types)
               if signature[name].startswith("*") or name == "rows"}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, aligned)
    return compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared


def main():
    x = torch.empty(512, 64, 8, 8, dtype=torch.bfloat16, device="meta")
    for ins, outs in ((256, 64), (64, 256), (128, 128)):  # the largest
        _, (rows, stages), options = launch_shape(x, ins, outs, matmul=True)
        shapes = dict(IN=ins, OUT=outs, ROWS=rows, STAGES=stages)
        for name, further in (("_norm_relu_matmul", dict(HAS_OTHER=True, HAS_SUMS=True)),
                              ("_backward_sums", dict(MATMUL=True)),
                              ("_backward_input", dict(MATMUL=True, HAS_OTHER=True))):
            print(name, ins, outs, shared_memory(getattr(gpu_kernels, name), {**shapes, **further}, options))
    for name, stages, further in (
            ("_moments", 3, {}), ("_norm_relu", 3, {}), ("_gate", 3, {}), ("_upsample", 1, dict(HAS_OTHER=True)),
            ("_upsample_backward", 1, {})):
        _, (rows, stages), options = launch_shape(x, 256, stages=stages)
        kernel = getattr(gpu_kernels, name, None) or getattr(gpu_mask_kernels, name)
        print(name, 256, 256, shared_memory(kernel, dict(C=256, ROWS=rows, STAGES=stages, **further), options))


if __name__ == "__main__":
    main()
