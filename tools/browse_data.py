"""Draw what the model sees: training clips after all augmentation, and the views of evaluation.

    python tools/browse_data.py CONFIG OUT [--split train|val] [--clips N] [--epoch E] [--test_crops 1|3|5|10]
                                [--test_clips N] [key=value ...]

Writes contact sheets (PNG) into the folder OUT. A row shows one clip. Left is the frame in the middle of the clip, as
it is in the video, resized, with the box that is cropped; right is the clip as it enters the model. The text says what
was drawn: labels, flips, boxes, RandAugment, erasing and mixing.

Training clips are the first ones that process 0 of a training on one process gets in this epoch. They come from the
loader and the augmentation of the training itself. On a GPU the noise of random erasing has other values. Videos of the
validation list are chosen by `seed`.
"""

import argparse
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from dotmap import DotMap
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.annotations import UNLABELLED, VideoRecord
from datasets.batch_augment import BatchAugment
from datasets.loaders import (
    build_eval_loader,
    build_train_loader,
    check_shared_memory,
    naming_lost_workers,
)
from datasets.sampling import sample_test
from datasets.transforms import crop_corners, resize_size
from datasets.video_dataset import EvalVideoDataset, TrainVideoDataset
from engine.configuration import read_config
from engine.loops import training_input
from utils.atomic import probe, write_atomically, writing
from utils.config import Purpose, load_config
from utils.errors import DataError, run_program
from utils.seeding import sample_rng

ROWS = 8  # of a sheet; a video has all of its views in one sheet
COLUMNS = 8  # frames in a line of a row
SMALL, LARGE = 96, 224  # smaller clips are enlarged by a whole number, larger ones are scaled down
GAP, TEXT = 6, 16  # pixels
CPU = torch.device("cpu")
YELLOW, GREY, WHITE, BLACK = (255, 210, 0), (150, 150, 150), (255, 255, 255), (0, 0, 0)
Box = tuple[int, int, int, int]  # left, upper, right, lower


