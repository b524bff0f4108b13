"""The study's runner and its tables, on a study of two tiny experiments."""
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cifar  # noqa: E402
import scaling  # noqa: E402
import study  # noqa: E402
import throughput  # noqa: E402
from small_training import CHANNELS  # noqa: E402
from timm import create_model  # noqa: E402

from harness.checkpoint import CheckpointWriter  # noqa: E402
from harness.environment import machine  # noqa: E402
from harness.recipes import make_recipe  # noqa: E402
from studies import experiments  # noqa: E402
from studies import report as study_report  # noqa: E402
from studies import results as study_results  # noqa: E402
from studies import summary as study_summary  # noqa: E402
from studies.experiments import EXPERIMENTS, TABLES, Experiment, Row, Table, cite  # noqa: E402
from studies.report import write_report  # noqa: E402
from studies.results import load_results  # noqa: E402

TINY = dict(model="plain_cnn8_cifar", dataset="digits", recipe="quick", args=("--limit", "64"),
            model_kwargs=(("channels", CHANNELS),))
STUDY = {"tiny-a": Experiment(**TINY), "tiny-b": Experiment(**{**TINY, "args": ("--limit", "64", "--lr", "0.01")})}
ROWS = (Row("A", "tiny-a", cite("report", "Plain CNN-8")), Row("B", "tiny-b", against="tiny-a"))


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A study of two experiments, and the arguments that keep it in a folder of its own."""
    for module in (study, study_results):
        monkeypatch.setattr(module, "EXPERIMENTS", STUDY)
    for module in (study, study_report):
        monkeypatch.setattr(module, "TABLES", {"tiny": Table("Tiny", "Two rates.", ROWS)})
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "results.md").write_text("# Results\n\n<!-- begin study -->\nold\n<!-- end study -->\n\nafter\n")
    return [word for name in ("runs", "results", "docs") for word in (f"--{name}", str(tmp_path / name))]


def result(error: float, epochs: int = 10, name: str = "tiny-a", seed: int = 0) -> dict:
    settings = dict(precision="fp32", epochs=epochs, model_kwargs=[f"channels={CHANNELS}"], batch_size=32,
                    label_noise=0.0, limit=64, holdout=0, **({"lr": 0.01} if name == "tiny-b" else {}))
    return dict(
        model="plain_cnn8_cifar", dataset="digits", recipe="quick", seed=seed, settings=settings,
        final={"error": error}, versions={"torch": "2.15.0"}, processes=1,
        hardware=study.hardware(torch.device("cpu")), images_per_s=100.0, params=2_000_000, macs=1_000_000,
        epochs=[{}] * epochs, command=f"python benchmarks/cifar.py --seed {seed}")


def save(folder: Path, name: str, epochs: int, *errors: float) -> None:
    folder.mkdir(exist_ok=True)
    for seed, error in enumerate(errors):
        file = folder / f"{name}-{epochs}ep-seed{seed}.json"
        file.write_text(json.dumps(result(error, epochs, name, seed)))


def test_every_experiment_is_a_network_and_a_recipe_that_exist():
    used = {row.experiment for table in TABLES.values() for row in table.rows}
    assert used == set(EXPERIMENTS)
    for table in TABLES.values():
        for row in table.rows:
            assert not row.against or row.against in {other.experiment for other in table.rows}
    networks = {}
    for experiment in EXPERIMENTS.values():
        args = experiments_args(experiment)
        make_recipe(args.recipe, args.dataset, args.overrides)
        networks[experiment.model, str(experiment.model_kwargs)] = experiment
    for experiment in networks.values():
        assert create_model(experiment.model, **dict(experiment.model_kwargs))


def experiments_args(experiment: Experiment):
    return study_results.parse_args(experiment.arguments())


def test_trunks_cost_what_their_rows_say():
    def size(name: str) -> tuple[int, int]:
        experiment = EXPERIMENTS[name]
        model = create_model(experiment.model, num_classes=10, **dict(experiment.model_kwargs))
        return sum(p.numel() for p in model.parameters()), study.count_macs(model)

    params, macs = size("att56-cifar10-best")
    assert size("trunk56-macs-best")[1] == pytest.approx(macs, rel=0.005)
    assert size("trunk56-params-best")[0] == pytest.approx(params, rel=0.005)
    assert EXPERIMENTS["trunk92-params-best"].model_kwargs == EXPERIMENTS["trunk92-noise10-best"].model_kwargs
    for network, recipe in (("orig92", "paper"), ("att92", "best")):
        params, _ = size(f"{network}-noise10-{recipe}")
        assert size(f"trunk92-noise10-{recipe}")[0] == pytest.approx(params, rel=0.005)


def test_arguments_reach_the_training_script():
    args = experiments_args(EXPERIMENTS["orig92-noise30-paper"])
    assert (args.model, args.label_noise, args.recipe) == ("ran_att92_cifar_orig", 0.3, "paper")
    args = experiments_args(EXPERIMENTS["trunk92-noise70-best"])
    assert (args.model, args.label_noise, args.recipe) == ("ran_att92_cifar", 0.7, "best")
    args = experiments_args(experiments.EXPERIMENTS["att56-naive-best"])
    assert args.model_kwargs == ['attention_args={"learning": "naive"}']


def test_only_runs_of_one_kind_of_training_are_compared(tiny, tmp_path):
    results = tmp_path / "results"
    save(results, "tiny-a", 8, 20.0, 22.0, 24.0)
    save(results, "tiny-b", 8, 20.5, 23.5, 90.0)
    other = results / "tiny-b-8ep-seed2.json"
    changed = json.loads(other.read_text())
    changed["settings"]["cpu_kernels"] = True
    other.write_text(json.dumps(changed))
    study.main(["--report", *tiny])
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "| 22.00 ± 2.12 (2 seeds) | +1.00 ± 6.50, too close to call | A |" in page  # seeds 0 and 1
    assert "| 90.00 (1 seed) | not compared: trained under other conditions | A |" in page
    for seed in (0, 1):
        (results / f"tiny-b-8ep-seed{seed}.json").unlink()
    study.main(["--report", *tiny])
    assert "| not compared: trained under other conditions |" in (tmp_path / "docs" / "results.md").read_text()


def test_tables_show_means_spreads_and_short_runs(tiny, tmp_path):
    save(tmp_path / "results", "tiny-a", 8, 20.0, 22.0)
    save(tmp_path / "results", "tiny-b", 8, 20.5, 21.7)
    save(tmp_path / "results", "tiny-a", 3, 40.0)
    save(tmp_path / "results", "tiny-b", 3, 45.0)
    study.main(["--report", *tiny])
    page = (tmp_path / "docs" / "results.md").read_text()
    hardware = f"{machine(result(0)['hardware'])}, fp32, torch 2.15.0"
    published = "22.08 (report, Plain CNN-8)"
    assert f"| A | {published} | 40.00 (1 seed) |  |  | 2.00 | 1.0 | **short**: 3 of 8 | {hardware} |" in page
    assert f"| A | {published} | 21.00 ± 1.41 (2 seeds) |  |  | 2.00 | 1.0 | 8 | {hardware} |" in page
    assert "| 45.00 (1 seed) | +5.00, spread unknown | A |" in page
    assert "| 21.10 ± 0.85 (2 seeds) | +0.10 ± 5.02, too close to call | A |" in page
    both = "python benchmarks/cifar.py --seed $seed --out runs/study/tiny-a-8ep-seed$seed"
    assert f"\nfor seed in 0 1; do {both}; done\n" in page
    assert "\npython benchmarks/study.py --table tiny --results runs/results\n```\n\n</details>" in page
    assert "\npython benchmarks/cifar.py --seed 0 --out runs/study/tiny-a-3ep-seed0\n" in page
    assert "Not run yet" not in page
    assert "old" not in page
    assert page.endswith("after\n")
    assert (tmp_path / "docs" / "assets" / "study-tiny.png").read_bytes().startswith(b"\x89PNG")
    # Written again, it stays as it is.
    write_report(tmp_path / "results", tmp_path / "docs")
    assert (tmp_path / "docs" / "results.md").read_text() == page


def test_settings_are_compared_on_the_images_that_were_held_out(tiny, tmp_path, monkeypatch, capsys):
    held = {name: Experiment(**{**TINY, "args": (*experiment.args, "--holdout", "16")})
            for name, experiment in STUDY.items()}
    monkeypatch.setattr(study_results, "EXPERIMENTS", held)
    monkeypatch.setattr(study_report, "TABLES", {"tiny": Table("Tiny", "Two rates.", ROWS, images="held-out")})
    for name, top1 in (("tiny-a", 75.0), ("tiny-b", 80.5)):
        save(tmp_path / "results", name, 8, 50.0)
        file = tmp_path / "results" / f"{name}-8ep-seed0.json"
        found = json.loads(file.read_text())
        found["settings"]["holdout"] = 16
        found["epochs"][-1] = {"eval_split": "held-out", "eval_top1": top1}
        file.write_text(json.dumps(found))
    study.main(["--report", *tiny])
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "held-out images, %" in page
    assert "our held-out errors" in page
    assert "| 25.00 (1 seed) |" in page
    assert "| 19.50 (1 seed) | -5.50, spread unknown | A |" in page
    assert "50.00" not in page  # the error on the test images
    del found["epochs"][-1]["eval_top1"]
    file.write_text(json.dumps(found))
    with pytest.raises(SystemExit):
        study.main(["--report", *tiny])
    assert "is damaged (KeyError('eval_top1')); remove it" in capsys.readouterr().err


def test_a_table_shows_errors_on_one_kind_of_images():
    for table in TABLES.values():
        for row in table.rows:
            assert ("--holdout" in EXPERIMENTS[row.experiment].args) == (table.images == "held-out"), row


def test_wrong_labels_of_an_earlier_version_are_no_result(tiny, tmp_path, monkeypatch, capsys):
    noisy = Experiment(**{**TINY, "args": ("--limit", "64", "--label-noise", "0.5")})
    monkeypatch.setattr(study_results, "EXPERIMENTS", {"tiny-a": noisy})
    save(tmp_path / "results", "tiny-a", 8, 20.0)
    file = tmp_path / "results" / "tiny-a-8ep-seed0.json"
    found = json.loads(file.read_text())
    found["settings"]["label_noise"] = 0.5
    file.write_text(json.dumps(found))
    with pytest.raises(SystemExit):
        study.main(["--report", *tiny])
    assert "(from before wrong labels had random numbers of their own); remove it" in capsys.readouterr().err
    file.write_text(json.dumps({**found, "labels_sha256": "0" * 64}))
    study.main(["--report", *tiny])


def test_intervals_are_pooled_over_the_rows_trained_alike(tiny, tmp_path, monkeypatch):
    others = {f"tiny-{letter}": Experiment(**{**TINY, "args": ("--limit", "64", "--lr", rate)})
              for letter, rate in (("b", "0.01"), ("c", "0.02"), ("d", "0.03"))}
    monkeypatch.setattr(study_results, "EXPERIMENTS", {**STUDY, **others})
    rows = (*ROWS, Row("C", "tiny-c", against="tiny-a"), Row("D", "tiny-d", against="tiny-a"))
    monkeypatch.setattr(study_report, "TABLES", {"tiny": Table("Tiny", "Rates.", rows), "again": Table("", "", rows)})
    save(tmp_path / "results", "tiny-a", 8, 20.0, 20.0, 20.0)
    save(tmp_path / "results", "tiny-b", 8, 20.9, 21.1, 21.0)
    save(tmp_path / "results", "tiny-c", 8, 20.8, 21.6, 21.2)
    save(tmp_path / "results", "tiny-d", 8, 21.0)
    save(tmp_path / "results", "tiny-b", 3, 80.0, 90.0)  # another length: no part of it
    save(tmp_path / "results", "tiny-a", 3, 20.0, 20.0)
    for file in (tmp_path / "results").glob("tiny-[cd]-*.json"):
        changed = json.loads(file.read_text())
        changed["settings"]["lr"] = {"c": 0.02, "d": 0.03}[file.name[5]]
        file.write_text(json.dumps(changed))
    study.main(["--report", *tiny])
    page = (tmp_path / "docs" / "results.md").read_text()
    # Variances 0, 0.01 and 0.16 of three seeds each: 2.447 * sqrt(0.17 / 3) * sqrt(2 / 3), and for one seed * sqrt(2).
    assert "| +1.00 ± 0.48 | A |" in page
    assert "| +1.20 ± 0.48 | A |" in page
    assert "| +1.00 ± 0.82 (1 seed) | A |" in page


def test_results_of_ones_own_have_a_page_of_their_own(tiny, tmp_path, monkeypatch):
    def execute(run, args, deadline):
        save(args.results, run.name, run.epochs, 30.0)
        return True

    monkeypatch.setattr(study, "execute", execute)
    before = (tmp_path / "docs" / "results.md").read_text()
    study.main(["--table", "tiny", "--epochs", "8", "--seeds", "0", "--results", str(tmp_path / "own" / "results")])
    assert (tmp_path / "own" / "results" / "runs").is_dir()
    page = (tmp_path / "own" / "results" / "results.md").read_text()
    assert page.startswith("# Results\n")
    assert "| B |  | 30.00 (1 seed) | +0.00, spread unknown | A |" in page
    assert (tmp_path / "own" / "results" / "assets" / "study-tiny.png").is_file()
    assert (tmp_path / "docs" / "results.md").read_text() == before


def test_rows_that_were_not_run_are_named_below_the_others(tiny, tmp_path):
    save(tmp_path / "results", "tiny-b", 8, 20.5, 21.7)
    study.main(["--report", *tiny])
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "| A |" not in page
    assert "\n\nNot run yet: A, published: 22.08 (report, Plain CNN-8).\n\n" in page


def test_the_printed_command_trains_every_seed_also_where_the_first_did_not_name_it(tiny, tmp_path):
    results = tmp_path / "results"
    save(results, "tiny-a", 8, 20.0, 22.0)
    for given in ("", " --seed=0", " --seed 0 --eval-every 1"):
        first = json.loads((results / "tiny-a-8ep-seed0.json").read_text())
        first["command"] = f"python benchmarks/cifar.py --epochs 8{given}"
        (results / "tiny-a-8ep-seed0.json").write_text(json.dumps(first))
        study.main(["--report", *tiny])
        page = (tmp_path / "docs" / "results.md").read_text()
        rest = given.replace(" --seed=0", "").replace(" --seed 0", "")
        command = f"python benchmarks/cifar.py --epochs 8{rest} --seed $seed --out runs/study/tiny-a-8ep-seed$seed"
        assert f"\nfor seed in 0 1; do {command}; done\n" in page


def test_committed_page_is_what_the_committed_results_say(tmp_path):
    docs = BENCHMARKS.parent / "docs"
    page = tmp_path / "results.md"
    page.write_text((docs / "results.md").read_text())
    write_report(study.RESULTS, tmp_path)
    assert page.read_text() == (docs / "results.md").read_text()


def test_budget_picks_what_fits(tiny, tmp_path):
    save(tmp_path / "results", "tiny-a", 10, 20.0)
    clock = study.Clock(tmp_path / "results", tmp_path / "runs", torch.device("cpu"))
    runs = study.plan(["tiny-a", "tiny-b"], 4, None)
    assert [(run.name, run.seed) for run in runs] == [("tiny-a", 0), ("tiny-b", 0), ("tiny-a", 1), ("tiny-b", 1)]
    seconds = clock.seconds(runs[0])
    macs = study.macs_of("plain_cnn8_cifar", json.dumps({"channels": CHANNELS}))
    assert seconds == pytest.approx(4 * 50_000 * macs / (100.0 * 1_000_000))
    # Of several runs the one in the middle counts, and those with other batches only where there are none with these.
    for images_per_s, batch_size in ((300.0, 32), (20.0, 32), (7.0, 64)):
        clock.add(dict(result(0), images_per_s=images_per_s, settings={"batch_size": batch_size}))
    assert clock.seconds(runs[0]) == pytest.approx(seconds)
    assert study.plan(["tiny-a", "tiny-a"], 4, [0, 0]) == runs[:1]
    chosen, left = study.choose(runs, clock, 2.5 * seconds)
    assert (chosen, left) == (runs[:2], runs[2:])
    assert study.choose(runs, clock, None) == (runs, [])
    assert study.choose(runs, clock, 0.5 * seconds) == (runs[:1], runs[1:]), "the first is begun, and goes on next time"
    # Of one that was interrupted after three of its four epochs, a quarter is left.
    (tmp_path / "runs" / runs[2].stem).mkdir(parents=True)
    with CheckpointWriter(tmp_path / "runs" / runs[2].stem) as writer:
        writer.save({}, {"epochs": [{}] * 3})
    assert clock.seconds(runs[2]) == pytest.approx(seconds / 4)
    (tmp_path / "runs" / runs[3].stem).mkdir()
    (tmp_path / "runs" / runs[3].stem / "checkpoint.safetensors").write_text("damaged")
    assert clock.seconds(runs[3]) == seconds, "the run itself tells"
    assert study.choose(runs, clock, 2.5 * seconds) == (runs[:3], runs[3:])


def test_runs_what_is_missing_stops_in_time_and_goes_on(tiny, tmp_path, capfd, monkeypatch):
    study.main(["--run", "tiny-a", "--epochs", "1", "--seeds", "0", *tiny])
    assert "tiny-a, seed 0, 1 epoch" in capfd.readouterr().out
    (saved,) = (tmp_path / "results").glob("*.json")
    assert saved.name == "tiny-a-1ep-seed0.json"
    before = saved.read_bytes()

    study.main(["--run", "tiny-a", "--epochs", "1", "--seeds", "0", *tiny])
    assert "nothing is missing" in capfd.readouterr().out
    assert saved.read_bytes() == before

    # A deadline in the past: the training starts and is told to stop.
    args = study.argparse.Namespace(
        runs=tmp_path / "runs", results=tmp_path / "results", nproc=1, data_dir=None, device="cpu", precision="fp32")
    run = study.Run("tiny-b", 1, 3)
    (tmp_path / "runs" / run.stem).mkdir(parents=True)
    assert not study.execute(run, args, study.time.monotonic())
    assert not run.result(args.results).exists()

    # One that was stopped after its first step is resumed.
    shutil.rmtree(tmp_path / "runs" / run.stem)
    with monkeypatch.context() as patch:
        patch.setattr(cifar.Display, "step", lambda *_: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            cifar.main([*run.experiment.arguments(), "--epochs", "1", "--seed", "3", "--device", "cpu", "--precision",
                        "fp32", "--out", str(tmp_path / "runs" / run.stem)])
    assert run.state(args.results, args.runs) == "interrupted"
    capfd.readouterr()
    assert study.execute(run, args, None)
    assert "resumed at step 1 of" in capfd.readouterr().out
    assert run.state(args.results, args.runs) == "done"
    assert set(load_results(args.results)) == {"tiny-a", "tiny-b"}
    study.main(["--list", *tiny])
    assert "tiny-a                       0 of 2 runs of 8 epochs; 1 of 1 epoch (short)" in capfd.readouterr().out


@pytest.mark.parametrize(("args", "message"), [
    (["--run", "nothing"], "--run nothing is not an experiment"),
    (["--all", "--budget", "-1"], "--budget must be above 0 minutes, got -1"),
    (["--all", "--budget", "nan"], "--budget must be above 0 minutes, got nan"),
])
def test_unusable_arguments(tiny, capsys, args, message):
    with pytest.raises(SystemExit) as exit_info:
        study.main([*args, *tiny])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize("script", [study, scaling, throughput])
def test_counts_begin_at_one(capsys, script):
    flag = "--epochs" if script is study else "--rounds"
    with pytest.raises(SystemExit) as exit_info:
        script.main([flag, "0"])
    assert exit_info.value.code == 2
    assert f"argument {flag}: must be at least 1, got 0" in capsys.readouterr().err


def test_a_result_of_another_run_is_not_taken(tiny, tmp_path, capsys):
    run = study.Run("tiny-b", 1, 3)
    folder = tmp_path / "runs" / run.stem
    folder.mkdir(parents=True)
    own = result(20.0, 1, "tiny-b", 3)
    for other, message in (
            ({"model": "plain_cnn8_cifar"}, "is damaged"),
            (dict(own, seed=4), "is of another run than tiny-b, seed 3, 1 epoch;"),
            (dict(own, settings=dict(own["settings"], lr=0.2)), "tiny-b, seed 3, 1 epoch (lr);"),
            (dict(own, settings=dict(own["settings"], label_noise=0.1)), "tiny-b, seed 3, 1 epoch (label_noise);"),
            (dict(own, settings=dict(own["settings"], cutmix=1.0)), "tiny-b, seed 3, 1 epoch (cutmix);"),
            (dict(own, settings=dict(own["settings"], initial_checkpoint="ab")), "1 epoch (initial_checkpoint);"),
            (dict(own, epochs=[]), "tiny-b, seed 3, 1 epoch (0 epochs are recorded);"),
            (dict(own, final={"error": float("nan")}), "is damaged"),
            ({key: value for key, value in own.items() if key != "macs"}, "is damaged")):
        (folder / "result.json").write_text(json.dumps(other))
        with pytest.raises(SystemExit) as exit_info:
            study.main(["--run", "tiny-b", "--epochs", "1", "--seeds", "3", *tiny])
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err
    assert not list((tmp_path / "results").iterdir())
    (folder / "result.json").write_text(json.dumps(own))
    study.main(["--run", "tiny-b", "--epochs", "1", "--seeds", "3", *tiny])
    assert (tmp_path / "results" / f"{run.stem}.json").is_file()


@pytest.mark.parametrize(("name", "text", "message"), [
    ("tiny-a-8ep-seed1.json", "{", "is damaged"),
    ("tiny-a-8ep-seed1.json", "null", "is damaged"),
    ("tiny-a-8ep-seed1.json", json.dumps({**result(20.0, 8, "tiny-a", 1), "processes": [1]}), "is damaged"),
    ("tiny-a-8ep-seed1.json", json.dumps(result(20.0, 8, "tiny-a", 0)), "is of another run than tiny-a, seed 1, 8 ep"),
    ("tiny-a-60ep-seed0.json", json.dumps(result(20.0, 8, "tiny-a", 0)), "is of another run than tiny-a, seed 0, 60"),
    ("tiny-a-8ep-seed0 (1).json", "{}", "is not the result of an experiment of the study"),
    ("tiny-c-8ep-seed0.json", "{}", "is not the result of an experiment of the study"),
])
@pytest.mark.parametrize("action", [["--list"], ["--report"], ["--run", "tiny-b"]], ids=lambda action: action[0])
def test_damaged_and_foreign_results_are_named(tiny, tmp_path, capsys, action, name, text, message):
    save(tmp_path / "results", "tiny-a", 8, 20.0)
    (tmp_path / "results" / name).write_text(text)
    with pytest.raises(SystemExit) as exit_info:
        study.main([*action, *tiny])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'results' / name} {message}")
    assert error.count("\n") == 1
    assert "old" in (tmp_path / "docs" / "results.md").read_text()


def test_a_run_that_fails_does_not_hold_up_the_others(tiny, tmp_path, capsys, monkeypatch):
    def execute(run, args, deadline):
        if run.name == "tiny-a":
            raise study.RunError(f"{run.title} ended with exit code 2; see above")
        save(args.results, run.name, run.epochs, 30.0)
        return True

    monkeypatch.setattr(study, "execute", execute)
    with pytest.raises(SystemExit) as exit_info:
        study.main(["--run", "tiny-a", "tiny-b", "--epochs", "8", "--seeds", "0", *tiny])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == (
        "failed: tiny-a, seed 0, 8 epochs ended with exit code 2; see above\n"
        "error: 1 of 2 runs failed: tiny-a, seed 0, 8 epochs\n")
    assert "| B |  | 30.00 (1 seed) |" in (tmp_path / "docs" / "results.md").read_text()


def test_all_rows_are_trained_in_one_precision(tiny, tmp_path, monkeypatch):
    commands = []

    class Training:
        returncode = 1

        def __init__(self, command):
            commands.append(command)

        def wait(self, timeout=None):
            return 1

    monkeypatch.setattr(study.subprocess, "Popen", Training)
    monkeypatch.setattr(study, "common_precision", lambda device: "bf16")
    for wanted in ([], ["--precision", "fp32"]):
        with pytest.raises(SystemExit):
            study.main(["--run", "tiny-a", "--epochs", "1", "--seeds", "0", *wanted, *tiny])
    folder = tmp_path / "runs" / study.Run("tiny-a", 1, 0).stem
    folder.mkdir(parents=True)
    with CheckpointWriter(folder) as writer:
        writer.save({}, {"epochs": []})
    with pytest.raises(SystemExit):  # goes on in the precision that its checkpoint has
        study.main(["--run", "tiny-a", "--epochs", "1", "--seeds", "0", *tiny])
    assert [command[-2:] for command in commands] == [
        ["--precision", "bf16"], ["--precision", "fp32"], [str(folder), "--resume"]]


def test_the_page_of_the_repository_is_not_overwritten_from_other_results(tiny, tmp_path, capsys, monkeypatch):
    repository = tmp_path / "docs" / "results.md"
    before = repository.read_text()
    monkeypatch.setattr(study, "execute", lambda run, args, deadline: pytest.fail("the folder is checked first"))
    for args, message in (
            (["--report", "--results", str(tmp_path / "typo")], f"error: there are no results in {tmp_path / 'typo'}"),
            (["--report", "--results", str(tmp_path / "typo"), "--docs", str(tmp_path / "docs")],
             f"error: there are no results in {tmp_path / 'typo'}"),
            (["--run", "tiny-a", "--docs", str(tmp_path / "typo")], "error: --docs must be a folder with results.md"),
            (["--run", "tiny-a", "--results", str(repository), "--docs", str(tmp_path / "docs")],
             f"error: --results {repository} is not a folder")):
        with pytest.raises(SystemExit) as exit_info:
            study.main(args)
        assert exit_info.value.code == 2
        assert capsys.readouterr().err.startswith(message)
    assert repository.read_text() == before


def test_page_without_the_marks(tiny, tmp_path, capsys):
    (tmp_path / "docs" / "results.md").write_text("# Results\n")
    with pytest.raises(SystemExit):
        study.main(["--report", *tiny])
    assert "must have the lines" in capsys.readouterr().err


def test_summary_takes_the_short_runs_with_most_seeds(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(study_summary, "COMPARISONS", (
        study_summary.Comparison("B against A", best=("tiny-b", "tiny-a"), report=("tiny-b", "missing"),
                                 published=((cite("report", "Plain CNN-8"), cite("report", "Attention-56")),)),))
    results = tmp_path / "results"
    save(results, "tiny-a", 8, 50.0)
    save(results, "tiny-b", 8, 40.0)
    save(results, "tiny-a", 10, 20.0, 22.0, 24.0)
    save(results, "tiny-b", 10, 30.0, 32.0, 54.0)
    other = results / "tiny-b-10ep-seed2.json"
    changed = json.loads(other.read_text())
    changed["settings"]["cpu_kernels"] = True  # not to be compared
    other.write_text(json.dumps(changed))
    (row,) = study_summary.summary(load_results(results)).splitlines()[2:]
    # sqrt((2 * 4 + 1 * 2) / 3) = 1.83 points from seed to seed; Student's t of 3 degrees of freedom is 3.18.
    assert row == "| B against A | **+10.00 ± 5.81** |  | +7.65 (report) |"
