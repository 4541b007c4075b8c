"""A CLIP opens as what it is: files, folders and names, compared with open_clip and transformers at random weights."""

import hashlib
import json
import re
import sys

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from encoders import encode_images_fast, encode_text, encode_text_fast
from harness.clips import DEMO_SHA256, DEMO_WEIGHTS, clip, load_clip, load_clip_of

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
SIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES, TOKENS = torch.randn(2, 3, 64, 64), clip.tokenize(["a photo of a cat.", "dog"])


def assert_refused(reason, *arguments):
    """`load_clip` raises an error for users. reason: a regular expression, or a plain text with brackets."""
    with pytest.raises((ValueError, OSError), match=reason if "*" in reason else re.escape(reason)):
        load_clip(*arguments)


def assert_opens(name, f, g):
    """Our fast encoders and the plain one of texts compute f and g, unit-length [2, d]. Returns the CLIP's SHA-256."""
    model, sha256 = load_clip(name)
    embedded, ends = model.token_embedding(TOKENS), TOKENS.argmax(dim=-1)
    fast = encode_text_fast(model, embedded[0, :1], embedded[:, 1 : ends.max() + 1], ends - 1)
    for ours, theirs in ((encode_images_fast(model, IMAGES), f), (encode_text(model, embedded, ends), g), (fast, g)):
        assert torch.allclose(ours / ours.norm(dim=-1, keepdim=True), theirs, atol=1e-5)
    return sha256


