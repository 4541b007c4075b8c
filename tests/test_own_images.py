"""Folders of one's own, images without labels, predictions; the other protocols; broken images and downloads."""

import csv
import io
import json
import pathlib

import evaluate
import gdown
import images
import layouts
import numpy as np
import pytest
import record
import torch
from PIL import Image

import data
from backbones import CoOp
from encoders import ZeroShot, as_clip_reads, clip, load_clip

SMALL = ["--clip", "demo", "--shots", 2, "--epochs", 4, "--workers", 0]
SOURCE = {"dataset": "demo", "root": None, "protocol": "cross-dataset", "shots": 1, "seed": 1}  # run.py's settings


def draw(path, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def own(tmp_path):
    """Three classes of ten images: a name with spaces and umlauts, one in capitals, one with an underscore."""
    for label, name in enumerate(["blaue Tür", "Red Door", "old_gate"]):
        for number in range(10):
            draw(tmp_path / "own" / name / f"Bild {number}.JPG", 10 * label + number)
    return tmp_path / "own"


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_a_folder_of_ones_own(own, command, tmp_path):
    code, out, err = command("data.py", "folder", "--root", own)
    assert code == 0 and "blaue Tür" in out and "folder: 3 classes, 'a photo of a {}.'" in out and err == ""
    lists = data.open_dataset("folder", own).split
    assert [len(lists[part]) for part in ("train", "val", "test")] == [15, 6, 9]
    assert [name for _, _, name in lists["test"][::3]] == ["Red Door", "blaue Tür", "old_gate"]
    (tmp_path / "link").symlink_to(own)
    assert data.open_dataset("folder", tmp_path / "link").split == lists
    link, runs = tmp_path / "link", tmp_path / "r"
    code, _, err = command("run.py", "--dataset", "folder", "--root", link, *SMALL, "--out", runs)
    assert code == 0, err
    folders = sorted(path.name for path in runs.iterdir())
    assert folders[0].startswith("folder-coop-backbone-seed1-root-link-shots2-clip-demo-epochs4-")


def test_train_and_test_folders(own, tmp_path):
    (own / "x").mkdir()
    for name in ("blaue Tür", "Red Door", "old_gate"):
        (own / "x" / "train").mkdir(exist_ok=True)
        (own / name).rename(own / "x" / "train" / name)
        draw(own / "x" / "test" / name / "1.png")
    lists = data.open_dataset("folder", own / "x").split
    assert [len(lists[part]) for part in ("train", "val", "test")] == [30, 0, 3]
    assert lists["test"][1] == ["test/blaue Tür/1.png", 1, "blaue Tür"]
    (own / "x" / "test" / "old_gate").rename(own / "x" / "test" / "OLD gate")  # the same to CLIP
    assert data.open_dataset("folder", own / "x").split["test"][0] == ["test/OLD gate/1.png", 2, "old_gate"]
    (own / "x" / "test" / "OLD gate").rename(own / "x" / "test" / "old house")
    with pytest.raises(ValueError, match="the class 'old_gate' has no test image"):
        data.open_dataset("folder", own / "x")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda own: own.rename(own.with_name("elsewhere")), "is not a folder"),
        (lambda own: [path.rename(own.parent / path.name) for path in own.iterdir()], "holds no class folders"),
        (lambda own: (own / "empty").mkdir(), "empty holds no images"),
        (lambda own: own.joinpath("Red Door").rename(own / "blaue Tür" / "Red Door"), "2 classes are too few"),
        (lambda own: [path.unlink() for path in list((own / "Red Door").iterdir())[1:]], "'Red Door' has no train"),
    ],
)
def test_a_bad_folder_is_one_sentence(own, command, damage, message):
    damage(own)
    code, out, err = command("run.py", "--dataset", "folder", "--root", own, "--clip", "demo", "--out", own / "runs")
    assert code == 2 and message in err and err.count("\n") == 1 and not (own / "runs").exists()


