"""The command line as a user types it, and what a run leaves behind."""

import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.error

import pytest
import safetensors
import safetensors.torch
import torch
from PIL import Image

import data
import demo
import evaluate
import images as images_module
import phase
import record
import run
from encoders import load_clip
from rivals import BACKBONES

ROWS = ("zeroshot", "backbone", "mao")


@pytest.fixture
def tune(eurosat, command, tmp_path):
    """tune(...) runs a small job on the small EuroSAT with the demo's CLIP: (code, stdout, stderr, folder of runs)."""

    def small(*arguments, out="runs"):
        code, stdout, stderr = command(
            "run.py",
            "--dataset",
            "eurosat",
            "--root",
            eurosat,
            "--clip",
            "demo",
            "--shots",
            4,
            "--epochs",
            4,
            "--workers",
            0,
            "--out",
            tmp_path / out,
            *arguments,
        )
        return code, stdout, stderr, tmp_path / out

    return small


def only(folder, method):
    (found,) = folder.glob(f"eurosat-coop-{method}-seed1*")
    return found


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_and_what_it_leaves(tune, command):
    code, out, err, runs = tune()
    assert code == 0, err
    table = [line.split("  ") for line in out.splitlines() if "  " in line]
    assert [row[0] for row in table[1:]] == ["zero-shot CLIP", "CoOp", "CoOp + MAO"]
    told = [line for line in out.splitlines() if line.startswith("Not told which half an image is from: Base ")]
    assert len(told) == 3 and "(CoOp)" in told[1] and "(CoOp + MAO; single final prompt: Base " in told[2]
    assert only(runs, "mao").name[:-7] == "eurosat-coop-mao-seed1-shots4-clip-demo-epochs4"  # and a hash
    for method in ROWS:
        result = json.loads((only(runs, method) / "result.json").read_text())
        assert result["h"] == evaluate.harmonic_mean(result["base"], result["new"])
        config = json.loads((only(runs, method) / "config.json").read_text())
        assert config["anchors"] == config["top_k"] == 2
        assert config["base_lr"] == {"zeroshot": None, "backbone": 0.002, "mao": 0.0035}[method]
        assert config["new_lr"] == (0.0035 if method == "mao" else None) and config["unlabeled_shots"] == 4
        assert config["versions"]["torch"] and len(config["clip_sha256"]) == 64
    mao = lines(only(runs, "mao"))
    assert [(line["phase"], line["epoch"]) for line in mao] == [("base", 1), ("base", 2), ("new", 1), ("new", 2)]
    assert [line["lr"] for line in mao] == [1e-5, 0.0035, 1e-5, 0.0035]
    assert 2 <= mao[0]["candidates"] <= 4 and mao[2]["candidates"] == 5  # H <= b*K; all new classes
    assert 0 <= mao[2]["pseudo_label_accuracy"] <= 100
    prompts = safetensors.torch.load_file(only(runs, "mao") / "new.safetensors")
    assert {name: tuple(value.shape) for name, value in prompts.items()} == {"ctx": (4, 128)}
    assert not (only(runs, "backbone") / "new.safetensors").exists()

    code, again, _ = command("run.py", "--eval", *(only(runs, method) for method in ROWS))
    assert code == 0
    tables = [[line.split() for line in text.splitlines() if "CoOp" in line or "CLIP" in line] for text in (out, again)]
    assert sorted(tables[0]) == sorted(tables[1]) and len(tables[0]) == 6


def test_the_embedded_default(command, tmp_path):
    rows = ["--method", "zeroshot", "mao", "--plot"]
    code, out, err = command("run.py", "--shots", 1, "--epochs", 2, *rows, "--out", tmp_path)
    assert code == 0, err
    pictures = sorted((path.parent.name.split("-")[2], path.name) for path in tmp_path.rglob("*.png"))
    assert pictures == [("mao", "confusion.png"), ("mao", "curves.png"), ("zeroshot", "confusion.png")]
    (folder,) = tmp_path.glob("demo-coop-zeroshot-seed1-shots1-epochs2-*")
    zero_shot = json.loads((folder / "result.json").read_text())
    assert 60 <= zero_shot["base"] <= 80 and 60 <= zero_shot["new"] <= 80
    line, _ = lines(next(tmp_path.glob("demo-coop-mao-*")))
    assert 16 < line["candidates"] <= 32  # b*K = 32 of 50 classes, duplicates deleted


