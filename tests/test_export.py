"""What predict.py exports gives the same probabilities without this project."""

import csv
import functools
import json

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from conftest import draw, refuses, succeeds
from PIL import Image

from encoders import clip, load_clip
from harness.images import model_input
from harness.images import test_transform as preprocessing
from harness.scores import scorer
from run import LEARNERS

NAMES = ["red door", "blue gate", "moon"]
frozen = functools.cache(lambda: load_clip("demo"))
HEADS = ["coop", "kgcoop", "tcp", "proda"]


@pytest.fixture
def tuned(request, tmp_path):
    """(backbone, learner before NAMES, predict.py's command on a file of its prompts), and five photos beside it."""
    torch.manual_seed(0)
    learner, prompts = LEARNERS[request.param](frozen()[0], NAMES), tmp_path / "new.safetensors"
    about = {"backbone": request.param, "settings": {}, "clip": "demo", "clip_sha256": frozen()[1], "classnames": NAMES}
    safetensors.torch.save_file(learner.state_dict(), prompts, {"mao": json.dumps(about)})
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    for number in range(5):
        draw(tmp_path / "photos" / f"{number}.png", number)
    return request.param, learner, f"predict.py --workers 0 --prompt {prompts} --classes {tmp_path / 'names.txt'}"


@pytest.mark.parametrize("tuned", HEADS, indirect=True)
def test_a_head_classifies_as_predict_does(tuned, tmp_path, command):
    """With clip alone: its own preprocessing and image encoder, and the README's lines."""
    line, head = f"{tuned[2]} --out {tmp_path / 'x.csv'} --export", tmp_path / "head.safetensors"
    out, _ = succeeds(command(line, head, tmp_path / "photos"))
    assert out.startswith(f"3 classes in {head}\n")
    with safetensors.safe_open(head, "pt") as file:
        names = json.loads(file.metadata()["mao"])["classnames"]
        text_features, logit_scale = file.get_tensor("text_features"), file.get_tensor("logit_scale")
    model = frozen()[0]
    preprocess = clip.clip._transform(model.visual.input_resolution)
    for row in csv.DictReader((tmp_path / "x.csv").open(encoding="utf-8-sig")):
        with torch.no_grad():
            f = model.encode_image(preprocess(Image.open(row["path"]))[None])
        f = f / f.norm(dim=-1, keepdim=True)
        p = (logit_scale * f @ text_features.T).softmax(dim=-1)[0]
        assert names[p.argmax()] == row["class"] and p.max().item() == pytest.approx(float(row["confidence"]), abs=2e-4)


@pytest.mark.parametrize("tuned", [name for name in LEARNERS if name not in HEADS], indirect=True)
def test_learners_that_are_no_head_say_why(tuned, tmp_path, command):
    refuses(command(tuned[2], "--export", tmp_path / "head.safetensors"), f"predict.py: {tuned[0]} ", ".onnx")
    assert not (tmp_path / "head.safetensors").exists()


@pytest.mark.parametrize("tuned", ["cocoop", "coprompt"], indirect=True)
def test_onnx_gives_the_same_probabilities(tuned, tmp_path, command):
    """Text that depends on the image, and a prompted image side with an adapter: the two kinds of graphs."""
    backbone, learner, line = tuned
    succeeds(command(line, "--export", tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["classnames"]) == NAMES
    photos = [Image.open(path).convert("RGB") for path in sorted((tmp_path / "photos").iterdir())]
    images = torch.stack(list(map(preprocessing(32), photos)))
    with torch.no_grad():
        expected = scorer(learner)(model_input(images)).softmax(dim=-1)
    size = 1 if backbone == "cocoop" else 5
    for first in range(0, 5, size):
        (found,) = session.run(None, {"images": images[first : first + size].numpy()})
        assert np.abs(found - expected[first : first + size].numpy()).max() < 1e-4