@pytest.mark.parametrize("twin", ["old gate", "Old_Gate", "BLAUE Tu\u0308r", "blaue  Tür"])
def test_names_that_are_one_to_clip_are_warned_about(twin, own, capsys):
    """Blank for underscore, case, and a decomposed letter: clip's tokenizer gives the same tokens."""
    for number in range(10):
        draw(own / twin / f"{number}.png")
    names = data.class_names(data.open_dataset("folder", own)).values()
    assert f"'{twin}'" in capsys.readouterr().err
    (one, other) = [name for name in names if as_clip_reads(name) == as_clip_reads(twin)]
    tokens = clip.tokenize([one.replace("_", " "), other.replace("_", " ")])
    assert torch.equal(*tokens) and len({as_clip_reads(name) for name in names}) == 3


def test_names_in_every_kind_of_file(own, tmp_path, command, capsys):
    """A byte order mark, CRLF and blanks; a new class that is a base class already; --new-test by what CLIP reads."""
    names = tmp_path / "names.txt"
    names.write_bytes("\ufeffFen\u00eatre \r\nRED door\r\n".encode())
    assert data.read_names(names) == ["Fenêtre", "RED door"]
    for name in ("Fene\u0302tre", "red_door"):
        draw(tmp_path / "labeled" / name / "1.png")
    draw(tmp_path / "new" / "1.png")
    settings = {"dataset": "folder", "root": own, "shots": 2, "seed": 1, "unlabeled": tmp_path / "new"}
    task = data.task_of({**settings, "new_classes": names, "new_test": tmp_path / "labeled"})
    assert "classes 'Red Door' and 'RED door' have one name to CLIP" in capsys.readouterr().err
    assert sorted(label for _, label, _ in task.tests["new"].items) == [0, 1]
    assert task.new_names == data.read_names(names)


def test_folders_named_by_a_file_and_words_of_ones_own(own, tmp_path, command):
    for text in ('\ufeff{"Red Door": "red door", "blaue Tür": "blue door", "old_gate": "gate"}',
                 "Red Door,red door\r\nblaue Tür,blue door\r\nold_gate,gate\r\n"):  # fmt: skip
        (tmp_path / "names").write_bytes(text.encode())
        source = data.open_dataset("folder", own, names=tmp_path / "names", template="a {} in Bonn.")
        assert list(data.class_names(source).values()) == ["red door", "blue door", "gate"]
    ask = ["run.py", "--dataset", "folder", "--root", own, *SMALL, "--out", tmp_path / "runs", "--method", "mao"]
    code, out, err = command(*ask, "--names", tmp_path / "names", "--template", "a {} in Bonn.")
    assert code == 0, err
    (run,) = (tmp_path / "runs").iterdir()
    config = json.loads((run / "config.json").read_text())
    assert config["templates"] == {"base": "a {} in Bonn.", "new": "a {} in Bonn."}
    assert config["classnames"] == ["red door", "blue door"]
    code, again, err = command("run.py", "--eval", run)
    assert code == 0 and again.splitlines()[3].split() == out.splitlines()[3].split()
    for text in ("a,x\na,y\n", '{"a": "x", "a": "y"}', "a,x\nb,x\n"):
        (tmp_path / "names").write_text(text)
        code, _, err = command(*ask, "--names", tmp_path / "names")
        assert code == 2 and ("'a' is there twice" in err or "gives two folders the name 'x'" in err), err
    (tmp_path / "names").write_text("Red Door,red door\n")
    for options, message in (
        (["--names", tmp_path / "names"], "no name for the class folder"),
        (["--names", "nowhere"], "cannot read --names nowhere"),
        (["--template", "a photo"], "needs {} once"),
        (["--template", "a {} or {}"], "needs {} once"),
        (["--template", "a {{}} photo"], "and no other braces"),  # which Python would read as the letters {}
        (["--template", "a {x} of {}"], "and no other braces"),
        (["--dataset", "demo", "--template", "a {}"], "--template is for --dataset folder"),
    ):
        code, _, err = command(*ask, *options)
        assert code == 2 and message in err.splitlines()[-1] and "Traceback" not in err


