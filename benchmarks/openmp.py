"""How long a thread of OpenMP spins while it waits for the others; to be imported before torch, which loads OpenMP.

A training step on a CPU has some hundred barriers. Where the processors are this program's alone, a thread that spins
there goes on at once. Where another program runs too, spinning keeps the processor from the thread that is waited for:
with GNU's runtime for 300,000 rounds. With 20,000 a training alone is as fast; two at once, on two cores, train 37
images of digits a second each, where they trained 5.
"""
import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
