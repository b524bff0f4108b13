"""The model card: metadata that the Hub understands, then what a reader wants to know before using the weights."""
import re
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import is_model, model_entrypoint

from .._download import plain
from ..published import PUBLISHED, published_network
from .run import Run, optional

PAPER = "https://arxiv.org/abs/1704.06904"
# Name, and the id of the data set on the Hub where it is there.
DATASETS = {
    "cifar10": ("CIFAR-10", "uoft-cs/cifar10"),
    "cifar100": ("CIFAR-100", "uoft-cs/cifar100"),
    "digits": ("scikit-learn digits", None),
    "imagenet-1k": ("ImageNet", "ILSVRC/imagenet-1k"),
}


def model_card(run: Run, repo_id: str) -> str:
    """Return the text of ``README.md`` for a training run; the same run gives the same text.

    What comes from the run is escaped: whatever characters it holds, the metadata stay valid YAML and the body shows
    them as text.
    """
    parts = [
        f"# {text(repo_id.rpartition('/')[2])}",
        _introduction(run),
        "## Results",
        _results(run),
        *(f"![{alt}]({name})" for name, alt in (("curves.png", "Training curves"), ("masks.png", "Attention masks"))
          if name in run.pictures),
        "## How to load",
        _loading(run, repo_id),
        "## Recipe",
        _recipe(run),
        "## Limits of use",
        _limits(run),
        "## Citation",
        code(_CITATION, "bibtex"),
    ]
    return str(ModelCard(f"---\n{card_data(run, repo_id).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def card_data(run: Run, repo_id: str) -> ModelCardData:
    """Return the metadata of the model card."""
    name, hub_id = DATASETS.get(run.dataset, (plain(run.dataset), None))
    common: dict[str, Any] = dict(
        task_type="image-classification", task_name="Image Classification",
        dataset_type=hub_id or name, dataset_name=name, dataset_split="test")
    results = [
        EvalResult(metric_type="accuracy", metric_name="Top-1 accuracy (%)", metric_value=_percent(run.top1), **common),
        EvalResult(metric_type="error", metric_name="Top-1 error (%)", metric_value=_percent(run.error), **common),
    ]
    top5 = optional(run.result, "final.top5", (int, float))
    if top5 is not None:
        results.append(EvalResult(
            metric_type="accuracy", metric_name="Top-5 accuracy (%)", metric_value=_percent(top5), **common))
    tags = ["image-classification", "timm", "pytorch"]
    if is_ours(run.model):
        tags.append("ran-layers")
    if is_residual_attention(run.model):
        tags += ["residual-attention-network", "arxiv:1704.06904"]
    return ModelCardData(
        library_name="timm",
        license=plain(optional(run.config, "pretrained_cfg.license", str) or "apache-2.0"),
        pipeline_tag="image-classification",
        tags=tags,
        datasets=[hub_id] if hub_id else None,
        metrics=["accuracy"],
        model_name=repo_id.rpartition("/")[2],
        eval_results=results,
    )


def is_ours(model: str) -> bool:
    """Whether it is a network that timm knows after ``import ran_layers`` alone."""
    return is_model(model) and model_entrypoint(model).__module__.startswith("ran_layers.")


def is_residual_attention(model: str) -> bool:
    """Whether it is a network of this package with Attention Modules, not one of its baselines."""
    return is_ours(model) and model.startswith("ran_")


def text(value: Any) -> str:
    """Return a value as one line of Markdown that renders as exactly that text, in a table cell too."""
    # A backslash before ASCII punctuation is that character; `&` and `<` are written as entities, since a renderer may
    # look for HTML before anything else.
    line = re.sub(r"([\\`*_{}\[\]()#+\-.!|~$^=:@\"'/>])", r"\\\1", plain(value))
    return line.replace("&", "&amp;").replace("<", "&lt;")


def code(value: str, language: str = "") -> str:
    """Return a code block that no run of backticks in ``value`` can end."""
    longest = max((len(run) for run in re.findall(r"`+", value)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{value}\n{fence}"


def _introduction(run: Run) -> str:
    name = text(DATASETS.get(run.dataset, (run.dataset,))[0])
    what = "A `timm` model"
    if is_residual_attention(run.model):
        what = f"A Residual Attention Network ([Wang et al., CVPR 2017]({PAPER})), `timm` model"
    elif is_ours(run.model):
        what = "A baseline to compare Residual Attention Networks with, `timm` model"
    sentence = f"{what} {text(run.model)}, trained on {name}."
    sizes = [
        f"{_short(number)} {unit}" for number, unit in (
            (optional(run.result, "params", (int, float)), "parameters"),
            (optional(run.result, "macs", (int, float)), "multiply-adds for an image"),
        ) if number is not None]
    return f"{sentence} {', '.join(sizes)}." if sizes else sentence


def _results(run: Run) -> str:
    """The run's error beside the published ones of the network of the same name."""
    name = text(DATASETS.get(run.dataset, (run.dataset,))[0])
    rows = [("**this model**", text(run.model), "single view", f"**{run.error:.2f}**")]
    flip = optional(run.result, "final.top1_flip", (int, float))
    if flip is not None:
        rows.append(("this model", text(run.model), "averaged with the mirrored image", f"{100 - flip:.2f}"))
    network = published_network(run.model)
    published = [row for row in PUBLISHED if (row.network, row.dataset) == (network, run.dataset)]
    rows += [(row.source, row.network, row.variant, f"{row.error:.2f}") for row in published]
    table = [f"Top-1 error on the test set of {name}, in percent.", ""]
    table += ["| source | network | variant | error |", "| --- | --- | --- | ---: |"]
    table += [f"| {' | '.join(row)} |" for row in rows]
    if published:
        table += ["", "The report is a student's re-implementation for CIFAR, the paper is "
                  f"[Wang et al. 2017]({PAPER}). Networks of one name differ in width between them."]
    else:
        table += ["", "Neither the report nor the paper states a figure for this network and data set."]
    top5 = optional(run.result, "final.top5", (int, float))
    if top5 is not None:
        table += ["", f"Top-5 accuracy, single view: {top5:.2f} %."]
    selection = optional(run.result, "selection", str)
    if selection:
        table += ["", f"Selection of the weights: {text(selection)}."]
    return "\n".join(table)


def _loading(run: Run, repo_id: str) -> str:
    ours = is_ours(run.model)
    lines = [
        "import timm", *(["import ran_layers  # registers the network with timm"] if ours else []), "",
        f'model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()',
        "config = timm.data.resolve_model_data_config(model)",
        "transform = timm.data.create_transform(**config, is_training=False)",
    ]
    install = "pip install timm"
    if ours:
        install = "pip install ran-layers  # or, in a clone of its repository: pip install ."
    return "\n\n".join((
        code(install, "sh"), code("\n".join(lines), "python"),
        "`num_classes=` and `in_chans=` adapt it to other data. The weights are safetensors."))


def _recipe(run: Run) -> str:
    """The command, the settings that are in use, and what they ran on; each fact once, from the settings if there."""
    epochs = optional(run.result, "epochs", list)
    processes = optional(run.result, "processes", int) or 1
    rows = {
        "recipe": optional(run.result, "recipe", str),
        "epochs": len(epochs) if epochs else None,
        "seed": optional(run.result, "seed", int),
        **{key: ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
           for key, value in (optional(run.result, "settings", dict) or {}).items()
           if key not in ("model", "dataset") and (value or value is False or key == "seed")},
        "hardware": _hardware(optional(run.result, "hardware", dict) or {}),
        "processes": processes if processes > 1 else None,
        "training time": _duration(optional(run.result, "seconds", (int, float))),
        "images/s": _rounded(optional(run.result, "images_per_s", (int, float))),
        "versions": _pairs(optional(run.result, "versions", dict) or {}),
    }
    table = [f"| {text(key)} | {text(value)} |" for key, value in rows.items() if value not in (None, "")]
    command = optional(run.result, "command", str)
    parts = ["In a clone of ran-layers:", code(plain(command), "sh")] if command else []
    if table:
        parts.append("\n".join(("| setting | value |", "| --- | --- |", *table)))
    parts.append("What is zero or empty, and so off, is not listed. All settings and each epoch's figures are in "
                 "[result.json](result.json).")
    return "\n\n".join(parts)


def _limits(run: Run) -> str:
    name = text(DATASETS.get(run.dataset, (run.dataset,))[0])
    size = optional(run.config, "pretrained_cfg.input_size", (list, tuple))
    pixels = f"{size[1]}x{size[2]} pixels" if size and len(size) == 3 else "the training size"
    return "\n".join((
        f"- It knows the classes of {name} alone and gives one of them for any picture, with a probability that is not "
        "calibrated.",
        f"- It was trained on images of {pixels}, prepared as `transform` above does; other sizes, sources and "
        "corruptions lower the accuracy, and how far was not measured here.",
        f"- The error is that of one training run, on the test set of {name}; another seed gives another figure.",
        "- It is for research and teaching. Do not let it decide about people or about anybody's safety.",
    ))


def _percent(value: float) -> float:
    return round(float(value), 2)


def _short(number: float) -> str:
    return f"{number / 1e9:.3g} G" if number >= 999.5e6 else f"{number / 1e6:.3g} M"


def _rounded(value: float | None) -> str | None:
    return None if value is None else f"{value:.0f}"


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def _hardware(record: dict[str, Any]) -> str:
    rest = _pairs({key: value for key, value in record.items() if key != "name"})
    name = record.get("name")
    return f"{name} ({rest})" if name and rest else rest or str(name or "")


def _pairs(record: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in record.items() if value is not None)


_CITATION = """@inproceedings{wang2017residual,
  title     = {Residual Attention Network for Image Classification},
  author    = {Wang, Fei and Jiang, Mengqing and Qian, Chen and Yang, Shuo and Li, Cheng and Zhang, Honggang and
               Wang, Xiaogang and Tang, Xiaoou},
  booktitle = {CVPR},
  year      = {2017},
}"""