@dataclass(frozen=True)
class Row:
    """One clip of a sheet.

    lines: text above it, the first one larger
    frame: of the video, resized, uint8 (H, W, 3)
    boxes: crops in the frame; the first is that of the clip
    clip: uint8 (T, H, W, 3)
    """

    lines: list[str]
    frame: np.ndarray
    boxes: list[Box]
    clip: np.ndarray


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="browse_data.py", description="Draw what the model sees, as PNG files.")
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run, see docs/configuration.md")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the PNG files")
    parser.add_argument("--split", choices=("train", "val"), help="default: both lists, as far as they are configured")
    parser.add_argument(
        "--clips", type=int, default=16, metavar="N", help="training clips, and videos of the other list (default 16)"
    )
    parser.add_argument("--epoch", type=int, default=0, metavar="E", help="epoch of the training, from 0 (default 0)")
    parser.add_argument("--test_crops", type=int, choices=(1, 3, 5, 10), default=1, help="crops of a test clip")
    parser.add_argument("--test_clips", type=int, default=1, metavar="N", help="clips of a test video")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    args = parser.parse_intermixed_args(argv)
    for name, least in (("clips", 1), ("epoch", 0), ("test_clips", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name}: {getattr(args, name)} is less than {least}")
    config, splits = read(args.config, args.overrides, args.split)
    if args.out.exists() and not args.out.is_dir():
        raise DataError(f"{args.out}: is a file, but OUT is the folder for the PNG files; give another name")
    probe(args.out / "train.png")
    for split in splits:
        if split == "train":
            name, groups, title = f"train_epoch{args.epoch}", train_rows(config, args.epoch, args.clips), train_title
        else:
            groups = eval_rows(config, args.clips, args.test_crops, args.test_clips)
            name, title = f"val_{args.test_crops}x{args.test_clips}", eval_title
        for number, rows in enumerate(sheets(groups), 1):
            write_sheet(args.out / f"{name}_{number:02d}.png", title(config, args), rows)


def read(path: str, overrides: list[str], split: str | None) -> tuple[DotMap, list[str]]:
    """The resolved configuration, checked for what the splits need, and the splits to show."""
    data = load_config(path, overrides, purpose="model").data
    configured = [part for part in ("train", "val") if data[f"{part}_list"]] or ["train"]
    splits = configured if split is None else [split]
    purpose: Purpose = "train" if "train" in splits else "test"
    return read_config(path, overrides, purpose), splits


def sheets(groups: Iterator[list[Row]]) -> Iterator[list[Row]]:
    """Put groups of rows together to sheets of about ROWS rows."""
    rows: list[Row] = []
    for group in groups:
        if rows and len(rows) + len(group) > ROWS:
            yield rows
            rows = []
        rows = rows + group
    if rows:
        yield rows


# Training


def train_title(config: DotMap, args: argparse.Namespace) -> list[str]:
    return [
        f"{config.data.dataset}: training clips of epoch {args.epoch}, as they enter the model",
        "Left: the middle frame of the clip in the video, resized; the yellow box is the crop. Right: all frames of "
        "the clip after augmentation. Frames and clips are numbered from 0.",
    ]


def train_rows(config: DotMap, epoch: int, count: int) -> Iterator[list[Row]]:
    """Yield a group of one row for each of the first `count` clips of an epoch."""
    loader = build_train_loader(config)
    dataset = loader.dataset
    assert isinstance(dataset, TrainVideoDataset)
    loader.sampler.set_epoch(epoch)
    keys, repeats = list(loader.sampler), config.data.num_sample
    check_shared_memory(loader)
    with naming_lost_workers(loader):
        for iteration, batch in enumerate(loader):
            seen, targets, notes = augmented(config, batch, epoch, iteration)
            for place in range(min(len(seen), count)):
                index, repeat = batch["indices"][place // repeats].item(), place % repeats
                key = keys[iteration * config.data.batch_size + place // repeats]
                number = iteration * len(seen) + place
                row = train_row(dataset, key, index, repeat, seen[place], targets[place], number, notes[place])
                yield [row]
            count -= len(seen)
            if count <= 0:
                return


def augmented(config: DotMap, batch: dict[str, Tensor], epoch: int, iteration: int) -> tuple[Tensor, Tensor, list[str]]:
    """What the training makes of a batch on the device.

    Returns:
        clips: uint8 (B, T, 3, H, W).
        shares: float (B, K), of the classes in a clip, without smoothing.
        notes: of each clip, what was erased and mixed.
    """
    data, solver = config.data, config.solver

    def variant(erase: bool, mix: bool) -> tuple[Tensor, Tensor]:
        augment = BatchAugment(data.num_classes, solver.smoothing, erase, mix, CPU)
        return training_input(batch["clips"], batch["labels"], augment, config, epoch, iteration)

    # All variants make the same draws, so their differences show what was done.
    seen, targets = variant(data.rand_erase, solver.mixup)
    erased = variant(data.rand_erase, False)[0] if solver.mixup else seen
    clean = variant(False, False)[0] if data.rand_erase else erased
    first = iteration * len(seen)
    notes = []
    for place in range(len(seen)):
        partner = len(seen) - 1 - place
        parts = [f"erased {shown(box)}" for box in changed_boxes(clean[place], erased[place])]
        parts += mixing(seen[place], erased[place], erased[partner], first + partner)
        notes.append("; ".join(parts))
    mean, std = (torch.tensor(list(values)).view(-1, 1, 1) for values in (data.mean, data.std))
    pixels = ((seen * std + mean) * 255).round().clamp(0, 255).byte()
    shares = (targets - solver.smoothing / data.num_classes) / (1 - solver.smoothing)
    return pixels, shares, notes


def mixing(seen: Tensor, own: Tensor, other: Tensor, number: int) -> list[str]:
    """How a clip came from its own and another clip, number `number`, all (T, 3, H, W); nothing if it is its own."""
    if not (boxes := changed_boxes(own, seen)):
        return []
    same = (seen == own).all(0).all(0)
    if torch.equal(torch.where(same, own, other), seen):
        return [f"{shown(boxes[0])} cut from clip {number} (cutmix)"]
    return [f"blended with clip {number} (mixup)"]


def changed_boxes(before: Tensor, after: Tensor) -> list[Box]:
    """The box around all pixels that differ in any frame, (T, 3, H, W); an empty list if none does."""
    changed = (before != after).any(0).any(0)
    if not changed.any():
        return []
    (upper, lower), (left, right) = (
        (int(lines.nonzero().min()), int(lines.nonzero().max()) + 1) for lines in (changed.any(1), changed.any(0))
    )
    return [(left, upper, right, lower)]


def train_row(
    dataset: TrainVideoDataset,
    key: tuple[int, ...],
    index: int,
    repeat: int,
    clip: Tensor,
    shares: Tensor,
    number: int,
    note: str,
) -> Row:
    """The row of one clip; `key` is the sampler's, and `index` the video that was read for it."""
    epoch, asked, *rest = key
    place = rest[0] if rest else None
    record = dataset.records[index]
    with dataset.reader.open(record) as video:
        choose = functools.partial(dataset.sample, epoch=epoch, index=index, place=place)
        num_frames, indices, frames, places = dataset.read_chosen(video, choose)
        height, width = frames[places[0]].shape[:2]
        draws = dataset.transform.draw(width, height, sample_rng(dataset.seed, epoch, index, repeat, place))
        frame = resized(frames[places[len(places) // 2]], draws.size)
    names = dataset.class_names
    classes = [(share, label) for label, share in enumerate(shares.tolist()) if share > 0.005]
    parts = [f"{share:.2f} {class_name(names, label)}" for share, label in sorted(classes, reverse=True)]
    heading = f"clip {number}: {' + '.join(parts) if len(parts) > 1 else class_name(names, classes[0][1])}"
    done = [f"crop {shown(draws.box)} of {draws.size[0]} x {draws.size[1]}"]
    if draws.flip:
        swapped = dataset.transform.flip_labels and record.label in dataset.transform.flip_labels
        done.append(f"flipped{f', so its label {class_name(names, record.label)} was swapped' if swapped else ''}")
    done += ["grey"] if draws.gray else []
    if dataset.transform.rand_aug:
        done.append(f"RandAugment: {', '.join(map(operation, draws.operations)) or 'nothing'}")
    done += [note] if note else []
    source = video_line(record, indices, num_frames)
    source += f"; repeat {repeat}" if dataset.num_sample > 1 else ""
    source += f"; instead of {dataset.records[asked].name}, which cannot be read" if index != asked else ""
    return Row([heading, "; ".join(done), source], frame, [draws.box], clip.permute(0, 2, 3, 1).numpy())


def operation(drawn: tuple) -> str:
    name, *arguments = drawn
    return " ".join([name, *(f"{value:.3g}" if isinstance(value, float) else str(value) for value in arguments)])


# Evaluation


def eval_title(config: DotMap, args: argparse.Namespace) -> list[str]:
    views = args.test_crops * args.test_clips
    return [
        f"{config.data.dataset}: videos of {config.data.val_list}, {views} view{'s' if views > 1 else ''} of each "
        f"({args.test_crops} crops x {args.test_clips} clips), as they enter the model",
        "Left: the middle frame of the clip in the video, resized; the yellow box is the crop of this view, grey boxes "
        "are those of the other views. Right: all frames of the view. Frames and views are numbered from 0.",
    ]


def eval_rows(config: DotMap, count: int, crops: int, clips: int) -> Iterator[list[Row]]:
    """Yield a group of a row for each view of a video, of `count` videos of the list, chosen by `seed`."""
    views = {"clips": clips, "crops": crops, "unlabelled": True, "every_video": True}
    total = len(build_eval_loader(config, **views).dataset)
    chosen = np.random.default_rng(config.seed).permutation(total)[:count].tolist()
    loader = build_eval_loader(config, **views, done=set(range(total)) - set(chosen))
    dataset = loader.dataset
    assert isinstance(dataset, EvalVideoDataset)
    check_shared_memory(loader)
    with naming_lost_workers(loader):
        for batch in loader:
            for number, index in enumerate(batch["indices"].tolist()):
                videos = batch["clips"].unflatten(0, (len(batch["indices"]), -1))
                yield view_rows(dataset, dataset.records[index], videos[number])
    for _, reason in loader.unreadable:
        sys.stderr.write(f"not shown: {reason}\n")


def view_rows(dataset: EvalVideoDataset, record: VideoRecord, views: Tensor) -> list[Row]:
    """A row for each view of a video, uint8 (V, T, 3, H, W)."""
    transform, rows = dataset.transform, []
    num_crops, size = transform.num_crops, transform.input_size

    def choose(num_frames: int) -> np.ndarray:
        return sample_test(num_frames, dataset.num_segments, dataset.protocol, dataset.num_clips, dataset.dense)

    middles, sizes = [], []
    with dataset.reader.open(record) as video:
        num_frames, indices, frames, flat = dataset.read_chosen(video, choose)
        for places in flat.reshape(indices.shape):
            sizes.append(resize_size(frames[places[0]].shape[1], frames[places[0]].shape[0], transform.resize))
            middles.append(resized(frames[places[len(places) // 2]], sizes[-1]))
    for view, clip in enumerate(views):
        crop, number = divmod(view, dataset.num_clips)
        frame, (width, height) = middles[number], sizes[number]
        boxes = [(x, y, x + size, y + size) for x, y in crop_corners(width, height, size, num_crops)]
        mirrored = num_crops == 10 and crop >= 5
        own = boxes.pop(crop % len(boxes))
        heading = f"{class_name(dataset.class_names, record.label)}: view {view}, crop {crop}, clip {number}"
        done = f"crop {shown(own)} of {width} x {height}{', mirrored' if mirrored else ''}"
        lines = [heading, f"{done}; {video_line(record, indices[number], num_frames)}"]
        rows.append(Row(lines, frame, [own, *boxes], clip.permute(0, 2, 3, 1).numpy()))
    return rows


# Text and pictures


def class_name(names: list[str] | None, label: int) -> str:
    if label == UNLABELLED:
        return "unlabelled"
    return f"'{names[label]}' ({label})" if names else f"label {label}"


def shown(box: Box) -> str:
    left, upper, right, lower = box
    return f"{right - left} x {lower - upper} at ({left}, {upper})"


def video_line(record: VideoRecord, indices: np.ndarray, num_frames: int) -> str:
    return f"{record.name} ({record.source}), frames {' '.join(map(str, indices.tolist()))} of {num_frames}"


def resized(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))


def write_sheet(path: Path, title: list[str], rows: list[Row]) -> None:
    """Write one sheet atomically and name it on stdout. Raises DataError if it cannot be written."""
    picture = draw_sheet(title, rows)
    with writing(path):
        write_atomically(path, lambda file: picture.save(file, "PNG"))
    print(f"{path}: {len(rows)} clips")


def draw_sheet(title: list[str], rows: list[Row]) -> Image.Image:
    """The picture of a sheet: its title, then row by row the text, the frame with boxes, and the clip."""
    num_frames, size = rows[0].clip.shape[:2]
    cell = size * -(-SMALL // size) if size < SMALL else min(size, LARGE)
    widths = [round(row.frame.shape[1] * cell / row.frame.shape[0]) for row in rows]
    left = min(max(widths), 2 * cell)
    columns = min(num_frames, COLUMNS)
    width = max(3 * GAP + left + 2 * GAP + columns * (cell + GAP), 640)
    blocks = [draw_text(title, width)]
    for row in rows:
        blocks += [draw_text(row.lines, width), draw_clip(row, width, left, cell)]
    sheet = Image.new("RGB", (width, sum(block.height for block in blocks) + GAP), WHITE)
    y = 0
    for block in blocks:
        sheet.paste(block, (0, y))
        y += block.height
    return sheet


def draw_text(lines: list[str], width: int) -> Image.Image:
    """Lines of text, broken where they are too long; the first is larger."""
    placed, y = [], GAP + GAP
    for number, line in enumerate(lines):
        font = ImageFont.load_default(size=TEXT if number == 0 else 0.85 * TEXT)
        for part in broken(line, font, width - 2 * GAP):
            placed.append((y, part, font))
            y += TEXT + 4 if number == 0 else TEXT
    image = Image.new("RGB", (width, y + 2), WHITE)
    draw = ImageDraw.Draw(image)
    draw.line((0, 0, width, 0), fill=GREY)
    for top, part, font in placed:
        draw.text((GAP, top), part, fill=BLACK, font=font)
    return image


def broken(line: str, font, width: int) -> list[str]:
    """The line in parts that are at most `width` pixels wide, broken at spaces where there are any."""
    parts = [""]
    for word in line.split(" "):
        for piece in [word] if font.getlength(word) <= width else [word[i : i + 40] for i in range(0, len(word), 40)]:
            longer = f"{parts[-1]} {piece}".strip()
            if font.getlength(longer) <= width:
                parts[-1] = longer
            else:
                parts.append(piece)
    return parts


def draw_clip(row: Row, width: int, left: int, cell: int) -> Image.Image:
    """The frame with its boxes, and beside it the frames of the clip in lines of COLUMNS."""
    lines = -(-len(row.clip) // COLUMNS)
    image = Image.new("RGB", (width, lines * (cell + GAP)), WHITE)
    height, own_width = row.frame.shape[:2]
    scale = min(cell / height, left / own_width)
    frame = Image.fromarray(row.frame).resize((round(own_width * scale), round(height * scale)))
    draw = ImageDraw.Draw(frame)
    for number, box in reversed(list(enumerate(row.boxes))):
        x0, y0, x1, y1 = (round(value * scale) for value in box)
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=GREY if number else YELLOW, width=1 if number else 2)
    image.paste(frame, (GAP, 0))
    for number, pixels in enumerate(row.clip):
        picture = Image.fromarray(pixels)
        enlarged = cell > len(pixels)
        picture = picture.resize((cell, cell), Image.Resampling.NEAREST if enlarged else Image.Resampling.BICUBIC)
        line, column = divmod(number, COLUMNS)
        image.paste(picture, (GAP + left + 2 * GAP + column * (cell + GAP), line * (cell + GAP)))
    return image


if __name__ == "__main__":
    run_program(main)
