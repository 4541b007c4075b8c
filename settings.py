"""Every setting of run.py: what it does, its default, and the section, table or equation that it comes from."""

import argparse
import inspect
import pathlib
import sys
from typing import NamedTuple

import torch

import demo
from checkpoints import ACTIVATIONS, PRECISIONS
from cli import Parser, at_least, warn
from data import DATASETS, DEMOS, NEW_PHASE, PROTOCOLS
from formats import SENTENCES, read_json
from images import default_workers
from record import ELSEWHERE, fingerprint
from rivals import BACKBONES, RIVALS
from rivals.coprompt import sentence_lists
from sampler import paper_batch


class Recipe(NamedTuple):
    """How a phase is tuned."""

    epochs: int
    lr: float  # at its highest, in epoch 2
    batch_size: int  # of random batches; a batch of hard negatives has b*K images


RECIPES = {  # section 4.1 and appendix B
    "backbone": Recipe(20, 0.002, 32),  # the backbone without MAO
    # Each of MAO's two phases: half of the backbone's epochs (section 3.2). With b = 4 anchors instead of 32 images, an
    # epoch of the base phase has 8 times as many steps.
    "mao": Recipe(10, 0.0035, 32),
    "cross-dataset": Recipe(5, 0.0035, 32),  # every row of Table 2
}
SGD = {"momentum": 0.9, "weight_decay": 5e-4}  # the authors' release, for every backbone; Adam has the decay alone
WARMUP_LR = 1e-5  # of the first epoch of a phase: the authors' release, for every backbone
METHODS = ["zeroshot", "backbone", "mao"]
OF_EVAL = ["eval", "root", "clip", "device", "workers", "threads"]  # what goes with --eval
# Each goes to those learners whose class takes it.
LEARNER_OPTIONS = ["n_ctx", "ctx_init", "depth", "n_ctx_vision", "depth_vision", "insert_before", "prompts"]


COUNT = {"type": at_least(1, 1_000_000), "metavar": "N"}
VECTORS = {"type": at_least(1, 1000), "metavar": "N"}  # of a prompt, of layers, of a width


def parser(description=None):
    """The parser of run.py's command line."""
    parser = Parser("run.py", description)
    add_task(parser.add_argument_group("task (section 4.1)").add_argument)
    add_model(parser.add_argument_group("model (Table 6)").add_argument)
    add_tuning(parser.add_argument_group("tuning (section 4.1 and appendix B)").add_argument)
    add_ablations(parser.add_argument_group("ablations (Tables 4, 5 and 8)").add_argument)
    add_questions(parser.add_argument_group("questions to the new phase").add_argument)
    add_machine(parser.add_argument_group("machine and files").add_argument)
    return parser


def add_task(add):
    """Which images and classes. add: the group's `add_argument`, here and below."""
    add("--dataset", default="demo", metavar="NAME", help=f"one of {', '.join(DATASETS)} (default: demo)")
    add("--root", metavar="DIR", help="folder of the datasets, in CoOp's layout (default: data); for --dataset folder "
        "your own: DIR/<class name>/*.jpg, or DIR/train and DIR/test")  # fmt: skip
    add("--names", metavar="FILE", help="of --dataset folder: JSON or CSV from class folders to names (default: the "
        "folders' own)")  # fmt: skip
    add("--template", metavar="WORDS", help="of --dataset folder: words of zero-shot CLIP and pseudo-labels, {} for "
        "the name (default: a photo of a {}.)")  # fmt: skip
    add("--download", action="store_true", help="fetch what is missing, where a program can (EuroSAT: always)")
    add("--protocol", choices=PROTOCOLS, default=PROTOCOLS[0], help="base-to-new (default, Table 1); cross-dataset: "
        "tune on all classes, score on --targets too (Table 2); few-shot: all classes, train and test")  # fmt: skip
    add("--targets", nargs="+", default=["all"], metavar="NAME", help="of cross-dataset (default: all others)")
    add("--unlabeled", metavar="DIR", help="phase 2 on all images of DIR instead; all classes of the dataset are base")
    add("--new-classes", metavar="FILE", help="their class names, one per line")
    add("--new-test", metavar="DIR", help="labeled images of them, DIR/<class name>/*.jpg (default: none, New is '-')")
    add("--shots", default=16, **COUNT, help="labeled images per base class (default: 16, appendix B)")
    add("--unlabeled-shots", **COUNT, help="unlabeled images per new class (default: as --shots; Fig. 4 right)")
    add("--seed", type=at_least(0), default=1, metavar="N", help="of all draws (default: 1; the paper has 3 runs)")


