"""Opens a CLIP: OpenAI's, the demo's, one that open_clip knows by name, a folder of a library, or a file of weights.

The model is always the `clip` package's, in float32. Keys and shapes of weights tell the layout and the sizes. They do
not tell the activation and the number of heads; a config beside the weights does, or the user.
"""

import hashlib
import pathlib
import re
import warnings

import numpy as np
import torch
from safetensors.torch import load_file, save

from harness.cli import warn
from harness.files import read_json
from harness.images import PIXEL_MEAN, PIXEL_STD

with warnings.catch_warnings(action="ignore"):  # clip imports pkg_resources, which warns that it is deprecated
    import clip.model

DEMO_WEIGHTS = pathlib.Path(__file__).parent.parent / "assets" / "demo-clip.pt"
DEMO_SHA256 = "ceef180d8fb7298f6ca0ef15cd9498ab0e369f6debe1de19ad678798ca74f2a3"
ACTIVATIONS = {"quickgelu": clip.model.QuickGELU, "gelu": torch.nn.GELU}  # OpenAI's, LAION's
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")  # in a folder

# What weights do not tell: (activation, width of a head) of the image side, and of the text side. None: not known.
UNKNOWN, OPENAI = ((None, None), (None, None)), (("quickgelu", 64), ("quickgelu", 64))

# How CLIP's images are resized and cropped, in configs of open_clip and of Hugging Face
RESIZE = {"resize_mode": "shortest", "interpolation": "bicubic", "resample": 3, "do_center_crop": True}

# Parts of keys of models that clip.model.CLIP cannot hold.
OTHER_KEYS = {"logit_bias": "SigLIP", "visual.trunk": "timm", "text.transformer.e": "a text encoder of Hugging Face"}

# What wrapping a model puts before its keys. Keys of what is computed, or joins the tensor of another key (k, v).
WRAPPED = re.compile(r"^((module|_orig_mod|model|clip|clip_model)\.)+")
SKIPPED = re.compile(r"input_resolution|context_length|vocab_size|attn_mask|position_ids|_tracked|self_attn\.[kv]_")

# Parts of Hugging Face's keys, and what OpenAI's keys have instead. They are replaced in this order.
RENAMES = {
    "text_model.": "", "vision_model.": "visual.", "embeddings.": "", "encoder.layers": "transformer.resblocks",
    "position_embedding.weight": "positional_embedding", "patch_embedding": "conv1", "final_layer_norm": "ln_final",
    "pre_layrnorm": "ln_pre", "post_layernorm": "ln_post", "layer_norm": "ln_", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj", "self_attn.q_proj.": "attn.in_proj_", "self_attn": "attn",
    "visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection",
}  # fmt: skip


def load_clip(name="ViT-B/16", device="cpu", activation=None, head_width=None):
    """The frozen CLIP: (clip.model.CLIP in float32, SHA-256).

    name: one of
        "demo", the small CLIP that comes along;
        a model that OpenAI published, which the clip package downloads on first use and checks;
        "open_clip:NAME/TAG", a pretrained model that open_clip downloads on first use;
        a folder with open_clip's or Hugging Face's config and weights, which open_clip or transformers opens;
        a file of weights, by torch.save or .safetensors, in OpenAI's, open_clip's or Hugging Face's layout. Of pickles,
        only tensors are read.
    activation, head_width: "quickgelu" or "gelu"; the width of an image head. They replace what is known of the CLIP.
    A file of weights without a config beside it needs the first, and the second where its image side is wider than
    1024 (otherwise 64).

    The SHA-256 is of the file, or of the only file of weights in the folder; otherwise of the model's tensors.
    FileNotFoundError: there is no such CLIP, or its package is missing or cannot download or open it. ValueError: it is
    not a CLIP, or not of a kind that clip.model.CLIP can hold; or the activation or the head width is missing.
    """
    published = {model: url.split("/")[-2] for model, url in clip.clip._MODELS.items()}  # the SHA-256 is in the address
    # A published name is no path: a folder RN50 may stand here.
    name, path = str(name), pathlib.Path(DEMO_WEIGHTS if name == "demo" else published.get(name, name))
    files = [path] if path.is_file() else [file for file in path.glob("*") if file.suffix in WEIGHTS]
    sha256 = published.get(name) or (hashlib.sha256(files[0].read_bytes()).hexdigest() if len(files) == 1 else None)
    if path.is_file() and sha256 not in published.values():
        known = OPENAI if name == "demo" or sha256 == DEMO_SHA256 else read_configs(path.parent)
        state = read_weights(path)
    else:
        state, known = open_by_package(name, path)
    (of_images, width), (of_text, text_width) = known
    if activation and of_images and {activation} != {of_images, of_text}:
        warn(f"--clip-activation {activation} replaces the activation of {name}, which is {of_images}")
    image_side, text_side = (activation or of_images, head_width or width), (activation or of_text, text_width)
    model = build(name, state, image_side, text_side)
    return model.to(device), sha256 or hashlib.sha256(save(model.state_dict())).hexdigest()


