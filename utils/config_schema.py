"""Every configuration key: its type, default, limits and one sentence; `python -m utils.config_schema` prints the docs.

Keys are written `section.key`. A field whose default is None may be None; one whose default is REQUIRED must be given.
"""

import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

REQUIRED = object()
ANY = object()
SECTIONS = {
    "data": "which videos are read, and how",
    "network": "the frozen tower and the side network",
    "solver": "the optimisation",
    "test": "the evaluation",
    "logging": "what is reported, and when",
}
KINDS = {
    "bool": "True or False",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "file": "a file",
    "folder": "a folder",
    "list of int": "a list of whole numbers",
    "list of float": "a list of numbers",
    "int or list of int": "a whole number or a list of them",
    "layers": "`all`, `every2`, `last:N` or a list of whole numbers",
    "dict": "a mapping of names to values",
}
# PyYAML reads a number with an exponent as text unless it has both a point and a signed exponent.
_EXPONENT_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class Rule(NamedTuple):
    """A limit on a value: `text` continues "must be a whole number, ...", `holds(value)` tests it."""

    text: str
    holds: Callable[..., bool]


def _at_least(low: int) -> Rule:
    return Rule(f"at least {low}", lambda value: value >= low)


def _one_of(*names: str) -> Rule:
    return Rule(f"one of {', '.join(names)}", lambda value: value in names)


def _names_frames(template: str) -> bool:
    try:
        return template.format(1) != template.format(2)
    except (AttributeError, LookupError, TypeError, ValueError):
        return False


_ABOVE_0 = Rule("above 0", lambda value: value > 0)
_FRACTION = Rule("at least 0 and below 1", lambda value: 0 <= value < 1)
_BETAS = Rule("two of them, each at least 0 and below 1", lambda b: len(b) == 2 and all(0 <= x < 1 for x in b))
_EPOCHS = Rule("each at least 0", lambda epochs: all(epoch >= 0 for epoch in epochs))
_STEPS = Rule("each at least 1", lambda steps: all(s >= 1 for s in (steps if isinstance(steps, list) else [steps])))
_NOT_EMPTY = Rule("not empty", lambda text: text.strip() != "")
_TEMPLATE = Rule("with one field for the frame number, like img_{:05d}.jpg", _names_frames)
_RESIZE = Rule(
    "the shorter side or [height, width] in pixels, none below data.input_size",
    lambda size: not isinstance(size, list) or len(size) == 2,
)
_MEAN = Rule(
    "three of them, for red, green and blue, each from 0 to 1", lambda m: len(m) == 3 and all(0 <= x <= 1 for x in m)
)
_STD = Rule(
    "three of them, for red, green and blue, each above 0 and at most 1",
    lambda std: len(std) == 3 and all(0 < x <= 1 for x in std),
)
_WIDTH = Rule("a positive multiple of 64", lambda value: value > 0 and value % 64 == 0)


@dataclass(frozen=True)
class Field:
    """One key: `kind` is a key of KINDS, `default` REQUIRED or a value of that kind, `doc` a sentence."""

    kind: str
    default: object
    doc: str
    rule: Rule | None = None
    optional: bool = False  # None is a value, though not the default

    @property
    def must(self) -> str:
        """What a value must be, in words."""
        limits = [self.rule.text] if self.rule else []
        return ", ".join([KINDS[self.kind], *limits, *(["or None"] if self.default is None or self.optional else [])])

    def read(self, value: object) -> object:
        """A value as YAML gives it, in this field's type, lists and dicts copied; ValueError says what is wrong."""
        value = None if value == "None" else value
        if value is None and (self.default is None or self.optional):
            return None
        try:
            result = _convert(self.kind, value)
            if self.rule is None or self.rule.holds(result):
                return result
        except (ValueError, OverflowError):
            pass
        raise ValueError(f"is {value!r}, must be {self.must}")


def _convert(kind: str, value: object) -> object:
    match kind:
        case "bool" if isinstance(value, bool):
            return value
        case "str" | "file" | "folder" if isinstance(value, str):
            return value
        case "int" | "float":
            number = free_value(value)
            if isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number):
                if kind == "float":
                    return float(number)
                if number == int(number):
                    return int(number)
        case "list of int" | "list of float" if isinstance(value, list):
            return [_convert(kind.removeprefix("list of "), item) for item in value]
        case "int or list of int":
            return _convert("list of int" if isinstance(value, list) else "int", value)
        case "layers" if isinstance(value, list):
            return _convert("list of int", value)
        case "layers" if isinstance(value, str) and re.fullmatch(r"all|every2|last:[1-9]\d*", value):
            return value
        case "dict" if isinstance(value, dict):
            return free_value(value)
    raise ValueError