@pytest.mark.parametrize("backbone", ["maple", "promptsrc"])
def test_backbones_that_prompt_the_image_side(tune, command, backbone):
    code, out, err, runs = tune(
        "--backbone", backbone, "--method", "backbone", "mao", "--depth", 2, "--pseudo-labeler", "tuned"
    )
    assert code == 0, err
    folders = [next(runs.glob(f"eurosat-{backbone}-{method}-*")) for method in ("backbone", "mao")]
    settings = json.loads((folders[1] / "config.json").read_text())["settings"]
    assert settings["depth"] == 2 and settings["n_ctx"] == (2 if backbone == "maple" else 4)
    code, again, err = command("run.py", "--eval", *folders)
    assert code == 0, err
    name = BACKBONES[backbone].__name__
    tables = [[line.split() for line in text.splitlines() if line.startswith(name)] for text in (out, again)]
    assert tables[0] == tables[1] and len(tables[0]) == 2


@pytest.mark.parametrize("backbone, precision", [("coop", "bf16"), ("coop", "fp16"), ("promptsrc", "bf16")])
def test_half_precision_follows_float32(command, tmp_path, backbone, precision):
    """Two epochs on the demo, the second at the full learning rate: losses within 1%, the prompts' way within 10%."""
    found = []
    for kind in ("fp32", precision):
        code, _, err = command(
            "run.py",
            "--backbone",
            backbone,
            "--method",
            "backbone",
            "--shots",
            2,
            "--epochs",
            2,
            "--precision",
            kind,
            "--workers",
            0,
            "--out",
            tmp_path / kind,
        )
        assert code == 0, err
        (folder,) = (tmp_path / kind).iterdir()
        prompts = safetensors.torch.load_file(folder / "base.safetensors")
        found.append(([line["loss"] for line in lines(folder)], prompts))
    (losses, prompts), (half_losses, half_prompts) = found
    assert half_losses == pytest.approx(losses, rel=0.01) and half_losses != losses
    run.torch.manual_seed(1)
    start = BACKBONES[backbone](load_clip("demo")[0], ["a"]).ctx
    way, half_way = prompts["ctx"] - start, half_prompts["ctx"] - start
    assert half_prompts["ctx"].dtype == run.torch.float32 and (half_way - way).norm() < 0.1 * way.norm()


def test_the_same_bits_whatever_the_workers(tune):
    files = []
    for workers in (0, 2):
        *_, runs = tune("--method", "mao", "--workers", workers, out=f"runs{workers}")
        files.append([(only(runs, "mao") / name).read_bytes() for name in ("base.safetensors", "new.safetensors")])
    assert files[0] == files[1]
    *_, runs = tune("--method", "mao", "--seed", 2, out="runs-seed2")
    (seed2,) = runs.iterdir()
    assert (seed2 / "base.safetensors").read_bytes() != files[0][0]


def test_tuning_reads_no_label_of_a_new_class_and_no_test_image(tune, monkeypatch):
    """With other answers and other test images, the same prompts; the scores are what changes."""
    *_, runs = tune("--method", "mao", "backbone")
    open_task = data.open_task

    def tampered(*arguments, **options):
        task = open_task(*arguments, **options)
        task.new_answers = [(label + 1) % 5 for label in task.new_answers]
        items = [[path, (label + 1) % 5, name] for path, label, name in task.tests["new"].items]
        for half, tampered_items in (("base", items), ("new", items[:5])):
            task.tests[half] = task.tests[half]._replace(items=tampered_items)
        return task

    monkeypatch.setattr(data, "open_task", tampered)
    *_, other = tune("--method", "mao", "backbone", out="tampered")
    for method, names in (("mao", ["base.safetensors", "new.safetensors"]), ("backbone", ["base.safetensors"])):
        for name in names:
            assert (only(runs, method) / name).read_bytes() == (only(other, method) / name).read_bytes()
    assert [line["loss"] for line in lines(only(runs, "mao"))] == [line["loss"] for line in lines(only(other, "mao"))]