def load_clip_of(settings, device, clip=None):
    """`load_clip` by a run's settings, in its precision.

    settings: config.json's, or the header's of a file of prompts, which has no precision (fp32). clip: where it is now.
    """
    options = settings.get("clip_activation"), settings.get("clip_head_width")
    clip_model, sha256 = load_clip(clip or settings["clip"], device, *options)
    return in_precision(clip_model, PRECISIONS[settings.get("precision") or "fp32"]), sha256


def in_precision(clip_model, dtype):
    """Puts the frozen weights that matrices are multiplied by into `dtype`, in place, and returns the model.

    The fast encoders then multiply in that type. Embeddings and normalization layers stay as they are.
    """
    for name, weight in clip_model.named_parameters():
        if not re.search(r"embedding|ln_|bn\d|downsample\.1|logit_scale", name):
            weight.data = weight.data.to(dtype)
    return clip_model


# Where weights come from, and what is known of them -------------------------------------------------------------------


def read_weights(path):
    """The tensors of a checkpoint file, {key: tensor}, without what wraps them. ValueError: it holds none."""
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        for wrapper in ("state_dict", "model_state_dict", "model"):
            found = found[wrapper] if isinstance(found.get(wrapper), dict) else found
        return {WRAPPED.sub("", key): value for key, value in found.items() if isinstance(value, torch.Tensor)}
    except Exception as error:  # torch and safetensors each raise their own on a broken file or a pickled object
        reason = "it is broken, a pointer of git-lfs (git lfs pull), or a pickled object (save model.state_dict())"
        raise ValueError(f"{path} is not a CLIP checkpoint that is safe to open: {reason}") from error


def read_configs(folder):
    """What the configs in a folder tell, as UNKNOWN. ValueError: one is broken, or of another kind of model."""
    found = UNKNOWN
    for name in ("preprocessor_config.json", "processor_config.json", "config.json", "open_clip_config.json"):
        if (folder / name).is_file():
            config = read_json(folder / name, dict, "fix it, or move it away")
            try:
                found = tuple(read_config(config)) or found
            except Exception as error:  # of every kind, on what is no config
                raise ValueError(f"{folder / name} is not a CLIP's config ({error}): give another") from error
    return found


def read_config(config):
    """Yields what a config of open_clip or Hugging Face tells, as UNKNOWN. Any error: it is broken, or another kind."""
    refuse_other_kinds(config)
    if model := config.get("model_cfg"):  # open_clip's
        activation, text = "quickgelu" if model.get("quick_gelu") else "gelu", model["text_cfg"]
        yield activation, model["vision_cfg"].get("head_width", 64)
        yield activation, text.get("width", 512) / text.get("heads", 8)
    elif "vision_config" in config:
        for name, width, heads in (("vision_config", 768, 12), ("text_config", 512, 8)):  # Hugging Face's, and defaults
            side = config.get(name) or {}
            head_width = side.get("hidden_size", width) / side.get("num_attention_heads", heads)
            yield side.get("hidden_act", "quick_gelu").replace("_", ""), head_width