def free_value(value: object) -> object:
    """A copy of a value of no fixed type, in which "None" is None and a number that PyYAML left as text is a number.

    ValueError for the types that YAML has and a configuration has not, such as dates.
    """
    match value:
        case dict():
            return {key: free_value(item) for key, item in value.items()}
        case list():
            return [free_value(item) for item in value]
        case str():
            return None if value == "None" else float(value) if _EXPONENT_NUMBER.fullmatch(value) else value
        case bool() | int() | float() | None:
            return value
    raise ValueError


FIELDS = {
    "base": Field("file", None, "A configuration, relative to this one, whose values hold where this one gives none."),
    "resume": Field(
        "file",
        None,
        "Checkpoint of a run to go on with, exactly where it stopped; `auto` takes the newest intact one of "
        "`--output`, and starts from the beginning if there is none.",
    ),
    "pretrain": Field(
        "file", None, "Checkpoint, ours or a released one, to start from; other classes take a new head."
    ),
    "seed": Field("int", 1024, "Initialisation, order, frames, crops and flips derive from it.", _at_least(0)),
    # data
    "data.dataset": Field("str", REQUIRED, "Name of the data set, also of the folder of its runs.", _NOT_EMPTY),
    "data.protocol": Field(
        "str",
        None,
        "Sampling of frames, resize and grayscale as for Kinetics or for Something-Something; None: `something` if "
        "`data.dataset` has that in its name, else `kinetics`.",
        _one_of("kinetics", "something"),
    ),
    "data.modality": Field("str", "RGB", "`RGB` reads frame folders, `video` video files.", _one_of("RGB", "video")),
    "data.decoder": Field(
        "str",
        "pyav",
        "Reads video files, with the same frames: `pyav` reads all kinds, `decord` takes longer and refuses some; "
        "`auto` is `decord` for what `pyav` would decode twice (large, and not H.264 or VP9 in mp4, mov, mkv or webm).",
        _one_of("pyav", "decord", "auto"),
    ),
    "data.num_segments": Field("int", 8, "Frames of a clip.", _at_least(1)),
    "data.batch_size": Field("int", REQUIRED, "Training videos of a batch, for each process.", _at_least(1)),
    "data.workers": Field("int", 4, "Loader processes for each training process; 0 loads in that one.", _at_least(0)),
    "data.prefetch": Field(
        "int", 2, "Batches that a loader process keeps ready; fewer need less memory.", _at_least(1)
    ),
    "data.num_classes": Field("int", REQUIRED, "Number of classes; labels run from 0 to one less.", _at_least(1)),
    "data.image_tmpl": Field(
        "str", "img_{:05d}.jpg", "File name of a frame; the first is number `data.index_base`.", _TEMPLATE
    ),
    "data.index_base": Field(
        "int", 1, "Number of the first frame file of a folder.", Rule("0 or 1", lambda base: base in (0, 1))
    ),
    "data.count_frames": Field(
        "bool", False, "Count the files named like `data.image_tmpl` in each folder; the list's column is not used."
    ),
    "data.on_error": Field(
        "str",
        "stop",
        "A video that cannot be read: `stop` ends the run; with `skip`, training takes the next one of the epoch's "
        "order, and evaluation gives NaN scores, counted wrong. Evaluation always does so with video files.",
        _one_of("stop", "skip"),
    ),
    "data.train_root": Field("folder", None, "Where the paths of `data.train_list` start; training needs it."),
    "data.train_list": Field(
        "file", None, "Training videos, a line `path num_frames label` (video files: `path label`) each; for training."
    ),
    "data.val_root": Field("folder", None, "Where the paths of `data.val_list` start; always needed."),
    "data.val_list": Field(
        "file", None, "Videos to evaluate, in the same form; always needed. test.py takes one whose labels are all -1."
    ),
    "data.label_list": Field("file", None, "Class names: a csv file with the header `id,name`."),
    "data.input_size": Field(
        "int", None, "Height and width of what the model sees; None takes the tower's.", _at_least(1)
    ),
    "data.resize": Field(
        "int or list of int", None, "Size of a frame before it is cropped; None: that of the protocol.", _RESIZE
    ),
    "data.flip": Field(
        "bool", True, "Training mirrors half of the clips, and swaps the labels of left and right; False: none."
    ),
    "data.mean": Field(
        "list of float",
        None,
        "Subtracted from pixels, which run from 0 to 1; None: that of the tower's training.",
        _MEAN,
    ),
    "data.std": Field(
        "list of float", None, "Pixels are then divided by it; None: that of the tower's training.", _STD
    ),
    "data.random_shift": Field("bool", True, "Training draws frames at random; False takes those of validation."),
    "data.num_sample": Field(
        "int", 1, "Clips, augmented apart, from each training video that is loaded.", _at_least(1)
    ),
    "data.rand_aug": Field("bool", False, "RandAugment, the same for all frames of a clip."),
    "data.rand_erase": Field("bool", False, "Random erasing, the same box in all frames of a clip."),
    "data.dense": Field("bool", False, "Frames from a window of 128, not the whole video; at most 128 segments then."),
    "data.shot": Field("int", None, "Train on this many videos of each class, chosen by `seed`.", _at_least(1)),
    # network
    "network.arch": Field("str", REQUIRED, "Frozen tower: `ViT-B/32`, `ViT-B/16`, ..., or `timm/<name>`.", _NOT_EMPTY),
    "network.init": Field("bool", True, "Load the tower's weights from `clip_pretrain/`; False leaves it random."),
    "network.weights": Field(
        "file",
        None,
        "Weight file of the tower, in place of the one in `clip_pretrain/`; `hub` lets timm download its own.",
    ),
    "network.backbone_kwargs": Field("dict", {}, "Passed to timm for the tower; replaces a base's mapping as a whole."),
    "network.drop_fc": Field("float", 0.0, "Dropout before the classifier.", _FRACTION),
    "network.side_dim": Field("int", REQUIRED, "Side width; 320 for ViT-B, 512 for ViT-L/14 in the paper.", _WIDTH),
    "network.side_variant": Field(
        "str",
        None,
        "Norms before or after the side network's layers; None: `post` for EVA-CLIP, else `pre`.",
        _one_of("pre", "post"),
    ),
    "network.side_layers": Field(
        "layers",
        None,
        "Tower blocks that the side network reads, from 0; None: `all` for `pre`, `every2` (1, 3, 5, ...) for `post`. "
        "Blocks after the last one read are not computed.",
    ),
    "network.backbone_dtype": Field(
        "str",
        "auto",
        "Type that the frozen tower is stored and run in; `auto`: that of `solver.precision` on a GPU, or float32.",
        _one_of("auto", "float32", "bfloat16", "float16"),
    ),
    "network.shard_backbone": Field(
        "bool", False, "Split the frozen tower's weights over the processes; each block is put together when it runs."
    ),
    # solver
    "solver.type": Field("str", "cosine", "Learning rate after the warm-up.", _one_of("cosine", "multistep")),
    "solver.epochs": Field("int", REQUIRED, "Passes over the training list.", _at_least(1)),
    "solver.start_epoch": Field("int", 0, "Epoch to start with, from 0; below `solver.epochs`.", _at_least(0)),
    "solver.lr": Field("float", REQUIRED, "Learning rate of the classifier after the warm-up.", _ABOVE_0),
    "solver.lr_warmup_step": Field("float", 0.0, "Epochs in which the learning rate rises from 0.", _at_least(0)),
    "solver.lr_decay_step": Field(
        "int or list of int",
        None,
        "`multistep` divides the rate by 10 every so many epochs, or at those listed.",
        _STEPS,
    ),
    "solver.evaluate": Field("bool", False, "Evaluate once and stop, without training."),
    "solver.betas": Field("list of float", [0.9, 0.999], "AdamW's averaging factors.", _BETAS),
    "solver.weight_decay": Field("float", 0.15, "AdamW's weight decay, on everything that is trained.", _at_least(0)),
    "solver.clip_ratio": Field("float", 1.0, "The side network's rate is this times `solver.lr`.", _at_least(0)),
    "solver.grad_accumulation_steps": Field("int", 1, "Batches whose gradients make one step.", _at_least(1)),
    "solver.mixup": Field("bool", False, "Mixup or cutmix of the clips of a batch, two by two."),
    "solver.smoothing": Field("float", 0.1, "Label smoothing; `solver.mixup` goes with 0.1.", _FRACTION),
    "solver.precision": Field(
        "str",
        "amp",
        "`amp`: bf16 where the GPU has it, else fp16; fp32 on a CPU.",
        _one_of("amp", "bf16", "fp16", "fp32"),
    ),
    "solver.recompute": Field(
        "bool",
        True,
        "Keep the tower's tokens and each side block's input only, and compute the rest again in the backward pass: "
        "the same gradients, in about a seventh of the memory.",
    ),
    "solver.compile": Field("bool", False, "Compile the tower's blocks, which takes a C++ compiler and a minute."),
    "solver.sync_bn": Field("bool", False, "BatchNorm statistics over all processes instead of each one's own."),
    "solver.clip_grad": Field("float", None, "Largest norm of the gradient; above, it is scaled down to it.", _ABOVE_0),
    # test
    "test.view_batch": Field("int", None, "Views in the model at once; None takes `data.batch_size`.", _at_least(1)),
    "test.remap_labels": Field(
        "bool", False, "Accept a checkpoint with the classes of `data.label_list` in another order; scores follow it."
    ),
    # logging
    "logging.save_minutes": Field(
        "float",
        10.0,
        "Minutes from one checkpoint inside an epoch to the next; None saves at the end of an epoch only.",
        _ABOVE_0,
        optional=True,
    ),
    "logging.keep": Field("int", 2, "Number of newest checkpoints that stay in the folder of a run.", _at_least(1)),
    "logging.print_freq": Field("int", 10, "Iterations from one printed line to the next.", _at_least(1)),
    "logging.eval_freq": Field("int", 1, "Epochs from one evaluation to the next.", _at_least(1)),
    "logging.skip_epoch": Field("list of int", [], "Epochs, from 0, that are saved but not evaluated.", _EPOCHS),
}

