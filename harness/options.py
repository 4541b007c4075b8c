"""Every setting of run.py, once: type and range, default, help and source. config.json is written and read by it.

`python run.py --help` shows the settings that are marked `COMMON`, `--help-all` shows all of them. This file imports
neither PyTorch nor CLIP, so that --help and a wrong option answer at once.
"""

import argparse
import inspect
import os
import sys
import typing
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from harness.cli import printable
from harness.files import Count, Index, Name, Real

# The recipe: section 4.1 and appendix B -------------------------------------------------------------------------------


class Recipe(msgspec.Struct):
    """How a phase is tuned."""

    epochs: Count
    lr: Real  # the highest learning rate, that of epoch 2
    batch_size: Count  # images of a random batch; a batch of hard negatives has b*K


RECIPES = {
    "backbone": Recipe(20, 0.002, 32),  # the backbone without MAO
    # Each of MAO's two phases: half of the backbone's epochs (section 3.2). With b = 4 anchors instead of 32 images, an
    # epoch of the base phase has 8 times as many steps.
    "mao": Recipe(10, 0.0035, 32),
    "cross-dataset": Recipe(5, 0.0035, 32),  # every row of Table 2
}
SGD = {"momentum": 0.9, "weight_decay": 5e-4}  # the authors' release, for every backbone; Adam has the decay alone
WARMUP_LR = 1e-5  # of the first epoch of a phase: the authors' release, for every backbone