def refuse_other_kinds(config):
    """ValueError: a config of open_clip or Hugging Face is of a kind that clip.model.CLIP cannot hold."""
    model = config.get("model_cfg") or config
    pixels = config.get("preprocess_cfg") or config.get("image_processor") or config
    image, text = (model.get(f"{side}_cfg") or model.get(f"{side}_config") or {} for side in ("vision", "text"))
    mean, std = (pixels.get(name) or pixels.get(f"image_{name}") for name in ("mean", "std"))
    resize = [name for name, ours in RESIZE.items() if pixels.get(name, ours) not in (ours, None)]
    kinds = {
        "SigLIP": model.get("init_logit_bias") is not None,
        "CoCa": "multimodal_cfg" in model,
        "timm": image.get("timm_model_name"),
        "a text encoder of Hugging Face": text.get("hf_model_name") or text.get("hf_tokenizer_name"),
        f"a {model.get('model_type')}": model.get("model_type", "clip") not in ("clip", "clip_text_model"),
        f"pixels of mean {mean} and std {std}": (mean and not np.allclose(mean, PIXEL_MEAN, atol=1e-3))
        or (std and not np.allclose(std, PIXEL_STD, atol=1e-3)),
        f"images of another {' and '.join(resize)}": resize,
        "other pooling": image.get("pool_type", "tok") != "tok"
        or text.get("pool_type", "argmax") != "argmax"
        or image.get("final_ln_after_pool"),
        "other layers": text.get("no_causal_mask")
        or any(
            side.get("act_kwargs")
            or side.get("norm_kwargs")
            or side.get("layer_norm_eps", 1e-5) != 1e-5
            or side.get("hidden_act", "gelu") not in ("gelu", "quick_gelu")
            for side in (image, text)
        ),
    }
    for kind, found in kinds.items():
        if found:
            raise ValueError(f"an unsupported kind of model, {kind}")


def open_by_package(name, path):
    """A CLIP that clip, open_clip or transformers opens: (state dict, what is known of it, as UNKNOWN).

    FileNotFoundError: none of them opens it. ValueError: open_clip or transformers computes other features than
    clip.model.CLIP does with the same weights, because of something that neither a config nor a key told.
    """
    known = read_configs(path)
    try:
        if (path / "open_clip_config.json").is_file():
            import open_clip

            theirs = open_clip.create_model(f"local-dir:{path}", require_pretrained=True)
        elif path.is_dir():
            from transformers import CLIPModel

            theirs, report = CLIPModel.from_pretrained(path, local_files_only=True, output_loading_info=True)
            if report["missing_keys"]:
                raise ValueError(f"its weights lack {min(report['missing_keys'])}")
        elif name.startswith("open_clip:"):
            import open_clip

            source, _, tag = name.removeprefix("open_clip:").rpartition("/")
            pretrained = open_clip.get_pretrained_cfg(source, tag)
            if not pretrained:
                raise ValueError("open_clip.list_pretrained() does not list it")
            config = open_clip.get_model_config(source) | {"quick_gelu": pretrained.get("quick_gelu", False)}
            known = tuple(read_config({"model_cfg": config, "preprocess_cfg": pretrained}))
            theirs = open_clip.create_model(source, tag, force_quick_gelu=config["quick_gelu"])
        else:
            return clip.load(name, device="cpu")[0].state_dict(), OPENAI
    except Exception as error:  # each package raises its own
        unwritable = getattr(error, "filename", None)  # such as in a home that is to be read alone
        remedy = "set a writable HOME" if unwritable else "connect to the network, pip install open_clip_torch"
        why = f"({' '.join(str(error).split())[:300]}): {remedy}"
        raise FileNotFoundError(f"there is no CLIP '{name}' that can be opened {why}, or give another") from error
    model = build(name, theirs.float().eval().state_dict(), *known)
    image, text = torch.rand(1, 3, *[model.visual.input_resolution] * 2), clip.tokenize("a photo", model.context_length)
    found = theirs(image, text) if hasattr(theirs, "visual") else theirs(text, image)[3:1:-1]
    ours = model.encode_image(image), model.encode_text(text)
    if not sum((a / a.norm() - b).norm() for a, b in zip(ours, found)) < 1e-4:
        raise ValueError(f"{name} is a kind of CLIP that is not supported (other features): give another")
    return theirs.state_dict(), known


