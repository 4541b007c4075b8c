"""The command line as a user types it, and what a run leaves behind."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import psutil
import pytest
import safetensors.torch
import torch
from conftest import PROJECT, SMALL, draw, lines, make_eurosat, read, refuses, succeeds, table
from PIL import Image

import backbones
import predict
import run
from baselines import labelers
from encoders import load_clip
from harness import demo, features, image_files, images, options, runs, scores, tuning
from harness.clips import DEMO_SHA256
from harness.layouts import EUROSAT_NAMES

stopped = mock.patch.object(scores, "score", side_effect=OSError("stopped"))  # between tuning and scoring
few_templates = mock.patch.object(backbones, "TEMPLATES", backbones.TEMPLATES[:3])  # of PromptSRC; 60 take long


def only(folder, method="mao"):
    (found,) = folder.glob(f"*-{method}-seed*")
    return found


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All three rows, tuned once: .root, .out with their folders, .printed."""
    folder = tmp_path_factory.mktemp("finished")
    root = make_eurosat(folder / "datasets")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run.main(f"--dataset eurosat --root {root} {SMALL} --out {folder / 'runs'}".split())
    return types.SimpleNamespace(root=root, out=folder / "runs", printed=printed.getvalue())


# What a run leaves ----------------------------------------------------------------------------------------------------


def test_a_run_and_what_it_leaves(finished, command):
    assert only(finished.out).name[:-7] == "eurosat-coop-mao-seed1-shots4-clip-demo-epochs4"  # and a hash
    scored = ["base", "new", "h", "base_by_final_prompt", "one_list", "one_list_final", "balanced", "ece", "per_class"]
    names, printed = {"zeroshot": "zero-shot CLIP", "backbone": "CoOp", "mao": "CoOp + MAO"}, table(finished.printed)
    for method, rates in {"zeroshot": [None] * 2, "backbone": [0.002, None], "mao": [0.0035] * 2}.items():
        result, config = (read(only(finished.out, method), name) for name in ("result", "config"))
        shown = [*names[method].split(), *(f"{result[score]:.2f}" for score in scored[:3])]
        assert any(row[: len(shown)] == shown for row in printed)
        assert list(result) == [*scored, "learnable_parameters", "seconds", "peak_mib"]
        assert result["h"] == scores.harmonic_mean(result["base"], result["new"])
        assert set(result["one_list"]) == {"base", "new", "h", "all"}
        for half in ("base", "new"):  # 2 test images of each of 5 classes
            assert [row["images"] for row in result["per_class"][half]] == [2] * 5
            accuracies = [row["accuracy"] for row in result["per_class"][half]]
            assert result["balanced"][half] == result[half] == sum(accuracies) / 5
        assert config["anchors"] == config["top_k"] == 2 and config["unlabeled_shots"] == 4
        assert [recipe and recipe["lr"] for recipe in (config["base"], config["new"])] == rates
        assert config["versions"]["torch"] and len(config["clip_sha256"]) == 64
        assert runs.read_config(only(finished.out, method)).learner_settings == {"n_ctx": 4, "ctx_init": None}
    mao = [(line["phase"], line["epoch"], line["lr"]) for line in lines(only(finished.out))]
    assert mao == [("base", 1, 1e-5), ("base", 2, 0.0035), ("new", 1, 1e-5), ("new", 2, 0.0035)]
    state = safetensors.torch.load_file(only(finished.out) / "new.safetensors")
    assert {name: tuple(value.shape) for name, value in state.items()} == {"ctx": (4, 128)}
    assert not (only(finished.out, "backbone") / "new.safetensors").exists()
    again, err = succeeds(command("run.py --eval", *finished.out.iterdir()))
    assert sorted(table(again)) == sorted(table(finished.printed)) and "result.json has" not in err


