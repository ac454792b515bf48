"""The whole method through the command line, small; stopped and resumed; and refused."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from rrcm.certify import Settings
from rrcm.cli import main
from rrcm.quickstart import quickstart
from rrcm.report import average_certified_radius, read_results

TINY = [
    "encoder.width=16",
    "encoder.depth=2",
    "encoder.heads=2",
    "encoder.patch_size=4",
    "encoder.projector_hidden=16",
    "encoder.projector_dim=8",
    "pretrain.batch_size=32",
    "pretrain.warmup_steps=1",
    "pretrain.precision=float32",
    "finetune.precision=float32",
    "pretrain.log_every=1",
    "finetune.batch_size=256",
    "finetune.log_every=1",
    "finetune.warmup_epochs=0",
]


@pytest.fixture
def rrcm(monkeypatch, capsys):
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rrcm", *map(str, arguments)])
        code = 0
        before = signal.getsignal(signal.SIGTERM)
        try:
            main()
        except SystemExit as exit:
            code = exit.code or 0
        finally:
            signal.signal(signal.SIGTERM, before)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def refused(rrcm):
    """Runs a command that must be refused: exit code 2, one line; returns the line."""

    def run(*arguments):
        code, _, err = rrcm(*arguments)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2, err
        assert len(lines) == 1, err
        assert "Traceback" not in err
        return lines[0]

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny encoder and a classifier for sigma 0.25, trained for a few steps."""
    root = tmp_path_factory.mktemp("trained")
    for arguments in (
        ["pretrain", "-r", "digits", *TINY, "pretrain.steps=4", "-o", root / "pretrain"],
        [
            *["finetune", "-r", "digits", *TINY, "finetune.epochs=2", "--sigma", "0.25"],
            *["--encoder", root / "pretrain" / "encoder", "-o", root / "finetune"],
        ],
    ):
        subprocess.run([sys.executable, "-m", "rrcm.cli", *map(str, arguments)], check=True)
    return root


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_certify_report_and_predict(trained, rrcm, tmp_path):
    model = trained / "finetune" / "classifier"
    out = tmp_path / "certify"
    certify = ["certify", model, "--data", "digits", "--n0", 20, "--n", 100, "--stride", 90]
    code, printed, err = rrcm(*certify, "-o", out)
    assert code == 0, err
    assert "0.25" in printed
    header, *rows = map(json.loads, (out / "journal.jsonl").read_text().splitlines())
    assert header["settings"]["sigma"] == 0.25
    assert [row["index"] for row in rows] == [0, 90, 180, 270]

    assert rrcm(*certify, "-o", out)[0] == 0
    again = (out / "journal.jsonl").read_text().splitlines()[1:]
    assert list(map(json.loads, again)) == rows

    code, printed, _ = rrcm("report", out, "-o", tmp_path / "report")
    assert code == 0
    assert {f.name for f in (tmp_path / "report").iterdir()} >= {
        "table.md",
        "table.csv",
        "accuracy_radius.png",
        "accuracy_radius.svg",
    }

    picture = tmp_path / "digit.png"
    Image.new("L", (8, 8), 128).save(picture)
    code, printed, _ = rrcm("predict", model, picture, "--n", 100)
    assert code == 0
    assert str(picture) in printed
    assert "radius" in printed or "abstains" in printed


def test_training_logs_and_validates(trained):
    log = read_log(trained / "pretrain")
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert {"loss", "contrastive", "consistency", "grad_norm", "lr"} <= log[0].keys()
    epochs = [entry for entry in read_log(trained / "finetune") if "accuracy_0.5" in entry]
    assert [entry["epoch"] for entry in epochs] == [1.0, 2.0]
    assert {"accuracy_0", "accuracy_0.5", "accuracy_1", "accuracy_2"} <= epochs[0].keys()


