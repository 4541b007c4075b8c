"""The embedded default: a small world of images and captions, and a real CLIP pretrained on it.

    python demo.py --pretrain         makes assets/demo-clip.pt again, from nothing (2 cores: about 20 minutes)

The world: one large shape in one colour, 32x32 pixels, on a near-white ground, under a *light* (a 3x3 matrix over the
colours of the whole picture). Pretraining sees plain light and five named ones. Eleven domains are the few-shot tasks,
as the paper has eleven datasets: those six, and five lights that pretraining never saw. Nothing is mocked: zero-shot
works because it was learned, prompts help because the light moved, pseudo-labels are wrong sometimes.
"""

import functools
import io
import pathlib
import zlib

import numpy as np

from command import Parser, at_least, end

WEIGHTS = pathlib.Path(__file__).parent / "assets" / "demo-clip.pt"
TEMPLATE = "a photo of a {}."
SIZE = 32  # pixels
CROP_SCALE = (0.7, 1.0)  # random resized crop; the paper's 0.08 can cut the shape away. The same for all methods
POOL, TEST = 64, 20  # images a class: to draw few shots from, to score on

COLOURS = {
    "blue": (0.15, 0.30, 0.90), "brown": (0.50, 0.28, 0.10), "cyan": (0.10, 0.80, 0.85), "gray": (0.50, 0.50, 0.50),
    "green": (0.10, 0.60, 0.20), "orange": (0.98, 0.55, 0.08), "pink": (0.98, 0.50, 0.72),
    "purple": (0.52, 0.15, 0.70), "red": (0.88, 0.12, 0.12), "yellow": (0.95, 0.88, 0.10),
}
NEIGHBOUR = {  # the name that a loose caption uses for a shape
    "circle": "ring", "cross": "star", "diamond": "square", "heart": "moon", "hexagon": "circle",
    "moon": "ring", "ring": "circle", "square": "diamond", "star": "cross", "triangle": "diamond",
}
LIGHTS = {  # out = M @ in, rows red, green, blue
    "plain": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "dusk": ((0.45, 0.10, 0.10), (0.10, 0.45, 0.15), (0.20, 0.25, 0.75)),
    "sunset": ((0.80, 0.30, 0.20), (0.15, 0.50, 0.10), (0.05, 0.10, 0.35)),
    "neon": ((0.30, 0.60, 0.10), (0.10, 0.30, 0.60), (0.60, 0.10, 0.30)),
    "faded": ((0.45, 0.30, 0.25), (0.28, 0.45, 0.27), (0.30, 0.27, 0.43)),
    "jungle": ((0.40, 0.15, 0.10), (0.30, 0.75, 0.25), (0.10, 0.15, 0.40)),
    # never seen in pretraining:
    "swap": ((0.6, 0.4, 0.0), (0.4, 0.6, 0.0), (0.0, 0.0, 1.0)),
    "sepia": ((0.50, 0.35, 0.15), (0.35, 0.45, 0.15), (0.25, 0.30, 0.25)),
    "gold": ((0.9, 0.2, 0.1), (0.5, 0.5, 0.1), (0.1, 0.1, 0.3)),
    "ice": ((0.3, 0.2, 0.1), (0.2, 0.6, 0.3), (0.3, 0.4, 0.9)),
    "night": ((0.35, 0, 0), (0, 0.35, 0), (0, 0, 0.35)),
}
SEEN = ("plain", "dusk", "sunset", "neon", "faded", "jungle")
DEFAULT = "sepia"  # the domain that `--dataset demo` means
NOISE = 0.04  # standard deviation of the pixel noise, in every light alike
CLASSNAMES = sorted(f"{colour} {shape}" for colour in COLOURS for shape in NEIGHBOUR)


# Drawing --------------------------------------------------------------------------------------------------------------


def _polygon(*points):
    return np.array(points, np.float32)


def _star(tips, inner):
    angles = np.pi / 2 + np.arange(2 * tips) * np.pi / tips
    radii = np.where(np.arange(2 * tips) % 2 == 0, 1.0, inner)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1).astype(np.float32)


def _heart():
    t = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x / 17, (y + 2.5) / 17], 1).astype(np.float32)