def test_scores_by_hand():
    """Accuracy that hides a class, and the calibration error of four images in three bins."""
    labels, share = torch.tensor([0] * 8 + [1] * 2), torch.full((10,), 0.8)
    tests = {"accuracy": types.SimpleNamespace(names=["a", "b", "c"])}
    found = scores.by_class(tests, {"accuracy": (share, torch.zeros(10), labels, share)})
    assert found["balanced"] == {"accuracy": 50} and found["ece"]["accuracy"] == pytest.approx(0, abs=1e-5)
    rows = [list(row.values()) for row in found["per_class"]["accuracy"]]
    assert rows == [["a", 100, 8], ["b", 0, 2], ["c", None, 0]]
    told = "Accuracy: 80.00, mean of classes 50.00: 1 of 2 classes have 0%"
    assert [list(scores.unbalanced({"accuracy": score, **found})) for score in (80, 51)] == [[told], []]
    right, confidences = torch.tensor([True, False, True, True]), torch.tensor([0.62, 0.65, 0.95, 0.1])
    assert scores.calibration_error(right, confidences) == pytest.approx(100 * (0.27 + 0.05 + 0.9) / 4)


def test_the_classifier_of_a_run_is_what_generalized_accuracy_scores(finished):
    photos, run_folder = finished.root / "eurosat" / "2750", only(finished.out)
    paths, _, answers = zip(*read(photos.parent, "split_zhou_EuroSAT")["test"])
    names, confidences = zip(*predict.load_classifier(run_folder)([Image.open(photos / path) for path in paths]))
    right, result = torch.tensor([name == answer for name, answer in zip(names, answers)]), read(run_folder, "result")
    assert 100 * right.float().mean().item() == pytest.approx(result["one_list"]["all"])
    error = scores.calibration_error(right, torch.tensor(confidences))
    assert error == pytest.approx(result["ece"]["one_list"], abs=0.01)


def test_several_seeds_and_nothing_to_resume(tune):
    """The last table has the means, and the H of the mean Base and New. --resume tells a run of other settings."""
    out, err, folder = succeeds(tune("--method zeroshot backbone --seed 1 2 2"))
    assert re.findall(r"^few-shot draw: 4 shots, seed (.), SHA-256 \w{12}$", err, re.M) == ["1", "2"]
    found = [read(next(folder.glob(f"*backbone-seed{seed}*")), "result") for seed in (1, 2)]
    (base, other), (new, other_new) = ([result[half] for result in found] for half in ("base", "new"))
    assert "eurosat, seeds 1 2 (mean ± standard deviation), 4 shots" in out and len(table(out)) == 6
    cells, h = re.split(r"  +", out.splitlines()[-3]), scores.harmonic_mean((base + other) / 2, (new + other_new) / 2)
    assert cells[1] == f"{(base + other) / 2:.2f} ± {abs(base - other) / 2**0.5:.2f}" and cells[3][:5] == f"{h:.2f}"
    _, err, _ = succeeds(tune("--method backbone --epochs 2 --resume"))
    assert re.search("no stopped run to resume, so it starts; eurosat-coop-backbone-seed1.* epochs 4 instead of 2", err)


def test_a_disk_without_locks(tune):
    for error in (OSError(37, "No locks available"), NotImplementedError("flock")):
        with mock.patch("filelock.FileLock.acquire", side_effect=error):
            assert "cannot be locked (" in succeeds(tune("--method zeroshot"))[1]


def test_devices_and_cores(monkeypatch):
    chosen = mock.Mock()
    for name, value in {"is_available": lambda: True, "device_count": lambda: 2, "set_device": chosen}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert [tuning.choose_device(device) for device in (None, "cpu", "cuda:1")] == ["cuda", "cpu", "cuda:1"]
    chosen.assert_called_once_with("cuda:1")
    with pytest.raises(ValueError, match="--device cuda:2: .* it sees .*cpu, cuda:0, cuda:1, cuda"):
        tuning.choose_device("cuda:2")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.8.1"))
    with pytest.raises(ValueError, match="PyTorch 2.9 or newer is needed, and 2.8.1 is installed"):
        tuning.choose_device("cpu")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 7}, raising=False)
    assert images.default_workers() == 2


