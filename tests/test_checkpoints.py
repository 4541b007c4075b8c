"""A checkpoint is what it says: OpenAI's, open_clip's and Hugging Face's layouts, wrapped or broken, held against the
real libraries with random weights.
"""

import json

import open_clip
import pytest
import safetensors.torch
import torch
from checkpoints import DEMO_WEIGHTS, clip, load_clip

from encoders import encode_images_fast, encode_text, encode_text_fast

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2}
VISION = {"image_size": 32, "patch_size": 8, "layers": 2}


@pytest.fixture
def small():
    return load_clip("demo")[0]


def features(model):
    """(f, g) of two images and two texts by our encoders, fast and plain."""
    torch.manual_seed(7)
    images, tokens = torch.randn(2, 3, 32, 32), clip.tokenize(["a photo of a cat.", "dog"])
    embedded, ends = model.token_embedding(tokens), tokens.argmax(dim=-1)
    plain = encode_text(model, embedded, ends)
    fast = encode_text_fast(model, embedded[0, :1], embedded[:, 1 : ends.max() + 1], ends - 1)
    assert torch.allclose(plain, fast, atol=1e-4)
    return images, tokens, encode_images_fast(model, images), plain


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("width, head_width, ratio", [(128, 64, 4.0), (160, 80, 4.0), (176, 88, 4.3637)])
@pytest.mark.parametrize("beside", [True, False])
def test_open_clips_checkpoints(quick, width, head_width, ratio, beside, tmp_path):
    torch.manual_seed(0)
    config = {"embed_dim": 64, "text_cfg": TEXT, "quick_gelu": quick}
    config["vision_cfg"] = {**VISION, "width": width, "head_width": head_width, "mlp_ratio": ratio}
    theirs = open_clip.CLIP(**config).eval()
    file = tmp_path / "open_clip_model.safetensors"
    safetensors.torch.save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, file)
    options = {"activation": "quickgelu" if quick else "gelu", "head_width": head_width}
    if beside:
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        options = {}
    else:
        with pytest.raises(ValueError, match="do not tell its activation.*--clip-activation"):
            load_clip(str(file))
    images, tokens, f, g = features(load_clip(str(file), **options)[0])
    with torch.no_grad():
        assert torch.allclose(f, theirs.encode_image(images), atol=1e-5)
        assert torch.allclose(g, theirs.encode_text(tokens), atol=1e-5)


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("of_text", ["quick_gelu", "gelu"])
def test_hugging_faces_checkpoints(activation, of_text, heads, tmp_path):
    import transformers

    torch.manual_seed(0)
    text = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**text, "num_attention_heads": heads, "image_size": 32, "patch_size": 8, "hidden_act": activation}
    config = transformers.CLIPConfig(
        text_config={**text, "hidden_act": of_text}, vision_config=vision, projection_dim=64
    )
    theirs = transformers.CLIPModel(config).eval()
    theirs.save_pretrained(tmp_path)
    images, tokens, f, g = features(load_clip(str(tmp_path / "model.safetensors"))[0])
    with torch.no_grad():
        found = theirs(input_ids=tokens, pixel_values=images)
    for ours, reference in ((f, found.image_embeds), (g, found.text_embeds)):
        assert torch.allclose(torch.nn.functional.normalize(ours, dim=-1), reference, atol=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="--clip-activation"):
        load_clip(str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "vision_config": 3}))
    with pytest.raises(ValueError, match="config.json is not a CLIP's config"):
        load_clip(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_state_dicts_stay_float32(wrap, tmp_path, small):
    state = {key: value + (1e-4 if "weight" in key else 0) for key, value in small.state_dict().items()}
    if wrap.endswith("."):
        content = {"state_dict": {wrap + key: value for key, value in state.items()}}
    else:
        content = state if wrap == "plain" else {wrap: state, "epoch": 3}
    torch.save(content, tmp_path / "a.pt")
    model, _ = load_clip(str(tmp_path / "a.pt"), activation="quickgelu")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


def test_a_wide_vision_side_is_asked_for_its_heads(tmp_path):
    model = clip.model.CLIP(64, 16, 1, 1280, 8, 77, 49408, 64, 1, 1)
    torch.save(model.state_dict(), tmp_path / "wide.pt")
    with pytest.raises(ValueError, match="the width of its vision heads.*--clip-head-width"):
        load_clip(str(tmp_path / "wide.pt"), activation="gelu")
    found, _ = load_clip(str(tmp_path / "wide.pt"), activation="gelu", head_width=80)
    assert found.visual.transformer.resblocks[0].attn.num_heads == 16
    with pytest.raises(ValueError, match="a vision head of 48 does not fit"):
        load_clip(str(tmp_path / "wide.pt"), activation="gelu", head_width=48)


def test_a_resnet(tmp_path):
    torch.manual_seed(0)
    model = clip.model.CLIP(64, 64, (1, 1, 1, 1), 16, None, 77, 49408, 64, 1, 1).eval()
    torch.save(model.state_dict(), tmp_path / "resnet.pt")
    found, _ = load_clip(str(tmp_path / "resnet.pt"), activation="quickgelu")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found.encode_image(images), model.encode_image(images))


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_what_is_no_clip(tmp_path, small, capsys):
    torch.save({"weights": Evil()}, tmp_path / "evil.pt")
    torch.save(small, tmp_path / "pickled.pt")
    (tmp_path / "broken.pt").write_bytes(DEMO_WEIGHTS.read_bytes()[:100_000])
    torch.save({"some.other.model": torch.ones(3)}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name in ("evil.pt", "pickled.pt", "broken.pt", "foreign.pt", "list.pt", "empty.safetensors"):
        with pytest.raises(ValueError, match=f"{name} is not a CLIP checkpoint"):
            load_clip(str(tmp_path / name), activation="gelu")
    assert "code ran" not in capsys.readouterr().out
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n")
    with pytest.raises(ValueError, match="lfs.safetensors is a pointer of git-lfs"):
        load_clip(str(tmp_path / "lfs.safetensors"))
    for name, value in (("nan.pt", torch.nan), ("zero.pt", 0.0)):
        state = {**small.state_dict(), "text_projection": torch.full_like(small.text_projection, value)}
        torch.save(state, tmp_path / name)
        with pytest.raises(ValueError, match=r"not finite, or all zero \(text_projection\)"):
            load_clip(str(tmp_path / name), activation="quickgelu")
    with pytest.raises(FileNotFoundError, match="there is no CLIP 'ViT-B/17'"):
        load_clip("ViT-B/17")
