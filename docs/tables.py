"""The tables of figures in the documentation, written into its pages from the code and the results.

    python docs/tables.py            # after a measurement, a training or a change of the networks

A page has a table between ``<!-- begin model-zoo -->`` and ``<!-- end model-zoo -->`` (a key of ``TABLES``). No
measured figure in it is typed by hand. That of the study is written by `benchmarks/study.py`, with its plots.
"""
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import timm

from ran_layers.published import PUBLISHED

REPOSITORY = Path(__file__).parents[1]
WEIGHTS = REPOSITORY / "ran_layers" / "weights"

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from harness.checkpoint import write_atomic  # noqa: E402
from harness.display import duration  # noqa: E402
from harness.environment import machine  # noqa: E402
from harness.errors import one_line_errors  # noqa: E402
from harness.evaluate import count_macs  # noqa: E402
from harness.recipes import RECIPES  # noqa: E402
from studies.pages import parts_of, replace_part, table  # noqa: E402
from studies.results import Finished, full_epochs, load_results  # noqa: E402
from studies.summary import summary  # noqa: E402


@cache
def model_zoo() -> str:
    """All registered networks, each counted on one image."""
    rows = []
    for name in timm.list_models(["ran_*", "plain_cnn8_*", "resnet18_cifar"]):
        model: Any = timm.create_model(name)
        macs = count_macs(model)
        _, height, width = model.pretrained_cfg["input_size"]
        rows.append((
            f"`{name}`",
            f"{sum(p.numel() for p in model.parameters()):,}",
            f"{macs / 1e9:.2f} G" if macs >= 1e9 else f"{macs / 1e6:.1f} M",
            f"{height}x{width}",
            ", ".join(f"{level['num_chs']}/{level['reduction']}" for level in model.feature_info),
        ))
    return table(("name", "parameters", "MACs", "input", "feature maps"), "lrrrl", rows)


def shipped_weights() -> str:
    """The weights inside the package, from the records of their training and what was measured with them."""
    results = {file.stem: json.loads(file.read_text()) for file in sorted(WEIGHTS.glob("*.json"))}
    if not results:
        return "*This version of the package ships no weights.*"
    robustness, throughput = _measured("robustness"), _measured("throughput")
    rows = [(
        f"`{name}`",
        f"{result['final']['error']:.2f} %",
        f"{result['params']:,}",
        f"{result['macs'] / 1e6:.1f} M",
        f"`{result['recipe']}` (flags below), {' + '.join(str(run['epochs']) for run in _runs(result))} epochs",
        f"{machine(result['hardware'])}, {result['settings']['precision']}, "
        f"{duration(sum(run['seconds'] for run in _runs(result)))}",
        _images_per_s(throughput, result["model"]),
        next((f"{row['mean']:.2f} %" for row in (robustness or {}).get("results", ()) if row["model"] == name), "-"),
    ) for name, result in results.items()]
    commands = "\n\n".join(
        "\n".join((f"# {name}", *(run["command"] for run in _runs(result)))) for name, result in results.items())
    head = ("weights", "test error", "parameters", "MACs", "recipe", "trained on, m:ss",
            "images/s, forward / training", "corrupted images")
    text = table(head, "lrrrllrr", rows)
    mirrored = ", ".join(f"`{name}` {100 - result['final']['top1_flip']:.2f} %" for name, result in results.items())
    text += f"\n\nWith the outputs averaged over each image and its mirror image: {mirrored}."
    if throughput:
        text += ("\n\nImages/s at the largest batch size measured: "
                 f"`{throughput['command']}` on {machine(throughput['hardware'])}, see "
                 "[Speed](speed.md).")
    return f"{text}\n\nTrained by\n\n```text\n{commands}\n```\n\n{_corruptions(robustness)}"