def test_the_embedded_default(command, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TEST", 5)  # images per class; 20 take long
    succeeds(command("run.py --shots 1 --epochs 2 --method zeroshot mao --out", tmp_path))
    result = read(only(tmp_path, "zeroshot"), "result")
    assert 60 <= result["base"] <= 80 and 60 <= result["new"] <= 80
    assert 16 < lines(only(tmp_path))[0]["candidates"] <= 32  # b*K = 32 of 50 classes, duplicates deleted


earlier = []  # prompts of the variants before
VARIANTS = [
    "",
    "--backbone maple --learner depth=2 --labeler tuned",
    "--backbone promptsrc --learner depth=2 depth_vision=2",
    "--cache-views 2",
    "--backbone promptsrc --cache-views 2 --learner depth=1",
    "--no-new",
    "--no-base --labeler tuned",
    "--no-reg-base",
    "--no-reg-new",
    "--sampler random",
    "--sampler random-classes",
    "--sampler clip-text",
    "--sampler clip-confusion",
    "--labeler confident",
    "--labeler soft",
    "--labeler whole",
    "--labeler balanced --unlabeled-shots 3",
]


@few_templates
@mock.patch.object(labelers, "THRESHOLD", 0.5)  # this CLIP is less sure of noise than of the demo
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_learn_from_no_label_that_nobody_may_read(variant, tune, command, eurosat):
    """Other labels on disk of new classes' training images and of all test images: bit-identical prompts.

    Before that, each variant has its phases and its candidates, prompts like no other variant's, and the same digits
    by --eval.
    """

    def left(out):
        rows = "mao" if variant else "backbone mao"
        printed, err, folder = succeeds(tune(f"--shots 1 --method {rows} {variant}", out=out))
        states = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}
        return states, [line["loss"] for line in lines(only(folder))], read(only(folder), "config"), printed, folder

    states, losses, config, printed, folder = left("before")
    phases = ["base"] * (4 if "no-base" in variant else 2) + ["new"] * (0 if "no-new" in variant else 2)
    base = (2, 5 if variant == "--sampler random" else 4)
    base = (5, 5) if "no-base" in variant or "no-reg-base" in variant else base
    for phase, line in zip(phases, lines(only(folder)), strict=True):
        low, high = base if phase == "base" else (10, 10) if variant == "--no-reg-new" else (5, 5)
        assert line["phase"] == phase and low <= line["candidates"] <= high
        assert 0 <= line.get("pseudo_label_accuracy", 0) <= 100
    last = (only(folder) / f"{phases[-1]}.safetensors").read_bytes()
    assert last not in earlier
    earlier.append(last)
    again, _ = succeeds(command("run.py --eval", *folder.iterdir()))
    assert sorted(table(again)) == sorted(table(printed))

    path = eurosat / "eurosat" / "split_zhou_EuroSAT.json"
    split = json.loads(path.read_text())
    names = {label: name for _, label, name in split["train"]}
    for item in [item for item in split["train"] if item[1] >= 5] + split["test"]:
        label = (item[1] + 1) % 5 + 5 * (item[1] // 5)  # whole classes are exchanged, so that the draw is the same
        item[1:] = label, names[label]
    path.write_text(json.dumps(split))
    other_states, other_losses, other_config, *_ = left("after")
    assert (states, losses) == (other_states, other_losses) and config["test_images"] != other_config["test_images"]


def test_bit_identical_for_any_number_of_workers(tune):
    found = []
    for seed, workers in ((1, 0), (1, 2), (2, 0)):
        ask = f"--method mao --anchors 3 --epochs 3 --seed {seed} --workers {workers}"
        _, err, folder = succeeds(tune(ask, out=f"{seed}{workers}"))
        assert "warning: b*K = 3*2 exceeds the 5 base classes" in err
        assert "warning: --epochs 3 leaves MAO a phase of one epoch" in err
        found.append([content(only(folder))[f"{name}.safetensors"] for name in ("base", "new")])
    assert found[0] == found[1] and found[0][0] != found[2][0]


@few_templates
@stopped
@pytest.mark.parametrize("backbone, precisions", [("coop", ["bf16", "fp16"]), ("promptsrc", ["bf16"])])
def test_half_precision_follows_float32(_, backbone, precisions, command, tmp_path):
    """Two epochs on the demo, the second at the full rate: losses within 1%, and what the prompts learn within 10%."""
    found = {}
    for kind in ("fp32", *precisions):
        ask = f"run.py --backbone {backbone} --method backbone --shots 1 --epochs 2 --precision {kind} --out"
        refuses(command(ask, tmp_path / kind), "stopped")
        state = safetensors.torch.load_file(only(tmp_path / kind, "backbone") / "base.safetensors")
        found[kind] = [line["loss"] for line in lines(only(tmp_path / kind, "backbone"))], state["ctx"]
    torch.manual_seed(1)
    start = run.LEARNERS[backbone](load_clip("demo")[0], ["a"]).ctx
    losses, context = found["fp32"]
    for half_losses, half_context in (found[kind] for kind in precisions):
        assert half_losses == pytest.approx(losses, rel=0.01) and half_losses != losses
        assert half_context.dtype == torch.float32
        assert (half_context - context).norm() < 0.1 * (context - start).norm()


def test_the_learning_rate_by_hand():
    rates = [run.learning_rate(epoch, 4, 0.1) for epoch in (1, 2, 3, 4)]
    assert rates == pytest.approx([1e-5, 0.1, 0.05 * (1 + 0.5**0.5), 0.05])


def test_names_of_folders():
    def name(**changed):
        return runs.folder_name(options.Settings(**changed), "mao")

    assert name() == "demo-coop-mao-seed1" == name(out="elsewhere", workers=3, force=True)
    assert name(lr=0.00123456789) != name(lr=0.00123456788)  # both are shown as 0.00123457
    assert name(dataset="folder", root="写真") != name(dataset="folder", root="照片")
    assert name(clip="a/clip.pt") != name(clip="b/clip.pt")
    assert len(name(root="x" * 250, clip="y" * 250).encode()) < 140
    assert name(dataset="dtd", root="a", sampler="random")[:-7] == "dtd-coop-mao-seed1-sampler-random"


# Options --------------------------------------------------------------------------------------------------------------


def test_help_is_short(command):
    for line, most in (("run.py --help", 16), ("run.py --help-all", 46)):
        code, out, _ = command(line)
        shown = [line.split()[0] for line in out.splitlines() if line.startswith("  -")]
        assert code == 0 and "--dataset" in shown and most - 4 <= len(shown) <= most
    for setting, known in {"backbone": run.LEARNERS, "sampler": run.SAMPLERS, "labeler": run.LABELERS}.items():
        assert set(known) <= set(re.findall(r"[\w-]+", options.FIELDS[setting].__metadata__[-1].description))


def test_a_command_of_experiments_is_a_file_too(tmp_path):
    """From any folder, and with the backend of a notebook, whose module this Python does not have."""
    ask, environment = "table5 --demo --quick --plan", {**os.environ, "MPLBACKEND": "module://nowhere"}
    ask = [sys.executable, PROJECT / "experiments" / "reproduce.py", *ask.split()]
    done = subprocess.run(ask, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "3 cells,   0 done" in done.stdout, done.stderr


WRONG = {
    "--device gpu": "argument --device: gpu does not fit",
    "--backbon maple": "unrecognized arguments: --backbon",
    "--dataset eurosatt": "there is no dataset 'eurosatt': did you mean eurosat",
    "--dataset a\x1b[2Jb": "there is no dataset 'a\\x1b[2Jb'",
    "--backbone coup": "invalid choice: 'coup' (choose from 'coop', 'maple', 'promptsrc'",
    "--top-k 51": "exceeds the 50 base classes",
    "--shots 0": "argument --shots: 0 does not fit",
    "--lr nan": "argument --lr: nan does not fit",
    f"--seed {'9' * 30}": "argument --seed",
    "--clip nowhere.pt": "there is no CLIP 'nowhere.pt'",
    "--n-ctx 8 --ctx-init photo": "--n-ctx has no effect with --ctx-init",
    "--learner depth=2": "coop has no setting depth: it has n_ctx, ctx_init",
    "--n-ctx 3 --learner n_ctx=4": "give each setting once, as NAME=VALUE",
    "--backbone maple --learner depth=x": "maple cannot have depth=x",
    "--backbone coprompt --learner sentences=nowhere.json": "cannot read --learner sentences=nowhere.json",
    "--backbone coprompt --cache-views 2": "--cache-views cannot be combined with coprompt",
    "--backbone coprompt --no-base": "--no-base",
    "--backbone cocoop --labeler tuned": "--labeler tuned cannot be combined with cocoop",
    "--backbone dept --labeler soft": "--labeler soft cannot be combined with dept",
    "--no-base --no-new": "leave nothing of MAO",
    "--no-base --top-k 3": "--top-k has no effect with --no-base",
    "--sampler random --top-k 3": "--top-k has no effect with --sampler random",
    "--protocol cross-dataset --targets demo-ice demo-sepia": "--targets has demo-sepia twice",
    "--targets demo-ice": "--targets has no effect",
    "--dataset folder": "needs --root",
    f"--cache {__file__}": "is a file: give a folder, or none",
    "--eval a --seed 7": "--seed has no effect with --eval",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_option_is_one_sentence(wrong, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuses(command(f"run.py {'' if 'eval' in wrong else '--epochs 2'}", *wrong.split(" ")), WRONG[wrong])
    assert not list(tmp_path.iterdir())


def test_views_that_memory_cannot_hold(tune, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=1e5))
    found = tune("--cache-views 3 --backbone maple --method backbone")
    refuses(found, "3 views of 20 images take 0 MiB; 0 MiB of memory are free: lower --cache-views")


# What CLIP encodes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def encoded(monkeypatch):
    """encoded() -> how many images CLIP has encoded since it was last called."""
    sizes, forward = [], torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda conv, x: sizes.append(len(x)) or forward(conv, x))
    return lambda: sum(sizes.pop() for _ in range(len(sizes)))


@pytest.mark.parametrize("backbone, counts", [("maple", [20, 40, 20, 20, 40, 0]), ("dept", [20, 0, 0, 0, 0, 0])])
def test_how_often_test_images_are_encoded(backbone, counts, tune, command, tmp_path, encoded):
    """10 + 10 images: by the plain row, by MAO, whose halves have their own prompts, by zero-shot CLIP; and again."""
    *_, folder = succeeds(tune(f"--backbone {backbone} --cache none --shots 1"))
    encoded()
    for row, count in zip(sorted(folder.glob("eurosat-*")) * 2, counts):
        succeeds(command("run.py --eval", row, "--cache", tmp_path / "cache"))
        assert encoded() == count


def test_features_on_disk_that_do_not_fit_are_encoded_again(encoded, tmp_path, monkeypatch, capsys):
    def encode(plain=False, **given):
        cache = options.Settings(**{"cache": str(folder), "device": "cpu", **given}), "the CLIP's SHA-256"
        read = image_files.FolderReader(tmp_path, plain)
        (f,) = features.frozen_features(clip_model, ["1.png"], read, "cpu", cache=cache)
        return encoded(), f.tolist()

    folder, clip_model, load = tmp_path / "cache", load_clip("demo")[0], features.load
    draw(tmp_path / "1.png")
    (_, f), (file,) = encode(), folder.glob("*.features")
    whole, left = file.read_bytes(), file.with_name(f".{file.name}.part")
    assert encode() == (0, f) == (0, encode(cache="none")[1])
    slow = mock.patch.object(features, "load", lambda file: [load(file), time.sleep(0.2)][0])
    with slow, ThreadPoolExecutor(2) as threads:  # the second one waits for the first one's
        found = list(threads.map(lambda place: encode(cache=place), [str(tmp_path / "two")] * 2))
    assert sum(count for count, _ in found) == 1
    monkeypatch.setattr(features, "LIMIT", 2 * len(whole))
    assert encode(precision="bf16")[0] == encode(plain=True)[0] == 1  # of another CLIP, and read in another way
    other, _ = sorted(folder.glob("*.features"), key=os.path.getmtime)  # two have room
    for damaged in (b"", whole[:50], whole[:-4], whole[:-1] + b"x", other.read_bytes()):
        file.write_bytes(damaged)
        left.write_bytes(b"of a killed writer")
        assert encode() == (1, f) and file.read_bytes() == whole and not left.exists()
    draw(tmp_path / "1.png", seed=7)
    assert encode()[0] == 1
    monkeypatch.setattr(features, "atomic_write", mock.Mock(side_effect=OSError("a full disk")))
    for place in (tmp_path / "1.png" / "is no folder", tmp_path / "full"):
        assert [encode(cache=str(place))[0] for _ in range(2)] == [1, 1]
        assert capsys.readouterr().err.count(f"features are not kept in {place}") == 1


# What goes wrong in a run ---------------------------------------------------------------------------------------------


def test_an_unreadable_image_stops_the_run(tune, eurosat):
    for path in (eurosat / "eurosat" / "2750" / "River").glob("River_[78].jpg"):  # test images
        path.write_bytes(b"")
    refuses(tune("--workers 1"), "cannot read the image", "River_7.jpg")


def test_prompts_that_went_too_far(tune, command, photos):
    """What diverges keeps the last good epoch; scores that are not finite numbers are none."""
    *found, folder = tune("--method backbone --lr 1e30", out="diverged")
    refuses(found, "the base phase diverged in epoch", "lower --lr")
    assert safetensors.torch.load_file(only(folder, "backbone") / "base.safetensors")["ctx"].isfinite().all()
    assert f"epoch {len(lines(only(folder, 'backbone')))}'s prompts are kept" in found[2]
    *found, folder = tune("--method backbone --epochs 2 --lr 1e30")
    refuses(found, "are not finite")
    shutil.copy(only(folder, "backbone") / "base.safetensors", "run")
    for more in ("--out a.csv 1.png", "--export head.safetensors"):
        refuses(command(f"predict.py --prompt run/base.safetensors --classes names.txt {more}"), "are not finite")
    assert not list(photos.glob("*.csv")) and not list(photos.glob("*.safetensors"))


def test_without_a_network(command, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", mock.Mock(side_effect=urllib.error.URLError("no network")))
    monkeypatch.setenv("HOME", str(tmp_path))
    refuses(command("run.py --dataset eurosat --root", tmp_path / "data"), "could not be downloaded", "eurosat")
    refuses(command("run.py --clip ViT-B/16"), "ViT-B/16", "no network")


def test_ctrl_c_exits_with_130_and_leaves_nothing_half_written(tmp_path):
    ask = [sys.executable, "run.py", "--method", "backbone", "--out", str(tmp_path)]
    default = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  # a shell's background jobs ignore it
    process = subprocess.Popen(ask, cwd=PROJECT, stderr=subprocess.PIPE, text=True, preexec_fn=default)
    deadline = time.time() + 120
    while not list(tmp_path.rglob("metrics.jsonl")) and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("result.json"))
    folder = only(tmp_path, "backbone")
    assert lines(folder) and safetensors.torch.load_file(folder / "base.safetensors")


# Runs that never mix --------------------------------------------------------------------------------------------------


def test_a_forced_rerun_keeps_the_finished_run(tune, eurosat, monkeypatch):
    """A finished run is shown, and tuned by --force alone; where that fails it is left, whole, as `.previous`."""
    _, printed, _, folder = tune("--method mao")
    mao, before = only(folder), content(only(folder))
    again, err, _ = succeeds(tune("--method mao", "--root", eurosat / ".." / "datasets"))  # the same place
    assert again == printed and "is there already" in err and "--force" in err
    assert content(mao) == before
    with mock.patch.object(images.KeptImages, "__call__", side_effect=images.UnreadableImage("cannot read the image")):
        refuses(tune("--method mao --force"), "cannot read the image")
    previous = mao.with_name(mao.name + ".previous")
    assert content(previous) == before
    assert succeeds(tune("--method mao --force")) and not previous.exists()
    after = content(mao)
    assert after["new.safetensors"] == before["new.safetensors"] and after["metrics.jsonl"] != before["metrics.jsonl"]


def test_a_folder_takes_no_run_of_other_data(eurosat, command, tmp_path):
    """Two --root of one name have two folders. A run of the same settings on other images is refused, even by force."""
    for site in "ab":
        shutil.copytree(eurosat / "eurosat" / "2750", tmp_path / site / "photos")
    ask = [f"run.py --dataset folder --method backbone {SMALL} --out", tmp_path / "runs", "--root"]
    succeeds(command(*ask, tmp_path / "a" / "photos"))
    with stopped:
        refuses(command(*ask, tmp_path / "b" / "photos"), "stopped")
    before = [content(folder) for folder in (tmp_path / "runs").iterdir()]
    for site, kind in (("a", "finished"), ("b", "stopped")):
        (tmp_path / site / "photos" / "Forest" / "Forest_1.jpg").unlink()
        for more in ([], ["--force"]):
            found = command(*ask, tmp_path / site / "photos", *more)
            refuses(found, f"holds a {kind} run of another", "training_images")
    assert len(before) == 2 and [content(folder) for folder in (tmp_path / "runs").iterdir()] == before


def test_other_sentences_are_another_run(tune, tmp_path):
    ask = f"--backbone coprompt --method backbone --epochs 2 --learner sentences={tmp_path / 'file.json'}"
    sentences = json.dumps({name: [f"{name} {number}." for number in range(3)] for name in EUROSAT_NAMES.values()})
    (tmp_path / "file.json").write_text(sentences)
    succeeds(tune(ask))
    (tmp_path / "file.json").write_text(sentences.replace("0.", "zero"))
    refuses(tune(ask), "holds a finished run of another", "files_sha256")


def test_two_runs_cannot_write_into_one_folder(tune):
    *_, folder = tune("--method zeroshot")
    (found,) = folder.iterdir()  # and no lock is left
    before = content(found)
    with runs.run_lock(found):
        refuses(tune("--method zeroshot --force"), "another run is writing into")
    assert content(found) == before


def test_what_a_stopped_run_kept_is_its_own_and_whole(tune):
    with stopped:
        for seed in (1, 2):
            *found, folder = tune(f"--method backbone --seed {seed}")
            refuses(found, "stopped")
    one, two = (next(folder.glob(f"*seed{seed}*")) for seed in (1, 2))
    whole, middle = (one / "resume.pt").read_bytes(), (one / "resume.pt").stat().st_size // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for kept, message in (
        (flipped, "its bytes are not those that were written"),
        (whole[:100], "its bytes are not those that were written"),
        ((two / "resume.pt").read_bytes(), "it is of another run than the config.json beside it"),
    ):
        (one / "resume.pt").write_bytes(kept)
        refuses(tune("--method backbone --resume"), message, "add --force to start over")
    (one / "resume.pt").write_bytes(whole)
    refuses(tune("--method backbone"), "add --resume to continue it, or --force to start over")
    (one / "metrics.jsonl").write_text("junk")
    assert succeeds(tune("--method backbone --resume")) and len(lines(one)) == 4 and not (one / "resume.pt").exists()
    (two / "config.json").write_text("{")
    refuses(tune("--method backbone --seed 2 --resume"), "config.json is broken")


# Scored again ---------------------------------------------------------------------------------------------------------


def edit(name, old, new):
    """A damage: in a file of the run, or of its data, a text is replaced."""

    def damage(folder, root):
        path = root / "eurosat" / name if name.startswith("split") else folder / name
        assert old.encode() in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))

    return damage


