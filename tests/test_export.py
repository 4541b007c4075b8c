"""What predict.py exports gives the same probabilities without this project."""

import csv
import io
import json

import numpy as np
import onnxruntime
import pytest
import record
import safetensors
import torch
from evaluate import scorer
from images import model_input
from images import test_transform as preprocessing
from PIL import Image

import predict
from backbones import BACKBONES
from encoders import clip, load_clip
from rivals import RIVALS  # noqa: F401  puts the rivals into BACKBONES

NAMES = ["red door", "blue gate", "moon"]


@pytest.fixture
def tuned(tmp_path):
    """Makes the prompts of a backbone: a file, and the learner before NAMES."""
    clip_model, sha256 = load_clip("demo")
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")

    def make(backbone):
        torch.manual_seed(0)
        learner = BACKBONES[backbone](clip_model, NAMES)
        config = {"dataset": "demo", "backbone": backbone, "settings": {}, "clip": "demo", "clip_sha256": sha256}
        record.Record(tmp_path / backbone, {**config, "classnames": NAMES}).prompts("new", learner)
        return tmp_path / backbone / "new.safetensors", learner

    return make


@pytest.mark.parametrize("backbone", ["coop", "kgcoop", "tcp", "proda"])
def test_a_head_classifies_as_predict_does(backbone, tuned, tmp_path, command):
    """With clip alone: its own preprocessing and image encoder, and the README's lines."""
    file, _ = tuned(backbone)
    options = ["--prompt", file, "--classes", tmp_path / "names.txt", "--export", tmp_path / "head.safetensors"]
    code, out, err = command("predict.py", *options)
    assert code == 0 and out == f"3 classes in {tmp_path / 'head.safetensors'}\n", err
    code, _, err = command("predict.py", tmp_path / "photos", *options, "--out", tmp_path / "x.csv", "--workers", 0)
    assert code == 0, err
    rows = list(csv.DictReader(io.StringIO((tmp_path / "x.csv").read_text())))
    with safetensors.safe_open(tmp_path / "head.safetensors", "pt") as head:
        names = json.loads(head.metadata()["mao"])["classnames"]
        text_features, logit_scale = head.get_tensor("text_features"), head.get_tensor("logit_scale")
    model = load_clip("demo")[0]
    preprocess = clip.clip._transform(model.visual.input_resolution)
    for row in rows:
        with torch.no_grad():
            f = model.encode_image(preprocess(Image.open(row["path"]))[None])
        f = f / f.norm(dim=-1, keepdim=True)
        p = (logit_scale * f @ text_features.T).softmax(dim=-1)[0]
        assert names[p.argmax()] == row["class"] and p.max().item() == pytest.approx(float(row["confidence"]), abs=2e-4)


@pytest.mark.parametrize("backbone", ["maple", "promptsrc", "coprompt", "dept", "cocoop"])
def test_learners_that_are_no_head_say_why(backbone, tuned, tmp_path, command):
    file, _ = tuned(backbone)
    head = tmp_path / "head.safetensors"
    code, out, err = command("predict.py", "--prompt", file, "--classes", tmp_path / "names.txt", "--export", head)
    assert code == 2 and err.startswith(f"predict.py: {backbone} ") and ".onnx" in err and err.count("\n") == 1
    assert not head.exists() and out == ""


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_many_names_are_encoded_a_few_at_a_time(backbone, tuned, monkeypatch):
    _, learner = tuned(backbone)
    monkeypatch.setattr(predict, "MANY", 2)
    if backbone in ("cocoop", "dept", "proda"):  # score in their own way
        assert predict.encode_names(learner, NAMES) is None
    else:
        with torch.no_grad():
            whole = learner.text_features()
        assert torch.allclose(predict.encode_names(learner, NAMES), whole, atol=1e-6) and len(whole) == len(NAMES) > 2


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_onnx_gives_the_same_probabilities(backbone, tuned, tmp_path, command):
    file, learner = tuned(backbone)
    path = tmp_path / "model.onnx"
    code, _, err = command("predict.py", "--prompt", file, "--classes", tmp_path / "names.txt", "--export", path)
    assert code == 0, err
    session = onnxruntime.InferenceSession(path)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classnames"]) == NAMES
    paths = sorted((tmp_path / "photos").iterdir())
    images = torch.stack([preprocessing(32)(Image.open(path).convert("RGB")) for path in paths])
    with torch.no_grad():
        expected = scorer(learner)(model_input(images)).softmax(dim=-1)
    size = 1 if backbone == "cocoop" else 5
    for first in range(0, 5, size):
        (found,) = session.run(None, {"images": images[first : first + size].numpy()})
        assert np.abs(found - expected[first : first + size].numpy()).max() < 1e-4


def test_bad_exports_are_one_sentence(tuned, tmp_path, command):
    file, _ = tuned("coop")
    ask = ["predict.py", "--prompt", file, "--classes", tmp_path / "names.txt"]
    for options, message in (
        ([], "nothing to do"),
        (["--export", tmp_path / "a.txt"], "must end with .safetensors"),
        (["--export", tmp_path / "nowhere" / "a.onnx"], "must be a file in a folder that is there"),
    ):
        code, out, err = command(*ask, *options)
        assert code == 2 and message in err and err.count("\n") == 1 and out == ""