def _runs(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The run, after those whose weights it began with, each with the number of its epochs."""
    return [*result.get("earlier", ()), {**result, "epochs": len(result["epochs"])}]


def _images_per_s(throughput: dict[str, Any] | None, model: str) -> str:
    """Speed at the largest batch size that was measured."""
    rows = [row for row in (throughput or {}).get("cases", ()) if (row["form"], row["model"]) == ("harness", model)]
    if not rows:
        return "-"
    row = max(rows, key=lambda row: row["batch_size"])
    return f"{row['forward']['images_per_s']:.0f} / {row['train']['images_per_s']:.0f}"


@cache
def _study() -> list[dict[str, Any]]:
    """The results of the study, which several tables read, by the names of their files."""
    files = sorted((REPOSITORY / "benchmarks" / "results" / "study").glob("*.json"))
    return [json.loads(file.read_text()) for file in files]


@cache
def _finished() -> dict[str, list[Finished]]:
    """The same results, checked and grouped by experiment."""
    return load_results(REPOSITORY / "benchmarks" / "results" / "study")


def trained_on_gpu() -> str:
    """Speed of trainings on a GPU, by epoch."""
    rows = []
    for result in _study():
        if result["hardware"]["device"] == "cuda":
            speeds = sorted(epoch["images_per_s"] for epoch in result["epochs"])
            rows.append((
                f"`{result['model']}`", result["dataset"], str(len(result["epochs"])),
                str(result["settings"]["batch_size"]), f"{speeds[-1]:,.0f}",
                f"{speeds[0]:,.0f}", f"{result['compile_seconds']:.0f} s", result["hardware"]["name"]))
    head = ("network", "data set", "epochs", "batch", "fastest epoch, images/s", "slowest", "compilation", "on")
    return table(head, "llrrrrrl", rows)


def defaults() -> str:
    """What the training script's own choices lead to, and how long that takes."""
    digits = _measured("digits")
    runs = {"`--dataset digits`": [Finished(len(digits["epochs"]), {digits["seed"]: digits})] if digits else []}
    for name, experiment in (
            ("CIFAR-10", "att56-cifar10-quick"), ("CIFAR-10, `--recipe best`", "att56-cifar10-best")):
        runs[name] = [group for group in _finished().get(experiment, ()) if group.epochs == full_epochs(experiment)]
    rows = [(
        name, f"`{group.first['recipe']}`, {group.epochs} epochs", group.errors_text,
        duration(mean(result["seconds"] for result in group.results.values())),
        f"{machine(group.first['hardware'])}, {group.first['settings']['precision']}, "
        f"{group.first['hardware']['threads']} threads",
    ) for name, groups in runs.items() for group in groups]
    return table(("`cifar.py`", "recipe", "test error, %", "training", "on"), "llrrl", rows)


def _corruptions(robustness: dict[str, Any] | None) -> str:
    """Errors on corrupted test images, from `benchmarks/robustness.py`."""
    if robustness is None:
        return ""
    kinds = [(row["name"], row["strengths"]) for row in robustness["results"][0]["corruptions"]]
    rows = [(f"`{result['model']}`", f"{result['clean']:.2f}",
             *(", ".join(f"{error:.2f}" for error in row["errors"]) for row in result["corruptions"]),
             f"{result['mean']:.2f}") for result in robustness["results"]]
    names = (f"{name} {', '.join(f'{strength:g}' for strength in strengths)}" for name, strengths in kinds)
    head = ("error, %", "clean", *names, "mean")
    return (table(head, "l" + "r" * (len(head) - 1), rows)
            + f"\n\nTest images corrupted at three strengths, with the parameters of severities 1, 3 and 5 of "
              f"CIFAR-10-C: `{robustness['command']}`. In float32 and with fused networks, so the clean column "
              "differs slightly from the test errors above.")


def time_to_accuracy() -> str:
    """The shortest training seen to reach each accuracy on CIFAR-10, by network and hardware."""
    fastest: dict[tuple[float, str, str], tuple[float, dict[str, Any]]] = {}
    for result in (*(json.loads(file.read_text()) for file in WEIGHTS.glob("*.json")), *_study()):
        if result["dataset"] != "cifar10" or result["settings"].get("holdout"):  # these see fewer images an epoch
            continue
        for goal, seconds in (result.get("seconds_to_top1") or {}).items():
            key = float(goal), result["model"], machine(result["hardware"])
            if seconds is not None and seconds < fastest.get(key, (float("inf"),))[0]:
                fastest[key] = seconds, result
    rows = [(
        f"{goal:g} %", f"`{model}`", duration(seconds), f"{len(result['epochs'])}",
        f"{result['compile_seconds']:.0f} s" if result["compile_seconds"] else "-", name, f"`{result['command']}`",
    ) for (goal, model, name), (seconds, result) in sorted(fastest.items())]
    return table(("accuracy", "network", "training", "epochs of the run", "compilation", "on", "command"), "llrrrll",
                 rows)


def published() -> str:
    """The figures of the report, the paper and other implementations."""
    rows = [(f"[{row.source}]({row.url})" if row.url else row.source, row.network, row.dataset, row.variant,
             f"{row.error:.2f}") for row in PUBLISHED]
    return table(("source", "network", "data set", "variant", "error, %"), "llllr", rows)


def recipes() -> str:
    """The hyper-parameters of the training script's recipes."""
    columns = [asdict(recipe) for recipe in RECIPES.values()]
    rows = [
        (f"`--{name.replace('_', '-')}`", *(
            "-" if _has_no_effect(name, column) else _show(column[name]) for column in columns))
        for name in columns[0] if any(column[name] for column in columns)
    ]
    return table(("flag", *(f"`{name}`" for name in RECIPES)), "l" + "r" * len(RECIPES), rows)


def _has_no_effect(name: str, column: dict[str, Any]) -> bool:
    without_effect = {"warmup": column["schedule"] != "onecycle", "pad_mode": column["pad"] == 0}
    without_effect |= dict.fromkeys(("muon_momentum", "muon_sgd_lr"), column["optimizer"] != "muon")
    return without_effect.get(name, False)


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{item:g}" for item in value) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _measured(name: str) -> dict[str, Any] | None:
    """What a script wrote into `benchmarks/results`, None if it has not been run."""
    file = REPOSITORY / "benchmarks" / "results" / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def from_results(show: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    """Let ``show`` have what the script of its name wrote, or say that it has not been run."""
    def text() -> str:
        result = _measured(show.__name__)
        return "*Not measured yet for this version.*" if result is None else show(result)

    return text


@from_results
def survive(result: dict[str, Any]) -> str:
    """What killing a training led to, from `benchmarks/survive.py`."""
    return (f"Measured by `{result['command']}` on {machine(result['hardware'])}: after {result['kills']} kills the "
            f"same weights as without any, for a training of {result['undisturbed_seconds']:.0f} seconds "
            "(`plain_cnn8_cifar` on digits).")


@from_results
def scaling(result: dict[str, Any]) -> str:
    """Speed of one process and of several, from `benchmarks/scaling.py`."""
    rows = [(
        str(row["processes"]), str(row["threads"]),
        "one process" if row["processes"] == 1 else "global batch" if row["sync_bn"] else "each process's slice",
        "yes" if row["cpu_kernels"] else "no",
        f"{row['images_per_s']:.0f}", f"{min(row['runs']):.0f} to {max(row['runs']):.0f}",
        f"{row['images_per_s'] / result['rows'][0]['images_per_s']:.2f}",
    ) for row in result["rows"]]
    return (table(("processes", "threads of each", "batch normalisation", "fused kernels", "images/s",
                   "lowest to highest", "factor"), "rrllrrr", rows)
            + f"\n\n`{result['command']}` on {machine(result['hardware'])}, {result['precision']}: training of "
              f"`{result['model']}` at 32 px, recipe `{result['recipe']}`, global batch {result['batch_size']}; "
              f"medians of {len(result['rows'][0]['runs'])} runs.")


@from_results
def throughput(result: dict[str, Any]) -> str:
    """Speed of the networks, from `benchmarks/throughput.py`."""
    return _speeds(result)


def throughput_elsewhere() -> str:
    """The same from other machines, each in a folder of its own."""
    files = sorted((REPOSITORY / "benchmarks" / "results").glob("*/throughput.json"))
    return "\n\n".join(_speeds(json.loads(file.read_text())) for file in files)


def _speeds(result: dict[str, Any]) -> str:
    rows = [(
        # Results from before each case said its precision had the same for all of a form.
        f"`{row['model']}`, {row['form']}, "
        + row.get("precision", result["precision"] if row["form"] == "harness" else "fp32"), str(row["batch_size"]),
        *(f"{row[kind]['images_per_s']:.0f} ({row[kind]['lowest']:.0f} to {row[kind]['highest']:.0f})"
          for kind in ("forward", "train")),
        f"{100 * row['train']['fraction_of_matmul']:.0f} %",
        f"{row['peak_bytes'] / 2 ** 20:.0f} MiB" if row["peak_bytes"] else "-",
    ) for row in result["cases"]]
    ceilings = result["ceilings"]
    head = ("network, form", "batch", "forward, images/s", "training, images/s", "of the ceiling", "memory of a step")
    return (table(head, "lrrrrr", rows)
            + f"\n\n`{result['command']}` on {machine(result['hardware'])}: matrix product in "
              f"{result['precision']} {ceilings['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s, "
              f"copy {ceilings['copy_bytes_per_s'] / 1e9:.1f} GB/s. Medians, lowest to highest.")


@from_results
def fuse(result: dict[str, Any]) -> str:
    """What folding and the memory order bring to inference, from `benchmarks/fuse.py`."""
    forms = list(result["results"][0]["milliseconds"])
    rows = [(f"`{row['model']}`", str(row["batch_size"]), *(
        f"{row['milliseconds'][form]:.1f} ms" + (f", {row['speedup'][form]:.2f}x" if form != forms[0] else "")
        for form in forms)) for row in result["results"]]
    return (table(("network", "batch", *forms), "lr" + "r" * len(forms), rows)
            + f"\n\n`{result['command']}` on {machine(result['hardware'])}, {result['precision']}, "
              f"{result['hardware']['threads']} threads: medians of {result['results'][0]['rounds']} rounds.")


@from_results
def resnet18_attention(result: dict[str, Any]) -> str:
    """What Attention Modules do for resnet18, from `examples/resnet18_attention.py`."""
    rows = [(
        "with" if attention else "without",
        ", ".join(f"{100 * run['accuracy']:.2f}" for run in result["runs"] if run["attention"] == attention),
        *{f"{run['parameters']:,}" for run in result["runs"] if run["attention"] == attention},
    ) for attention in (False, True)]
    gain, spread = result["gain_in_points"], result["deviation_of_gain"]
    if spread is None:
        verdict = "of one seed, with a spread that is not known"
    else:
        verdict = f"with a deviation of {spread:.2f}, that is " + (
            "no difference beyond the spread" if abs(gain) <= 2 * spread else "a gain" if gain > 0 else "a loss")
    return (table(("attention", "accuracy by seed, %", "parameters"), "lrr", rows)
            + f"\n\n{result['epochs']} epochs of {result['images']:,} images, seeds paired: {gain:+.2f} points "
              f"{verdict}, at {result['time_ratio']:.2f} times the training "
              f"time ({result['name']}). So short a training tells nothing about long ones.")


def study_summary() -> str:
    """The differences between the short trainings of the study."""
    return summary(_finished())


def speed_summary() -> str:
    """How fast the networks train, on the machine that was measured last and in whole trainings on GPUs."""
    measured = _measured("throughput")
    rows = []
    if measured:
        cases = [case for case in measured["cases"] if case["model"] == "ran_att56_cifar"]
        largest = max(case["batch_size"] for case in cases)
        threads = measured["hardware"].get("threads")
        on = machine(measured["hardware"]) + (f", {threads} threads" if threads else "")
        names = {"harness": "as `cifar.py` does, plain SGD", "dataloader": "the usual way: eager, NCHW, `DataLoader`"}
        rows += [(f"`{case['model']}`", f"{names[case['form']]}, {case['precision']}", str(largest), on,
                  f"{case['train']['images_per_s']:.0f}") for case in cases if case["batch_size"] == largest]
    runs: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for result in _study():
        if result["hardware"]["device"] == "cuda":
            key = result["model"], result["settings"]["precision"], result["hardware"]["name"]
            runs.setdefault(key, []).append((result["settings"]["batch_size"], result["images_per_s"]))
    for (model, precision, name), found in runs.items():
        batches, speeds = (sorted({min(values), max(values)}) for values in zip(*found))
        rows.append((f"`{model}`", f"`cifar.py`, {precision}", " to ".join(map(str, batches)), name,
                     " to ".join(f"{speed:,.0f}" for speed in speeds)))
    return table(("network", "trained by", "batch", "on", "images/s"), "llrlr", rows)


TABLES = {
    "defaults": defaults, "model-zoo": model_zoo, "published": published, "recipes": recipes,
    "shipped-weights": shipped_weights, "study-summary": study_summary, "speed-summary": speed_summary,
    "trained-on-gpu": trained_on_gpu,
    "time-to-accuracy": time_to_accuracy, "survive": survive, "scaling": scaling, "throughput": throughput,
    "throughput-elsewhere": throughput_elsewhere, "fuse": fuse, "resnet18-attention": resnet18_attention}


def pages() -> list[Path]:
    """Return the pages that may have tables."""
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def with_tables(page: Path) -> str:
    """Return the text of ``page`` with its tables as they are now."""
    text = page.read_text(encoding="utf-8")
    for name in parts_of(text):
        if name in TABLES:
            text = replace_part(page, text, name, TABLES[name]())
    return text


def main() -> None:
    with one_line_errors():
        for page in pages():
            text = with_tables(page)
            if text != page.read_text(encoding="utf-8"):
                write_atomic(page, text.encode())
                print(f"wrote {page.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