DAMAGES = [
    (edit("config.json", '"learner_settings"', '"settings"'), "config.json is broken (Object", "of this version"),
    (edit("config.json", '"seed": 1', '"sead": 1'), "config.json is broken (Object contains unknown field `sead`"),
    (edit("config.json", '"shots": 4', '"shots": "4"'), "config.json is broken (Expected", "`$.shots`"),
    (edit("config.json", '"shots": 4', '"shots": 0'), "config.json is broken (Expected", "`$.shots`"),
    (edit("config.json", '"n_ctx": 4', '"n_ctxx": 4'), "config.json", "n_ctxx"),
    (edit("config.json", '"n_ctx": 4', '"n_ctx": 8'), "config.json", "fit"),
    (edit("config.json", '"coop"', '"vpt"'), "'vpt'"),
    (edit("base.safetensors", DEMO_SHA256, "0" * 64), "another CLIP"),
    (lambda folder, _: (folder / "base.safetensors").write_bytes(b"1" * 50), "is not a file of prompts"),
    (lambda folder, _: (folder / "base.safetensors").unlink(), "base.safetensors is missing"),
    (edit("result.json", "{", "["), "result.json is broken"),
    (edit("split_zhou_EuroSAT.json", '"Forest"', '"Wood"'), "other classes"),
    (edit("split_zhou_EuroSAT.json", "River_7.jpg", "River_8.jpg"), "other test images"),
]


@pytest.mark.parametrize("damage, messages", [(damage, messages) for damage, *messages in DAMAGES])
def test_eval_refuses_what_does_not_fit(damage, messages, finished, command, tmp_path):
    folder = shutil.copytree(only(finished.out, "backbone"), tmp_path / "run")
    root = shutil.copytree(finished.root, tmp_path / "datasets")
    damage(folder, root)
    refuses(command("run.py --eval", folder, "--root", root), *messages)


def test_eval_warns_of_other_scores_and_finds_moved_data(finished, command, tmp_path):
    folder = shutil.copytree(only(finished.out, "zeroshot"), tmp_path / "run")
    result = read(folder, "result")
    (folder / "result.json").write_text(json.dumps({**result, "base": result["base"] / 2}))
    root = shutil.copytree(finished.root, tmp_path / "elsewhere")
    _, err = succeeds(command("run.py --eval", folder, "--root", root))
    assert f"has {result['base'] / 2:.2f} for base, and this is {result['base']:.2f}" in err
    refuses(command("run.py --eval", folder / "config.json"), "is not a folder")
