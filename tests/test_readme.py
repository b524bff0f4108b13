"""What the README quotes is what was measured."""
import json
import re
from pathlib import Path

import pytest

from ran_layers.published import PUBLISHED

ROOT = Path(__file__).resolve().parents[1]

# What it says of the study, and the cells of docs/results.md that say so: the difference, and the row it is to.
COMPARISONS = {
    "Attention-92 is better than Attention-56 by 0.95 ± 0.79 under our recipe":
        "-0.95 ± 0.79 | Attention-56, CIFAR-10, recipe `best`",
    "under the report's it is too close to call, by 0.56 ± 1.43.":
        "-0.56 ± 1.43, too close to call | Attention-56, CIFAR-10, recipe `report` |",
    "is better than naive attention learning by 2.04 ± 1.43 under the report's recipe":
        "+2.04 ± 1.43 | Attention-56 (report), residual, recipe `report` |",
    "under ours it is too close to call, by 0.46 ± 0.79.":
        "+0.46 ± 0.79, too close to call | Attention-56 (report), residual, recipe `best` |",
    "Too close to call: the local mask is better than the soft mask by 0.52 ± 0.79 under our recipe":
        "-0.52 ± 0.79, too close to call | Attention-56 (report), soft, recipe `best` |",
    "and worse by 0.36 ± 1.43 under the report's":
        "+0.36 ± 1.43, too close to call | Attention-56 (report), soft, recipe `report` |",
    "Attention-92 is better than its trunk at equal parameters by 3.58 ± 6.78":
        "+3.58 ± 6.78, too close to call | 50% noise, Attention-92 (report) |",
    "Attention-56 is better than its trunk with residual units added by 0.40 ± 0.79 at equal MACs":
        "+0.40 ± 0.79, too close to call | Attention-56 |",
    "and by 0.10 ± 0.79 at equal parameters;": "+0.10 ± 0.79, too close to call | Attention-56 |",
    "plain CNN of 8 layers is better than Attention-56 by 5.21 ± 0.79,": "-5.21 ± 0.79 | Attention-56 |",
    "under the report's recipe by 8.09 ± 1.43;": "-8.09 ± 1.43 | Attention-56, recipe `report` |",
    "with 17 times the MACs of Attention-56, is better by 7.45 ± 1.12 (one seed)":
        "-7.45 ± 1.12 (1 seed) | Attention-56 |",
    "better than Adam: by 1.83 ± 1.43 with batches of 32,": "+1.83 ± 1.43 | Nesterov SGD, batch 32 |",
    "by 3.57 ± 1.43 with 64": "+3.57 ± 1.43 | Nesterov SGD, batch 64 |",
    "by 4.74 ± 1.43 with 256": "+4.74 ± 1.43 | Nesterov SGD, batch 256 |",
    "between 32 and 64 it is too close to call": "-1.22 ± 1.43, too close to call | Nesterov SGD, batch 64 |",
    "batches of 64 are better than of 256 by 6.11 ± 1.43": "+6.11 ± 1.43 | Nesterov SGD, batch 64 |",
    "the 92 is better by 0.46 points on CIFAR-10": "-0.46, spread unknown | Attention-56, CIFAR-10 |",
    "and by 2.25 on CIFAR-100": "-2.25, spread unknown | Attention-56, CIFAR-100 |",
    "trained anew for 160 epochs after 7.13 % at 110": "| 7.13 (1 seed) |  |  | 1.88 | 31.8 | 110 |",
}
REPORTED = {(row.network, row.dataset): row.error for row in PUBLISHED if row.source == "report" and not row.variant}


@pytest.fixture(scope="module")
def readme():
    return " ".join((ROOT / "README.md").read_text().split())


def test_comparisons(readme):
    results = (ROOT / "docs" / "results.md").read_text()
    assert not [phrase for phrase in COMPARISONS if phrase not in readme]
    assert not [cells for cells in COMPARISONS.values() if cells not in results]
    quoted = " ".join(COMPARISONS)
    assert not [figure for figure in re.findall(r"\d+\.\d\d ± \d+\.\d\d", readme) if figure not in quoted]
    worse = REPORTED["Attention-92", "cifar10"] - REPORTED["Attention-56", "cifar10"]
    assert f"In the report it was worse by {worse:.2f}." in readme
    plain, attention = REPORTED["Plain CNN-8", "cifar10"], REPORTED["Attention-56", "cifar10"]
    assert f"the report's was worse, {plain:.2f} against {attention:.2f} %" in readme


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
    speeds = {case["form"]: case["train"]["images_per_s"]
              for case in json.loads((measured / "throughput.json").read_text())["cases"]
              if (case["model"], case["batch_size"]) == ("ran_att56_cifar", 256)}
    assert f"trains `ran_att56_cifar` at {speeds['harness']:.0f} images a second" in readme
    assert f"reaches {speeds['dataloader']:.0f}." in readme
    runs = [json.loads(file.read_text()) for file in (measured / "study").glob("*.json")]
    runs = [run for run in runs if run["model"] == "ran_att56_cifar" and run["hardware"]["device"] == "cuda"]
    fastest = max(epoch["images_per_s"] for run in runs for epoch in run["epochs"])
    assert f"single epochs at up to {fastest:,.0f}." in readme
    slowest, *_, quickest = sorted(run["images_per_s"] for run in runs)
    assert f"whole trainings of it went at {slowest:,.0f} to {quickest:,.0f} images a second" in readme
    short, longer = (json.loads((measured / "study" / f"orig92-cifar10-{name}-seed0.json").read_text())
                     for name in ("best-12ep", "full-37ep"))
    for text in (
            f"{longer['final']['error']:.2f} % after {len(longer['epochs'])} epochs, {longer['seconds']:.0f} seconds",
            f"trains at {longer['images_per_s']:,.0f} images a second",
            f"90 % on CIFAR-10 after {longer['seconds_to_top1']['90']:.0f} s and 94 % after "
            f"{longer['seconds_to_top1']['94']:.0f} s",
            f"{len(short['epochs'])} epochs of the default recipe passed 90 % after "
            f"{short['seconds_to_top1']['90']:.0f} s",
            f"before the 12 epochs it had compiled for {short['compile_seconds']:.0f} s, before the 37",
            f"for {longer['compile_seconds']:.0f} s. No run has reached 95 % yet"):
        assert text in readme
    results = [json.loads(file.read_text()) for file in (measured / "study").glob("*.json")]
    assert not [run for run in results if run["dataset"] == "cifar10" and run["final"]["top1"] >= 95]
    for row in json.loads((measured / "fuse.json").read_text())["results"]:
        if row["model"] == "ran_att56_cifar":
            assert f"{row['speedup']['folded, channels last (fuse)']:.2f} times" in readme
            assert re.search(rf"the layout alone makes [^(]*{row['speedup']['plain, channels last']:.2f}", readme)
