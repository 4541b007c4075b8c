"""What predict.py exports gives the same probabilities without this project."""

import csv
import functools
import json
import re
from unittest import mock

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
from harness.released import read_released
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
    """Text that depends on the image, and a prompted image side with an adapter: the two kinds of graphs.

    The second has its weights in a file of their own, as a model of more than 2 GB has.
    """
    backbone, learner, line = tuned
    save = functools.partialmethod(torch.onnx.ONNXProgram.save, external_data=backbone == "coprompt")
    with mock.patch.object(torch.onnx.ONNXProgram, "save", save):
        succeeds(command(line, "--export", tmp_path / "model.onnx"))
    assert (tmp_path / "model.onnx.data").exists() == (backbone == "coprompt")
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


def test_predictions_of_a_run(tune, command, tmp_path, monkeypatch):
    """All classes of the run, several images and folders; only what predict.py wrote is overwritten."""
    monkeypatch.chdir(tmp_path)
    *_, folder = succeeds(tune("--method zeroshot mao"))
    (mao,) = folder.glob("*mao*")
    for name in ("one.png", "more/two.png", "more/three.png"):
        draw(tmp_path / name, len(name))
    config = json.loads((mao / "config.json").read_text())
    base, new = config["classnames"], config["new_classnames"]
    for more, names in (("", base + new), ("--candidates new", new)):
        out, _ = succeeds(command(f"predict.py one.png more --workers 0 {more} --export head.safetensors --run", mao))
        assert out == f"{len(names)} classes in head.safetensors\n3 images in predictions.csv\n"
        text = (tmp_path / "predictions.csv").read_bytes().decode()
        assert text.startswith("\ufeffpath,class,confidence\r\none.png,")  # Excel wants the mark
        found = [row["class"] for row in csv.DictReader(text[1:].splitlines())]
        assert len(found) == 3 and set(found) <= set(names)
    out, _ = succeeds(command("predict.py one.png --prompt", mao / "new.safetensors"))  # it names its candidates
    assert {line.split("%")[1].strip() for line in out.splitlines()[:5]} == set(new)
    for notes in ("path,why\n", "path,class,confidence,note\n", "# path,class,confidence\n"):
        (tmp_path / "notes.csv").write_text(notes)
        refuses(command("predict.py one.png --out notes.csv --run", mao), "notes.csv is there, and predict.py did not")
    (tmp_path / "link.csv").symlink_to(tmp_path / "nowhere.csv")
    refuses(command("predict.py one.png --out link.csv --run", mao), "link.csv is there, and predict.py did not")
    refuses(command("predict.py one.png --run", *folder.glob("*zero*")), "is zero-shot or not finished")


AS_RELEASED = {  # our keys and the authors'
    "maple": [
        ("^", "prompt_learner."),
        ("text_prompts", "compound_prompts_text"),
        ("projections", "compound_prompt_projections"),
    ],
    "promptsrc": [
        ("visual_prompts.0", "image_encoder.VPT"),
        (r"visual_prompts.(\d)", r"image_encoder.transformer.resblocks.\1.VPT_shallow"),
        (r"text_prompts.(\d)", r"text_encoder.transformer.resblocks.\1.VPT_shallow"),
    ],
}


@pytest.mark.parametrize("backbone, settings", [
    ("coop", {"n_ctx": 6}), ("maple", {"depth": 3}), ("promptsrc", {"depth": 2, "depth_vision": 3, "n_ctx_vision": 5})
])  # fmt: skip
def test_prompts_of_the_authors_trainers(backbone, settings, photos, command):
    """Their tensors are read, at other sizes than ours, and of the rest nothing is run; other learners are refused."""
    ours, state = LEARNERS[backbone](frozen()[0], NAMES, **settings).state_dict(), {"image_encoder.a": torch.ones(2)}
    optimizer, ask = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1), "predict.py 1.png --clip demo"
    ask, scheduler = f"{ask} --classes names.txt --prompt a.tar", torch.optim.lr_scheduler.StepLR(optimizer, 5)
    for name, value in ours.items():
        for key, theirs in AS_RELEASED.get(backbone, []):
            name = re.sub(key, theirs, name)
        state[name] = value
    torch.save({"state_dict": state, "scheduler": scheduler, "value": np.float64(1)}, "a.tar")
    succeeds(command(ask))
    header, found = read_released("a.tar")
    assert header.backbone == backbone and header.settings.items() >= settings.items() and found.keys() == ours.keys()
    assert all(torch.equal(found[key], value) for key, value in ours.items())
    torch.save({"state_dict": {"ctx": torch.ones(4, 128), "meta_net.weight": torch.ones(2)}}, "a.tar")
    refuses(command(ask), "is no model.pth.tar-N of CoOp, MaPLe or PromptSRC (ValueError: ctx [4, 128], meta_net")
