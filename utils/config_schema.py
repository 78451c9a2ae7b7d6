"""All configuration keys, each with type, default, limits and an explanation.

    python -m utils.config_schema > docs/configuration.md

Keys are written `section.key`. A field with the default REQUIRED must be given; a field with the default None accepts
None.
"""

import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from string import Formatter
from typing import NamedTuple

from utils.errors import quoted

REQUIRED = object()  # the default of a key that must be given
ANY = object()  # in LEGACY: every value is accepted
SECTIONS = {
    "data": "the videos, and how they are read",
    "network": "the frozen tower and the side network",
    "solver": "training",
    "test": "evaluation",
    "logging": "reports and evaluations during training",
}
KINDS = {
    "bool": "True or False",
    "bool or auto": "`auto`, True or False",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "file": "a file",
    "folder": "a folder",
    "model": "a file, a folder, or a name of the Hugging Face Hub, org/name",
    "list of int": "a list of whole numbers",
    "list of float": "a list of numbers",
    "int or list of int": "a whole number or a list of them",
    "layers": "`all`, `every2`, `last:N` or a list of whole numbers",
    "class weights": "`balanced` or a list of numbers, one for each class",
    "dict": "a mapping of names to values",
}
# PyYAML reads 1e-3 as text: it wants a point and a signed exponent.
_EXPONENT_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class Rule(NamedTuple):
    """A limit on a value. `text` completes "must be a whole number, ..." and `holds(value)` tests the value."""

    text: str
    holds: Callable[..., bool]


def _from_to(low: int, high: int) -> Rule:
    """High limits are far above what anybody uses; they catch slips that would fill the memory."""
    return Rule(f"from {low} to {high}", lambda value: low <= value <= high)


def _at_least(low: int) -> Rule:
    return Rule(f"at least {low}", lambda value: value >= low)


def _one_of(*names: str) -> Rule:
    return Rule(f"one of {', '.join(names)}", lambda value: value in names)


def _fields(template: str) -> list[tuple]:
    try:
        return list(Formatter().parse(template))
    except ValueError:
        return []


def _names_frames(template: str) -> bool:
    if re.search(r"\d{4}", "".join(spec or "" for _, _, spec, _ in _fields(template))):
        return False  # a number padded to thousands of digits
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
_WEIGHTS = Rule(
    "each at least 0 and not all 0",
    lambda weights: weights == "balanced" or (all(weight >= 0 for weight in weights) and any(weights)),
)
_WIDTH = Rule("a positive multiple of 64, at most 16384", lambda value: 0 < value <= 16384 and value % 64 == 0)


@dataclass(frozen=True)
class Field:
    """One configuration key.

    `kind` is a key of KINDS, `default` is REQUIRED or a value of that kind, `doc` explains the key in sentences.
    `trained_with` marks a key that decides what the trained weights get of a video: frames, pixels, or tokens of the
    tower. Another value in a test gives the weights something that they were not trained with, and no error.
    """

    kind: str
    default: object
    doc: str
    rule: Rule | None = None
    optional: bool = False  # None is allowed although it is not the default
    trained_with: bool = False

    @property
    def must(self) -> str:
        """The requirement on a value in words."""
        limits = [self.rule.text] if self.rule else []
        return ", ".join([KINDS[self.kind], *limits, *(["or None"] if self.default is None or self.optional else [])])

    def read(self, value: object) -> object:
        """Return a value that YAML gave in the type of this field; lists and dicts are copied.

        Raises ValueError with the value and the requirement.
        """
        value = None if value == "None" else value
        if value is None and (self.default is None or self.optional):
            return None
        try:
            result = _convert(self.kind, value)
            if self.rule is None or self.rule.holds(result):
                return result
        except (ValueError, OverflowError):
            pass
        raise ValueError(f"is {quoted(value)}, must be {self.must}")


def _convert(kind: str, value: object) -> object:
    match kind:
        case "bool" | "bool or auto" if isinstance(value, bool):
            return value
        case "bool or auto" if value == "auto":
            return value
        case "str" | "file" | "folder" | "model" if isinstance(value, str):
            return value
        case "int" | "float":
            number = _free_value(value)
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
        case "class weights" if isinstance(value, list):
            return _convert("list of float", value)
        case "class weights" if value == "balanced":
            return value
        case "dict" if isinstance(value, dict):
            return _free_value(value)
    raise ValueError