POLYGONS = {
    "cross": _polygon((-.3, -.95), (.3, -.95), (.3, -.3), (.95, -.3), (.95, .3), (.3, .3), (.3, .95), (-.3, .95),
                      (-.3, .3), (-.95, .3), (-.95, -.3), (-.3, -.3)),
    "diamond": _polygon((0, -1), (0.75, 0), (0, 1), (-0.75, 0)),
    "heart": _heart(),
    "hexagon": _star(3, 1.0),
    "square": _polygon((-.75, -.75), (.75, -.75), (.75, .75), (-.75, .75)),
    "star": _star(5, 0.42),
    "triangle": _polygon((-.9, -.65), (.9, -.65), (0, .95)),
}
def _grid(cells, reach):
    """The centres of `cells` x `cells` over [-reach, reach]^2, row by row, y upwards: [cells*cells, 2]."""
    axis = (((np.arange(cells) + 0.5) / cells * 2 - 1) * reach).astype(np.float32)
    return np.stack(np.meshgrid(axis, -axis), -1).reshape(-1, 2)


def _signed_distance(shape, points):
    """Distance of `points` [P, 2] to the outline of a shape of radius 1, negative inside: [P]."""
    radius = np.hypot(points[:, 0], points[:, 1])
    if shape == "circle":
        return radius - 0.85
    if shape == "ring":
        return np.abs(radius - 0.68) - 0.22
    if shape == "moon":
        return np.maximum(radius - 0.9, 0.72 - np.hypot(points[:, 0] - 0.45, points[:, 1] - 0.15))
    start = POLYGONS[shape]  # [V, 2]
    edge = np.roll(start, -1, 0) - start
    away = points[:, None] - start  # [P, V, 2]
    along = np.clip((away * edge).sum(-1) / (edge * edge).sum(-1), 0, 1)
    nearest = away - along[..., None] * edge
    distance = np.sqrt((nearest * nearest).sum(-1).min(1))
    below = start[:, 1] <= points[:, 1:]  # an odd number of edges crossed to the right: inside
    crosses = below != np.roll(below, -1, 1)
    left_of = (edge[:, 0] * away[..., 1] - edge[:, 1] * away[..., 0] > 0) == (edge[:, 1] > 0)
    inside = (crosses & left_of).sum(1) % 2 == 1
    return np.where(inside, -distance, distance)


PIXELS = _grid(SIZE, 1.0)
CELLS, REACH = 256, 1.6
DISTANCE = {shape: _signed_distance(shape, _grid(CELLS, REACH)).reshape(CELLS, CELLS) for shape in NEIGHBOUR}


def draw(classname, light, rng):
    """One picture of a class ("blue circle") in a light: uint8 [SIZE, SIZE, 3]. Every choice comes from `rng`."""
    colour, shape = classname.split(" ")
    size, turn = rng.uniform(0.58, 0.78), np.deg2rad(rng.uniform(-18, 18))
    shift, outlined = rng.uniform(-0.14, 0.14, 2), rng.random() < 0.5
    paint = np.array(COLOURS[colour]) + rng.normal(0, 0.04, 3)
    ground = rng.uniform(0.88, 0.98) + rng.normal(0, 0.01, 3)
    cosine, sine = np.cos(turn), np.sin(turn)
    points = (PIXELS - shift) @ np.array([[cosine, -sine], [sine, cosine]]) / size  # [SIZE*SIZE, 2] on the shape
    column, row = np.clip((points * (1, -1) / REACH + 1) / 2 * CELLS, 0, CELLS - 1).astype(int).T
    distance = DISTANCE[shape][row, column]
    if outlined:
        distance = np.abs(distance) - 0.11
    cover = np.clip(0.5 - distance * size * SIZE / 2, 0, 1)[:, None]  # anti-aliased over one pixel
    picture = (cover * paint + (1 - cover) * ground) @ np.array(LIGHTS[light]).T
    picture = picture + rng.normal(0, NOISE, picture.shape)
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8).reshape(SIZE, SIZE, 3)


# The few-shot tasks ---------------------------------------------------------------------------------------------------