def add_model(add):
    """The prompt learner and the frozen CLIP."""
    paper, rivals = ", ".join(name for name in BACKBONES if name not in RIVALS), ", ".join(RIVALS)
    add("--backbone", choices=list(BACKBONES), default="coop", metavar="NAME", help=f"the prompt learner (default: "
        f"coop). Table 1: {paper}; promptsrc's losses weigh 25 (text), 10 (image) and 1, its Gaussian over epochs is "
        f"at 15, std 1. Fig. 3, Tables 3 and 7: {rivals}; their settings stand in rivals/")  # fmt: skip
    add("--method", nargs="+", choices=METHODS, default=METHODS, help="rows of the table (default: all; Table 1)")
    add("--n-ctx", **VECTORS, help="text contexts (default: 4; maple and coprompt 2; dept and proda 16; Table 3's 8K "
        "parameters are 16)")  # fmt: skip
    add("--ctx-init", metavar="WORDS", help="coop: the context starts from these words (default: from N(0, 0.02^2))")
    add("--depth", **VECTORS, help="maple, promptsrc, coprompt: layers with contexts (default: 9, 9, 12, or all where "
        "there are fewer)")  # fmt: skip
    add("--n-ctx-vision", **VECTORS, help="promptsrc: visual contexts (default: 4)")
    add("--depth-vision", **VECTORS, help="promptsrc: layers with visual contexts (default: as for --depth)")
    add("--insert-before", **VECTORS, help="tcp: the text layer, from 0, before which the class's prompts come in "
        "(default: 8)")  # fmt: skip
    add("--prompts", **VECTORS, help="proda: prompts, each a context and a place of the name (default: 32)")
    add("--sentences", metavar="FILE", help="coprompt: JSON, class name to a list of sentences, as its authors' files "
        "(default: on the demo the world's own captions)")  # fmt: skip
    add("--clip", metavar="NAME|FILE", help="frozen CLIP (default: ViT-B/16, section 3.1; on the demo: demo, its own); "
        "or a checkpoint of OpenAI's, open_clip's or Hugging Face's layout")  # fmt: skip
    add("--clip-activation", choices=list(ACTIVATIONS), help="of a checkpoint without a config beside it")
    add("--clip-head-width", **VECTORS, help="of a checkpoint without a config beside it: width of a vision head "
        "(default: 64, where it can be)")  # fmt: skip


def add_tuning(add):
    """How the phases are tuned."""
    backbone, mao, cross = RECIPES["backbone"], RECIPES["mao"], RECIPES["cross-dataset"]
    add("--recipe", choices=["own", "paper"], default="own", help="of a rival without MAO: its authors' optimizer, "
        "epochs, batch and learning rate (default: own), or those of all other backbones here")  # fmt: skip
    add("--epochs", type=at_least(2, 100_000), metavar="N", help=f"default: {backbone.epochs}, MAO halves them; "
        f"cross-dataset {cross.epochs}, not halved")  # fmt: skip
    add("--lr", type=at_least(1e-9), metavar="X", help=f"default: {backbone.lr}, MAO and cross-dataset {mao.lr}")
    add("--batch-size", **COUNT, help=f"of the backbone and of MAO's new phase (default: {backbone.batch_size})")
    add("--anchors", **COUNT, help="b of the base phase (default: 4 from 32 base classes, else 2)")
    add("--top-k", **COUNT, help="K of Eq. 4 (default: 8 from 16 base classes, else half of them, at least 2)")
    add("--cache-views", **VECTORS, help="make N views of each image once, draw from them, and encode them once where "
        "the image side is frozen (default: each view anew)")  # fmt: skip


def add_ablations(add):
    """What of MAO is left out."""
    add("--no-base", action="store_true", help="phase 1 is the plain backbone with all its epochs (Table 4 b)")
    add("--no-new", action="store_true", help="stop after phase 1 (Tables 4 a and 8 c)")
    add("--no-reg-base", action="store_true", help="phase 1: cross-entropy over all base classes, not Eq. 6")
    add("--no-reg-new", action="store_true", help="phase 2: over base and new classes, not Eq. 8 (Table 4 c)")
    add("--pseudo-labeler", choices=["clip", "tuned"], default="clip", help="Eq. 7's CLIP (default: clip; Table 5)")