def _free_value(value: object) -> object:
    """Return a copy of a value without a fixed type.

    The text "None" becomes None, and a number that PyYAML read as text becomes a number. Raises ValueError for types
    that a configuration does not use, such as dates.
    """
    match value:
        case dict():
            return {key: _free_value(item) for key, item in value.items()}
        case list():
            return [_free_value(item) for item in value]
        case str():
            return None if value == "None" else float(value) if _EXPONENT_NUMBER.fullmatch(value) else value
        case bool() | int() | float() | None:
            return value
    raise ValueError


FIELDS = {
    "base": Field(
        "file",
        None,
        "Another configuration that gives the values missing in this one. The path is relative to this file.",
    ),
    "resume": Field(
        "file",
        None,
        "Checkpoint of a run to continue. The run continues exactly where it stopped. `auto`: the newest intact "
        "checkpoint in `--output`; without one, the training starts from the beginning.",
    ),
    "pretrain": Field(
        "model",
        None,
        "Checkpoint to start a new training from: a file, ours or a released one; the folder of a run, or one that "
        "`tools/publish.py` wrote; or a model of the Hugging Face Hub. For other classes the head is initialised "
        "again.",
    ),
    "seed": Field(
        "int", 1024, "Seed of initialisation, video order, frames, crops and flips.", _from_to(0, 4294967295)
    ),
    "init_seed": Field(
        "int",
        None,
        "Seed of the first weights of side network and head alone. None: they follow from `seed`.",
        _from_to(0, 4294967295),
    ),
    "runs": Field(
        "dict",
        {},
        "Several trainings beside one tower, see docs/sweeps.md: the name of each, and its own values, such as "
        "`{slow: {solver.lr: 3e-4}, light: {network.side_dim: 128}}`.",
    ),
    # data
    "data.dataset": Field(
        "str", REQUIRED, "Name of the data set. Its runs are stored in a folder of this name.", _NOT_EMPTY
    ),
    "data.protocol": Field(
        "str",
        None,
        "Rules for frame sampling, resize and grayscale: those for Kinetics or those for Something-Something. None: "
        "`something` if `data.dataset` contains that word, otherwise `kinetics`.",
        _one_of("kinetics", "something"),
        trained_with=True,
    ),
    "data.modality": Field(
        "str",
        "RGB",
        "`RGB` reads folders of frames, or the zip files of `prepare_data.py pack`. `video` reads video files.",
        _one_of("RGB", "video"),
    ),
    "data.decoder": Field(
        "str",
        "pyav",
        "Library that decodes video files; all give the same frames. `pyav` reads all kinds of files. `decord` is "
        "slower "
        "and refuses some. `auto` takes `decord` for files that `pyav` would decode twice: large ones that are not "
        "H.264 "
        "or VP9 in mp4, mov, mkv or webm.",
        _one_of("pyav", "decord", "auto"),
    ),
    "data.num_segments": Field("int", 8, "Number of frames in a clip.", _from_to(1, 1024), trained_with=True),
    "data.batch_size": Field("int", REQUIRED, "Training videos in a batch of each process.", _from_to(1, 65536)),
    "data.workers": Field(
        "int",
        4,
        "Loader processes of each training process; with 0, the training process loads the data itself.",
        _from_to(0, 1024),
    ),
    "data.prefetch": Field(
        "int", 2, "Batches that each loader process prepares in advance. Fewer need less memory.", _from_to(1, 1024)
    ),
    "data.num_classes": Field("int", REQUIRED, "Number of classes. Labels start at 0.", _from_to(1, 1000000)),
    "data.image_tmpl": Field(
        "str",
        "img_{:05d}.jpg",
        "File name of a frame with a field for its number. The first number is `data.index_base`.",
        _TEMPLATE,
    ),
    "data.index_base": Field("int", 1, "Number of the first frame file in a folder.", _at_least(0), trained_with=True),
    "data.segments": Field(
        "bool",
        False,
        "Lists name segments of videos, in lines `path first_frame num_frames label`, for frames and for video files. "
        "`first_frame` counts the frames of the whole video from 0, whatever `data.index_base` is.",
    ),
    "data.count_frames": Field(
        "bool",
        False,
        "Count the frame files in each folder and ignore the number of frames in the list.",
        trained_with=True,
    ),
    "data.on_damage": Field(
        "str",
        "accept",
        "What happens when a part of a video cannot be decoded, or its file is shorter than its header states. "
        "`accept`: what can be decoded is used, and the log names the video. `error`: it is a video that cannot be "
        "read, for `data.on_error`.",
        _one_of("accept", "error"),
    ),
    "data.on_error": Field(
        "str",
        "stop",
        "What happens when a video cannot be read. `stop`: the run ends. `skip`: training takes the next video in the "
        "order of the epoch; evaluation gives NaN scores and counts the video as wrong. Evaluation of video files "
        "always "
        "does what `skip` says.",
        _one_of("stop", "skip"),
    ),
    "data.train_root": Field(
        "folder", None, "Folder that the paths in `data.train_list` are relative to. Required for training."
    ),
    "data.train_list": Field(
        "file",
        None,
        "List of the training videos, with lines `path num_frames label` (video files: `path label`; segments: see "
        "`data.segments`). Required for training.",
    ),
    "data.val_root": Field(
        "folder", None, "Folder that the paths in `data.val_list` are relative to. Always required."
    ),
    "data.val_list": Field(
        "file",
        None,
        "List of the videos to evaluate, in the same form. Always required. test.py accepts a list with -1 for every "
        "label.",
    ),
    "data.label_list": Field("file", None, "Class names in a csv file with the header `id,name`."),
    "data.input_size": Field(
        "int",
        None,
        "Height and width of the model's input in pixels. None: the tower's.",
        _from_to(1, 4096),
        trained_with=True,
    ),
    "data.resize": Field(
        "int or list of int", None, "Size of a frame before cropping. None: the protocol's.", _RESIZE, trained_with=True
    ),
    "data.flip": Field(
        "bool",
        True,
        "Mirror half of the training clips and swap their labels where class names differ in left and right, or in "
        "clockwise and counterclockwise. False: no flips.",
    ),
    "data.mean": Field(
        "list of float",
        None,
        "Mean of red, green and blue, subtracted from pixels between 0 and 1. None: that of the tower's training.",
        _MEAN,
        trained_with=True,
    ),
    "data.std": Field(
        "list of float",
        None,
        "Standard deviation that pixels are then divided by. None: that of the tower's training.",
        _STD,
        trained_with=True,
    ),
    "data.random_shift": Field("bool", True, "Draw training frames at random. False: take the frames of validation."),
    "data.num_sample": Field(
        "int",
        1,
        "Clips from each loaded training video. All show the same frames, each with its own augmentation.",
        _from_to(1, 64),
    ),
    "data.rand_aug": Field("bool", False, "Use RandAugment, with the same operations for all frames of a clip."),
    "data.rand_erase": Field("bool", False, "Use random erasing, with the same box in all frames of a clip."),
    "data.dense": Field(
        "bool",
        False,
        "Take frames from a window of 128 frames, not from the whole video. `data.num_segments` must be at most 128.",
        trained_with=True,
    ),
    "data.min_frames": Field(
        "int",
        1,
        "Leave videos with fewer frames out of training and validation; test.py scores all. The log counts them. The "
        "released code leaves out videos below 8. Video files, and folders with `data.count_frames`, are opened once "
        "at the start to be counted.",
        _from_to(1, 1000000),
    ),
    "data.balance": Field(
        "bool",
        False,
        "Draw the classes equally often in training. An epoch keeps its number of videos: those of small classes come "
        "several times, each time as another clip, and those of large classes take turns from epoch to epoch.",
    ),
    "data.shot": Field(
        "int", None, "Train on this many videos of each class only. `seed` chooses them.", _from_to(1, 1000000)
    ),
    # network
    "network.arch": Field(
        "str",
        REQUIRED,
        "The frozen tower: `ViT-B/32`, `ViT-B/16`, ..., or `timm/<name>`.",
        _NOT_EMPTY,
        trained_with=True,
    ),
    "network.init": Field(
        "bool", True, "Load the tower's weights from `clip_pretrain/`. False: leave the tower random."
    ),
    "network.weights": Field(
        "file",
        None,
        "Another weight file of the tower than the one in `clip_pretrain/`. `hub`: timm downloads its weights.",
    ),
    "network.backbone_kwargs": Field(
        "dict", {}, "Arguments that timm builds the tower with. They replace all of those in `base`.", trained_with=True
    ),
    "network.drop_fc": Field("float", 0.0, "Dropout probability before the classifier.", _FRACTION),
    "network.side_dim": Field(
        "int", REQUIRED, "Width of the side network. In the paper, 320 for ViT-B and 512 for ViT-L/14.", _WIDTH
    ),
    "network.side": Field(
        "str",
        "side4video",
        "What is trained beside the tower. A probe is a baseline: it reads the tokens of the last block of "
        "`network.side_layers` only; `linear` takes the class token and the mean of the patches, `attentive` a learned "
        "query that attends to them.",
        _one_of("side4video", "linear", "attentive"),
        trained_with=True,
    ),
    "network.average_frames": Field(
        "bool",
        True,
        "Whether a probe averages what it finds in each frame, so that the order of the frames cannot count. False: "
        "`linear` puts the frames in a row, `attentive` looks at all frames together.",
        trained_with=True,
    ),
    "network.side_variant": Field(
        "str",
        None,
        "Place of the norms in the side network: before (`pre`) or after (`post`) its layers. None: `post` for "
        "EVA-CLIP, "
        "otherwise `pre`.",
        _one_of("pre", "post"),
        trained_with=True,
    ),
    "network.side_layers": Field(
        "layers",
        None,
        "Tower blocks that the side network reads, counted from 0. None: `all` for the variant `pre`, `every2` (1, 3, "
        "5, ...) for `post`, `last:1` for a probe. The tower stops after the last block that is read.",
        trained_with=True,
    ),
    "network.backbone_dtype": Field(
        "str",
        "precision",
        "Type of the frozen tower's weights and computation. `precision`: that of `solver.precision` on a GPU; on a "
        "CPU bfloat16 if `solver.precision` is bf16 and the CPU has units for it (AVX512-BF16 or AMX), otherwise "
        "float32. `auto`: the same in training and tests; predictions with `amp` take bfloat16 on such a CPU too.",
        _one_of("precision", "auto", "float32", "bfloat16", "float16"),
    ),
    "network.shard_backbone": Field(
        "bool", False, "Split the frozen tower's weights over the processes. Each block is gathered when it runs."
    ),
    # solver
    "solver.type": Field(
        "str", "cosine", "Schedule of the learning rate after the warm-up.", _one_of("cosine", "multistep")
    ),
    "solver.epochs": Field("int", REQUIRED, "Number of passes over the training list.", _from_to(1, 100000)),
    "solver.start_epoch": Field(
        "int", 0, "First epoch, counted from 0. Must be below `solver.epochs`.", _from_to(0, 100000)
    ),
    "solver.lr": Field(
        "float",
        REQUIRED,
        "Learning rate of the classifier after the warm-up. `solver.clip_ratio` sets that of the side network.",
        _ABOVE_0,
    ),
    "solver.lr_scale": Field(
        "str",
        "none",
        "`linear` multiplies `solver.lr` by the videos of an update on all processes, over `solver.lr_batch`.",
        _one_of("linear", "none"),
    ),
    "solver.lr_batch": Field(
        "int",
        256,
        "Videos of an update that `solver.lr` is meant for; the paper's ViT-B/16 takes 8 GPUs x 32. In a shipped "
        "configuration, these are 8 x its `data.batch_size`. Only `solver.lr_scale: linear` reads it.",
        _from_to(1, 100000000),
    ),
    "solver.lr_warmup_step": Field(
        "float", 0.0, "Number of warm-up epochs, in which the learning rate rises from 0.", _at_least(0)
    ),
    "solver.lr_decay_step": Field(
        "int or list of int",
        None,
        "`multistep` divides the learning rate by 10 every this many epochs, or at the listed epochs.",
        _STEPS,
    ),
    "solver.evaluate": Field("bool", False, "Evaluate once and stop without training."),
    "solver.betas": Field("list of float", [0.9, 0.999], "The two betas of AdamW.", _BETAS),
    "solver.weight_decay": Field("float", 0.15, "Weight decay of AdamW, for all trained parameters.", _at_least(0)),
    "solver.clip_ratio": Field(
        "float",
        1.0,
        "The side network's learning rate is `solver.lr` times this (`solver.lr` for its BatchNorms).",
        _at_least(0),
    ),
    "solver.grad_accumulation_steps": Field(
        "int", 1, "Number of batches whose gradients are added for one update.", _from_to(1, 65536)
    ),
    "solver.mixup": Field("bool", False, "Mix the clips of each batch in pairs, by mixup or cutmix."),
    "solver.smoothing": Field("float", 0.1, "Label smoothing. `solver.mixup` requires 0.1.", _FRACTION),
    "solver.class_weights": Field(
        "class weights",
        None,
        "Weight of each class in the training loss. The loss of a clip is its cross entropy, smoothing included, times "
        "the weight of its class. A clip that `solver.mixup` has mixed of two classes has the sum of both losses, each "
        "times its share and its weight. A batch takes the mean over its clips and does not divide by the weights. "
        "`balanced`: inverse to the number of training videos, so that the classes have equal shares of the loss and "
        "the mean weight of a video is 1; not together with `data.balance`. Validation and tests do not use weights.",
        _WEIGHTS,
    ),
    "solver.precision": Field(
        "str",
        "amp",
        "Type of matrix products. `amp`: bf16 on a GPU that supports it, fp16 on other GPUs, fp32 on a CPU.",
        _one_of("amp", "bf16", "fp16", "fp32"),
    ),
    "solver.tf32": Field(
        "bool",
        False,
        "On a GPU, float32 products and convolutions take TF32, which rounds their inputs to 10 bits.",
    ),
    "solver.deterministic": Field(
        "bool",
        False,
        "On a GPU, take operators that give the same bits in every run; one that cannot ends the run. It is slower.",
    ),
    "solver.recompute": Field(
        "bool or auto",
        True,
        "Keep only the tower's tokens and the input of each side block, and compute the rest again in the backward "
        "pass. The gradients are the same up to the order of sums; the memory for them is about a seventh. `auto`: "
        "False on a GPU whose memory is enough for a step without it, by the plan of `tools/plan.py`, and True "
        "elsewhere; a resumed run keeps its choice.",
    ),
    "solver.compile": Field(
        "bool", False, "Compile the blocks of tower and side network. This needs a C++ compiler and takes some minutes."
    ),
    "solver.sync_bn": Field(
        "bool", False, "Compute BatchNorm statistics over all processes. False: each process uses its own clips."
    ),
    "solver.timeout_minutes": Field(
        "float",
        10.0,
        "Minutes that a process waits for another one, or for its loader, before the run ends with an error.",
        _ABOVE_0,
    ),
    "solver.clip_grad": Field(
        "float", None, "Largest norm of the gradient. A larger gradient is scaled down to it. None: no limit.", _ABOVE_0
    ),
    "solver.patience": Field(
        "int",
        None,
        "Stop after this many epochs without a better validation, of the weights or of their average. None: train for "
        "all of `solver.epochs`.",
        _from_to(1, 100000),
    ),
    "solver.ema": Field(
        "float",
        None,
        "Keep an average of what is trained, of which each update keeps this share; it is evaluated and saved beside "
        "the weights. It follows them after about 1 / (1 - `solver.ema`) updates. None: no average.",
        Rule("above 0 and below 1", lambda value: 0 < value < 1),
    ),
    # test
    "test.view_batch": Field(
        "int", None, "Number of views that the model evaluates at once. None: `data.batch_size`.", _from_to(1, 65536)
    ),
    "test.remap_labels": Field(
        "bool",
        False,
        "Accept a checkpoint whose classes have another order than `data.label_list`. Scores are put in the list's "
        "order.",
    ),
    # logging
    "logging.save_minutes": Field(
        "float",
        10.0,
        "Minutes between two checkpoints inside an epoch. None: save at the end of each epoch only.",
        _ABOVE_0,
        optional=True,
    ),
    "logging.keep": Field(
        "int", 2, "Number of newest checkpoints that are kept in the folder of a run.", _from_to(1, 1000)
    ),
    "logging.print_freq": Field("int", 10, "Print a line every this many iterations.", _from_to(1, 1000000000)),
    "logging.eval_freq": Field("int", 1, "Evaluate every this many epochs.", _from_to(1, 100000)),
    "logging.wandb": Field(
        "str",
        None,
        "Project of Weights & Biases that the run is reported to. It needs the package of requirements-extras.txt.",
        _NOT_EMPTY,
    ),
    "logging.skip_epoch": Field(
        "list of int", [], "Epochs, counted from 0, that are not evaluated. They are saved.", _EPOCHS
    ),
}