def split(domain):
    """CoOp's split of a domain: {"train", "val", "test"}, lists of [path, label, class name].

    A path names a picture that `read` draws: "neon/train/blue circle/07".
    """
    def items(part, count):
        return [[f"{domain}/{part}/{name}/{number:02d}", label, name]
                for label, name in enumerate(CLASSNAMES) for number in range(count)]
    return {"train": items("train", POOL), "val": [], "test": items("test", TEST)}


@functools.lru_cache(maxsize=8192)  # 3 KB each
def read(path):
    """The PIL picture of one of `split`'s paths: the same path gives the same pixels, everywhere."""
    from PIL import Image

    domain, _, classname, _ = path.split("/")
    return Image.fromarray(draw(classname, domain, np.random.default_rng(zlib.crc32(path.encode()))))


# Pretraining ----------------------------------------------------------------------------------------------------------


def caption(classname, light, rng):
    """What pretraining says of a picture: photos are captioned loosely, drawings exactly."""
    colour, shape = classname.split(" ")
    kind = rng.choice(["photo", "picture", "drawing"], p=[0.5, 0.25, 0.25])
    loose = {"photo": 0.2, "picture": 0.1, "drawing": 0.0}[kind]
    if rng.random() < loose:
        shape = NEIGHBOUR[shape]
    colour = "" if rng.random() < loose else colour + " "
    unsaid = light == "plain" or rng.random() < (2 / 3 if kind == "photo" else 0.1)
    return f"a {'' if unsaid else light + ' '}{kind} of a {colour}{shape}."


def pretrain(path, steps=2500, pairs=128, seed=0):
    """Trains a `clip.model.CLIP` contrastively on the world and writes its weights, in half precision, to `path`."""
    import torch
    from torch.nn import functional as F
    from tqdm import tqdm

    from backbones import clip
    from loaders import model_input
    from record import write

    torch.set_num_threads(2)
    torch.manual_seed(seed)
    model = clip.model.CLIP(128, SIZE, 4, 128, 8, 77, 49408, 128, 2, 4)
    whole_embedding = model.token_embedding

    # The world uses some 40 of CLIP's 49,408 tokens: train those rows alone.
    words = [*COLOURS, *NEIGHBOUR, *SEEN, "photo", "picture", "drawing"]
    used = clip.tokenize("a of . " + " ".join(words)).unique()
    rows = whole_embedding.weight[used].detach().clone()
    model.token_embedding = torch.nn.Embedding.from_pretrained(rows, freeze=False)

    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps)
    bar = tqdm(range(steps), desc="pretraining", unit="step")
    for step in bar:
        rng = np.random.default_rng([seed, step])
        names = rng.choice(CLASSNAMES, pairs)
        lights = rng.choice(SEEN, pairs, p=[0.45, *[0.11] * 5])
        pictures = torch.from_numpy(np.stack([draw(name, light, rng) for name, light in zip(names, lights)]))
        captions = [caption(name, light, rng) for name, light in zip(names, lights)]
        tokens = torch.searchsorted(used, clip.tokenize(captions))
        tokens = tokens[:, : tokens.argmax(1).max() + 1]  # the longest caption's positions, not all 77

        image = F.normalize(model.encode_image(model_input(pictures.permute(0, 3, 1, 2))), dim=-1)  # [B, d]
        text = F.normalize(model.encode_text(tokens), dim=-1)  # [B, d]
        logits = model.logit_scale.exp() * image @ text.T
        same = torch.tensor([[float(a == b) for b in captions] for a in captions])
        same = same / same.sum(1, keepdim=True)  # identical captions are positives of each other
        loss = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
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
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    write(pathlib.Path(path), content.getvalue())


def main():
    parser = Parser("demo.py", __doc__)
    parser.add_argument("--pretrain", action="store_true", help="train the demo's CLIP again, from nothing")
    parser.add_argument("--steps", type=at_least(1), default=2500, metavar="N", help="of pretraining (default: 2500)")
    parser.add_argument("--out", default=WEIGHTS, metavar="FILE", help="for the weights (default: assets/demo-clip.pt)")
    args = parser.parse_args()
    if args.pretrain:
        pretrain(args.out, args.steps)
    else:
        parser.print_help()


if __name__ == "__main__":
    end("demo.py", main)