@pytest.mark.parametrize(
    "options",
    [
        "--backbone coop",
        "--backbone maple --depth 2 --pseudo-labeler tuned",
        "--backbone promptsrc --depth 2",
        "--backbone coop --cache-views 2",
        "--backbone coop --no-reg-new",
        "--backbone coop --pseudo-labeler tuned --no-base",
        "--backbone coop --pseudo-label-view center --pseudo-labels confident --confidence 0.35",
        "--backbone coop --pseudo-labels balanced --unlabeled-shots 2",
        "--backbone maple --depth 2 --pseudo-labels soft",
    ],
)
def test_labels_on_disk_that_nobody_may_read(tune, eurosat, options):
    """The new classes' training images and all test images get other classes on disk: the same prompts."""

    def left(out):
        code, _, err, runs = tune("--method", "mao", *options.split(), out=out)
        assert code == 0, err
        (folder,) = runs.iterdir()
        states = [(folder / name).read_bytes() for name in ("base.safetensors", "new.safetensors")]
        return states, json.loads((folder / "config.json").read_text())["test_images"], lines(folder)

    before = left("before")
    path = eurosat / "eurosat" / "split_zhou_EuroSAT.json"
    split = json.loads(path.read_text())
    names = {label: name for _, label, name in split["train"]}

    def other(label):  # the next class of the same half: whole classes are exchanged, so that the draw is the same
        return (label + 1) % 5 + 5 * (label // 5)

    for part in ("train", "test"):
        for item in split[part]:
            if part == "test" or item[1] >= 5:
                item[1:] = other(item[1]), names[other(item[1])]
    path.write_text(json.dumps(split))
    after = left("after")
    assert before[0] == after[0] and before[1] != after[1]
    assert [line["loss"] for line in before[2]] == [line["loss"] for line in after[2]]


def test_a_random_draw_of_unlabeled_images_reads_no_label(tune, eurosat):
    """Every label of a new-class training image is dealt out anew: the same images, and the same prompts."""
    draws = []
    path = eurosat / "eurosat" / "split_zhou_EuroSAT.json"
    split = json.loads(path.read_text())
    for out in ("before", "after"):
        code, _, err, runs = tune("--method", "mao", "--unlabeled-draw", "random", "--unlabeled-shots", 2, out=out)
        assert code == 0, err
        (folder,) = runs.iterdir()
        prompts = (folder / "new.safetensors").read_bytes()
        task = data.open_task(data.open_dataset("eurosat", eurosat), 4, 2, unlabeled_draw="random")
        draws.append((task.new_train, prompts))
        assert len(task.new_train) == 2 * 5 == len(set(task.new_train))
        new = [item for item in split["train"] if item[1] >= 5]
        dealt = [item[1:] for item in new]
        random.Random(7).shuffle(dealt)
        for item, (label, name) in zip(new, dealt):
            item[1:] = label, name
        path.write_text(json.dumps(split))
    assert draws[0] == draws[1]


def test_other_ways_to_label(tune):
    """Each way leaves a whole run; a threshold above all confidences takes no image, and then no step."""
    prompts = {}
    for options in (
        "",
        "--pseudo-label-view center",
        "--pseudo-labels confident --confidence 0.35",
        "--pseudo-labels confident --confidence 1",
        "--pseudo-labels balanced",
        "--pseudo-labels soft",
    ):
        code, _, err, runs = tune("--method", "mao", *options.split(), out=f"runs{len(prompts)}")
        assert code == 0, err
        (folder,) = runs.iterdir()
        prompts[options] = (folder / "new.safetensors").read_bytes()
        first = (folder / "base.safetensors").read_bytes()
        if options.endswith("confidence 1"):
            assert "pseudo_label_accuracy" not in lines(folder)[-1]
            assert safetensors.torch.load(prompts[options])["ctx"].equal(safetensors.torch.load(first)["ctx"])
    assert [list(prompts.values()).index(v) for v in prompts.values()] == list(range(len(prompts)))


@pytest.mark.parametrize(
    "switch, phases, candidates",
    [
        ("--no-new", ["base"] * 2, {"base": (2, 4)}),
        ("--no-base", ["base"] * 4 + ["new"] * 2, {"base": (5, 5), "new": (5, 5)}),
        ("--no-reg-base", ["base"] * 2 + ["new"] * 2, {"base": (5, 5), "new": (5, 5)}),
        ("--no-reg-new", ["base"] * 2 + ["new"] * 2, {"base": (2, 4), "new": (10, 10)}),
        ("--pseudo-labeler tuned", ["base"] * 2 + ["new"] * 2, {"base": (2, 4), "new": (5, 5)}),
    ],
)
def test_ablations(tune, switch, phases, candidates):
    code, _, err, runs = tune("--method", "mao", *switch.split())
    assert code == 0, err
    found = lines(only(runs, "mao"))
    assert [line["phase"] for line in found] == phases and switch.strip("-").replace(" ", "-") in only(runs, "mao").name
    for line in found:
        low, high = candidates[line["phase"]]
        assert low <= line["candidates"] <= high


def test_cached_views(tune):
    """The phases run on them, with pixels where the image side is prompted."""
    code, _, err, runs = tune("--cache-views", 3)
    assert code == 0 and "caching 3 views of 20 images, 0.0 MiB" in err, err
    assert only(runs, "mao").name[:-7].endswith("-cache-views3") and len(lines(only(runs, "mao"))) == 4
    for backbone in ("maple", "promptsrc"):
        code, _, err, _ = tune("--cache-views", 3, "--backbone", backbone, "--method", "mao")
        assert code == 0 and "caching 3 views of 20 images, 0.2 MiB" in err, err


def test_cached_views_are_the_augmented_images():
    task = data.open_task(data.open_dataset("demo-ice"), shots=1)
    images = images_module.Images(task.new_train, task.read, images_module.train_transform(32, (0.3, 1)))

    def encode(images):
        return images.flatten(1) / 255

    cached = images_module.CachedViews(images, 4, True, encode, seed=1, phase=2)
    (pixels, features), index = cached[7, 13]
    again, _ = images[7, images_module.augmentation_seed(1, 2, 0, 1 * 50 + 7)]  # 13 % 4 = view 1 of image 7
    assert index == 7 and torch.equal(pixels, again) and (features.float() - again.flatten() / 255).abs().max() < 1e-3
    assert len({bytes(cached[7, view][0][0].numpy().tobytes()) for view in range(4)}) == 4
    alone = images_module.CachedViews(images, 4, False, encode, seed=1, phase=2)
    assert torch.equal(alone[7, 13][0], features)


def test_views_that_memory_will_not_hold(tune, monkeypatch):
    monkeypatch.setattr(images_module, "free_mib", lambda: 0.1)
    code, _, err, _ = tune("--cache-views", 3, "--backbone", "maple", "--method", "backbone")
    assert code == 2 and "3 views of 20 images take 0 MiB, and 0 MiB of memory are free: lower --cache-views" in err


def test_the_learning_rate_by_hand():
    rates = [phase.learning_rate(epoch, 4, 0.1) for epoch in (1, 2, 3, 4)]
    assert rates == pytest.approx([1e-5, 0.1, 0.05 * (1 + 0.5**0.5), 0.05])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dataset", "eurosatt"], "there is no dataset 'eurosatt': did you mean eurosat"),
        (["--backbone", "coup"], "invalid choice: 'coup' (choose from 'coop', 'maple', 'promptsrc'"),
        (["--top-k", "6"], "top-k is 6, but there are 5 classes"),
        (["--shots", "0"], "0 is not a whole number of 1 or more"),
        (["--epochs", "1"], "1 is not a whole number of 2 or more"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--seed", "9" * 30], "is not a whole number of 0 or more"),
        (["--shots", "1.5"], "1.5 is not a whole number of 1 or more"),
        (["--clip", "nowhere.pt"], "there is no CLIP 'nowhere.pt'"),
        (["--clip", __file__], "is not a CLIP checkpoint"),
        (["--n-ctx", "80"], "does not fit CLIP's 77 positions"),
        (["--depth", "2"], "--depth is no setting of coop"),
        (["--backbone", "maple", "--depth", "5"], "a prompt depth of 5 does not fit"),
        (["--prompts", "3"], "--prompts is no setting of coop"),
        (["--backbone", "tcp", "--insert-before", "9"], "--insert-before 9 does not fit: this CLIP takes 1 to 3"),
        (["--backbone", "kgcoop", "--sentences", "x.json"], "--sentences is no setting of kgcoop"),
        (["--backbone", "coprompt", "--sentences", "nowhere.json"], "cannot read --sentences nowhere.json"),
        (["--backbone", "coprompt"], "coprompt needs sentences on the classes: give --sentences FILE"),
        (["--backbone", "cocoop", "--pseudo-labeler", "tuned"], "--pseudo-labeler tuned has no place with cocoop"),
        (["--backbone", "coprompt", "--cache-views", "2"], "--cache-views has no place with coprompt"),
    ],
)
def test_bad_input_is_one_sentence(tune, arguments, message):
    code, out, err, runs = tune("--method", "mao", *arguments)
    last = err.replace("\r", "\n").splitlines()[-1]
    assert code == 2 and out == "" and message in last and "Traceback" not in err
    assert not runs.exists()