# Keys of older configurations -> the accepted value (ANY: every value; a key: the value of that key), and the reason.
LEGACY = {
    "data.seg_length": (1, "A segment gives one frame. For more frames, use `data.num_segments`."),
    "network.tm": (False, "The side network is the only temporal module."),
    "network.drop_out": (0, "The frozen tower has no dropout; use `network.drop_fc` for the classifier's."),
    "network.emb_dropout": (0, "The frozen tower has no dropout; use `network.drop_fc` for the classifier's."),
    "network.type": (ANY, "`network.arch` names the model."),
    "network.sim_header": (None, "The feature of a clip is the mean over its tokens."),
    "network.joint_st": (False, "Attention runs inside each frame, and convolutions run across frames."),
    "network.n_emb": ("network.side_dim", "Another name of `network.side_dim`, and must equal it."),
    "network.sync_bn": ("solver.sync_bn", "Another name of `solver.sync_bn`, and must equal it."),
    "network.fix_clip": (ANY, "The tower is always frozen."),
    "network.my_fix_clip": (True, "The tower is always frozen."),
    "solver.epoch_offset": (0, "Use `resume` or `solver.start_epoch`."),
    "solver.optim": ("adamw", "AdamW is the only optimizer; see `solver.betas` and `solver.weight_decay`."),
    "solver.loss_type": ("CE", "Cross entropy is the only loss; see `solver.smoothing`."),
    "solver.layer_decay": (
        1.0,
        "All layers of the side network share one learning rate, which `solver.clip_ratio` sets.",
    ),
    "solver.momentum": (ANY, "AdamW has no momentum; see `solver.betas`."),
}

