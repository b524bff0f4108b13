"""What a push makes of a run: which runs are refused, and the model card of the others."""
import html as entities
import json
import re
from dataclasses import replace

import pytest
import timm
import torch
import yaml
from hub_fixtures import REPO, edit, finish_run
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from ran_layers._download import plain
from ran_layers.hub import push_to_hub
from ran_layers.hub.card import code, model_card, text
from ran_layers.hub.run import read_run
from ran_layers.published import PUBLISHED, published_network


def without(path):
    def change(record):
        *parents, key = path.split(".")
        for parent in parents:
            record = record[parent]
        del record[key]
    return change


@pytest.mark.parametrize(("change", "said"), [
    (lambda run: (run / "result.json").unlink(), "has no result.json"),
    (lambda run: (run / "config.json").unlink(), "has no config.json"),
    (lambda run: (run / "result.json").write_text("{"), "result.json is not valid JSON"),
    (lambda run: (run / "result.json").write_text("[]"), "result.json must hold a JSON object, got list"),
    (lambda run: edit(run / "result.json", without("final.top1")), "final.top1 (int or float) is missing"),
    (lambda run: edit(run / "result.json", without("final")), "final.top1 (int or float) is missing"),
    (lambda run: edit(run / "result.json", without("model")), "field model (str) is missing"),
    (lambda run: edit(run / "result.json", without("dataset")), "field dataset (str) is missing"),
    (lambda run: edit(run / "result.json", lambda r: r["final"].update(top1=float("nan"))), "final.top1"),
    (lambda run: edit(run / "result.json", lambda r: r["final"].update(top1=915)), "from 0 to 100, got 915"),
    (lambda run: edit(run / "result.json", lambda r: r["final"].update(error=1.0)), "is not 100 - final.top1"),
    (lambda run: edit(run / "result.json", lambda r: r.update(model="resnet18")), "'resnet18', config.json of"),
    (lambda run: edit(run / "config.json", without("architecture")), "field architecture (str) is missing"),
    (lambda run: edit(run / "config.json", lambda c: c.update(architecture="nonesuch")), "result.json is of model"),
    (lambda run: edit(run / "config.json", lambda c: c.update(model_args={})), "does not load with timm"),
    (lambda run: (run / "model.safetensors").unlink(), "has no model.safetensors"),
    (lambda run: (run / "model.safetensors").rename(run / "pytorch_model.bin"), "only pytorch_model.bin: a pickle can"),
    (lambda run: (run / "model.safetensors").write_bytes(b"cut"), "is not a whole safetensors file"),
    (lambda run: edit(run / "result.json", lambda r: r.update(command="HF_TOKEN=hf_" + "a" * 34)), "access token"),
], ids=lambda value: value if isinstance(value, str) else "run")
def test_runs_that_are_refused(hub, run_dir, cli, change, said):
    change(run_dir)
    status, out, err = cli("push", run_dir, REPO)
    assert status == 1
    assert len(err) == 1, err
    assert said in err[0]
    assert "aaaa" not in err[0] + out
    assert hub.requests == []


def test_weights_that_are_not_finite(hub, run_dir, cli):
    model = timm.create_model(f"local-dir:{run_dir}", pretrained=True)
    with torch.no_grad():
        model.head.fc.bias[0] = float("nan")
    save_file(model.state_dict(), run_dir / "model.safetensors")
    status, _, err = cli("push", run_dir, REPO)
    assert status == 1
    assert "head.fc.bias holds values that are not finite" in err[0]


def test_run_without_optional_fields(hub, run_dir):
    (run_dir / "result.json").write_text(json.dumps(
        {"model": "plain_cnn8_cifar", "dataset": "cifar10", "final": {"top1": 90}}))
    (run_dir / "curves.png").unlink()
    (run_dir / "masks.png").unlink()
    push_to_hub(run_dir, REPO)
    card = hub.repos[REPO].files["README.md"].decode()
    assert "None" not in card
    assert ".png" not in card
    assert "**10.00**" in card


# --- the card --------------------------------------------------------------------------------------------------------


def render(markdown):
    markdown_it = pytest.importorskip("markdown_it")
    return markdown_it.MarkdownIt("gfm-like", {"linkify": False}).render(markdown)