def test_warnings(tune):
    code, _, err, _ = tune("--method", "mao", "--anchors", 3, "--epochs", 3)
    assert code == 0 and "warning: b*K = 3*2 exceeds the 5 base classes" in err
    assert "warning: --epochs 3 leaves MAO a phase of one epoch" in err


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_stops_the_run(tune, eurosat, workers):
    for path in (eurosat / "eurosat" / "2750" / "River").glob("River_[78].jpg"):  # test images
        path.write_bytes(b"")
    code, _, err, _ = tune("--workers", workers)
    assert code == 2 and "Traceback" not in err
    assert "cannot read the image" in err.splitlines()[-1] and "River_7.jpg" in err.splitlines()[-1]


def test_an_infinite_loss_keeps_the_last_good_epoch(tune):
    code, _, err, runs = tune("--method", "backbone", "--lr", "1e30")
    assert code == 2 and "the base phase diverged in epoch" in err and "lower --lr" in err
    state = safetensors.torch.load_file(only(runs, "backbone") / "base.safetensors")
    assert state["ctx"].isfinite().all() and f"epoch {len(lines(only(runs, 'backbone')))}'s prompts are kept" in err


def test_without_a_network(command, tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, err = command("run.py", "--dataset", "eurosat", "--root", tmp_path / "data")
    assert code == 2 and "eurosat is not in" in err and "could not be downloaded" in err and "Traceback" not in err
    assert not (tmp_path / "data").exists()
    code, _, err = command("run.py", "--clip", "ViT-B/16")
    assert code == 2 and "CLIP ViT-B/16 could not be downloaded" in err and "Traceback" not in err


def test_a_full_disk(tune, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    code, _, err, runs = tune("--method", "backbone")
    assert code == 2 and "config.json (No space left on device): make room" in err and "Traceback" not in err
    assert not [path for path in runs.rglob("*") if path.is_file()]


def test_an_out_that_cannot_be_a_folder(tune, eurosat):
    code, _, err, _ = tune("--method", "backbone", out="datasets/eurosat/split_zhou_EuroSAT.json")
    assert code == 2 and "cannot make the folder" in err and "Traceback" not in err


def test_prompts_of_another_clip_or_backbone(tune, command):
    *_, runs = tune("--method", "backbone")
    config = only(runs, "backbone") / "config.json"
    prompts = only(runs, "backbone") / "base.safetensors"
    good, text = prompts.read_bytes(), config.read_text()
    state = safetensors.torch.load(good)
    with safetensors.safe_open(prompts, "pt") as file:
        header = json.loads(file.metadata()["mao"])
    for change, message in (
        ({"clip_sha256": "0" * 64}, "for another CLIP"),
        ({"backbone": "cocoop"}, "backbone 'cocoop'"),
    ):
        prompts.write_bytes(safetensors.torch.save(state, {"mao": json.dumps(header | change)}))
        code, _, err = command("run.py", "--eval", prompts.parent)
        assert code == 2 and message in err
    prompts.write_bytes(good[:50])
    code, _, err = command("run.py", "--eval", prompts.parent)
    assert code == 2 and "is not a file of prompts" in err
    prompts.write_bytes(good)
    for content, message in (
        (text[:40], "config.json is broken"),
        ("{}", "config.json is broken ('dataset' is missing)"),
        (text.replace('"seed": 1', '"sead": 1'), "config.json is broken ('seed' is missing"),
        (text.replace('"lr": null', '"lr": NaN'), "config.json is broken (NaN is not a number"),
        (text.replace('"lr": null', '"rate": 1'), "config.json is broken ('rate' is not known here"),
        (text.replace('"n_ctx": 4', '"n_ctx": 10000000000000'), "config.json is broken ('settings'"),
        (text.replace('"n_ctx": 4', '"n_ctxx": 4'), "a setting 'n_ctxx', which coop does not know"),
        (text.replace('"n_ctx": 4', '"n_ctx": 8'), "do not fit the settings"),
        (text.replace('"coop"', '"vpt"'), "is of a backbone 'vpt'"),
    ):
        config.write_text(content)
        code, _, err = command("run.py", "--eval", prompts.parent)
        assert code == 2 and message in err and "Traceback" not in err
    code, _, err = command("run.py", "--eval", config)
    assert code == 2 and "give a folder of a run" in err


def test_a_finished_run_is_lost_to_nothing_but_a_finished_one(tune, command, eurosat, monkeypatch):
    """A run that fails leaves the one before it, whole, as `.previous`; and data that moved are found by --root."""
    *_, runs = tune("--method", "mao")
    folder = only(runs, "mao")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    read, broken = images_module.FolderReader.__call__, images_module.UnreadableImage("cannot read the image")

    def fail(*arguments, decode=True):
        if decode:
            raise broken

    monkeypatch.setattr(images_module.FolderReader, "__call__", fail)
    assert tune("--method", "mao", "--force")[0] == 2
    previous = folder.with_name(folder.name + ".previous")
    assert {path.name: path.read_bytes() for path in previous.iterdir()} == before
    monkeypatch.setattr(images_module.FolderReader, "__call__", read)
    assert tune("--method", "mao")[0] == 0 and not previous.exists()
    moved = eurosat.rename(eurosat.with_name("moved"))
    assert command("run.py", "--eval", folder, "--root", moved)[0] == 0
    (folder / "new.safetensors").unlink()
    code, _, err = command("run.py", "--eval", folder, "--root", moved)
    assert code == 2 and "new.safetensors is missing" in err


def test_ctrl_c_exits_with_130_and_leaves_nothing_half_written(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "run.py", "--method", "backbone", "--out", str(tmp_path)],
        cwd=pathlib.Path(run.__file__).parent,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.time() + 120
    while not list(tmp_path.rglob("metrics.jsonl")) and time.time() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("result.json"))
    (folder,) = tmp_path.iterdir()
    assert lines(folder) and safetensors.torch.load_file(folder / "base.safetensors")


@pytest.mark.parametrize(
    "options, message",
    [
        ("--no-base --no-new", "--no-base and --no-new leave nothing of MAO"),
        ("--no-base --backbone coprompt", "leave nothing of MAO"),
        ("--no-base --top-k 3", "--top-k has no effect with --no-base"),
        ("--no-new --unlabeled-shots 3", "--unlabeled-shots has no effect with --no-new"),
        ("--backbone coprompt --pseudo-labeler tuned", "--pseudo-labeler has no effect with --backbone coprompt"),
        ("--confidence 0.5", "--confidence has no effect with --pseudo-labels top1"),
        (
            "--pseudo-labels balanced --pseudo-label-view center",
            "--pseudo-label-view has no effect with --pseudo-labels",
        ),
        ("--no-new --pseudo-labels soft", "--pseudo-labels has no effect with --no-new"),
        ("--backbone dept --pseudo-labels soft", "--pseudo-labels soft has no place with dept"),
        ("--protocol few-shot --unlabeled-draw random", "--unlabeled-draw has no place in the few-shot protocol"),
        ("--n-ctx 8 --ctx-init photo", "--n-ctx has no place with --ctx-init"),
    ],
)
def test_an_option_without_effect_is_refused(command, tmp_path, options, message):
    code, out, err = command("run.py", *options.split(), "--out", tmp_path / "runs")
    assert code == 2 and message in err and err.count("\n") == 1 and out == "" and not (tmp_path / "runs").exists()


def test_eval_refuses_other_classes_and_other_test_images(tune, command, eurosat):
    *_, runs = tune("--method", "backbone")
    split = eurosat / "eurosat" / "split_zhou_EuroSAT.json"
    text = split.read_text()
    for change, message in (
        (lambda text: text.replace('"Forest"', '"Wood"'), "was tuned on other classes than"),
        (lambda text: text.replace("River_7.jpg", "River_8.jpg"), "was scored on other test images than the lists"),
    ):
        split.write_text(change(text))
        code, _, err = command("run.py", "--eval", only(runs, "backbone"))
        assert code == 2 and message in err and err.count("\n") == 1


def test_eval_scores_the_same_images_of_a_folder_that_has_changed(eurosat, command, tmp_path):
    """The run keeps its lists: new images are not scored, least of all those that it was tuned on."""
    photos = eurosat / "eurosat" / "2750"
    ask = ["run.py", "--dataset", "folder", "--root", photos, "--clip", "demo", "--shots", 2, "--epochs", 2]
    code, out, err = command(*ask, "--method", "backbone", "--workers", 0, "--out", tmp_path / "runs")
    assert code == 0, err
    (run_folder,) = (tmp_path / "runs").iterdir()
    for number in range(5):
        shutil.copy(photos / "River" / "River_1.jpg", photos / "Forest" / f"A{number}.jpg")
    code, again, err = command("run.py", "--eval", run_folder)
    assert code == 0 and "has changed since the run: 5 images are new and 0 missing" in err
    assert [line for line in out.splitlines() if "CoOp" in line] == [
        line for line in again.splitlines() if "CoOp" in line
    ]
    for path in (photos / "Forest").iterdir():
        path.unlink()
    code, _, err = command("run.py", "--eval", run_folder)
    assert code == 0 and "test images are missing" in err and "the rest is scored" in err
    code, _, err = command("run.py", "--eval", run_folder, "--root", tmp_path)
    assert code == 2 and "none of the run's" in err.splitlines()[-1]


@pytest.fixture
def stopped(own_command, tmp_path):
    """stopped(seed) is the folder of a row that was tuned to its end and stopped before it was scored."""

    def run(seed, *more):
        def stop(*_):
            raise OSError("stopped")

        score, evaluate.score = evaluate.score, stop
        try:
            assert own_command("--seed", seed, *more)[0] == 2
        finally:
            evaluate.score = score
        (folder,) = (tmp_path / "runs").glob(f"*seed{seed}*")
        return folder

    return run


@pytest.fixture
def own_command(command, tmp_path):
    ask = ["run.py", "--shots", 1, "--epochs", 2, "--method", "backbone", "--workers", 0, "--out", tmp_path / "runs"]
    return lambda *more: command(*ask, *more)


def test_what_a_stopped_run_kept_is_its_own_and_whole(stopped, own_command):
    one, two = stopped(1), stopped(2)
    whole = (one / "resume.pt").read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content, message in (
        (flipped, "its bytes are not those that were written"),
        (whole[:100], "its bytes are not those that were written"),
        ((two / "resume.pt").read_bytes(), "it is of another run than the config.json beside it"),
    ):
        (one / "resume.pt").write_bytes(content)
        code, _, err = own_command("--seed", 1, "--resume")
        assert code == 2 and message in err.splitlines()[-1] and "add --force to start over" in err.splitlines()[-1]
    (one / "resume.pt").write_bytes(whole)
    (one / "metrics.jsonl").write_text("junk")
    code, table, _ = own_command("--seed", 1, "--resume")
    assert code == 0 and len(lines(one)) == 2
    (two / "config.json").write_text("{")
    assert own_command("--seed", 2, "--resume")[0] == 2 and own_command("--seed", 2, "--force")[0] == 0


def test_force_replaces_no_run_of_other_images(stopped, own_command, tmp_path):
    classes = tmp_path / "photos"
    for name, number in itertools.product("abc", range(4)):
        (classes / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(classes / name / f"{number}.png")
    of = ("--dataset", "folder", "--root", classes, "--clip", "demo")
    folder = stopped(1, *of)
    (classes / "a" / "0.png").unlink()
    code, _, err = own_command("--seed", 1, *of, "--force")
    assert code == 2 and "holds a stopped run of another training_images" in err and (folder / "resume.pt").exists()


def test_scores_that_are_not_finite_are_none(own_command, command, tmp_path):
    """Prompts that went too far in the last step, and such prompts from outside: no class is the highest."""
    code, out, err = own_command("--lr", "1e30")
    assert code == 2 and out == "" and "are not finite numbers" in err.splitlines()[-1], err
    (prompts,) = (tmp_path / "runs").glob("*/base.safetensors")
    (tmp_path / "names.txt").write_text("red\nblue\n")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    ask = ["--prompt", prompts, "--classes", tmp_path / "names.txt", "--out", tmp_path / "a.csv"]
    code, out, err = command("predict.py", tmp_path / "a.png", *ask)
    assert code == 2 and "are not finite numbers" in err.splitlines()[-1] and not (tmp_path / "a.csv").exists()
    code, out, err = command("predict.py", *ask[:4], "--export", tmp_path / "head.safetensors")
    assert code == 2 and "are not finite" in err.splitlines()[-1] and not (tmp_path / "head.safetensors").exists()


def test_eval_says_what_differs_and_takes_no_other_options(tune, command):
    code, _, err = command("run.py", "--eval", "nowhere")
    assert code == 2 and "config.json is missing" in err
    *_, runs = tune("--method", "backbone", "mao")
    folder, other = only(runs, "backbone"), only(runs, "mao")
    code, _, err = command("run.py", "--eval", folder, "--seed", 7)
    assert code == 2 and "--seed has no effect with --eval: leave it out" in err
    result = json.loads((folder / "result.json").read_text())
    assert "result.json has" not in command("run.py", "--eval", folder)[2]
    (folder / "result.json").write_text(json.dumps({**result, "base": result["base"] / 2}))
    code, _, err = command("run.py", "--eval", folder)
    assert code == 0 and f"has {result['base'] / 2:.2f} for base, and this is {result['base']:.2f}" in err
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "test_images": "0" * 64}))
    code, _, err = command("run.py", "--eval", other)
    assert code == 2 and "was scored on other test images than the lists have now" in err