# Keys that may differ between the trainings of `runs`. The others decide what reaches the tower, or hold for all.
OWN_KEYS = (
    *("init_seed", "network.side", "network.average_frames", "network.drop_fc"),
    *("network.side_dim", "network.side_variant", "network.side_layers"),
    *(
        "solver.type",
        "solver.lr",
        "solver.lr_scale",
        "solver.lr_batch",
        "solver.lr_warmup_step",
        "solver.lr_decay_step",
    ),
    *("solver.betas", "solver.weight_decay", "solver.clip_ratio", "solver.clip_grad", "solver.ema", "solver.patience"),
    *("solver.smoothing", "solver.class_weights", "solver.sync_bn", "solver.recompute"),
)
# Why another key, or one of a section, cannot differ; the first that fits.
SHARED_BECAUSE = {
    "seed": "it also draws the clips, which all runs share; init_seed draws the first weights alone",
    "solver.mixup": "it mixes the pixels that the tower sees, and all runs share the tower's tokens",
    "solver.grad_accumulation_steps": "it is part of the batch, which all runs share",
    "solver.epochs": "the runs go through the data together; solver.patience may end one earlier",
    "solver.start_epoch": "the runs go through the data together",
    "solver.compile": "it changes the tower's numbers, and all runs share the tower",
    "solver.": "it is a switch of the processes, which all runs share",
    "data.": "all runs get the same clips",
    "network.": "all runs share the tower",
    "": "it holds for all runs together",
}

