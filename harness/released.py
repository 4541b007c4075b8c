"""Prompts that the authors' own trainers of CoOp, MaPLe and PromptSRC saved: `prompt_learner/model.pth.tar-50`.

Dassl's trainers save {"state_dict", "epoch", "optimizer", "scheduler", ...}. CoOp's state dict has the prompts alone,
those of MaPLe and PromptSRC the whole model.
"""

import re
import zipfile

import torch

from harness.runs import Header

RENAMES = {  # the authors' keys and ours
    r"^(module\.)?(prompt_learner\.)?": "",
    r"^compound_prompts_text": "text_prompts",
    r"^compound_prompt_projections": "projections",
    r"^text_encoder.*resblocks\.(\d+)\.VPT_shallow": r"text_prompts.\1",
    r"^image_encoder.*resblocks\.(\d+)\.VPT_shallow": r"visual_prompts.\1",
    r"^image_encoder\.VPT": "visual_prompts.0",
}
FROZEN = re.compile(r"token_(prefix|suffix)|(image|text|ZS_image)_encoder\.|logit_scale")


class Ignored:
    """What a checkpoint holds besides tensors, such as a scheduler: made and filled without any effect."""

    __init__ = __setstate__ = lambda self, *_: None


def read_released(path):
    """(`runs.Header`, state dict) of such a file, or None: no file of PyTorch's. Of the pickle, only tensors are read.

    The number and the depth of the prompts are those of the tensors. ValueError: it holds something else.
    """
    if not zipfile.is_zipfile(path):
        return None
    try:
        others, found = torch.serialization.get_unsafe_globals_in_checkpoint(path), {}
        with torch.serialization.safe_globals([(Ignored, name) for name in others]):
            state = torch.load(path, "cpu", weights_only=True)["state_dict"]
        for key, value in state.items():
            for theirs, ours in RENAMES.items():
                key = re.sub(theirs, ours, key)
            if not FROZEN.match(key):
                found[key] = value.float()
        text, image = (sum(key.startswith(f"{side}_prompts") for key in found) for side in ("text", "visual"))
        backbone = "promptsrc" if image else "maple" if "proj.weight" in found else "coop"
        if backbone == "coop" and (found.keys() != {"ctx"} or found["ctx"].ndim != 2):  # as CoCoOp, or one per class
            raise ValueError(", ".join(f"{key} {list(value.shape)}" for key, value in list(found.items())[:3]))
        settings = {"n_ctx": len(found["ctx"])} | ({} if backbone == "coop" else {"depth": 1 + text})
        if image:
            settings |= {"n_ctx_vision": len(found["visual_prompts.0"]), "depth_vision": image}
        return Header(backbone, settings, "ViT-B/16", ""), found  # the releases' CLIP, which the file does not name
    except Exception as error:  # of every kind, on a file of another program
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ValueError(f"{path} is no model.pth.tar-N of CoOp, MaPLe or PromptSRC ({reason}): give one") from error