def add_questions(add):
    """What the paper leaves unasked (docs/results.md, "What the scores hide"); its own way is the default."""
    add("--unlabeled-draw", choices=["balanced", "random"], default="balanced", help="unlabeled images: so "
        "many of each new class (default), or as many of all of them, without looking")  # fmt: skip
    add("--pseudo-label-view", choices=["augmented", "center"], default="augmented", help="what Eq. 7 labels: each "
        "view as it comes (default, the release), or the whole image, once")  # fmt: skip
    add("--pseudo-labels", choices=["top1", "confident", "balanced", "soft"], default="top1", help="top1 (default); "
        "confident: those above --confidence alone; balanced: the most confident images of each class, labeled once as "
        "whole images; soft: the probabilities as targets")  # fmt: skip
    add("--confidence", type=at_least(0.0, 1), default=0.9, metavar="P", help="of --pseudo-labels confident (default: "
        "0.9)")  # fmt: skip


def add_machine(add):
    """Where and how it runs."""
    add("--precision", choices=["auto", *PRECISIONS], default="auto", help="of CLIP's matrices; all else is fp32 "
        "(default: auto, fp32 on a CPU, on a GPU bf16 or, where it has none, fp16 with loss scaling)")  # fmt: skip
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda where there is one")  # fmt: skip
    add("--workers", type=at_least(0, 1000), metavar="N", help="load images (default: one per core, at most 8; demo: "
        "none)")  # fmt: skip
    add("--image-memory", type=at_least(0, 10**9), default=1024, metavar="MIB", help="for decoded training "
        "images, which are read again and again (default: 1024; 0: decode them anew each time)")  # fmt: skip
    add("--threads", type=at_least(1, 1024), metavar="N", help="of PyTorch on a CPU; other last digits with another "
        "number (default: one per core; demo: 1, docs/speed.md)")  # fmt: skip
    add("--out", default="runs", metavar="DIR", help="each row leaves a folder there (default: runs)")
    add("--plot", action="store_true", help="also leave each row's training curves and confusion, as PNG")
    add("--resume", action="store_true", help="go on with a stopped run of the same settings, to the same bits")
    add("--force", action="store_true", help="tune again what is there already, or start a stopped run over")
    add("--eval", nargs="+", metavar="RUN", help="score finished rows again (--root, --clip: where they are now)")


def parse(arguments=None, description=None):
    """The settings in force, an argparse.Namespace; those that depend on the data are filled in by `fit`.

    arguments: a list of strings, or the command line's. description: for --help. `changed` has those that are not the
    default. ValueError: settings that do not go together, or a GPU that is not there.
    """
    options = parser(description)
    args = options.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    named = {"dataset", "backbone", "method", "seed", *ELSEWHERE}  # not told by `changed`
    args.changed = {
        name: value for name, value in vars(args).items() if name not in named and value != options.get_default(name)
    }
    if args.eval:
        for name, value in vars(args).items():
            if value != options.get_default(name) and name not in ("changed", *OF_EVAL):
                raise ValueError(f"--{name.replace('_', '-')} has no effect with --eval: leave it out")
    on_demo = args.dataset in DEMOS
    if args.workers is None:
        args.workers = 0 if on_demo else default_workers()  # the demo draws images faster than a worker hands them over
    if args.clip is None:
        args.clip = "demo" if on_demo else "ViT-B/16"
    if args.threads is None and not args.eval:  # threads that share the demo's small tensors wait for each other
        args.threads = 1 if args.clip == "demo" else torch.get_num_threads()
    if args.precision == "auto":
        args.precision = "fp32"
        if args.device == "cuda":
            args.precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if args.unlabeled_shots is None:
        args.unlabeled_shots = args.shots
    if args.epochs is None:
        args.epochs = RECIPES["cross-dataset" if args.protocol == "cross-dataset" else "backbone"].epochs
    args.method = list(dict.fromkeys(args.method))  # each row once
    backbone = BACKBONES[args.backbone]
    args.settings = learner_settings(backbone, args)
    if args.cache_views is not None and getattr(backbone, "views", 1) > 1:
        raise ValueError(
            f"--cache-views has no place with {args.backbone}, which draws two views at a time: leave it out"
        )
    refused = getattr(backbone, "tuned_labeler_refused", None)
    if args.pseudo_labeler == "tuned" and refused:
        raise ValueError(f"--pseudo-labeler tuned has no place with {args.backbone}: {refused}; leave it out")
    if args.pseudo_labels == "soft" and hasattr(backbone, "cross_entropy"):
        raise ValueError(f"--pseudo-labels soft has no place with {args.backbone}, whose cross-entropy takes labels")
    if args.sentences is not None and args.backbone != "coprompt":
        raise ValueError(f"--sentences is no setting of {args.backbone}: leave it out")
    if args.ctx_init is not None and args.n_ctx is not None:
        raise ValueError("--n-ctx has no place with --ctx-init, whose words give the number: leave one of them out")
    refuse_without_effect(args)
    return args