# Key -> the value it may have (ANY, or that of the other key named here), and why.
LEGACY = {
    "data.seg_length": (1, "A segment gives one frame; use `data.num_segments` for more frames."),
    "network.tm": (False, "The side network is the only temporal module."),
    "network.drop_out": (0, "The frozen tower has no dropout; use `network.drop_fc` for the classifier's."),
    "network.emb_dropout": (0, "The frozen tower has no dropout; use `network.drop_fc` for the classifier's."),
    "network.type": (ANY, "`network.arch` says it all."),
    "network.sim_header": (None, "The clip's feature is a mean, with no further head."),
    "network.joint_st": (False, "Attention runs inside each frame, convolution across frames."),
    "network.n_emb": ("network.side_dim", "Another name of `network.side_dim`, and must equal it."),
    "network.sync_bn": ("solver.sync_bn", "Another name of `solver.sync_bn`, and must equal it."),
    "network.fix_clip": (ANY, "The tower is always frozen."),
    "network.my_fix_clip": (True, "The tower is always frozen."),
    "solver.epoch_offset": (0, "Use `resume` or `solver.start_epoch`."),
    "solver.optim": ("adamw", "AdamW is the only optimizer; see `solver.betas` and `solver.weight_decay`."),
    "solver.loss_type": ("CE", "Cross entropy is the only loss; see `solver.smoothing`."),
    "solver.layer_decay": (1.0, "Layers share one rate; `solver.clip_ratio` sets it apart from the classifier's."),
    "solver.momentum": (ANY, "AdamW has none; see `solver.betas`."),
}

