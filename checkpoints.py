"""Opens a CLIP: a published one, the demo's, or a checkpoint file of OpenAI's, open_clip's or Hugging Face's layout.

The model is always the `clip` package's, in float32. Keys and shapes tell the layout and the sizes. They tell neither
the activation nor the width of a head; a config.json or open_clip_config.json beside the file does, or the user.
"""

import hashlib
import pathlib
import pickle
import re
import warnings

import safetensors.torch
import torch

from formats import CLIP_CONFIG, check, read_json

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # clip imports pkg_resources, which warns that it is deprecated
    import clip
    import clip.model

DEMO_WEIGHTS = pathlib.Path(__file__).parent / "assets" / "demo-clip.pt"
ACTIVATIONS = {"quickgelu": clip.model.QuickGELU, "gelu": torch.nn.GELU}  # OpenAI's, LAION's
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WRAPPERS = ("state_dict", "model_state_dict", "model")  # a checkpoint's entry that holds the weights
PREFIXES = ("module.", "_orig_mod.", "model.", "clip.", "clip_model.")  # what wrapping a model puts before its keys


def load_clip(name="ViT-B/16", device="cpu", activation=None, head_width=None):
    """The frozen CLIP: (clip.model.CLIP in float32, SHA-256 of its file).

    name: "demo", the small CLIP that comes along; a published model, which the clip package downloads on first use and
    checks; or a checkpoint file, by torch.save or .safetensors. Of pickles, only tensors are read.
    activation, head_width: of a checkpoint file that has no config beside it. "quickgelu" or "gelu"; the width of a
    vision head, 64 unless given where the whole width is at most 1024.
    FileNotFoundError: no such file, or it cannot be downloaded. ValueError: not a CLIP, or one of those two is missing.
    """
    published = {model: url.split("/")[-2] for model, url in clip.clip._MODELS.items()}  # the SHA-256 is in the address
    path = DEMO_WEIGHTS if name == "demo" else pathlib.Path(name)
    if name in published:
        sha256 = published[name]
    elif path.is_file():
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    else:
        raise FileNotFoundError(f"there is no CLIP '{name}': give a checkpoint file or one of {', '.join(published)}")
    if (activation or head_width) and (name == "demo" or sha256 in published.values()):
        raise ValueError(
            f"--clip-activation and --clip-head-width have no place with {name}, whose are known: leave them out"
        )
    if sha256 in published.values():
        model = load_published(name)
    elif name == "demo":
        model = load_file(name, path, {}, "quickgelu", 64)
    else:
        model = load_file(name, path, read_config(path), activation, head_width)
    return model.float().eval().requires_grad_(False).to(device), sha256


def load_clip_of(settings, device, clip=None):
    """`load_clip` by a run's settings, in its precision. settings: of config.json, or of the header of prompts, which
    has no precision (fp32). clip: where it is now.
    """
    activation, head_width = settings.get("clip_activation"), settings.get("clip_head_width")
    clip_model, sha256 = load_clip(clip or settings["clip"], device, activation, head_width)
    return in_precision(clip_model, PRECISIONS[settings.get("precision") or "fp32"]), sha256


@torch.no_grad()
def in_precision(clip_model, dtype):
    """Puts the frozen weights that matrices are multiplied by into `dtype`, in place, and returns the model.

    The fast encoders then multiply in that type. Embeddings and layer norms stay as they are.
    """
    for module in clip_model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.to(dtype)
        elif isinstance(module, torch.nn.MultiheadAttention):
            for weight in (module.in_proj_weight, module.in_proj_bias):
                weight.data = weight.to(dtype)
    for owner, name in ((clip_model, "text_projection"), (clip_model.visual, "proj")):
        if getattr(owner, name, None) is not None:  # a ResNet has no proj
            getattr(owner, name).data = getattr(owner, name).to(dtype)
    return clip_model


def load_published(name):
    """A model that OpenAI published, by name or as its archive. FileNotFoundError, ValueError: as `load_clip`."""
    try:
        return clip.load(str(name), device="cpu")[0]
    except OSError as error:
        raise FileNotFoundError(
            f"CLIP {name} could not be downloaded ({error}): connect to the network once, or give a checkpoint file "
            "with --clip"
        ) from error
    except Exception as error:  # torch and clip each raise their own on a broken file
        raise ValueError(f"{name} is not a CLIP checkpoint ({error}): get the file again") from error