def tell_precision(args):
    """Prints one line, on stderr: in which precision CLIP runs, and whether another one would be faster here."""
    told = f"precision: {args.precision} on the {'GPU' if args.device == 'cuda' else 'CPU'}"
    if args.device == "cpu" and args.precision == "fp32" and args.clip != "demo" and cpu_has_bf16():
        told += "; this CPU has bf16, which is faster: --precision bf16 (docs/speed.md)"
    print(told, file=sys.stderr)


def cpu_has_bf16():
    """Whether the processor multiplies matrices in bfloat16 by itself, as Linux tells."""
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def refuse_without_effect(args):
    """ValueError: an option that the others make meaningless, or a row of MAO without any phase of MAO."""
    no_new = "--no-new" if args.no_new else None
    if new_phase_refused(args):
        no_new = f"--backbone {args.backbone}, which has no new phase"
    if args.no_base and no_new and "mao" in args.method:
        raise ValueError(f"--no-base and {no_new} leave nothing of MAO: leave one out, or add --method backbone")
    without_effect = {}  # {option: what makes it so}
    if args.no_base:
        without_effect.update(dict.fromkeys(("no_reg_base", "anchors", "top_k"), "--no-base"))
    if no_new:
        of_new_phase = ("no_reg_new", "pseudo_labeler", "unlabeled_shots", *NEW_PHASE)
        without_effect.update(dict.fromkeys(of_new_phase, no_new))
    if args.pseudo_labels != "confident":
        without_effect["confidence"] = f"--pseudo-labels {args.pseudo_labels}"
    if args.unlabeled and args.pseudo_labels != "balanced":
        without_effect["unlabeled_shots"] = "--unlabeled, of which all images are taken"
    if args.pseudo_labels == "balanced":
        without_effect["pseudo_label_view"] = "--pseudo-labels balanced, which sees whole images"
    for option, cause in without_effect.items():
        if option in args.changed:
            raise ValueError(f"--{option.replace('_', '-')} has no effect with {cause}: leave it out")


def read_sentences(args):
    """CoPrompt's sentences, {class name: list of strings}: of --sentences, on the demo its captions, else None.

    FileNotFoundError, ValueError: the file cannot be read, or is something else.
    """
    if args.sentences is None:
        return demo.sentences() if args.dataset in DEMOS else None
    advice = 'give JSON, {"class name": ["a sentence", ...], ...}'
    return read_json(args.sentences, SENTENCES, advice=advice, option="--sentences ")


def learner_settings(backbone, args):
    """What a backbone's class takes besides CLIP and class names: a dict of its defaults, or of the options given.

    ValueError: an option that is another backbone's.
    """
    parameters = inspect.signature(backbone).parameters.values()
    found = {p.name: p.default for p in parameters if p.default is not p.empty}
    for name in LEARNER_OPTIONS:
        value = getattr(args, name)
        if value is None:
            continue
        if name not in found:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} is no setting of {backbone.__name__.lower()}: leave it out")
        found[name] = value
    return found