def test_three_images_have_one_to_test(own):
    for path in list((own / "Red Door").iterdir())[3:]:
        path.unlink()
    split = data.open_dataset("folder", own).split
    assert [sum(name == "Red Door" for _, _, name in split[part]) for part in ("train", "val", "test")] == [2, 0, 1]


def test_a_class_with_fewer_images_than_shots_gives_all(own):
    task = data.open_task(data.open_dataset("folder", own), shots=16)
    assert len(task.base_train) == 10 and len(task.new_train) == 5


def test_new_classes_without_labels(own, command, tmp_path):
    """Phase 2 on images of a folder; New and H are unknown until there are labeled ones."""
    names = tmp_path / "names.txt"
    names.write_text("Fenster\n\nDach und First\n", encoding="utf-8")
    for number in range(5):
        draw(tmp_path / "new" / ("deep" if number % 2 else ".") / f"{number}.png", 100 + number)
    ask = ["run.py", "--dataset", "folder", "--root", own, *SMALL, "--out", tmp_path / "runs"]
    ask += ["--unlabeled", tmp_path / "new", "--new-classes", names]
    code, out, err = command(*ask)
    assert code == 0, err
    table = [line.split() for line in out.splitlines()[2:6]]
    assert table[0][:3] == ["Base", "New", "H"] and all(row.count("-") >= 2 for row in table[1:])
    (folder,) = (tmp_path / "runs").glob("folder-coop-mao*")
    assert result(folder)["new"] is None and result(folder)["h"] is None
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["base"] * 2 + ["new"] * 2
    assert lines[-1]["candidates"] == 2 and "pseudo_label_accuracy" not in lines[-1]
    code, again, _ = command("run.py", "--eval", folder)
    assert code == 0 and again.splitlines()[3].split() == out.splitlines()[5].split()  # the MAO row

    for name in ("Fenster", "Dach und First"):
        draw(tmp_path / "labeled" / name / "1.png", 7)
    code, _, err = command(*ask, "--new-test", tmp_path / "labeled")
    assert code == 0, err
    (folder,) = (tmp_path / "runs").glob("folder-coop-mao*new-test*")
    assert result(folder)["new"] == 50  # two equal images of two classes

    # Predictions by those prompts.
    photos = tmp_path / "new"
    options = ["--prompt", folder / "new.safetensors", "--classes", names]
    code, out, err = command("predict.py", photos, *options, "--out", tmp_path / "found.csv")
    assert code == 0, err
    rows = list(csv.reader(io.StringIO((tmp_path / "found.csv").read_text())))
    assert rows[0] == ["path", "class", "confidence"] and len(rows) == 6
    assert {row[0] for row in rows[1:]} == {str(path) for path in photos.rglob("*.png")}
    assert {row[1] for row in rows[1:]} <= {"Fenster", "Dach und First"}
    assert all(0.5 <= float(row[2]) <= 1 for row in rows[1:])
    code, out, _ = command("predict.py", photos / "0.png", *options, "--out", tmp_path / "one.csv")
    shares = [float(line.split("%")[0]) for line in out.splitlines()[:2]]
    assert code == 0 and shares[0] >= shares[1] and sum(shares) == pytest.approx(100, abs=0.02)
    assert out.splitlines()[0].split("%")[1].strip() in (tmp_path / "one.csv").read_text()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--new-classes": None}, "go together"),
        ({"--unlabeled": None}, "go together"),
        ({"--unlabeled": "nowhere"}, "nowhere is not a folder"),
        ({"--unlabeled": "empty"}, "empty holds no images"),
        ({"--new-classes": "nowhere"}, "cannot read class names in nowhere"),
        ({"--new-classes": "twice.txt"}, "names 'a' twice"),
        ({"--new-classes": "empty.txt"}, "empty.txt is empty"),
        ({"--protocol": "few-shot"}, "it has no new phase"),
        ({"--targets": "demo-ice"}, "add --protocol cross-dataset"),
        ({"--root": None}, "needs --root"),
        ({"--new-test": "own"}, "that names.txt does not name"),
        ({"--new-test": "nowhere"}, "nowhere is not a folder"),
    ],
)
def test_bad_new_classes_are_one_sentence(own, command, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "new" / "1.png")
    (tmp_path / "empty").mkdir()
    for name, content in (("names.txt", "a\nb\n"), ("twice.txt", "a\nb\na\n"), ("empty.txt", "\n")):
        (tmp_path / name).write_text(content)
    options = {"--dataset": "folder", "--root": "own", "--unlabeled": "new", "--new-classes": "names.txt"}
    options = {**options, "--clip": "demo", **change}
    code, _, err = command("run.py", *[word for pair in options.items() if pair[1] for word in pair])
    assert code == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--prompt": "nowhere"}, "nowhere is missing"),
        ({"--prompt": "names.txt"}, "is not a file of prompts"),
        ({"--classes": "nowhere"}, "cannot read class names"),
        ({"--clip": "names.txt"}, "is not a CLIP checkpoint"),
        ({"image": "nowhere"}, "there is no image or folder nowhere"),
        ({"image": "broken.png"}, "cannot read the image broken.png"),
        ({"--out": "nowhere/x.csv"}, "must be a file in a folder that is there"),
        ({"--out": "1.png"}, "is the image too, which it would replace"),
        ({"--out": "./names.txt"}, "is --classes too, which it would replace"),
        ({"--export": "run/new.safetensors"}, "is --prompt too, which it would replace"),
        ({"--export": "x.csv"}, "is --export too, which it would replace"),
        ({"--prompt": "run"}, "run is a folder"),
    ],
)
def test_bad_predictions_are_one_sentence(command, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "1.png")
    (tmp_path / "broken.png").write_bytes(b"no PNG")
    (tmp_path / "names.txt").write_text("a\nb\n")
    clip_model, sha256 = load_clip("demo")
    config = {"dataset": "demo", "backbone": "coop", "settings": {}, "clip": "demo", "clip_sha256": sha256}
    record.Record(tmp_path / "run", config).prompts("new", CoOp(clip_model, ["a"]))
    options = {"--prompt": "run/new.safetensors", "--classes": "names.txt", "--out": "x.csv", **change}
    image = options.pop("image", "1.png")
    code, _, err = command("predict.py", image, *[word for pair in options.items() for word in pair])
    assert code == 2 and message in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_predictions_go_on_past_broken_images(command, tmp_path, workers):
    for name in ("1.png", "3.png"):
        draw(tmp_path / "photos" / name)
    (tmp_path / "photos" / "2.png").write_bytes(b"no PNG")
    (tmp_path / "names.txt").write_text("a\nb\n")
    clip_model, sha256 = load_clip("demo")
    config = {"dataset": "demo", "backbone": "coop", "settings": {}, "clip": "demo", "clip_sha256": sha256}
    record.Record(tmp_path / "run", config).prompts("new", CoOp(clip_model, ["a"]))
    options = ["--prompt", tmp_path / "run/new.safetensors", "--classes", tmp_path / "names.txt", "--workers", workers]
    code, out, err = command("predict.py", tmp_path / "photos", *options, "--out", tmp_path / "x.csv")
    assert code == 1 and out == f"3 images in {tmp_path / 'x.csv'}\n"
    headline, sentence = err.splitlines()[-2:]
    assert headline == "predict.py: 1 of 3 images have no class there:"
    assert sentence.startswith(f"cannot read the image {tmp_path / 'photos' / '2.png'} (") and "Traceback" not in err
    rows = list(csv.reader(io.StringIO((tmp_path / "x.csv").read_text())))
    assert rows[2] == [str(tmp_path / "photos" / "2.png"), "", ""] and all(rows[i][1] in "ab" for i in (1, 3))