def paper_batch(classes):
    """(b, K) for C_b base classes, two ints, with b*K <= C_b from 4 classes on (appendix B).

    The paper has (4, 8) from 32 classes, (2, 8) for DTD and OxfordPets, (2, 2) for EuroSAT's 5.
    Ours: (2, 8) from 16 classes, and below that (2, C_b/2), with K at least 2.
    """
    if classes >= 32:
        return 4, 8
    if classes >= 16:
        return 2, 8
    return 2, max(2, classes // 2)


# The table ------------------------------------------------------------------------------------------------------------

COMMON = "common"  # shown by --help
MACHINE = "machine"  # changes nothing of what is tuned
Epochs = Annotated[int, Meta(ge=2, le=100_000)]
Size = Annotated[int, Meta(ge=1, le=1_000_000)]
Vectors = Annotated[int, Meta(ge=1, le=1000)]  # of a context; also layers, widths, views
Rate = Annotated[float, Meta(ge=1e-9, le=1e38)]
Protocol = Literal["base-to-new", "cross-dataset", "few-shot"]
Method = Literal["zeroshot", "backbone", "mao"]
Activation = Literal["quickgelu", "gelu"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Device = Annotated[str, Meta(pattern=r"^(cpu|mps|cuda(:\d{1,3})?)$")]
Workers = Annotated[int, Meta(ge=0, le=1000)]
Threads = Annotated[int, Meta(ge=1, le=1024)]


def option(kind, text, *marks):
    """The type of a field of `Settings`: `kind`, with its help text and its marks."""
    return Annotated[kind, Meta(description=text, extra={"marks": marks})]


# fmt: off
class Settings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a user can set. None: the default depends on other settings, on the data or on the machine."""

    # Task (section 4.1)
    dataset: option(Name, "demo, folder, or one of the eleven datasets (see data.py --help)", COMMON) = "demo"
    root: option(Name | None, "folder of the datasets, in CoOp's layout (default: data); for --dataset folder your "
                 "own: DIR/<class name>/*.jpg, or DIR/train and DIR/test", COMMON) = None
    names: option(Name | None, "for --dataset folder: JSON or CSV from class folders to names") = None
    template: option(Name | None, "for --dataset folder: the prompt of zero-shot CLIP and of the pseudo-labels, {} for "
                     "the name (default: a photo of a {}.)") = None
    download: option(bool, "download what is missing, where that is possible (EuroSAT: always)", MACHINE) = False
    protocol: option(Protocol, "base-to-new: Table 1; cross-dataset: tune on all classes, score on --targets too, "
                     "Table 2; few-shot: tune and test on all classes", COMMON) = "base-to-new"
    targets: option(tuple[Name, ...], "for cross-dataset (default: all other datasets)") = ("all",)
    unlabeled: option(Name | None, "tune phase 2 on all images of this folder; all classes of the dataset are base "
                      "classes then") = None
    new_classes: option(Name | None, "for --unlabeled: a file with the names of the new classes, one per line") = None
    new_test: option(Name | None, "for --unlabeled: labeled images of the new classes, DIR/<class name>/*.jpg") = None
    shots: option(Size, "labeled images per base class (appendix B)", COMMON) = 16
    unlabeled_shots: option(Size | None, "unlabeled images per new class (default: as --shots; Fig. 4 right)") = None
    seed: option(Index | tuple[Index, ...], "of all draws; of several (paper: 1 2 3) the mean too", COMMON) = 1

    # Model (Table 6)
    backbone: option(Name, "the prompt learner: coop, maple, promptsrc (Table 1), or one of the baselines cocoop, "
                     "kgcoop, proda, tcp, dept, coprompt", COMMON) = "coop"
    method: option(tuple[Method, ...], "rows of the table (Table 1)", COMMON) = ("zeroshot", "backbone", "mao")
    n_ctx: option(Vectors | None, "context vectors (default: 4; maple and coprompt 2; dept and proda 16)") = None
    ctx_init: option(Name | None, "for coop: the context starts from these words (default: from N(0, 0.02^2))") = None
    learner: option(tuple[Name, ...], "settings of the prompt learner's class: depth=9 (maple, promptsrc), prompts=32 "
                    "(proda), sentences=FILE (coprompt), ...; a wrong one is answered with all that there are") = ()
    clip: option(Name | None, "frozen CLIP (default: ViT-B/16, section 3.1; on the demo: demo): a name of OpenAI's, "
                 "open_clip:MODEL/PRETRAINED, a checkpoint file, or a folder of open_clip's or Hugging Face's",
                 COMMON) = None
    clip_activation: option(Activation | None, "for a checkpoint file without a config beside it") = None
    clip_head_width: option(Vectors | None, "for such a file: width of its ViT's attention heads (default: 64)") = None

    # Tuning (section 4.1 and appendix B)
    epochs: option(Epochs | None, "default: 20, half of them for each of MAO's phases; cross-dataset 5", COMMON) = None
    lr: option(Rate | None, "highest learning rate (default: 0.002; MAO and cross-dataset 0.0035)") = None
    batch_size: option(Size | None, "images per step of the backbone and of MAO's new phase (default: 32)") = None
    anchors: option(Size | None, "b of the base phase (default: 4 from 32 base classes on, else 2)") = None
    top_k: option(Size | None, "K of Eq. 4 (default: 8 from 16 base classes on, else half of them, at least 2)") = None
    cache_views: option(Vectors | None, "augment each image N times, once, and draw from these views, which is faster "
                        "(default: augment anew; docs/speed.md)", COMMON) = None
    recipe: option(Literal["own", "paper"], "tune a baseline without MAO as its authors do, or as all others") = "own"

    # Variants and ablations (Tables 4, 5 and 8)
    sampler: option(Name, "batches of MAO's base phase: hard (Eq. 4), or random, random-classes, clip-text, "
                    "clip-confusion (baselines/samplers.py)") = "hard"
    text_encoder: option(Name | None, "for --sampler hard: a sentence-transformers model, by its name or folder, for "
                         "class names that MiniLM does not know, such as Chinese ones (default: MiniLM)") = None
    labeler: option(Name, "pseudo-labels: clip (Eq. 7), tuned (Table 5), or balanced, confident, soft, whole "
                    "(baselines/labelers.py)") = "clip"
    no_base: option(bool, "phase 1 is the plain backbone with all its epochs (Table 4 b)") = False
    no_new: option(bool, "stop after phase 1 (Tables 4 a and 8 c)") = False
    no_reg_base: option(bool, "phase 1: cross-entropy over all base classes instead of Eq. 6") = False
    no_reg_new: option(bool, "phase 2: cross-entropy over base and new classes instead of Eq. 8 (Table 4 c)") = False

    # Machine and files
    precision: option(Precision, "of CLIP's matrices; auto: fp32 on a CPU, bf16 or fp16 on a GPU") = "auto"
    device: option(Device | None, "cpu, cuda, cuda:1, ..., mps (default: cuda where there is one)", MACHINE) = None
    workers: option(Workers | None, "processes that load images (default: one per core, at most 8; demo: none)",
                    MACHINE) = None
    threads: option(Threads | None, "of PyTorch on a CPU; the last digits depend on it (default: one per core; demo: "
                    "1)", MACHINE) = None
    cache: option(Name | None, "folder that keeps frozen CLIP's image features, so that no run encodes them again; "
                  "none: keep nothing (default: ~/.cache/mao)", MACHINE) = None
    out: option(Name, "each row leaves a folder there", COMMON, MACHINE) = "runs"
    resume: option(bool, "continue a stopped run of the same settings, bit-identically", COMMON, MACHINE) = False
    force: option(bool, "tune again what is finished, or start a stopped run over", MACHINE) = False
    eval: option(tuple[Name, ...], "score finished runs again, given their folders", COMMON, MACHINE) = ()
# fmt: on


DEFAULTS = Settings()
WITH_EVAL = {"eval", "root", "clip", "device", "workers", "threads", "cache"}  # what can be given with --eval


class Config(Settings):
    """config.json: the settings in force for one row, and what else its result depends on."""

    method: Method
    seed: Index
    learner_settings: dict[str, int | float | str | None]
    base: Recipe | None  # the recipe of phase 1; None: the row does not have the phase
    new: Recipe | None  # the recipe of phase 2
    clip_sha256: Name
    classnames: Annotated[list[Name], Meta(min_length=1)]
    new_classnames: list[Name]
    training_images: str
    test_images: str
    files_sha256: dict[str, str]  # of files that the learner's settings name
    versions: dict[str, str | None]


FIELDS = typing.get_type_hints(Settings, include_extras=True)  # {name: type, with its help and marks}
MACHINE_SETTINGS = {name for name, kind in FIELDS.items() if MACHINE in kind.__metadata__[-1].extra["marks"]}


def typed(settings):
    """{name: value} of the settings that are not the default."""
    found = {name: getattr(settings, name) for name in FIELDS}
    return {name: value for name, value in found.items() if value != getattr(DEFAULTS, name)}


# The command line -----------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, and which takes no abbreviated options."""

    def __init__(self, name, description):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(name, description=description, formatter_class=raw, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: {printable(message)}\n")


def checked(kind):
    """The `type` of an argument: converts its text by msgspec, with the type's range."""

    def convert(text):
        try:
            return msgspec.convert(text, kind, strict=False)
        except msgspec.ValidationError as error:
            raise argparse.ArgumentTypeError(f"{text} does not fit ({error})") from error

    return convert


def parser(description=None, everything=True, choices=None):
    """The parser of run.py, made from `Settings`.

    everything: its help shows all settings, not just those marked `COMMON`. choices: {setting: the names it can have}.
    """
    found = Parser("run.py", description)
    found.add_argument("--help-all", action="store_true", help="show all options, and exit")
    for name, annotated in FIELDS.items():
        kind, about, default = annotated.__origin__, annotated.__metadata__[-1], getattr(DEFAULTS, name)
        several = next((one for one in (kind, *typing.get_args(kind)) if typing.get_origin(one) is tuple), None)
        kind = typing.get_args(several)[0] if several else kind  # of each value
        text = about.description.replace("%", "%%")
        if default not in (None, False, (), ("all",)):
            text += f" (default: {' '.join(default) if isinstance(default, tuple) else default})"
        how = {"help": text if everything or COMMON in about.extra["marks"] else argparse.SUPPRESS}
        literals = [one for one in (kind, *typing.get_args(kind)) if typing.get_origin(one) is Literal]
        if kind is bool:
            how["action"] = "store_true"
        else:
            how.update(default=default, nargs="+" if several else None)
            if name in (choices or {}):
                how.update(choices=list(choices[name]), metavar="NAME")
            elif literals:
                how["choices"] = typing.get_args(literals[0])
            else:
                how["type"] = checked(kind if several else annotated)
        found.add_argument(dashed(name), **how)
    return found


def parse(arguments=None, description=None, choices=None):
    """The settings that the user typed, a `Settings`.

    arguments: a list of strings, or those of the command line. description, choices: as in `parser`. Ends the process
    after --help, and with exit code 2 and one sentence where an option is wrong.
    """
    words = sys.argv[1:] if arguments is None else [str(word) for word in arguments]
    everything = "--help-all" in words
    options = parser(description, everything, choices)
    found = vars(options.parse_args(["--help"] if everything else words))
    del found["help_all"]
    several = {name: tuple(dict.fromkeys(value)) for name, value in found.items() if isinstance(value, list)}
    if len(several.get("seed", ())) == 1:  # one run has one
        several["seed"] = several["seed"][0]
    settings = Settings(**{**found, **several})  # each value once
    try:
        check(settings)
    except ValueError as error:
        options.error(str(error))
    return settings


def dashed(name):
    """The option of a setting: "--no-base" of "no_base"."""
    return f"--{name.replace('_', '-')}"


def check(settings):
    """ValueError: settings that cannot be combined, or that have no effect beside others."""
    given, protocol = set(typed(settings)), settings.protocol
    if settings.eval and given - WITH_EVAL:
        raise ValueError(f"{dashed(min(given - WITH_EVAL))} has no effect with --eval: leave it out")
    if settings.cache and settings.cache != "none" and os.path.isfile(settings.cache):
        raise ValueError(f"--cache {settings.cache} is a file: give a folder, or none")
    if settings.dataset == "folder" and not settings.root:
        raise ValueError("--dataset folder needs --root, the folder of your class folders")
    if bool(settings.unlabeled) != bool(settings.new_classes) or (settings.new_test and not settings.unlabeled):
        raise ValueError("--unlabeled DIR and --new-classes FILE belong together (and --new-test to them): give both")
    if protocol == "cross-dataset" and settings.dataset == "folder":
        raise ValueError("--dataset folder has no targets for the cross-dataset protocol: --root is its own folder")
    if settings.no_base and settings.no_new and "mao" in settings.method:
        raise ValueError("--no-base and --no-new leave nothing of MAO: leave one out, or add --method backbone")
    if settings.labeler == "soft" and settings.no_reg_new:
        raise ValueError("--labeler soft cannot be combined with --no-reg-new: leave one of them out")
    of_new_phase = ("unlabeled_shots", "labeler", "no_reg_new")
    all_images = settings.unlabeled and settings.labeler != "balanced"
    for cause, holds, without_effect in (
        (f"--protocol {protocol}", protocol != "base-to-new", (*of_new_phase, "unlabeled", "no_new")),
        (f"--protocol {protocol}", protocol != "cross-dataset", ("targets",)),
        ("--no-base", settings.no_base, ("sampler", "anchors", "top_k", "no_reg_base", "text_encoder")),
        (f"--sampler {settings.sampler}", settings.sampler != "hard", ("text_encoder",)),
        ("--sampler random", settings.sampler == "random", ("anchors", "top_k")),
        ("--no-new", settings.no_new, of_new_phase),
        ("--ctx-init, whose words give the number", settings.ctx_init, ("n_ctx",)),
        ("--unlabeled, of which all images are taken", all_images, ("unlabeled_shots",)),
    ):
        for name in given & set(without_effect) if holds else ():
            raise ValueError(f"{dashed(name)} has no effect with {cause}: leave one of them out")


# What depends on the prompt learner -----------------------------------------------------------------------------------


def learner_settings(settings, learner):
    """What the learner's class takes besides CLIP and class names: {name: value}, its defaults and what the user gave.

    learner: the class. ValueError: a setting that it does not have, or of another type than its signature says.
    """
    parameters = inspect.signature(learner).parameters.values()
    found = {p.name: p.default for p in parameters if p.default is not p.empty}
    kinds = {p.name: p.annotation if p.annotation is not p.empty else type(p.default) for p in parameters}
    given = {name: getattr(settings, name) for name in ("n_ctx", "ctx_init") if getattr(settings, name) is not None}
    for word in settings.learner:
        name, equals, value = word.partition("=")
        if not equals or name in given:
            raise ValueError(f"--learner {word}: give each setting once, as NAME=VALUE")
        given[name] = value
    for name, value in given.items():
        if name not in found:
            raise ValueError(f"{settings.backbone} has no setting {name}: it has {', '.join(found) or 'none'}")
        try:
            found[name] = msgspec.convert(value, kinds[name], strict=False)
        except msgspec.ValidationError as error:
            raise ValueError(f"{settings.backbone} cannot have {name}={value} ({error})") from error
    return found


def check_learner(settings, learner):
    """ValueError: settings that cannot be combined with a learner's class."""
    name, given = settings.backbone, set(typed(settings))
    if settings.cache_views is not None and learner.views > 1:
        raise ValueError(f"--cache-views cannot be combined with {name}, which takes {learner.views} views at a time")
    if learner.new_phase_refused and "mao" in settings.method:
        for option in given & {"unlabeled_shots", "labeler", "no_reg_new", "no_base"}:
            raise ValueError(f"{dashed(option)} has no effect with {name}, which has no new phase: leave it out")
    if settings.labeler == "tuned" and learner.tuned_labeler_refused:
        raise ValueError(f"--labeler tuned cannot be combined with {name}: {learner.tuned_labeler_refused}")
    if settings.labeler == "soft" and learner.cross_entropy is not None:
        raise ValueError(f"--labeler soft cannot be combined with {name}, whose own cross-entropy takes labels")


def recipes(settings, method, learner, new_classes):
    """(recipe of phase 1, recipe of phase 2) of a row; None where the row does not have the phase.

    learner: the class. A baseline without MAO has its authors' recipe, unless --recipe paper. new_classes: whether the
    task has any; only then MAO has a new phase.
    """
    given = {name: getattr(settings, name) for name in ("lr", "batch_size") if getattr(settings, name) is not None}
    epochs, replace = settings.epochs, msgspec.structs.replace
    whole, first, second = {}, {}, {}  # what --epochs replaces: of one phase, of MAO's first, of its second
    if epochs is not None:
        whole, first, second = {"epochs": epochs}, {"epochs": epochs - epochs // 2}, {"epochs": epochs // 2}
    if method == "zeroshot":
        return None, None
    if settings.protocol == "cross-dataset":
        return replace(RECIPES["cross-dataset"], **given, **whole), None
    if method == "mao" and not settings.no_base:
        base = replace(RECIPES["mao"], **given, **first)
    else:  # the backbone; with --no-base it is MAO's first phase too
        own = learner.recipe if settings.recipe == "own" else {}
        of_authors = {name: own[name] for name in Recipe.__struct_fields__ if name in own}
        base = replace(RECIPES["backbone"], **{**of_authors, **given, **whole})
    new = method == "mao" and new_classes and not settings.no_new and not learner.new_phase_refused
    return base, replace(RECIPES["mao"], **given, **second) if new else None