def stop_when_logged(arguments, log, step, number):
    """Starts the command and sends the signal once its log has the step."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rrcm.cli", *map(str, arguments)], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert process.poll() is None, "ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, number)
    return process.wait(timeout=60)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_stopped_stage_ends_bit_for_bit_as_an_uninterrupted_one(
    trained, rrcm, tmp_path, stage, number
):
    if stage == "pretrain":
        command = ["pretrain", "-r", "digits", *TINY, "pretrain.steps=60"]
        command += ["pretrain.checkpoint_every=3"]
        result = "encoder"
    else:
        encoder = trained / "pretrain" / "encoder"
        command = ["finetune", "-r", "digits", *TINY, "finetune.epochs=12", "--sigma", 0.5]
        command += ["--encoder", encoder, "finetune.checkpoint_every=4"]
        result = "classifier"
    assert rrcm(*command, "-o", tmp_path / "whole")[0] == 0
    stopped = tmp_path / "stopped"
    code = stop_when_logged([*command, "-o", stopped], stopped / "log.jsonl", 7, number)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert rrcm(*command, "-o", stopped)[0] == 0

    whole = load_file(tmp_path / "whole" / result / "model.safetensors")
    resumed = load_file(stopped / result / "model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(whole[name].equal(resumed[name]) for name in whole)

    def steps(folder):
        return [{k: v for k, v in entry.items() if k != "seconds"} for entry in read_log(folder)]

    assert steps(stopped) == steps(tmp_path / "whole")


def test_quickstart_small_and_again(tmp_path):
    small = Settings(n0=20, n=100, stride=40)
    overrides = [*TINY, "pretrain.steps=4", "finetune.epochs=1"]
    for _ in range(2):  # the second time everything is there already
        screen = Console(record=True, width=100, file=io.StringIO())
        quickstart(tmp_path / "quickstart", screen, overrides, settings=small)
        text = screen.export_text()
        assert "Certified accuracy" in text
        assert "rrcm certify" in text
    files = {f.name for f in (tmp_path / "quickstart").iterdir()}
    assert files >= {
        *("pretrain", "finetune-0.25", "finetune-0.5", "finetune-1", "certify"),
        *("table.md", "table.csv", "accuracy_radius.png", "accuracy_radius.svg"),
        *("pictures.png", "pictures.svg"),
    }
    (results,) = [r for r in read_results(tmp_path / "quickstart") if r.sigma == 0.5]
    assert results.name == "pre-trained"
    assert results.index.tolist() == list(range(0, 360, 40))


@pytest.mark.slow
def test_pretraining_earns_its_place(tmp_path):
    """Quickstart's classifiers against the same encoder fine-tuned from random weights."""
    for name, from_scratch in (("with", False), ("without", True)):
        quickstart(tmp_path / name, Console(stderr=True), from_scratch=from_scratch)
    with_it, without = read_results(tmp_path / "with"), read_results(tmp_path / "without")
    assert [r.sigma for r in with_it] == [r.sigma for r in without] == [0.25, 0.5, 1.0]
    for better, worse in zip(with_it, without, strict=True):
        assert average_certified_radius(better) > 1.05 * average_certified_radius(worse)


@pytest.mark.parametrize(
    ("source", "settings"),
    [
        ("cifar10-jpeg/test.parquet", ["data.image_size=32", "data.channels=3"]),
        ("fashion-mnist/test.parquet", ["data.image_size=28", "data.channels=1"]),
        (
            "imagenet-sample",
            ["data.image_size=224", "data.channels=3", "encoder.patch_size=16"],
        ),
    ],
)
def test_a_few_steps_on_real_sets(shared, rrcm, tmp_path, source, settings):
    data = shared / "data" / source
    command = ["-r", "digits", *TINY, f"data.source={data}", *settings]
    out = tmp_path / "pretrain"
    views = ["pretrain.views=natural", "pretrain.steps=2", "pretrain.batch_size=16"]
    code, _, err = rrcm("pretrain", *command, *views, "-o", out)
    assert code == 0, err
    assert (out / "encoder" / "model.safetensors").exists()


def test_another_runs_folder_is_refused(trained, refused):
    command = ["pretrain", "-r", "digits", *TINY, "pretrain.steps=5", "-o", trained / "pretrain"]
    assert "pretrain.steps is 4 there and 5 here" in refused(*command)


def test_a_loss_that_is_not_finite_stops_the_run(trained, refused, tmp_path):
    pretrain = ["pretrain", "-r", "digits", *TINY, "pretrain.steps=9", "pretrain.lr=1e30"]
    line = refused(*pretrain, "pretrain.warmup_steps=0", "-o", tmp_path / "pretrain")
    assert "the pre-training loss is nan at step 1" in line
    finetune = ["finetune", "-r", "digits", *TINY, "finetune.lr=1e30", "--sigma", 0.25]
    line = refused(
        *finetune, "--encoder", trained / "pretrain" / "encoder", "-o", tmp_path / "finetune"
    )
    assert "the fine-tuning loss is nan at step 1" in line


def test_bad_sigma_n_and_alpha(trained, refused, tmp_path):
    encoder, model = trained / "pretrain" / "encoder", trained / "finetune" / "classifier"
    finetune = ["finetune", "-r", "digits", "--encoder", encoder, "-o", tmp_path / "x", "--sigma"]
    certify = ["certify", model, "--data", "digits", "-o", tmp_path / "x"]
    assert "sigma must be a positive number, got 0.0" in refused(*finetune, 0)
    assert "sigma" in refused(*certify, "--sigma", -1)
    assert "n must be" in refused(*certify, "--n", 0)
    assert "n0 must be" in refused(*certify, "--n0", 0)
    assert "alpha" in refused(*certify, "--alpha", 1.5)
    assert not (tmp_path / "x").exists()


def test_models_and_encoders_that_are_not_there(trained, refused, tmp_path):
    certify = ["--data", "digits", "-o", tmp_path / "x"]
    assert "no such folder" in refused("certify", tmp_path / "none", *certify)
    encoder = trained / "pretrain" / "encoder"
    assert "expected a Classifier" in refused("certify", encoder, *certify)
    finetune = ["finetune", "-r", "digits", "--sigma", 0.25, "-o", tmp_path / "x"]
    assert "no such folder" in refused(*finetune, "--encoder", tmp_path / "none")
    assert "give either --encoder DIR or --from-scratch" in refused(*finetune)
    other = [*finetune, "--encoder", encoder, "data.image_size=16"]
    assert "the encoder takes 8 pixels" in refused(*other)
    assert not (tmp_path / "x").exists()


