"""The world of the embedded demo: drawn images of ten shapes in ten colors, in eleven domains.

An image is one large shape on a near-white ground, 32x32 pixels. Each domain has its own light, a 3x3 matrix that is
applied to the colors of the whole image. The domains are the few-shot tasks, like the paper's eleven datasets.
experiments/pretrain.py trained the demo's CLIP on six of them, and it never saw the other five. So nothing is mocked:
zero-shot works because it was learned, prompts help because the light differs, and some pseudo-labels are wrong.
"""

import functools
import zlib

import numpy as np
from PIL import Image

TEMPLATE = "a photo of a {}."
SIZE = 32  # pixels
CROP_SCALE = (0.7, 1.0)  # random resized crop, for all methods; the paper's 0.08 can cut the shape away
POOL, TEST = 64, 20  # images per class: to draw few shots from, to score on

# fmt: off
COLORS = {
    "blue": (0.15, 0.30, 0.90), "brown": (0.50, 0.28, 0.10), "cyan": (0.10, 0.80, 0.85), "gray": (0.50, 0.50, 0.50),
    "green": (0.10, 0.60, 0.20), "orange": (0.98, 0.55, 0.08), "pink": (0.98, 0.50, 0.72),
    "purple": (0.52, 0.15, 0.70), "red": (0.88, 0.12, 0.12), "yellow": (0.95, 0.88, 0.10),
}
NEIGHBORS = {  # for every shape, the shape that an imprecise caption names instead
    "circle": "ring", "cross": "star", "diamond": "square", "heart": "moon", "hexagon": "circle",
    "moon": "ring", "ring": "circle", "square": "diamond", "star": "cross", "triangle": "diamond",
}
LIGHTS = {  # of every domain: output color = M @ input color, rows red, green, blue
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
# fmt: on
SEEN = ("plain", "dusk", "sunset", "neon", "faded", "jungle")  # the domains of pretraining
DEFAULT = "sepia"  # the domain of `--dataset demo`
NOISE = 0.04  # standard deviation of the pixel noise, the same in every domain
CLASSNAMES = sorted(f"{color} {shape}" for color in COLORS for shape in NEIGHBORS)

# Shapes ---------------------------------------------------------------------------------------------------------------


def _star(tips, inner):
    """Corners of a star of radius 1 with its inner corners at radius `inner`: [2 * tips, 2]."""
    angles = np.pi / 2 + np.arange(2 * tips) * np.pi / tips
    radii = np.where(np.arange(2 * tips) % 2 == 0, 1.0, inner)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1).astype(np.float32)


def _heart():
    """24 corners of a heart: [24, 2]."""
    t = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x / 17, (y + 2.5) / 17], 1).astype(np.float32)


# fmt: off
POLYGONS = {  # corners [V, 2], counterclockwise or clockwise, y upward
    "cross": [(-.3, -.95), (.3, -.95), (.3, -.3), (.95, -.3), (.95, .3), (.3, .3), (.3, .95), (-.3, .95),
              (-.3, .3), (-.95, .3), (-.95, -.3), (-.3, -.3)],
    "diamond": [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)],
    "heart": _heart(),
    "hexagon": _star(3, 1.0),
    "square": [(-.75, -.75), (.75, -.75), (.75, .75), (-.75, .75)],
    "star": _star(5, 0.42),
    "triangle": [(-.9, -.65), (.9, -.65), (0, .95)],
}
# fmt: on


def _grid(cells, reach):
    """The centers of `cells` x `cells` over [-reach, reach]^2, row by row, y upward: [cells*cells, 2]."""
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
    start = np.array(POLYGONS[shape], np.float32)  # [V, 2]
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
CELLS, REACH = 256, 1.6  # of the tables of distances, which `draw` looks up
# The table of a shape, made when it is first drawn: all of them take a third of a second.
distances = functools.cache(lambda shape: _signed_distance(shape, _grid(CELLS, REACH)).reshape(CELLS, CELLS))


# Images ---------------------------------------------------------------------------------------------------------------


def draw(classname, domain, rng):
    """One image of a class ("blue circle") in a domain: uint8 [SIZE, SIZE, 3]. Every choice comes from `rng`."""
    color, shape = classname.split(" ")
    size, turn = rng.uniform(0.58, 0.78), np.deg2rad(rng.uniform(-18, 18))
    shift, outlined = rng.uniform(-0.14, 0.14, 2), rng.random() < 0.5
    paint = np.array(COLORS[color]) + rng.normal(0, 0.04, 3)
    ground = rng.uniform(0.88, 0.98) + rng.normal(0, 0.01, 3)
    cosine, sine = np.cos(turn), np.sin(turn)
    points = (PIXELS - shift) @ np.array([[cosine, -sine], [sine, cosine]]) / size  # [SIZE*SIZE, 2] on the shape
    column, row = np.clip((points * (1, -1) / REACH + 1) / 2 * CELLS, 0, CELLS - 1).astype(int).T
    distance = distances(shape)[row, column]
    if outlined:
        distance = np.abs(distance) - 0.11
    cover = np.clip(0.5 - distance * size * SIZE / 2, 0, 1)[:, None]  # anti-aliased over one pixel
    image = (cover * paint + (1 - cover) * ground) @ np.array(LIGHTS[domain]).T
    image = image + rng.normal(0, NOISE, image.shape)
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8).reshape(SIZE, SIZE, 3)


def sentences():
    """Captions of every class like those of pretraining, for CoPrompt: {class name: 18 sentences}."""
    lights = ["", *(f"{domain} " for domain in SEEN if domain != "plain")]
    starts = [f"a {light}{kind} of a" for light in lights for kind in ("photo", "picture", "drawing")]
    return {name: [f"{start} {name}." for start in starts] for name in CLASSNAMES}


def split(domain):
    """CoOp's split of a domain: {"train", "val", "test"}, lists of [path, label, class name]; no val.

    A path names an image that `read` draws: "neon/train/blue circle/07".
    """
    lists = {"train": [], "val": [], "test": []}
    for part, count in (("train", POOL), ("test", TEST)):
        for label, name in enumerate(CLASSNAMES):
            lists[part] += [[f"{domain}/{part}/{name}/{number:02d}", label, name] for number in range(count)]
    return lists


@functools.lru_cache(maxsize=8192)  # 3 KB each
def read(path):
    """The RGB image (PIL) of a path in `split`: the same path gives the same pixels on every machine."""
    domain, _, classname, _ = path.split("/")
    return Image.fromarray(draw(classname, domain, np.random.default_rng(zlib.crc32(path.encode()))))
