"""CoPrompt [11], "Consistency-guided Prompt Learning for Vision-Language Models".

MaPLe's prompts, adapters A behind both encoders, and two losses that hold the result near frozen CLIP:

    f' = unit(0.9 f + 0.1 A_image(f)),  w' = unit(0.8 w + 0.2 A_text(w)),  A(x) = ReLU(W2 ReLU(W1 x))
    L = CE + weight * (1 - mean over all C classes of cos(w'_c, sentence_c))
           + weight * (1 - mean over the images of cos(f'(view 1), frozen f(view 2)))

The sentences describe the classes; a language model wrote the authors'. One of them is drawn per step, for all classes.
Settings: the authors' code (ShuvenduRoy/CoPrompt @ a2a6c12). Depth, contexts and weight differ between their datasets
(9 or 12, 2 or 4, 0.1 to 8); here they are 12, 2 and 8, which are those of DTD.
"""

import torch
from torch import nn
from torch.nn import functional as F

from backbones import AllTextFeatures, MaPLe, pixels
from encoders import encode_images_fast, frozen_image_features, tokenize, zero_shot_text_features
from harness import demo
from harness.files import read_json
from harness.folders import name_finder


class CoPrompt(AllTextFeatures, MaPLe):
    """CoPrompt on MaPLe's prompts: `n_ctx` contexts before each of the first `depth` layers (12, or all if fewer).

    weight: of both consistency losses. sentences: a JSON file like the authors' gpt_file/*.json, from class names to
    lists of K sentences, or such a dict; None is enough for the demo's classes, whose captions are known. `sentence`
    fixes which of the K is taken; None draws one per step.
    """

    # the authors' code; Food101 takes 5 epochs
    recipe = {"optimizer": "sgd", "epochs": 8, "lr": 0.0035, "batch_size": 4, "augmentation": "randaugment"}
    views = 2  # of each training image, drawn independently
    new_phase_refused = (
        "coprompt + MAO has the base phase alone: in a new phase, pseudo-labels could not be matched with the "
        "sentences on the classes (appendix D)"
    )

    def __init__(
        self,
        clip_model,
        classnames,
        n_ctx: int = 2,
        depth: int | None = None,
        weight: float = 8.0,
        sentences: str | None = None,
    ):
        if depth is None:
            visual = getattr(clip_model.visual, "transformer", clip_model.transformer)  # MaPLe refuses a ResNet
            depth = min(12, clip_model.transformer.layers, visual.layers)
        self.weight, self.sentences, self.sentence = weight, sentences, None
        super().__init__(clip_model, classnames, n_ctx, depth)
        features = clip_model.text_projection.shape[1]
        self.adapter_image, self.adapter_text = adapter(features).to(self.ctx), adapter(features).to(self.ctx)

    def set_classes(self, classnames):
        super().set_classes(classnames)
        self.classnames = classnames
        self.bank = None  # the sentences' features [K, C, d], computed where a loss needs them

    def check(self):
        sentence_lists(self.clip_model, self.classnames, self.sentences)

    def encode_all(self):
        """w' of all classes [C, d], unit length."""
        w = self.unscaled_text_features()  # [C, d]
        return F.normalize(0.8 * w + 0.2 * self.adapter_text(w), dim=-1)

    def image_features(self, images):
        """f' [B, d], unit length. Of a pair of views, images that training gives, it takes the first."""
        context, *deep = self.visual_contexts()
        f = encode_images_fast(self.clip_model, pixels(images), context, deep)
        return F.normalize(0.9 * f + 0.1 * self.adapter_image(f), dim=-1)

    def other_losses(self, images, f):
        """The two consistency losses, weighted and summed: a scalar.

        images: a pair of views, [B, 3, h, w] each; one view alone serves as both. f: f' [B, d] of the first.
        ValueError: a class has no sentences.
        """
        second = images[1] if isinstance(images, tuple) else images
        if self.bank is None:
            lists = sentence_lists(self.clip_model, self.classnames, self.sentences)
            of_each = [zero_shot_text_features(self.clip_model, sentences, ["{}"]) for sentences in zip(*lists)]
            self.bank = torch.stack(of_each)  # of frozen CLIP, unit length [K, C, d]
        w = self.take_text_features()
        k = torch.randint(len(self.bank), ()).item() if self.sentence is None else self.sentence
        f_0, w_0 = frozen_image_features(self.clip_model, second), self.bank[k]  # of frozen CLIP
        text = 1 - F.cosine_similarity(w, w_0.to(w)).mean()
        image = 1 - F.cosine_similarity(f.to(w), f_0.to(w)).mean()
        return self.weight * (text + image)


def adapter(features):
    """A(x) = ReLU(W2 ReLU(W1 x)), without biases: [B, d] -> [B, d]."""
    net = nn.Sequential()
    net.add_module("down", nn.Linear(features, features // 4, bias=False))  # W1
    net.add_module("relu1", nn.ReLU())
    net.add_module("up", nn.Linear(features // 4, features, bias=False))  # W2
    net.add_module("relu2", nn.ReLU())
    return net


def sentence_lists(clip_model, classnames, sentences):
    """The sentences of each class, lists of K strings, checked but not encoded. sentences: as of `CoPrompt`.

    FileNotFoundError: no such file. ValueError: none at all, none for a class, unequal numbers, or one that is longer
    than CLIP's context.
    """
    option = "--learner sentences="
    if isinstance(sentences, str):
        advice = 'give JSON, {"class name": ["a sentence", ...], ...}'
        sentences = read_json(sentences, dict[str, list[str]], advice, option)
    elif sentences is None and set(classnames) <= set(demo.CLASSNAMES):
        sentences = demo.sentences()
    elif sentences is None:
        raise ValueError(f"coprompt needs sentences on the classes: give {option}FILE, as its authors' gpt_file/*.json")
    lists, find = [], name_finder(list(sentences))
    for name in classnames:
        found = sentences.get(find(name))
        if not found:
            raise ValueError(f"{option} has none for the class '{name}': add a list of them")
        lists.append(found)
    if len({len(found) for found in lists}) > 1:
        raise ValueError(f"{option} must have as many sentences for each class: shorten the longer lists")
    for name, found in zip(classnames, lists):
        try:
            tokenize(clip_model, [sentence.replace("_", " ") for sentence in found])
        except ValueError as error:
            raise ValueError(f"{option} has one for the class '{name}' that is too long: {error}") from error
    return lists