_HEAD = """# Configuration

Written by `python -m utils.config_schema > docs/configuration.md`: change the sentences there.

A run is one YAML file, and any number of `key=value` after it on the command line, where the same rules hold:
`solver.lr=1e-3`, `logging.skip_epoch=[0,1]`, `network.backbone_kwargs.depth=4`. Paths are relative to the folder that
the program runs in, the repository root; that of `base` to the file that says it. An unknown key is an error."""


def markdown() -> str:
    """The text of docs/configuration.md."""
    lines = [_HEAD]
    for section, what in {"": "the run", **SECTIONS}.items():
        fields = {key: field for key, field in FIELDS.items() if key.rpartition(".")[0] == section}
        rows = [(f"`{key}`", field.must, _code(field.default), field.doc) for key, field in fields.items()]
        lines += [f"\n## {f'`{section}`' if section else 'No section'}: {what}\n"]
        lines += _table(("key", "type", "default", "what it does"), rows)
    lines += ["\n## Keys of older configurations\n\nAccepted with this value, and dropped; an error otherwise.\n"]
    lines += _table(("key", "value", "why"), [(f"`{key}`", _code(value), why) for key, (value, why) in LEGACY.items()])
    return "\n".join(lines) + "\n"


def _code(value: object) -> str:
    return "required" if value is REQUIRED else "any" if value is ANY else f"`{value}`"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    sys.stdout.write(markdown())