# The other protocols --------------------------------------------------------------------------------------------------


def test_cross_dataset(command, tmp_path):
    """Table 2: the source, the targets and their average; five epochs at MAO's rate, the base phase alone."""
    ask = ["run.py", "--dataset", "demo-ice", "--protocol", "cross-dataset", "--shots", 1]
    code, out, err = command(*ask, "--targets", "demo-gold", "demo-plain", "--out", tmp_path)
    assert code == 0, err
    table = [line.split("  ") for line in out.splitlines()[2:]]
    assert out.splitlines()[2].split()[:4] == ["demo-ice", "demo-gold", "demo-plain", "Average"] and len(table) == 5
    for folder in tmp_path.iterdir():
        found, config = result(folder), json.loads((folder / "config.json").read_text())
        assert found["average"] == (found["demo-gold"] + found["demo-plain"]) / 2
        assert config["new_lr"] is None
        if config["method"] == "zeroshot":
            assert config["base_lr"] is None and not (folder / "metrics.jsonl").exists()
        else:
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            assert config["base_lr"] == 0.0035 and [json.loads(line)["phase"] for line in lines] == ["base"] * 5
    (mao,) = tmp_path.glob("demo-ice-coop-mao-seed1-*")
    assert mao.name[:-7] == "demo-ice-coop-mao-seed1-protocol-cross-dataset-targets-demo-gold-demo-plain-shots1"
    before = result(mao)
    code, again, _ = command("run.py", "--eval", mao)
    assert code == 0 and again.splitlines()[3].split() == out.splitlines()[5].split() and result(mao) == before
    task = data.task_of({**SOURCE, "targets": ["all"]})
    assert len(task.tests) == 11 and len(task.base_names) == 100 and "demo-sepia" not in task.tests


