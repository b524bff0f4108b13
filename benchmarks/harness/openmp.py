"""How many threads OpenMP has, and how long they spin while they wait for each other.

To be imported before torch, which loads OpenMP. What the user has set in the environment stays.

A training step on a CPU has some hundred barriers. Where the processors are this program's alone, a thread that spins
there goes on at once. Where another program runs too, spinning keeps the processor from the thread that is waited for:
with GNU's runtime for 300,000 rounds. With 20,000 a training alone is as fast; two at once, on two cores, train 37
images of digits a second each, where they trained 5.

A container may see all processors of its host and have the time of a few. More threads than that wait for each other:
with the time of one of two processors, one thread trained 393 images a second, two 270.
"""
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def processors_by_quota(cgroup: Path = CGROUP) -> int | None:
    """Return how many processors' time this container has, in whole ones, or None if nothing limits it."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # version 2, version 1
        try:
            quota, period = map(int, " ".join((cgroup / file).read_text() for file in files).split())
        except (OSError, ValueError):  # not there, or "max"
            continue
        if quota > 0:
            return max(1, quota // period)
    return None


def set_up() -> None:
    """Set what OpenMP reads when it is loaded."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    threads = processors_by_quota()
    if threads is not None and threads < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


set_up()
