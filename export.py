"""Tuned prompts for programs without this project: a head for any CLIP user, or image encoder and head as ONNX.

python predict.py --prompt runs/demo-coop-mao-seed1/new.safetensors --classes names.txt --export head.safetensors
python predict.py --prompt runs/demo-coop-mao-seed1/new.safetensors --classes names.txt --export model.onnx
"""

import json

import safetensors.torch
import torch
from torch import nn

from evaluate import finite, scorer
from images import PIXEL_MEAN, PIXEL_STD
from record import write


def export(path, learner, header, classnames, pixels, g=None):
    """Writes `path`, a pathlib.Path: a head, .safetensors, or all of it, .onnx.

    learner: it holds `classnames`, or g [C, d] are their text features. header: of the file of prompts. pixels: the
    CLIP's input resolution.
    ValueError: another ending, or `export_head` or `export_onnx` cannot.
    """
    if path.suffix == ".onnx":
        export_onnx(path, learner, classnames, pixels, g)
    elif path.suffix == ".safetensors":
        export_head(path, learner, header, classnames, g)
    else:
        raise ValueError(f"--export {path} must end with .safetensors (a head) or .onnx (image encoder and head)")


@torch.no_grad()
def export_head(path, learner, header, classnames, g=None):
    """The learner as a linear head on frozen CLIP's image features f, scaled to unit length (Eq. 3):

        logits = logit_scale * f @ text_features.T

    A safetensors file of "text_features" [C, d] and "logit_scale" []; its metadata "mao" is JSON with classnames, the
    CLIP and its SHA-256. ValueError: the learner is no such head, or its features are not finite.
    """
    if learner.prompts_images or getattr(learner, "text_depends_on_image", False):
        why = "tunes its image side or scores" if learner.prompts_images else "makes its text anew for each image"
        raise ValueError(f"{header['backbone']} {why}, so that no head holds it: export it as .onnx, or use predict.py")
    g = finite(learner.text_features() if g is None else g)
    tensors = {"text_features": g.float().cpu().contiguous()}
    tensors["logit_scale"] = torch.as_tensor(learner.logit_scale).float().cpu()
    about = {"classnames": list(classnames), **{key: header[key] for key in ("backbone", "clip", "clip_sha256")}}
    write(path, safetensors.torch.save(tensors, {"mao": json.dumps(about)}))


class Classifier(nn.Module):
    """uint8 images [B, 3, pixels, pixels] -> probabilities [B, C]: CLIP's normalization, image encoder, head."""

    def __init__(self, learner, g=None):
        super().__init__()
        self.score = scorer(learner, g)
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(PIXEL_STD)[:, None, None])

    def forward(self, images):
        # As `images.model_input`: torchvision's normalize looks at its values, which cannot be exported.
        return self.score((images.float() / 255 - self.mean) / self.std).softmax(dim=-1)


def export_onnx(path, learner, classnames, pixels, g=None):
    """`Classifier` as an ONNX file: "images" uint8 [B, 3, pixels, pixels] -> "probabilities" [B, C].

    B is any number, but 1 where text depends on the image. Its metadata "classnames" is a JSON list. Images come
    resized and cut as CLIP's own preprocessing does it. The learner is on the CPU.
    ValueError: onnx and onnxscript are missing, or the probabilities are not finite.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise ValueError(f"--export {path} needs more packages: pip install onnx onnxscript") from error
    single = getattr(learner, "text_depends_on_image", False)
    images = torch.zeros(1 if single else 2, 3, pixels, pixels, dtype=torch.uint8)
    shapes = None if single else {"images": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        classifier = Classifier(learner, g).eval()
        finite(classifier(images))
        program = torch.onnx.export(
            classifier,
            (images,),
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto
    onnx.helper.set_model_props(model, {"classnames": json.dumps(list(classnames))})
    write(path, model.SerializeToString())