def load_file(name, path, config, activation, head_width):
    """The model of a checkpoint file. config: of `read_config`; activation, head_width: over it, where they are given.

    ValueError: as `load_clip`.
    """
    state = {key: value.float() if value.is_floating_point() else value for key, value in read_weights(path).items()}
    for key, value in state.items():
        if not value.isfinite().all() or (value.ndim > 1 and not value.any()):  # no matrix of a trained CLIP is zero
            raise ValueError(f"{name} holds weights that are not finite, or all zero ({key}): get the file again")
    text = (activation or config.get("text_activation"), config.get("text_heads"))
    vision = (activation or config.get("activation"), head_width or config.get("head_width"))
    return build(name, to_openai_keys(state), text, vision)


def read_weights(path):
    """The tensors of a checkpoint file, {key: tensor}, taken out of what wraps them. ValueError: it holds none."""
    advice = "get the file again, or give another with --clip"
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a pointer of git-lfs and not the file itself: run 'git lfs pull' there")
    try:
        if path.suffix == ".safetensors":
            found = safetensors.torch.load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a CLIP checkpoint that is safe to open: it holds a pickled object, or none; "
            "save model.state_dict() instead of the model"
        ) from error
    except Exception as error:  # torch and safetensors each raise their own on a broken file
        raise ValueError(f"{path} is not a CLIP checkpoint (its weights cannot be read): {advice}") from error
    for wrapper in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"{path} is not a CLIP checkpoint (it holds no state dict): {advice}")
    found = {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}
    for prefix in PREFIXES * 2:  # two may be nested, in either order
        if found and all(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): value for key, value in found.items()}
    return found


def read_config(path):
    """What a config.json or open_clip_config.json beside a checkpoint says of it, a dict that may be empty:

    "activation" and "head_width" of vision, "text_activation" and "text_heads". ValueError: the file is broken.
    """
    for name in ("open_clip_config.json", "config.json"):
        beside = path.with_name(name)
        if not beside.is_file():
            continue
        advice = "mend it, or take it away"
        content = read_json(beside, dict, advice=advice)
        try:
            if "model_cfg" in content:  # open_clip's
                content = content["model_cfg"]
                activation = "quickgelu" if content.get("quick_gelu") else "gelu"
                found = {"activation": activation, "text_activation": activation}
                found["head_width"] = content["vision_cfg"].get("head_width", 64)
                found["text_heads"] = content["text_cfg"].get("heads", 8)
            elif "vision_config" in content:  # Hugging Face's, which leaves out its defaults
                vision, text = content["vision_config"] or {}, content.get("text_config") or {}
                found = {"activation": vision.get("hidden_act", "quick_gelu").replace("_", "")}
                found["text_activation"] = text.get("hidden_act", "quick_gelu").replace("_", "")
                found["head_width"] = vision.get("hidden_size", 768) // vision.get("num_attention_heads", 12)
                found["text_heads"] = text.get("num_attention_heads", 8)
            else:
                continue
        except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise ValueError(f"{beside} is not a CLIP's config ({error}): {advice}") from error
        return check(found, CLIP_CONFIG, (), beside, advice)
    return {}