def save_open_clip(folder, quick_gelu, vision, **text):
    """A random model of open_clip, saved with its config. Returns its f, g and file of weights."""
    vision = {"image_size": 64, "patch_size": 16, **vision}
    config = {"embed_dim": 64, "text_cfg": {**TEXT, **text}, "vision_cfg": vision, "quick_gelu": quick_gelu}
    theirs, file = open_clip.CLIP(**config).eval().requires_grad_(False), folder / "open_clip_model.safetensors"
    save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, file)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return *theirs(IMAGES, TOKENS)[:2], file


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("width, head, ratio, layers", [(160, 80, 4, 2), (176, 88, 4.3637, 2), (16, 64, 4, [1] * 4)])
def test_a_model_of_open_clip(quick, width, head, ratio, layers, tmp_path):
    vision = {"layers": layers, "width": width, "head_width": head, "mlp_ratio": ratio}
    f, g, file = save_open_clip(tmp_path, quick, vision)
    assert assert_opens(file, f, g) == assert_opens(tmp_path, f, g) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_other_features_than_open_clips(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.clips.refuse_other_kinds", lambda config: None)
    save_open_clip(tmp_path, True, {"layers": 2, "width": 128}, no_causal_mask=True)
    assert_refused("not supported (other features)", tmp_path)


@pytest.mark.parametrize("image, text", [("quick_gelu", "quick_gelu"), ("gelu", "gelu"), ("gelu", "quick_gelu")])
def test_a_model_of_hugging_face(image, text, tmp_path):
    vision = {**SIDE, "num_attention_heads": 2, "image_size": 64, "patch_size": 16, "hidden_act": image}
    theirs = CLIPModel(CLIPConfig(text_config={**SIDE, "hidden_act": text}, vision_config=vision)).eval()
    theirs.save_pretrained(tmp_path)
    found, file = theirs(TOKENS, IMAGES), tmp_path / "model.safetensors"
    for path in (file, tmp_path):
        assert_opens(path, found.image_embeds, found.text_embeds)
    save_file({key: value for key, value in theirs.state_dict().items() if "visual_" not in key}, file)
    assert_refused("its weights lack visual_projection.weight", tmp_path)


def test_a_pretrained_name_of_open_clip(tmp_path, monkeypatch):
    f, g, file = save_open_clip(tmp_path, True, {"layers": 2, "width": 128})
    config = json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", {**config, "quick_gelu": False})  # the tag knows
    tags = {"a": {"file": str(file), "quick_gelu": True}, "b": {"mean": (0.5, 0.5, 0.5)}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", tags)
    assert assert_opens("open_clip:tiny/a", f, g) == load_clip(file)[1]  # the file holds these tensors and no more
    for name, reason in (("tiny/b", "pixels"), ("tiny/c", "does not list"), ("ViT-B-16-SigLIP/webli", "SigLIP")):
        assert_refused(f"there is no CLIP 'open_clip:{name}' that.*{reason}", f"open_clip:{name}")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert_refused("open_clip:tiny/a.*pip install open_clip_torch", "open_clip:tiny/a")


def test_the_demo_and_published_models(tmp_path, monkeypatch, capsys):
    archive = tmp_path / DEMO_SHA256 / "tiny.pt"
    archive.parent.mkdir()
    archive.write_bytes(DEMO_WEIGHTS.read_bytes())
    header = {"clip": "nowhere.pt", "clip_activation": None, "clip_head_width": None}  # of prompts, as fb9d477 wrote it
    opened = [load_clip("demo"), load_clip(archive), load_clip_of(header, "cpu", archive)]
    monkeypatch.setattr(clip.clip, "_MODELS", {n: f"file://{archive.parent}/{n}.pt" for n in ("tiny", "gone")})
    monkeypatch.setattr("os.path.expanduser", lambda path: str(tmp_path / "downloads"))
    for model, sha256 in (*opened, load_clip(archive), load_clip("tiny")):
        assert sha256 == DEMO_SHA256 and isinstance(model.transformer.resblocks[0].mlp.gelu, clip.model.QuickGELU)
        assert model.dtype == torch.float32 and not model.logit_scale.requires_grad
    assert "warning" not in capsys.readouterr().err
    assert isinstance(load_clip("tiny", activation="gelu")[0].transformer.resblocks[0].mlp.gelu, torch.nn.GELU)
    assert "warning: --clip-activation gelu replaces the activation of tiny" in capsys.readouterr().err
    assert_refused("there is no CLIP 'gone' that can be opened.*connect to the network", "gone")


def test_half_precision():
    model, _ = load_clip_of({"clip": "demo", "precision": "bf16"}, "cpu")
    for name, weight in model.named_parameters():
        assert weight.dtype == (torch.float32 if re.search("ln_|embedding|logit_scale", name) else torch.bfloat16)


def test_a_file_of_weights_alone(tmp_path):
    state, file = {key: value + 1e-4 for key, value in load_clip("demo")[0].state_dict().items()}, tmp_path / "a.pt"
    for prefix in ("", "module.", "_orig_mod.module."):
        torch.save({"state_dict": {prefix + key: value for key, value in state.items()}, "epoch": 3}, file)
        model, _ = load_clip(file, activation="gelu")
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert_refused("unknown activation: add --clip-activation", file)
    torch.save(clip.model.CLIP(64, 16, 1, 1088, 8, 77, 49408, 64, 1, 1).state_dict(), file)
    assert_refused("unknown head width: add --clip-head-width", file, "cpu", "gelu")
    assert_refused("heads do not fit a width of 1088", file, "cpu", "gelu", 256)
    assert load_clip(file, "cpu", "gelu", 68)[0].visual.transformer.resblocks[0].attn.num_heads == 16


def test_what_is_refused(tmp_path):
    """Broken weights, and configs beside them. A config is read before the weights and the configs above it here."""
    file, state = tmp_path / "a.pt", load_clip("demo")[0].state_dict()
    matrix = state["text_projection"]
    file.write_text("version https://git-lfs.github.com/spec/v1")
    assert_refused("a pointer of git-lfs (git lfs pull)", file)
    for name, content, reason in (
        ("a.pt", {"weights": print}, "is not a CLIP checkpoint that is safe to open"),
        ("a.pt", {**state, "text_projection": matrix * torch.nan}, "not finite, or all zero (text_projection)"),
        ("a.pt", {**state, "text_projection": matrix * 0}, "not finite, or all zero (text_projection)"),
        ("a.pt", {**state, "visual.trunk.weight": matrix}, "unsupported kind of model, timm"),
        ("a.pt", {"some.other.model": matrix}, "it lacks 'visual"),
        ("config.json", {"model_type": "siglip", "vision_config": {}}, "unsupported kind of model, a siglip"),
        ("config.json", {"vision_config": {"hidden_act": "gelu_new"}}, "unsupported kind of model, other layers"),
        ("processor_config.json", {"image_processor": {"resample": 2}}, "images of another resample"),
        ("preprocessor_config.json", {"image_std": [0.229, 0.224, 0.225]}, "pixels of mean None and std [0.229"),
    ):
        write = torch.save if name == "a.pt" else lambda content, path: path.write_text(json.dumps(content))
        write(content, tmp_path / name)
        assert_refused(reason, file, "cpu", "gelu")