_HEAD = """# Configuration

This page is printed by `python -m utils.config_schema > docs/configuration.md`. To change it, edit
`utils/config_schema.py`.

A run is described by one YAML file. Any number of `key=value` may follow it on the command line and replace its values,
for example `solver.lr=1e-3`, `logging.skip_epoch=[0,1]` or `network.backbone_kwargs.depth=4`. Paths are relative to the
folder that the program runs in, which is the repository root. Only the path in `base` is relative to its own file. An
unknown key is an error that names the nearest key.

A value that is None because the protocol or the tower decides it is filled in right after loading
(`engine/configuration.py`). The `config.yaml` in the folder of a run holds the values that were filled in.

A checkpoint holds the configuration of its training. These keys decide which frames, pixels and tokens its weights get,
and `test.py` refuses other values than the checkpoint's, unless `--accept_changes` is given: {trained_with}.

The trainings of `runs` ([docs/sweeps.md](sweeps.md)) may differ in these keys: {own}."""


def markdown() -> str:
    """Return the text of docs/configuration.md."""
    trained_with = ", ".join(f"`{key}`" for key, field in FIELDS.items() if field.trained_with)
    lines = [_HEAD.format(trained_with=trained_with, own=", ".join(f"`{key}`" for key in OWN_KEYS))]
    for section, title in {"": "the run", **SECTIONS}.items():
        fields = {key: field for key, field in FIELDS.items() if key.rpartition(".")[0] == section}
        rows = [(f"`{key}`", field.must, _code(field.default), field.doc) for key, field in fields.items()]
        lines += [f"\n## {f'`{section}`' if section else 'No section'}: {title}\n"]
        lines += _table(("key", "type", "default", "meaning"), rows)
    lines += ["\n## Keys of older configurations\n"]
    lines += ["Each key is accepted with this value and then ignored. Another value is an error.\n"]
    lines += _table(("key", "value", "why"), [(f"`{key}`", _code(value), why) for key, (value, why) in LEGACY.items()])
    return "\n".join(lines) + "\n"


def _code(value: object) -> str:
    return "required" if value is REQUIRED else "any" if value is ANY else f"`{value}`"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    sys.stdout.write(markdown())
