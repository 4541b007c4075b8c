"""Pretrains the CLIP of the embedded demo on the world that harness/demo.py draws, from nothing and from one seed.

    python -m experiments.pretrain                           makes assets/demo-clip.pt again (2 cores: about 20 minutes)
    python -m experiments.pretrain --seed 1 --out clip1.pt   another CLIP, to see what depends on the first one

Photos are captioned loosely, drawings exactly, and only the six domains of `demo.SEEN` are seen. So the CLIP is right
often enough for zero-shot classification, and wrong often enough for prompts to help.
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).parents[1])  # as a file, too, it imports from the project's folder

import io

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from harness import demo
from harness.cli import run_main
from harness.clips import DEMO_WEIGHTS, clip
from harness.files import Count, Index, atomic_write, make_folder
from harness.images import model_input
from harness.options import Parser, Threads, checked


def caption(classname, domain, rng):
    """A caption of pretraining for an image of a class ("blue circle") in a domain. Every choice comes from `rng`."""
    color, shape = classname.split(" ")
    kind = rng.choice(["photo", "picture", "drawing"], p=[0.5, 0.25, 0.25])
    loose = {"photo": 0.2, "picture": 0.1, "drawing": 0.0}[kind]
    if rng.random() < loose:
        shape = demo.NEIGHBORS[shape]
    words = ["a", domain, kind, "of a", color, shape]
    if rng.random() < loose:
        words.remove(color)
    if domain == "plain" or rng.random() < (2 / 3 if kind == "photo" else 0.1):
        words.remove(domain)
    return " ".join(words) + "."


def contrastive_loss(model, images, captions, tokens):
    """CLIP's loss over pairs, where images of one caption are positives of each other: a scalar.

    images: uint8 [B, h, w, 3]. captions: B strings. tokens: int64 [B, T], the captions as the model takes them.
    """
    image = F.normalize(model.encode_image(model_input(images.permute(0, 3, 1, 2))), dim=-1)  # [B, d]
    text = F.normalize(model.encode_text(tokens), dim=-1)  # [B, d]
    logits = model.logit_scale.exp() * image @ text.T
    same = torch.tensor([[float(a == b) for b in captions] for a in captions])
    same = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2


def pretrain(path, steps=2500, pairs=128, seed=0, threads=2):
    """Trains a `clip.model.CLIP` contrastively on the world and writes its weights, in half precision, to `path`.

    pairs: of an image and a caption, per step. threads: of PyTorch. OSError: `path` cannot be written.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = clip.model.CLIP(128, demo.SIZE, 4, 128, 8, 77, 49408, 128, 2, 4)
    whole_embedding = model.token_embedding

    # The world uses some 40 of CLIP's 49,408 tokens: train those rows alone.
    words = [*demo.COLORS, *demo.NEIGHBORS, *demo.SEEN, "photo", "picture", "drawing"]
    used = clip.tokenize("a of . " + " ".join(words)).unique()
    rows = whole_embedding.weight[used].detach().clone()
    model.token_embedding = torch.nn.Embedding.from_pretrained(rows, freeze=False)

    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    bar = tqdm(range(steps), desc="pretraining", unit="step", disable=None)
    for step in bar:
        rng = np.random.default_rng([seed, step])
        names = rng.choice(demo.CLASSNAMES, pairs)
        domains = rng.choice(demo.SEEN, pairs, p=[0.45, *[0.11] * 5])
        images = [demo.draw(name, domain, rng) for name, domain in zip(names, domains)]
        captions = [caption(name, domain, rng) for name, domain in zip(names, domains)]
        tokens = torch.searchsorted(used, clip.tokenize(captions))
        tokens = tokens[:, : tokens.argmax(1).max() + 1]  # the longest caption's positions, not all 77
        loss = contrastive_loss(model, torch.from_numpy(np.stack(images)), captions, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100))
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", scale=f"{model.logit_scale.exp().item():.1f}")

    with torch.no_grad():
        whole_embedding.weight[used] = model.token_embedding.weight
    model.token_embedding = whole_embedding
    content = io.BytesIO()  # not a file: torch.save would write its name into the archive
    torch.save({name: value.half() for name, value in model.state_dict().items()}, content)
    make_folder(pathlib.Path(path).parent)
    atomic_write(pathlib.Path(path), content.getvalue())


def main(arguments=None):
    """The command line of experiments/pretrain.py."""
    parser = Parser("experiments.pretrain", __doc__)
    add = parser.add_argument
    add("--steps", type=checked(Count), default=2500, metavar="N", help="default: 2500")
    add("--out", default=DEMO_WEIGHTS, metavar="FILE", help="for the weights (default: assets/demo-clip.pt)")
    add("--seed", type=checked(Index), default=0, metavar="N", help="of all draws (default: 0)")
    add("--threads", type=checked(Threads), default=2, metavar="N", help="the bits depend on it (default: 2)")
    args = parser.parse_args(arguments)
    pretrain(args.out, args.steps, seed=args.seed, threads=args.threads)


if __name__ == "__main__":
    run_main("experiments.pretrain", main)
