"""What a file from outside may hold. Each kind has its types and ranges here; anything else is refused in one sentence.

A file may be broken, edited by hand, or made by somebody else's program. What is read is checked once, by msgspec,
before anything is computed from it.
"""

import json
import pathlib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=1, le=2**31)]
Index = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Real = Annotated[float, Meta(ge=-1e38, le=1e38)]  # finite, and within float32
Percent = Annotated[float, Meta(ge=0, le=100)]
Seconds = Annotated[float, Meta(ge=0, le=1e12)]
Name = Annotated[str, Meta(min_length=1)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Setting = Annotated[int, Meta(ge=1, le=10_000)] | Real | str | None  # of a prompt learner

ITEMS = list[tuple[Name, Index, Name]]  # [path, label, class name]
SPLIT = {"train": Annotated[ITEMS, Meta(min_length=1)], "test": Annotated[ITEMS, Meta(min_length=1)], "val": ITEMS}
LISTS = {"split": dict[Literal["train", "val", "test"], ITEMS] | None, "new_test": ITEMS | None}
NAMES = dict[str, Annotated[str, Meta(pattern=r"\S")]]  # of --names, from folders to class names
SENTENCES = dict[str, list[str]]

CLIP_CONFIG = {  # what a config beside a CLIP's weights says
    "activation": Name, "text_activation": Name, "head_width": Count, "text_heads": Count,
}  # fmt: skip

HEADER = {  # of a file of prompts
    "dataset": Name, "backbone": Name, "settings": dict[str, Setting], "clip": Name, "clip_sha256": Sha256,
    "clip_activation": Literal["quickgelu", "gelu"] | None, "clip_head_width": Count | None,
    "classnames": Annotated[list[Name], Meta(min_length=1)],
}  # fmt: skip
CONFIG = HEADER | {  # config.json: HEADER's keys, and these
    "method": Literal["zeroshot", "backbone", "mao"], "seed": Index, "shots": Count, "unlabeled_shots": Count,
    "protocol": Literal["base-to-new", "cross-dataset", "few-shot"],
    "targets": Annotated[list[Name], Meta(min_length=1)], "new_classnames": list[Name],
    **dict.fromkeys(("root", "names", "template", "unlabeled", "new_classes", "new_test", "sentences", "ctx_init",
                     "augmentation", "out"), str | None),
    "device": Literal["cpu", "cuda"], "recipe": Literal["own", "paper"], "precision": Literal["fp32", "bf16", "fp16"],
    "pseudo_labeler": Literal["clip", "tuned"], "unlabeled_draw": Literal["balanced", "random"],
    "pseudo_label_view": Literal["augmented", "center"],
    "pseudo_labels": Literal["top1", "confident", "balanced", "soft"],
    **dict.fromkeys(("download", "no_base", "no_new", "no_reg_base", "no_reg_new", "resume", "force", "plot"), bool),
    **dict.fromkeys(("epochs", "anchors", "top_k", "threads", "n_ctx", "depth", "n_ctx_vision", "depth_vision",
                     "insert_before", "prompts", "cache_views", "base_epochs", "new_epochs", "base_batch_size",
                     "new_batch_size"), Count | None),
    **dict.fromkeys(("lr", "confidence", "base_lr", "new_lr", "momentum", "weight_decay", "warmup_lr"), Real | None),
    "workers": Index, "image_memory": Index, "eval": None,
    "crop_scale": tuple[Real, Real], "optimizer": dict[str, str | Real | None | dict],
    "training_images": Sha256, "test_images": Sha256, "sentences_sha256": Sha256 | None,
    "templates": dict[str, str], "versions": dict[str, str | None],
}  # fmt: skip
RESULT = {  # result.json; of cross-dataset also each dataset's accuracy, by its name
    **dict.fromkeys(("base", "new", "h", "base_by_final_prompt", "accuracy", "average"), Percent | None),
    **dict.fromkeys(("one_list", "one_list_final"), dict[Literal["base", "new", "h", "all"], Percent]),
    "learnable_parameters": Index, "seconds": Seconds, "peak_mib": Seconds | None,
}  # fmt: skip
METRICS = {  # a line of metrics.jsonl
    "phase": Literal["base", "new"], "epoch": Count, "loss": Real, "lr": Real, "candidates": Real, "seconds": Seconds,
    "pseudo_label_accuracy": Percent,
}  # fmt: skip


def read_json(path, kinds, needed=(), advice="get the file again", option="", others=None):
    """The content of a JSON file, checked as by `check`. option: "--names ", where the user named the file by one.

    FileNotFoundError: it cannot be opened. ValueError: it is not JSON, or of other types or ranges than `kinds` says.
    """
    path = pathlib.Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FileNotFoundError(f"cannot read {option}{path} ({error.strerror}): {advice}") from error
    except ValueError as error:
        raise ValueError(f"{option}{path} is not a text file in UTF-8 ({error}): {advice}") from error
    return check(parse(text, f"{option}{path}", advice), kinds, needed, f"{option}{path}", advice, others)


def parse(text, where, advice):
    """What a JSON text holds. ValueError: it is not JSON, its numbers are not finite, or it nests without end."""

    def refuse(constant):
        raise ValueError(f"{constant} is not a number")

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError(f"{where} is broken (it nests too deeply): {advice}") from error
    except ValueError as error:
        raise ValueError(f"{where} is broken ({error}): {advice}") from error


def once(pairs):
    """A dict of (key, value) pairs. ValueError: a key comes twice, or something is no pair."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"'{key}' is there twice")
        found[key] = value
    return found


def check(found, kinds, needed, where, advice, others=None):
    """Returns what was read from a file, unchanged, if it is of the types and ranges of `kinds`.

    kinds: {key: type}, or one type for the whole. needed: the keys that must be there. others: the type of keys that
    `kinds` does not name; None: they are refused. where: the file, for the sentence. ValueError: something is amiss.
    """
    try:
        if not isinstance(kinds, dict):
            msgspec.convert(found, kinds)
            return found
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, where names and values belong")
        for key in needed:
            if key not in found:
                raise ValueError(f"'{key}' is missing")
        for key, value in found.items():
            kind = kinds.get(key, others)
            if key not in kinds and others is None:
                raise ValueError(f"'{key}' is not known here")
            try:
                msgspec.convert(value, kind)
            except msgspec.ValidationError as error:
                raise ValueError(f"'{key}': {error}") from error
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"{where} is broken ({str(error)[:300]}): {advice}") from error
    return found