def test_few_shot(eurosat, command, tmp_path):
    """All classes, train and test: one accuracy, MAO by its base phase."""
    ask = ["run.py", "--dataset", "eurosat", "--root", eurosat, "--protocol", "few-shot", *SMALL]
    code, out, err = command(*ask, "--out", tmp_path / "runs")
    assert code == 0, err
    assert out.splitlines()[2].split() == ["Accuracy", "learnable", "seconds", "peak", "memory"] and "single" not in out
    (mao,) = (tmp_path / "runs").glob("eurosat-coop-mao*")
    assert not (mao / "new.safetensors").exists()
    lines = [json.loads(line) for line in (mao / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["base"] * 2
    assert json.loads((mao / "config.json").read_text())["top_k"] == 5  # of 10 classes, all of them base


def test_zero_shot_takes_each_datasets_words(eurosat, monkeypatch):
    """EuroSAT's are "a centered satellite photo of {}.", in every protocol; the score is that of those words."""
    clip_model, _ = load_clip("demo")
    settings = {"dataset": "demo-ice", "root": eurosat, "protocol": "cross-dataset", "targets": ["eurosat"]}
    task = data.task_of({**settings, "shots": 1, "seed": 1})
    task.tests.pop("demo-ice")
    words, set_classes = [], ZeroShot.set_classes

    def noted(self, names, template=None):
        set_classes(self, names, template)
        words.append(self.template)

    monkeypatch.setattr(ZeroShot, "set_classes", noted)
    foundation = ZeroShot(clip_model, task.base_names)
    monkeypatch.setattr(evaluate, "accuracy", lambda *arguments: 0.0)
    evaluate.score(foundation, None, task, evaluate.Tests(task, foundation, "cpu"))
    assert words == ["a photo of a {}.", "a centered satellite photo of {}."]


def test_an_unknown_target_is_one_sentence(command, tmp_path):
    ask = ["run.py", "--dataset", "demo-ice", "--protocol", "cross-dataset", "--targets", "demo-gould"]
    code, _, err = command(*ask, "--out", tmp_path / "runs")
    assert code == 2 and "there is no dataset 'demo-gould': did you mean demo-gold" in err and err.count("\n") == 1
    with pytest.raises(ValueError, match="--targets demo-sepia is the source itself"):
        data.task_of({**SOURCE, "targets": ["demo-sepia"]})


# Images and downloads -------------------------------------------------------------------------------------------------


def test_a_palette_png_a_gray_one_and_one_that_ends_early(tmp_path):
    read = images.FolderReader(tmp_path)
    draw(tmp_path / "color.png")
    color = Image.open(tmp_path / "color.png")
    color.quantize(16).save(tmp_path / "palette.png", transparency=3)
    color.convert("L").save(tmp_path / "gray.png")
    for name in ("palette.png", "gray.png"):
        assert images.test_transform(32)(read(name)).shape == (3, 32, 32)
    draw(tmp_path / "short.jpg")
    content = (tmp_path / "short.jpg").read_bytes()
    (tmp_path / "short.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(images.UnreadableImage, match="short.jpg .*truncated"):
        read("short.jpg")


def test_a_split_that_names_a_missing_file_is_found_before_the_work(eurosat, command, tmp_path):
    split = json.loads((eurosat / "eurosat" / "split_zhou_EuroSAT.json").read_text())
    missing = eurosat / "eurosat" / "2750" / split["test"][-1][0]
    missing.unlink()
    run = ["run.py", "--dataset", "eurosat", "--root", eurosat, *SMALL, "--out", tmp_path / "runs"]
    code, _, err = command(*run)
    assert code == 2 and str(missing) in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()
    draw(missing)
    new = [path for path, _, _ in data.few_shot(split, 2, 1)["train"]][-1]
    (eurosat / "eurosat" / "2750" / new).write_text("no image")
    code, _, err = command(*run)
    assert code == 2 and new in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["dtd", "ucf101", "stanford_cars"])
def test_a_download_that_breaks_off_leaves_nothing(name, tmp_path, monkeypatch, command):
    """What cannot be had says what to get, from where, into which folder."""

    class Broken:
        def __init__(self, root, download):
            draw(tmp_path / "data" / f".{name}.part" / "dtd" / "dtd" / "images" / "banded" / "1.jpg")
            raise ConnectionResetError("the line is dead")

    def broken(id, output):
        raise ConnectionResetError("the line is dead")

    monkeypatch.setattr(layouts.datasets, "DTD", Broken)
    monkeypatch.setattr(gdown, "download", broken)
    code, _, err = command("data.py", name, "--root", tmp_path / "data", "--download")
    assert code == 2 and err.count("\n") == 1 and f"into {tmp_path / 'data' / name}" in err and "http" in err
    assert ("the line is dead" in err) == (name != "stanford_cars") and not (tmp_path / "data").exists()


def test_a_download_arrives_in_coops_layout(tmp_path, monkeypatch, capsys):
    """DTD by torchvision, its split file from Google Drive; where that fails, CoOp's rule and a line that says so."""

    class Whole:
        def __init__(self, root, download):
            for kind in ("banded", "dotted", "woven"):
                for number in range(10):
                    draw(pathlib.Path(root) / "dtd" / "dtd" / "images" / kind / f"{kind}_{number}.jpg")

    def drive(id, output):
        if refused:
            raise gdown.exceptions.FileURLRetrievalError("Too many users\nhave viewed it")
        items = [
            [f"{kind}/{kind}_{number}.jpg", label, kind]
            for label, kind in enumerate(("banded", "dotted", "woven"))
            for number in range(10)
        ]
        pathlib.Path(output).write_text(json.dumps({"train": items, "val": [], "test": items[::5]}))

    monkeypatch.setattr(layouts.datasets, "DTD", Whole)
    monkeypatch.setattr(gdown, "download", drive)
    refused = True
    source = data.open_dataset("dtd", tmp_path, download=True)
    err = capsys.readouterr().err
    assert len(source.split["train"]) == 15 and "Too many users" in err and "the digits then differ" in err
    refused = False
    source = data.open_dataset("dtd", tmp_path, download=True)
    assert len(source.split["train"]) == 30 and capsys.readouterr().err == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dtd"]
    assert sorted(path.name for path in (tmp_path / "dtd").iterdir()) == [
        "images",
        "split_seed1_DescribableTextures.json",
        "split_zhou_DescribableTextures.json",
    ]