def test_other_sentences_are_another_run(own_command, tmp_path):
    file, captions = tmp_path / "sentences.json", demo.sentences()
    ask = ("--backbone", "coprompt", "--recipe", "paper", "--sentences", file)
    file.write_text(json.dumps(captions))
    assert own_command(*ask)[0] == 0
    file.write_text(json.dumps({name: found[:2] for name, found in captions.items()}))
    code, _, err = own_command(*ask)
    assert code == 2 and "holds a finished run of another sentences_sha256" in err


def test_one_folder_a_run(eurosat, command, tmp_path):
    """Two --root of one name have two folders; what is there is shown, and tuned again by --force alone."""
    ask = ["run.py", "--dataset", "folder", "--clip", "demo", "--shots", 2, "--epochs", 2, "--method", "backbone"]
    ask += ["--workers", 0, "--out", tmp_path / "runs", "--root"]
    for site in "ab":
        shutil.copytree(eurosat / "eurosat" / "2750", tmp_path / site / "photos")
    _, table, _ = command(*ask, tmp_path / "a" / "photos")
    (folder,) = (tmp_path / "runs").iterdir()
    assert command(*ask, tmp_path / "b" / "photos")[0] == 0 and len(list((tmp_path / "runs").iterdir())) == 2
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, again, err = command(*ask, tmp_path / "a" / ".." / "a" / "photos")  # the same place
    assert code == 0 and again == table and "is there already: its scores are shown; --force tunes it again" in err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert command(*ask, tmp_path / "a" / "photos", "--force")[0] == 0
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after["base.safetensors"] == before["base.safetensors"] and after["metrics.jsonl"] != before["metrics.jsonl"]
    (tmp_path / "a" / "photos" / "Forest" / "Forest_1.jpg").unlink()  # the same settings, of other images
    for more in ([], ["--force"]):
        code, _, err = command(*ask, tmp_path / "a" / "photos", *more)
        assert code == 2 and f"{folder} holds a finished run of another training_images" in err.splitlines()[-1]
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == after


def test_names_of_folders():
    def name(**changed):
        return record.folder_name("folder", "coop", "mao", 1, changed)

    assert record.folder_name("demo", "coop", "mao", 1, {}) == "demo-coop-mao-seed1"
    assert name(lr=0.00123456789) != name(lr=0.00123456788)  # both are shown as 0.00123457
    assert name(root="写真") != name(root="照片") and name(clip="a/clip.pt") != name(clip="b/clip.pt")
    assert len(name(root="x" * 250, clip="y" * 250).encode()) < 140
    assert record.folder_name("dtd", "coop", "mao", 1, {"root": "a"})[:-7] == "dtd-coop-mao-seed1"


def test_two_runs_cannot_write_into_one_folder(command, tmp_path):
    ask = ["run.py", "--shots", 1, "--epochs", 2, "--method", "zeroshot", "--workers", 0, "--out", tmp_path]
    name = record.folder_name("demo", "coop", "zeroshot", 1, {"shots": 1, "epochs": 2})
    with record.alone(tmp_path / name):
        code, _, err = command(*ask)
        assert code == 2 and "another run is writing into" in err and not list(tmp_path.glob("demo*"))
    assert command(*ask)[0] == 0 and [path.name[0] for path in tmp_path.iterdir()] == ["d"]
