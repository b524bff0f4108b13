"""The command line of `cifar.py`: what it refuses, in one line, before anything is written, and what flags mean."""
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cifar
from test_cifar import fails, run

from harness.errors import RunError, one_line_errors
from harness.evaluate import count_macs
from harness.network import load_initial_weights
from harness.options import parse_args
from harness.recipes import make_recipe
from harness.result import selection


@pytest.mark.parametrize("script", [
    *(f"benchmarks/{name}" for name in ("cifar", "fuse", "robustness", "scaling", "study", "survive", "throughput")),
    *(f"examples/{name}" for name in ("export_onnx", "finetune", "resnet18_attention", "segmentation"))])
def test_help_says_what_every_flag_is_and_no_default_that_is_none(script, monkeypatch, capsys):
    folder, name = script.split("/")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / folder))
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main(["--help"])
    assert ended.value.code == 0
    options = capsys.readouterr().out.split("options:\n")[1]
    for lines in options.split("\n  -")[1:]:
        flag, text = re.fullmatch(r"(.+?)(?:  +|\n +)(\S.*)", lines.strip().split("\n\n")[0], re.DOTALL).groups()
        assert len(text.split()) > 1, flag
        assert "default: None" not in text, flag
        assert text.count("(default: ") < 2, flag


@pytest.mark.parametrize(("args", "message"), [
    (["--model", "resnet0"], "--model resnet0 is not a timm model"),
    (["--model", "ran_att_56_cifar"], "is not a timm model; did you mean ran_att56_cifar or "),
    (["--model-kwargs", "depth"], "--model-kwargs must be KEY=VALUE with VALUE as JSON, got depth"),
    (["--model-kwargs", "depth=3"], "--model plain_cnn8_cifar with {'depth': 3}"),
    (["--device", "abacus"], "--device abacus is not available here"),
    (["--epochs", "0"], "--epochs must be at least 1, got 0"),
    (["--epochs", "-3"], "--epochs must be at least 1, got -3"),
    (["--limit", "-1"], "--limit must not be negative, got -1"),
    (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    (["--batch-size", "999"], "--batch-size 999 is above the 160 training images"),
    (["--lr", "-1"], "--lr must be finite and not negative, got -1.0"),
    (["--lr", "nan"], "--lr must be finite and not negative, got nan"),
    (["--holdout", "160"], "--holdout must be below the 160 training images"),
    (["--resolutions", "0.5"], "--resolutions must be pairs"),
    (["--eval-only"], "--eval-only: no finished run in"),
    (["--device", "meta"], "--device meta has shapes but no numbers"),
    (["--seed", "-1"], "--seed must be from 0 to 2**32 - 1, got -1"),
    (["--seed", str(2 ** 64)], "--seed must be from 0 to 2**32 - 1, got 18446744073709551616"),
    (["--pad", "32"], "--pad must be below the 32 pixels of the images, got 32"),
    (["--momentum", "1"], "--momentum must be below 1, got 1"),
    (["--ema-decay", "2"], "--ema-decay must be below 1, got 2"),
    (["--label-smoothing", "1.5"], "--label-smoothing must be at most 1, got 1.5"),
    (["--resolutions", "0", "0"], "--resolutions must have fractions from 0 to 1 and at least 1 pixel, got (0.0, 0.0)"),
    (["--milestones", "80", "120"], "--milestones must be fractions of the training from 0 to 1, got (80.0, 120.0)"),
    (["--model-kwargs", "num_classes=3"], "--model-kwargs num_classes follows from the data set and"),
    (["--model", "ran_att56_cifar", "--resolutions", "0", "8", "0.5", "32"],
     "does not take images of 3 x 8 x 8, to which --resolutions (0.0, 8.0, 0.5, 32.0) shrinks them (a soft mask"),
    (["--model", "ran_att56_cifar", "--resolutions", "0", "8", "0.5", "32"],
     "; --resolutions without values leaves them as they are"),
    (["--eval-only", "--lr", "5"], "--eval-only trains nothing; leave out --lr"),
    (["--eval-only", "--recipe", "best"], "--eval-only trains nothing; leave out --recipe"),
    (["--model-kwargs", "in_chans=1"], "--model-kwargs in_chans follows from the data set and"),
    (["--model-kwargs", "features_only=true"], "--model-kwargs features_only makes a network without classifier"),
    (["--model-kwargs", 'checkpoint_path="x"'], "--model-kwargs checkpoint_path is --initial-checkpoint here"),
    (["--model-kwargs", 'act_layer="foo"'], "--model plain_cnn8_cifar with {'act_layer': 'foo'}: "),
    (["--model", "ran_att56_cifar.cifar1"], "--model ran_att56_cifar.cifar1 with {}: Invalid pretrained tag (cifar1)"),
    (["--model", "coat_lite_tiny"], "--model coat_lite_tiny has a parameter under several names ("),
    (["--cutout", "33"], "--cutout must be at most the 32 pixels of the images, got 33"),
    (["--resolutions", "0.4", "32", "0", "24"], "--resolutions must have rising fractions, got (0.4, 32.0, 0.0, 24.0)"),
    (["--epochs", "many"], "argument --epochs: invalid int value: 'many'; --help lists the flags"),
    (["--epoch", "1"], "unrecognized arguments: --epoch 1"),
    (["--data-dir", ""], "argument --data-dir: must not be empty"),
    (["--out", "a#b"], "argument --out: must be of printable characters without # and ?, and begin with one slash"),
    (["--eval-only", "--model-kwargs", "foo=1"], "--eval-only trains nothing; leave out --model-kwargs"),
    (["--eval-only", "--seed", "1"], "--eval-only trains nothing; leave out --seed"),
    (["--eval-only", "--no-sync-bn"], "--eval-only trains nothing; leave out --sync-bn"),
])
def test_unusable_arguments(tmp_path, capsys, args, message):
    assert message in fails(capsys, *args, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_of_one_image_is_refused_where_nothing_is_left_to_normalise_over(tmp_path, capsys):
    line = fails(capsys, "--model", "resnet18", "--batch-size", 1, "--limit", 16, "--out", tmp_path / "run")
    assert "--batch-size 1 is too small for the batch normalisation of this network (Expected more than 1" in line


def test_arguments_of_a_model_may_be_given_by_one_flag_or_several(tmp_path):
    assert parse_args(["--model-kwargs", "a=1", "b=2", "--model-kwargs", "a=3"]).model_kwargs == ["a=3", "b=2"]
    command = ("--model-kwargs", "channels=[16,16,16,16]", "--model-kwargs", "drop_rate=0.1", "--out", tmp_path / "run")
    run("--epochs", "1", "--limit", "32", *command)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model_args"]["channels"] == [16, 16, 16, 16]
    assert config["model_args"]["drop_rate"] == 0.1
    run("--epochs", "1", "--limit", "32", *command, "--resume")


@pytest.mark.parametrize(("error", "line"), [
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
     "error: there is not enough memory, of which smaller batches take less (CUDA out of memory. Tried to allocate"),
    (OSError(), "error: OSError()"), (RunError("so"), "error: so")])
def test_errors_of_one_line(capsys, error, line):
    with pytest.raises(SystemExit) as exit_info, one_line_errors():
        raise error
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith(line)


def test_mistakes_of_our_own_have_a_traceback():
    with pytest.raises(RuntimeError, match="size of tensor"), one_line_errors():
        raise RuntimeError("The size of tensor a must match")


def test_the_result_says_what_was_watched():
    recipe = make_recipe("quick", "digits", {})
    seen = [{"epoch": 1, "eval_split": "held-out"}, {"epoch": 2}]
    assert selection(16, recipe, seen) == (
        "none: the weights are those of the last step; 16 training images were held out and watched")
    assert selection(0, recipe, [{"epoch": 1}]) == "none: the weights are those of the last step"
    assert selection(0, recipe, [{"eval_split": "test"}]).endswith("the test set was watched, nothing was picked by it")


def test_weights_to_begin_with_must_be_numbers():
    model = timm.create_model("plain_cnn8_cifar")
    weights = {name: values.clone() for name, values in model.state_dict().items()}
    load_initial_weights(model, weights, Path("some"))
    weights["head.fc.weight"][0, 0] = torch.inf
    with pytest.raises(RunError, match=r"--initial-checkpoint some: head\.fc\.weight has values that are NaN or inf"):
        load_initial_weights(model, weights, Path("some"))


def test_of_several_processes_the_first_alone_evaluates(tmp_path, monkeypatch, capsys):
    run("--epochs", "1", "--limit", "32", "--out", tmp_path / "run")
    capsys.readouterr()
    for rank, lines in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        cifar.main(["--eval-only", "--device", "cpu", "--out", str(tmp_path / "run")])
        assert len(capsys.readouterr().out.splitlines()) == lines


def test_networks_with_tokens_are_taken():
    """The counter of operations once failed where a parameter is the argument of a layer."""
    model = timm.create_model("test_vit3", img_size=32, num_classes=10)
    assert count_macs(model, 32) > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_not_installed_is_said_at_once(monkeypatch, capsys):
    from harness import extras

    assert extras.missing() == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else name)
    with pytest.raises(SystemExit) as exit_info:
        importlib.reload(extras)
    assert exit_info.value.code == 2
    monkeypatch.undo()
    importlib.reload(extras)
    assert extras.missing() == []
    assert capsys.readouterr().err == (
        'error: scikit-learn must be installed: in the repository, pip install -e ".[bench]"\n')