def fit(args, task, clip_model):
    """Fills in b and K for a task, and checks that the settings fit it (appendix B).

    ValueError: K exceeds the base classes, or a class name does not fit the prompt. A choice that weakens MAO is
    warned about.
    """
    names = task.base_names + task.new_names
    for test in task.tests.values():
        names = names + test.names
    learner = BACKBONES[args.backbone](clip_model, names, **args.settings)  # raises where a name does not fit
    for needed in ("text_features", "image_features", "logit_scale", "set_classes", "prompts_images"):
        if not hasattr(learner, needed):
            raise ValueError(f"the backbone {args.backbone} has no {needed}, which docs/backbone.md asks for: add it")
    if hasattr(learner, "sentences"):
        sentence_lists(clip_model, task.base_names, read_sentences(args))  # raises where a class has none
    count = len(task.base_names)  # C_b
    anchors, top_k = paper_batch(count)
    args.anchors = anchors if args.anchors is None else args.anchors
    args.top_k = top_k if args.top_k is None else args.top_k
    if args.top_k > count:
        raise ValueError(f"top-k is {args.top_k}, but there are {count} classes: choose that or less")
    if args.anchors * args.top_k > count:
        warn(
            f"b*K = {args.anchors}*{args.top_k} exceeds the {count} base classes: reg-B may become plain "
            "cross-entropy (appendix B wants --anchors times --top-k within the classes)"
        )
    if "mao" in args.method and has_new_phase(args, "mao", task) and new_phase_refused(args):
        warn(new_phase_refused(args))
    if "mao" in args.method and args.epochs < 4 and args.protocol != "cross-dataset":
        warn(f"--epochs {args.epochs} leaves MAO a phase of one epoch, which is the warm-up at {WARMUP_LR}")


def row(args, method, task):
    """The settings of one row of the table: `args` with its method, and what its phases are tuned with.

    base_recipe, new_recipe: a `Recipe`, or None where the row lacks that phase. MAO has a new phase where the task has
    new classes. optimizer, augmentation: a rival's own, or CoOp's. A rival without MAO has its own epochs, rate and
    batch too, unless --recipe paper; MAO's are appendix B's.
    """
    own = {}  # a rival's, of its authors
    if args.recipe == "own":
        own = getattr(BACKBONES[args.backbone], "recipe", own)
    given = {field: getattr(args, field) for field in ("lr", "batch_size") if getattr(args, field) is not None}
    epochs = first = second = {}  # what --epochs overrides: of one phase, of MAO's first, of its second
    if "epochs" in args.changed:
        epochs = {"epochs": args.epochs}
        first = {"epochs": args.epochs - args.epochs // 2}  # an odd epoch is the base phase's
        second = {"epochs": args.epochs // 2}

    base = new = None
    if args.protocol == "cross-dataset" and method != "zeroshot":
        base = RECIPES["cross-dataset"]._replace(**given, **epochs)
    elif method == "mao" and not args.no_base:
        base = RECIPES["mao"]._replace(**given, **first)
    elif method != "zeroshot":  # the backbone; with --no-base, also the first phase of MAO
        own_recipe = {field: own[field] for field in Recipe._fields if field in own}
        base = RECIPES["backbone"]._replace(**{**own_recipe, **given, **epochs})
    if has_new_phase(args, method, task) and not new_phase_refused(args):
        new = RECIPES["mao"]._replace(**given, **second)

    optimizer = {"optimizer": own.get("optimizer", "sgd"), "eps": own.get("eps"), "lr_factors": own.get("lr_factors")}
    tuned_with = {"base_recipe": base, "new_recipe": new, "optimizer": optimizer}
    return argparse.Namespace(**{**vars(args), "method": method, **tuned_with, "augmentation": own.get("augmentation")})


def has_new_phase(args, method, task):
    """Whether a row is to have MAO's new phase."""
    return method == "mao" and bool(task.new_names) and not args.no_new


def new_phase_refused(args):
    """Why the backbone cannot have a new phase, a sentence, or None."""
    return getattr(BACKBONES[args.backbone], "new_phase_refused", None)


def in_force(row, task, clip_sha256):
    """What config.json says: every setting of a row of `row`, a dict that JSON can hold."""
    left_out = ("changed", "base_recipe", "new_recipe", "batch_size")
    found = {name: value for name, value in vars(row).items() if name not in left_out}
    for phase, recipe in (("base", row.base_recipe), ("new", row.new_recipe)):
        for field in Recipe._fields:
            found[f"{phase}_{field}"] = getattr(recipe, field, None)
    return {
        **found,
        **SGD,
        "warmup_lr": WARMUP_LR,
        "crop_scale": task.crop_scale,
        "clip_sha256": clip_sha256,
        "classnames": task.base_names,
        "new_classnames": task.new_names,
        "training_images": task.training_images(),
        "test_images": task.test_images(),
        "sentences_sha256": None if row.sentences is None else fingerprint(read_sentences(row)),
        "templates": {name: test.template for name, test in task.tests.items()},
        "threads": torch.get_num_threads(),
    }