def test_certify_runs_anyones_module(rrcm, refused, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n"
        "def model():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
        "def nothing():\n"
        "    return 3\n"
    )
    options = ["--data", "digits", "--n", 50, "--max-images", 2, "-o", tmp_path / "out"]
    sizes = ["--sigma", 0.5, "--image-size", 8, "--channels", 1]
    assert rrcm("certify", f"{file}:model", *options, *sizes)[0] == 0
    assert len((tmp_path / "out" / "journal.jsonl").read_text().splitlines()) == 3
    assert "needs --sigma" in refused("certify", f"{file}:model", *options)
    assert "name the function" in refused("certify", file, *options, *sizes)
    assert "no function 'other'" in refused("certify", f"{file}:other", *options, *sizes)
    assert "returned int" in refused("certify", f"{file}:nothing", *options, *sizes)
    assert "no such file" in refused("certify", tmp_path / "no.py:model", *options, *sizes)


def test_pictures_of_the_wrong_size_or_kind(trained, refused, rrcm, tmp_path):
    model = trained / "finetune" / "classifier"
    Image.new("L", (9, 8)).save(tmp_path / "wide.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "colour.png")
    (tmp_path / "text.png").write_text("not a picture")
    assert "wide.png is 9x8" in refused("predict", model, tmp_path / "wide.png")
    assert "colour.png" in refused("predict", model, tmp_path / "colour.png")
    assert "text.png" in refused("predict", model, tmp_path / "text.png")
    assert "none.png" in refused("predict", model, tmp_path / "none.png")
    code, printed, _ = rrcm("predict", model, tmp_path / "wide.png", "--n", 50, "--convert")
    assert code == 0
    assert "wide.png" in printed


def test_a_stopped_certification_says_how_to_go_on(trained, tmp_path):
    model, out = trained / "finetune" / "classifier", tmp_path / "certify"
    command = ["certify", model, "--data", "digits", "--n", 2000, "-o", out]
    process = subprocess.Popen(
        [sys.executable, "-m", "rrcm.cli", *map(str, command)], stderr=subprocess.PIPE, text=True
    )
    journal = out / "journal.jsonl"
    while not (journal.exists() and len(journal.read_text().splitlines()) > 3):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command to carry on" in err
    assert "Traceback" not in err


def test_saving_a_model_never_removes_other_files(shared, refused, tmp_path):
    folder = shared / "golden" / "reference-tiny"
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "a.tex").write_text("years of work")
    command = ["import-reference", folder / "nnet.pth", "--config", folder / "config.json"]
    assert "holds other files (a.tex)" in refused(*command, "-o", thesis)
    assert (thesis / "a.tex").read_text() == "years of work"


def test_a_model_file_that_fails_is_one_clear_line(refused, tmp_path):
    options = ["--data", "digits", "-o", tmp_path / "x", "--sigma", 0.5]
    options += ["--image-size", 8, "--channels", 1]
    for number, (text, words) in enumerate(
        [
            ("def model(:\n", "SyntaxError"),
            ("import nowhere\n", "ModuleNotFoundError"),
            ("def model():\n    raise KeyError('weights')\n", "KeyError at"),
            ("def model(size):\n    pass\n", "TypeError"),
        ]
    ):
        file = tmp_path / f"mine{number}.py"
        file.write_text(text)
        assert words in refused("certify", f"{file}:model", *options)
    file = tmp_path / "seven.py"
    file.write_text(
        "import torch\n"
        "def model():\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 7))\n"
    )
    assert "got [1, 7]" in refused("certify", f"{file}:model", *options)
    assert not (tmp_path / "x").exists()


def test_settings_that_cannot_train(refused, tmp_path):
    pretrain = ["pretrain", "-r", "digits", "-o", tmp_path / "x"]
    assert "warmup_steps 60 must be below steps 5" in refused(*pretrain, "pretrain.steps=5")
    assert "cannot be its own negative" in refused(*pretrain, "pretrain.batch_size=9999")
    assert not (tmp_path / "x").exists()


def test_an_unwritable_folder(trained, refused, tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    assert "Not a directory" in refused("pretrain", "-r", "digits", *TINY, "-o", out)
    certify = ["certify", trained / "finetune" / "classifier", "--data", "digits", "-o", out]
    assert str(out) in refused(*certify)


def test_import_reference(shared, rrcm, refused, tmp_path):
    folder = shared / "golden" / "reference-tiny"
    command = ["import-reference", folder / "nnet.pth", "--config", folder / "config.json"]
    assert rrcm(*command, "-o", tmp_path / "encoder")[0] == 0
    assert (tmp_path / "encoder" / "model.safetensors").exists()
    missing = ["import-reference", tmp_path / "none.pth", "--config", folder / "config.json"]
    assert "none.pth" in refused(*missing, "-o", tmp_path / "other")