def test_card_metadata_and_body(hub, run_dir):
    edit(run_dir / "result.json", lambda result: result.update(recipe="best"))
    push_to_hub(run_dir, REPO)
    card = ModelCard(hub.repos[REPO].files["README.md"].decode())
    assert card.data.library_name == "timm"
    assert card.data.license == "apache-2.0"
    assert card.data.datasets == ["uoft-cs/cifar10"]
    assert {"image-classification", "ran-layers"} <= set(card.data.tags)
    measured = {(r.metric_type, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert measured[("error", "Top-1 error (%)")] == 8.5
    assert measured[("accuracy", "Top-1 accuracy (%)")] == 91.5
    assert {r.dataset_type for r in card.data.eval_results} == {"uoft-cs/cifar10"}

    html = render(card.text)
    rows = ["".join(row.split("\n")).replace("<td>", "").replace('<td style="text-align:right">', "").split("</td>")
            for row in html.split("<tr>")]
    figures = {(row[0], row[2]): row[3] for row in rows if len(row) > 4}
    assert figures[("<strong>this model</strong>", "single view")] == "<strong>8.50</strong>"
    assert figures[("this model", "averaged with the mirrored image")] == "8.10"
    assert figures[("report", "")] == "22.08"
    assert "<td>best</td>" in html
    assert "curves.png" in html
    assert "masks.png" in html
    assert 'timm.create_model("hf-hub:alice/net", pretrained=True)' in card.text
    for heading in ("Results", "How to load", "Recipe", "Limits of use"):
        assert f"<h2>{heading}</h2>" in html


ODD = [
    "<script>alert(1)</script>", 'say "hi": \'x\'', "two\nlines\r\n---\nlicense: evil", "| a | b |", "`x` **y** _z_",
    "[a](javascript:x) ![i](y)", "- item", "# heading", "{{ card_data }} {% raw %}", "\\ & &amp; \x00\x1b[31m \ud800",
    "~~s~~ $x$ www.example.com a@b.c", "!!python/object:os.system", "1.", "Ünïcödé 漢字 ✓",
]


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_card_of_odd_input(hub, run_dir, odd):
    def change(result):
        result["dataset"] = odd
        result["recipe"] = result["selection"] = odd
        result["settings"] = {odd: odd}
        result["hardware"] = {"name": odd}
        result["command"] = f"python ``` {odd}"
    edit(run_dir / "result.json", change)
    push_to_hub(run_dir, REPO)
    card = hub.repos[REPO].files["README.md"].decode()
    metadata = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    shown = plain(odd)
    assert metadata["model-index"][0]["results"][0]["dataset"]["name"] == shown
    assert metadata["license"] == "apache-2.0"
    html = render(ModelCard(card).text)
    cell = f"<td>{entities.escape(shown, quote=False).replace(chr(34), '&quot;')}</td>"
    assert html.count(cell) >= 3, html  # a setting's name and value, and the recipe
    assert html.count("<h1>") == 1
    assert html.count("<h2>") == 5
    assert html.count("<script") == 0
    assert html.count("<img") == 2


def test_card_beside_report_and_paper(tmp_path):
    finish_run(tmp_path / "run", "ran_att56_cifar", channels=(8, 8, 16, 16), stem_chs=8)
    html = render(ModelCard(model_card(read_run(tmp_path / "run"), REPO)).text)
    errors = re.findall(r"<td>([a-z ]+)</td>\n<td>Attention-56</td>\n<td>([a-z ]*)</td>\n<td[^>]*>([0-9.]+)</td>", html)
    assert ("report", "", "14.43") in errors
    assert ("paper", "", "5.52") in errors
    assert ("paper", "naive attention learning", "5.89") in errors


def recipe_rows(run_dir):
    recipe = model_card(read_run(run_dir), REPO).split("\n## ")[3]
    return re.findall(r"<td>(.*?)</td>\n<td>(.*?)</td>", render(recipe))


def test_recipe_says_each_thing_once_and_leaves_out_what_is_off(run_dir):
    edit(run_dir / "result.json", lambda result: result.update(processes=1, epochs=[{}] * 3, seed=5, settings={
        "model": "plain_cnn8_cifar", "dataset": "cifar10", "recipe": "best", "epochs": 3, "seed": 0, "lr": 0.03,
        "mixup": 0.0, "milestones": [], "resolutions": [0.0, 24, 0.4, 32], "standardize": False, "limit": 0}))
    assert recipe_rows(run_dir) == [
        ("recipe", "best"), ("epochs", "3"), ("seed", "0"), ("lr", "0.03"), ("resolutions", "0.0, 24, 0.4, 32"),
        ("standardize", "False"), ("hardware", "a processor (device cpu)"), ("training time", "90 min"),
        ("images/s", "220"), ("versions", "torch 2.9")]
    edit(run_dir / "result.json", lambda result: result.update(processes=4))
    assert ("processes", "4") in recipe_rows(run_dir)


def test_text_and_code():
    assert plain(" two\r\nlines \x00\x1b[31m\ud800 ✓ ") == "two lines [31m ✓"
    assert text("a|b") == r"a\|b"
    assert code("a ```` b").startswith("`````\n")


def test_published_figures():
    assert len(set(PUBLISHED)) == len(PUBLISHED)
    assert all(0 < row.error < 100 for row in PUBLISHED)
    assert published_network("ran_att92_cifar_orig") == "Attention-92"
    assert published_network("ran_attnext56") == "AttentionNeXt-56"
    assert published_network("plain_cnn8_cifar") == "Plain CNN-8"
    assert published_network("resnet18") is None


def test_any_timm_model(hub, tmp_path, cli):
    model = timm.create_model("test_resnet", num_classes=10)
    timm.models.save_for_hf(model, tmp_path / "run", safe_serialization=True)
    (tmp_path / "run" / "result.json").write_text(json.dumps(
        {"model": "test_resnet", "dataset": "digits", "final": {"top1": 97.5}}))
    assert cli("push", tmp_path / "run", REPO)[0] == 0
    card = ModelCard(hub.repos[REPO].files["README.md"].decode())
    assert card.data.datasets is None
    assert "ran_layers" not in card.text
    timm.create_model(f"hf-hub:{REPO}", pretrained=True)


@pytest.mark.parametrize("name", timm.list_models(["ran_*", "plain_cnn8_*", "resnet18_cifar", "resnet18"]))
def test_the_card_says_how_its_network_is_found(name, run_dir):
    card = ModelCard(model_card(replace(read_run(run_dir), model=name), REPO))
    assert ("import ran_layers" in card.text) == ("pip install ran-layers" in card.text) == (name != "resnet18")
    assert ("ran-layers" in card.data.tags) == (name != "resnet18")
    assert ("arxiv:1704.06904" in card.data.tags) == name.startswith("ran_")


def test_the_card_of_a_large_network(run_dir):
    edit(run_dir / "result.json", lambda result: result.update(params=60_500_000, macs=1.94e9))
    assert "60.5 M parameters, 1.94 G multiply-adds for an image." in model_card(read_run(run_dir), REPO)