def to_openai_keys(state):
    """A CLIP's weights under the keys of the `clip` package: from Hugging Face's layout, or as they are."""
    if "text_model.embeddings.token_embedding.weight" not in state:
        return {key.removeprefix("text.") if key.startswith("text.") else key: value for key, value in state.items()}
    renamed = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    }
    parts = [
        (r"^text_model\.final_layer_norm", "ln_final"), (r"^vision_model\.pre_layrnorm", "visual.ln_pre"),
        (r"^vision_model\.post_layernorm", "visual.ln_post"),
        (r"^text_model\.encoder\.layers", "transformer.resblocks"),
        (r"^vision_model\.encoder\.layers", "visual.transformer.resblocks"), (r"\.layer_norm1", ".ln_1"),
        (r"\.layer_norm2", ".ln_2"), (r"\.mlp\.fc1", ".mlp.c_fc"), (r"\.mlp\.fc2", ".mlp.c_proj"),
        (r"\.self_attn\.out_proj", ".attn.out_proj"),
    ]  # fmt: skip
    found = {}
    for key, value in state.items():
        if key.endswith("position_ids") or ".self_attn.k_proj" in key or ".self_attn.v_proj" in key:
            continue
        if ".self_attn.q_proj." in key:  # clip has query, key and value in one
            value = torch.cat([state[key.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            key = key.replace(".self_attn.q_proj.", ".attn.in_proj_")
        if key in ("text_projection.weight", "visual_projection.weight"):
            value, key = value.T, {"t": "text_projection", "v": "visual.proj"}[key[0]]
        key = renamed.get(key, key)
        for pattern, replacement in parts:
            key = re.sub(pattern, replacement, key)
        found[key] = value
    return found


def build(name, state, text, vision):
    """A clip.model.CLIP of the sizes that the weights have, with them in it.

    text: (activation, number of heads), the second None for a width of 64 each. vision: (activation, width of a head).
    ValueError: they are not a CLIP's, or do not go together.
    """
    (text_activation, text_heads), (activation, head_width) = text, vision
    for extra in ("input_resolution", "context_length", "vocab_size", "attn_mask"):
        state.pop(extra, None)
    try:
        sizes, vision_width = sizes_of(state)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"{name} is not a CLIP checkpoint (its keys are not a CLIP's: {error}): give one of OpenAI's, "
            "open_clip's or Hugging Face's layout"
        ) from error
    if activation not in ACTIVATIONS or text_activation not in ACTIVATIONS:
        raise ValueError(
            f"the weights of {name} do not tell its activation, and no config lies beside it: add --clip-activation "
            "quickgelu (OpenAI's models and their copies) or gelu (most of open_clip's)"
        )
    is_vit = isinstance(sizes[2], int)
    if is_vit and head_width is None and vision_width > 1024:
        raise ValueError(
            f"the weights of {name} do not tell the width of its vision heads, and no config lies beside it: add "
            "--clip-head-width (80 for ViT-H, 88 for ViT-g, 104 for ViT-bigG)"
        )
    head_width = head_width or 64
    if is_vit and vision_width % head_width:
        raise ValueError(f"a vision head of {head_width} does not fit {name}, whose width is {vision_width}")
    if text_heads is not None and sizes[-3] % text_heads:
        raise ValueError(f"{text_heads} text heads do not fit {name}, whose text width is {sizes[-3]}")
    try:
        model = clip.model.CLIP(*sizes)
    except Exception as error:  # of every kind, on sizes that are no model's
        raise ValueError(f"{name} is not a CLIP checkpoint (no model has the sizes {sizes}): give another") from error
    towers = [("transformer", model.transformer, text_activation, text_heads or max(1, model.transformer.width // 64))]
    if is_vit:
        tower = model.visual.transformer
        towers.append(("visual.transformer", tower, activation, vision_width // head_width))
    for prefix, tower, tower_activation, heads in towers:
        for layer, block in enumerate(tower.resblocks):
            block.attn.num_heads, block.attn.head_dim = heads, tower.width // heads
            block.mlp.gelu = ACTIVATIONS[tower_activation]()
            hidden = state.get(f"{prefix}.resblocks.{layer}.mlp.c_fc.weight")
            if hidden is not None and len(hidden) != 4 * tower.width:  # ViT-g and ViT-bigG
                block.mlp.c_fc = torch.nn.Linear(tower.width, len(hidden))
                block.mlp.c_proj = torch.nn.Linear(len(hidden), tower.width)
    try:
        model.load_state_dict({**state, "logit_scale": state["logit_scale"].reshape(())})
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{name} is not a CLIP checkpoint that fits here ({reason}): give another") from error
    return model


def sizes_of(state):
    """(the arguments of clip.model.CLIP, the width of its image side). KeyError, ValueError: not a CLIP's weights."""
    embed, width = state["text_projection"].shape[1], state["ln_final.weight"].shape[0]
    layers = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("transformer.resblocks."))
    context, vocabulary = len(state["positional_embedding"]), len(state["token_embedding.weight"])
    text = (context, vocabulary, width, max(1, width // 64), layers)
    if "visual.proj" in state:
        vision_width, _, patch, _ = state["visual.conv1.weight"].shape
        vision = 1 + max(int(key.split(".")[3]) for key in state if key.startswith("visual.transformer.resblocks."))
        grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
        return (embed, grid * patch, vision, vision_width, patch, *text), vision_width
    counts = []  # a ResNet's blocks
    for stage in range(1, 5):
        counts.append(len({key.split(".")[2] for key in state if key.startswith(f"visual.layer{stage}.")}))
    vision_width = state["visual.layer1.0.conv1.weight"].shape[0]
    grid = round((len(state["visual.attnpool.positional_embedding"]) - 1) ** 0.5)
    return (embed, 32 * grid, tuple(counts), vision_width, None, *text), vision_width
