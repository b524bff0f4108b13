"""What the README quotes is what was measured."""
import json
import re
from pathlib import Path

import pytest

from ran_layers.published import PUBLISHED

ROOT = Path(__file__).resolve().parents[1]

# What it says of the long trainings, and the cells of docs/results.md that say so.
LONG = {
    "the 92 is better by 0.46 points on CIFAR-10":
        "| Attention-92, CIFAR-10 | 22.93 (report) | 6.67 (1 seed) | -0.46, spread unknown | Attention-56, CIFAR-10 |",
    "and by 2.25 on CIFAR-100":
        "| Attention-92, CIFAR-100 | 45.80 (report) | 25.86 (1 seed) | -2.25, spread unknown | Attention-56,",
    "trained anew for 160 epochs after 7.13 % at 110":
        "| Attention-56, CIFAR-10 | 14.43 (report) | 7.13 (1 seed) |  |  | 1.88 | 31.8 | 110 |",
}
REPORTED = {(row.network, row.dataset): row.error for row in PUBLISHED if row.source == "report" and not row.variant}


@pytest.fixture(scope="module")
def readme():
    return " ".join((ROOT / "README.md").read_text().split())


def test_long_trainings(readme):
    results = (ROOT / "docs" / "results.md").read_text()
    assert not [phrase for phrase in LONG if phrase not in readme]
    assert not [cells for cells in LONG.values() if cells not in results]


def test_operations_of_the_baselines(readme):
    macs = {}
    for file in (ROOT / "benchmarks" / "results" / "study").glob("*-best-10ep-*.json"):
        result = json.loads(file.read_text())
        macs[file.name.partition("-best")[0]] = result["macs"]
    assert (f"The plain CNN has {macs['plain8'] / 1e6:.0f} million MACs, Attention-56 has "
            f"{macs['att56-cifar10'] / 1e6:.0f}, ResNet-18 has {macs['resnet18'] / macs['att56-cifar10']:.0f} times "
            "the MACs of Attention-56.") in readme


def test_errors_of_the_weights(readme):
    records = sorted((ROOT / "ran_layers" / "weights").glob("*.json"))
    assert records
    for record in records:
        run = json.loads(record.read_text())
        epochs = " + ".join(str(count) for count in (
            *(earlier["epochs"] for earlier in run.get("earlier", ())), run["settings"]["epochs"]))
        network, dataset = f"Attention-{run['model'][7:9]}", run["dataset"]
        assert (f"| {dataset.upper().replace('CIFAR', 'CIFAR-')}, {network} | **{run['final']['error']:.2f}** "
                f"(`{run['model']}`, {epochs} epochs) | {REPORTED[network, dataset]:.2f} |") in readme
    robustness = json.loads((ROOT / "benchmarks" / "results" / "robustness.json").read_text())["results"]
    errors = {row["model"]: f"{row['clean']:.2f}" for row in robustness}
    clean = [errors[f"ran_att{depth}_cifar.{dataset}"] for dataset in ("cifar10", "cifar100") for depth in (56, 92)]
    assert f"{', '.join(clean[:-1])} and {clean[-1]}" in readme


def test_speeds(readme):
    measured = ROOT / "benchmarks" / "results"
    short, longer = (json.loads((measured / "study" / f"orig92-cifar10-{name}-seed0.json").read_text())
                     for name in ("best-12ep", "full-37ep"))
    for text in (
            f"for {len(longer['epochs'])} epochs: **{longer['final']['error']:.2f} %** in {longer['seconds']:.0f} s",
            f"passed 90 % on CIFAR-10 after {short['seconds_to_top1']['90']:.0f} s of training in a run of "
            f"{len(short['epochs'])} epochs, and 94 % after {longer['seconds_to_top1']['94']:.0f} s in one of "
            f"{len(longer['epochs'])}, evaluated every fifth epoch",
            f"compiled for {short['compile_seconds']:.0f} s, before the second",
            f"at hand, for {longer['compile_seconds']:.0f} s. No run has reached 95 % yet."):
        assert text in readme
    results = [json.loads(file.read_text()) for file in (measured / "study").glob("*.json")]
    assert not [run for run in results if run["dataset"] == "cifar10" and run["final"]["top1"] >= 95]
    for row in json.loads((measured / "fuse.json").read_text())["results"]:
        if row["model"] == "ran_att56_cifar":
            assert f"{row['speedup']['folded, channels last (fuse)']:.2f} times" in readme
            assert re.search(rf"the layout alone makes [^(]*{row['speedup']['plain, channels last']:.2f}", readme)
