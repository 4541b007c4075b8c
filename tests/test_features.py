"""How often CLIP encodes a test image, and the folder that keeps frozen CLIP's features: harness/features.py."""

import pytest
import torch
from conftest import draw, succeeds

from encoders import load_clip
from harness import features, images, options


@pytest.fixture
def sizes(monkeypatch):
    """How many images CLIP encodes: the sizes of the batches."""
    found, forward = [], torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda conv, x: found.append(len(x)) or forward(conv, x))
    return found


@pytest.mark.parametrize("backbone, counts", [("maple", [20, 40, 20, 20, 40, 0]), ("dept", [20, 0, 0, 0, 0, 0])])
def test_how_often_test_images_are_encoded(backbone, counts, tune, command, tmp_path, sizes):
    """10 + 10 images: by the plain row, by MAO, whose halves have prompts of their own, by zero-shot CLIP; and again."""
    _, _, folder = succeeds(tune(f"--backbone {backbone} --cache none --shots 1"))
    found = []
    for row in sorted(folder.glob("eurosat-*")) * 2:
        sizes.clear()
        succeeds(command("run.py --eval", row, "--cache", tmp_path / "cache"))
        found.append(sum(sizes))
    assert found == counts


@pytest.fixture
def encode(sizes, tmp_path):
    """encode(plain=False, **settings) -> (how many of two images CLIP encodes, their features)."""
    clip_model, sha256 = load_clip("demo")
    draw(tmp_path / "1.png")

    def run(plain=False, **given):
        sizes.clear()
        cache = options.Settings(**{"cache": str(tmp_path / "cache"), "device": "cpu", **given}), sha256
        (f,) = features.frozen_features(clip_model, ["1.png"], images.FolderReader(tmp_path, plain), "cpu", cache=cache)
        return sum(sizes), f.tolist()

    return run


def test_what_does_not_fit_is_encoded_again(encode, tmp_path, monkeypatch):
    _, f = encode()
    (file,) = (tmp_path / "cache").glob("*.features")
    whole, left = file.read_bytes(), file.with_name(f".{file.name}.part")
    assert encode() == (0, f) == (0, encode(cache="none")[1])
    monkeypatch.setattr(features, "LIMIT", 2 * len(whole))
    assert encode(precision="bf16")[0] == encode(plain=True)[0] == 1  # of another CLIP, and read in another way
    other, _ = sorted((tmp_path / "cache").glob("*.features"), key=lambda path: path.stat().st_mtime)  # two have room
    for damaged in (b"", whole[:50], whole[:-4], whole[:-1] + b"x", other.read_bytes()):
        file.write_bytes(damaged)
        left.write_bytes(b"of a killed writer")
        assert encode() == (1, f) and file.read_bytes() == whole and not left.exists()
    draw(tmp_path / "1.png", seed=7)
    count, changed = encode()
    assert count == 1 and changed != f


def test_a_folder_that_cannot_keep_them(encode, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(features, "atomic_write", full)
    for folder in (tmp_path / "1.png" / "is a file", tmp_path / "full"):
        assert [encode(cache=str(folder))[0] for _ in range(2)] == [1, 1]
        assert capsys.readouterr().err.count(f"features are not kept in {folder}") == 1
