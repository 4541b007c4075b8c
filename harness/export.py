"""Tuned prompts for programs without this project: a head for any CLIP user, or image encoder and head as ONNX.

python predict.py --run runs/demo-coop-mao-seed1 --export head.safetensors
python predict.py --run runs/demo-coop-mao-seed1 --export model.onnx
"""

import json
import os
import pathlib
import tempfile

import safetensors.torch
import torch
from torch import nn

from harness.files import MARKS, atomic_write, wrap_os_errors
from harness.images import model_input
from harness.scores import check_finite, scorer


def export(path, learners, header, classnames):
    """Writes `path`, a pathlib.Path: a head (.safetensors), or image encoder and head (.onnx).

    learners: prompt learners on one CLIP, which hold `classnames` together. header: of the file of prompts, a dict.
    ValueError: another ending, or an error of `export_head` or `export_onnx`.
    """
    if path.suffix not in MARKS or path.suffix == ".csv":
        raise ValueError(f"--export {path} must end with .safetensors (a head) or .onnx (image encoder and head)")
    if path.suffix == ".onnx":
        export_onnx(path, learners, classnames)
    else:
        export_head(path, learners, header, classnames)


@torch.no_grad()
def export_head(path, learners, header, classnames):
    """Writes the learners as a linear head on frozen CLIP's image features f of unit length (Eq. 3):

        logits = logit_scale * f @ text_features.T

    The safetensors file holds "text_features" [C, d] and "logit_scale" []; its metadata "mao" is JSON with classnames,
    the CLIP and its SHA-256. ValueError: a learner is not such a head, or its features are not finite.
    """
    learner = learners[0]
    if learner.prompts_images or learner.text_depends_on_image:
        why = "tunes its image side or scores" if learner.prompts_images else "computes its text anew for each image"
        raise ValueError(f"{header['backbone']} {why}, so no head can hold it: export it as .onnx, or use predict.py")
    g = check_finite(torch.cat([learner.text_features() for learner in learners]))
    tensors = {"text_features": g.float().cpu().contiguous()}
    tensors["logit_scale"] = torch.as_tensor(learner.logit_scale).float().cpu()
    about = {"classnames": list(classnames), **{key: header[key] for key in ("backbone", "clip", "clip_sha256")}}
    atomic_write(path, safetensors.torch.save(tensors, {"mao": json.dumps(about)}))


class Classifier(nn.Module):
    """uint8 images [B, 3, pixels, pixels] -> probabilities [B, C]: CLIP's normalization, image encoder, head."""

    def __init__(self, learners):
        super().__init__()
        self.score = scorer(*learners)

    def forward(self, images):
        return self.score(model_input(images)).softmax(dim=-1)


def export_onnx(path, learners, classnames):
    """Writes `Classifier` as an ONNX file: "images" uint8 [B, 3, pixels, pixels] -> "probabilities" [B, C].

    B is any number, but 1 if text depends on the image. Its metadata "classnames" is a JSON list. The caller resizes
    and crops images as CLIP's own preprocessing does. Weights of more than 2 GB are in a second file, `path`.data, as
    ONNX wants it. The learners are on the CPU.
    ValueError: onnx and onnxscript are missing, or the probabilities are not finite.
    """
    try:
        import onnx  # noqa: F401  torch.onnx needs both
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--export {path} needs more packages: pip install onnx onnxscript") from error
    single, pixels = learners[0].text_depends_on_image, learners[0].clip_model.visual.input_resolution
    images = torch.zeros(1 if single else 2, 3, pixels, pixels, dtype=torch.uint8)
    shapes = None if single else {"images": {0: torch.export.Dim("batch")}}
    names = {"input_names": ["images"], "output_names": ["probabilities"]}
    with torch.no_grad():
        classifier = Classifier(learners).eval()
        check_finite(classifier(images))
        program = torch.onnx.export(classifier, (images,), **names, dynamic_shapes=shapes, dynamo=True, verbose=False)
    program.model.producer_name = "MAO"
    program.model.metadata_props["classnames"] = json.dumps(list(classnames))
    with wrap_os_errors(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        program.save(os.path.join(folder, path.name))
        for file in sorted(pathlib.Path(folder).iterdir(), reverse=True):  # the weights first
            os.replace(file, path.parent / file.name)