# The model ------------------------------------------------------------------------------------------------------------


def build(name, weights, image_side, text_side):
    """A frozen clip.model.CLIP in float32 with these weights. ValueError: as `load_clip`.

    image_side, text_side: (activation, width of a head); None: not known.
    """
    try:
        state = dict(to_openai_keys(weights))
        sizes = {key: value.to("meta") for key, value in state.items()}
        with torch.device("meta"):  # takes neither memory nor random numbers
            for key, bias in state.items():
                if key.endswith(".mlp.c_proj.bias"):  # build_model knows no other ratio than 4
                    standard = clip.model.ResidualAttentionBlock(len(bias), 1).mlp
                    sizes |= standard.state_dict(prefix=key.removesuffix("c_proj.bias"))
            model = clip.model.build_model(sizes).float()
        for prefix, side, (activation, head_width) in (("visual.", model.visual, image_side), ("", model, text_side)):
            if not hasattr(side, "transformer"):  # a ResNet
                continue
            width, heads = side.transformer.width, side.transformer.width / (head_width or 64)
            if not activation:
                raise ValueError("unknown activation: add --clip-activation quickgelu (OpenAI) or gelu (LAION)")
            if prefix and not head_width and width > 1024:
                raise ValueError("unknown head width: add --clip-head-width (ViT-H 80, ViT-g 88, ViT-bigG 104)")
            if not side.transformer.layers or heads < 1 or heads % 1 or width % heads:
                raise ValueError(f"{side.transformer.layers} layers of {heads:g} heads do not fit a width of {width}")
            for layer, block in enumerate(side.transformer.resblocks):
                hidden = len(state[f"{prefix}transformer.resblocks.{layer}.mlp.c_fc.bias"])
                with torch.device("meta"):
                    block.mlp.c_fc, block.mlp.c_proj = torch.nn.Linear(width, hidden), torch.nn.Linear(hidden, width)
                block.mlp.gelu = ACTIVATIONS[activation]()
                block.attn.num_heads, block.attn.head_dim = int(heads), int(width / heads)
                block.attn_mask = None if prefix else model.build_attention_mask()
        model.load_state_dict(state, assign=True)
    except Exception as error:  # of every kind, on what is no CLIP
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).rpartition("\n")[2].strip()
        raise ValueError(
            f"CLIP {name} cannot be opened ({reason[:300]}): give a ViT or ResNet like OpenAI's"
        ) from error
    return model.eval().requires_grad_(False)


def to_openai_keys(weights):
    """float32 weights under the keys of the `clip` package, from any of the layouts. ValueError: not a CLIP's."""
    for part, kind in OTHER_KEYS.items():
        if any(part in key for key in weights):
            raise ValueError(f"an unsupported kind of model, {kind}")
    for key in [key for key in weights if not SKIPPED.search(key)]:
        value = (weights[key].T if key.endswith("_projection.weight") else weights[key]).float().contiguous()
        if ".self_attn.q_proj." in key:  # clip has query, key and value in one
            value = torch.cat([weights[key.replace("q_proj", part)].float() for part in ("q_proj", "k_proj", "v_proj")])
        for theirs, ours in RENAMES.items():
            key = key.replace(theirs, ours)
        if not value.norm().isfinite() or (value.ndim > 1 and not value.norm()):  # no matrix of a trained CLIP is zero
            raise ValueError(f"its weights are not finite, or all zero ({key})")
        yield key.removeprefix("text."), value.reshape(()) if key == "logit_scale" else value
