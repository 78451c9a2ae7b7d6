"""The generated demo data set: the class of a video is how its objects move, and no single frame shows it.

Two textured objects lie on a textured ground whose borders are joined (a torus). The state of an object is four
numbers in [0, 1), each one cyclic: x and y position, angle, and logarithm of the size (the largest is followed by the
smallest). In each class some of the four run at a steady rate and the others rest; all start uniformly at random. So
every frame of every class has the same distribution, the opposite class is the same videos played backwards, and a
mirrored "left" is a "right".

Letters: F frames, O objects, H = W = size in pixels.

    python -m tools.motion_demo ROOT [--train_videos N] [--val_videos N] [--size PIXELS] [--num_frames N] [--seed N]
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.errors import DataError, run_program

VERSION = 1  # of the videos: goes into the stamp, so that a changed generator does not pass old files for its own
X, Y, ANGLE, SIZE = range(4)
# Name -> direction in the states, opposites next to each other. The y axis points down, as pixel rows do.
MOTIONS = {
    "moving left": (-1, 0, 0, 0),
    "moving right": (1, 0, 0, 0),
    "moving up": (0, -1, 0, 0),
    "moving down": (0, 1, 0, 0),
    "moving up left": (-(0.5**0.5), -(0.5**0.5), 0, 0),
    "moving down right": (0.5**0.5, 0.5**0.5, 0, 0),
    "moving up right": (0.5**0.5, -(0.5**0.5), 0, 0),
    "moving down left": (-(0.5**0.5), 0.5**0.5, 0, 0),
    "growing": (0, 0, 0, 1),
    "shrinking": (0, 0, 0, -1),
}
CLASSES = tuple(MOTIONS)
# Slowest and fastest rate of each state, in cycles per frame: 1.3 to 1.9 pixels of 64, and 2 to 3 per cent.
RATES = ((0.02, 0.03), (0.02, 0.03), (0.0, 0.0), (0.03, 0.045))
OBJECTS = 2
SMALLEST, LARGEST = 0.2, 0.36  # greatest radius of an object, as a part of the frame's width
TEXELS = 96  # width of an object's picture, over twice its greatest width in the frame: nearest sampling is smooth
JPEG_QUALITY = 95
VIDEO_FILES = 16  # so many validation videos, or all if there are fewer, are written as mp4 files too
STAMP = "motion_demo.json"


def trajectory(class_index: int, rng: np.random.Generator, num_frames: int) -> np.ndarray:
    """States (F, O, 4) in [0, 1): x, y, angle, log size. Equal draws give opposite classes reversed states, exactly."""
    start = rng.random((OBJECTS, 4))
    slowest, fastest = np.transpose(RATES)
    rate = np.array(MOTIONS[CLASSES[class_index]]) * (slowest + rng.random() * (fastest - slowest))
    time = np.arange(num_frames) - (num_frames - 1) / 2
    return (start + rate * time[:, None, None]) % 1.0


def render_video(class_index: int, rng: np.random.Generator, size: int = 64, num_frames: int = 16) -> np.ndarray:
    """One video of a class, uint8 (F, H, W, 3)."""
    states = trajectory(class_index, rng, num_frames)
    ground = _texture(rng, size, lowest=1, highest=4, contrast=0.04, colours=(0.05, 0.3))
    return draw(states, ground, [_object(rng) for _ in range(OBJECTS)])


def draw(states: np.ndarray, ground: np.ndarray, objects: list[np.ndarray]) -> np.ndarray:
    """Objects (RGBA, (TEXELS, TEXELS, 4)) in their states (F, O, 4) over a ground (H, W, 3), later ones on top.

    Colours are in 0..1; returns uint8 (F, H, W, 3).
    """
    size = len(ground)
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    frames = np.repeat(ground[None].astype(np.float32), len(states), axis=0)
    for picture, (x, y, angle, log_size) in zip(objects, states.astype(np.float32).transpose(1, 2, 0), strict=True):
        across = ((pixels - x[:, None] + 0.5) % 1.0 - 0.5)[:, None, :]  # (F, 1, W), the short way round the torus
        down = ((pixels - y[:, None] + 0.5) % 1.0 - 0.5)[:, :, None]  # (F, H, 1)
        radius = SMALLEST * (LARGEST / SMALLEST) ** log_size
        cos, sin = (f(2 * np.pi * angle)[:, None, None] / radius[:, None, None] for f in (np.cos, np.sin))
        u, v = cos * across + sin * down, cos * down - sin * across  # (F, H, W), the picture spans -1..1
        inside = u * u + v * v < 1
        column, row = (np.minimum((w[inside] + 1) * (TEXELS / 2), TEXELS - 1).astype(np.intp) for w in (u, v))
        texels = picture[row, column]
        frames[inside] += texels[:, 3:] * (texels[:, :3] - frames[inside])
    return (frames * 255 + 0.5).astype(np.uint8)


def generate(
    root: Path | str,
    train_videos: int = 640,
    val_videos: int = 160,
    size: int = 64,
    num_frames: int = 16,
    seed: int = 0,
) -> bool:
    """Write the data set to `root`; False if it is there already, made with the same settings.

    `frames/train_00012/img_00001.jpg`, `train.txt` and `val.txt` (`path num_frames label`, paths relative to
    `frames`), `classes.csv`; `videos/val_00000.mp4` and `val_videos.txt` (`path label`, relative to `videos`). The
    folder appears when it is complete. Raises DataError if something else is at `root`.
    """
    root = Path(root)
    settings = dict(train_videos=train_videos, val_videos=val_videos, size=size, num_frames=num_frames, seed=seed)
    if min(train_videos, val_videos, size, num_frames) < 1 or seed < 0:
        raise DataError(f"{root}: numbers of videos and frames and the size must be at least 1, the seed at least 0")
    stamp = json.dumps({"version": VERSION, **settings}) + "\n"
    try:
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            if (root / STAMP).is_file() and (root / STAMP).read_text(encoding="utf-8") == stamp:
                return False
            raise DataError(f"{root}: exists and is not the demo data of these settings; delete it or name another")
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{root.name}.", dir=root.parent) as folder:
            unfinished = Path(folder) / root.name
            for split, (name, videos) in enumerate((("train", train_videos), ("val", val_videos))):
                _write_split(unfinished, name, videos, size, num_frames, key=(seed, split))
            _write_video_files(unfinished, min(VIDEO_FILES, val_videos), size, num_frames, key=(seed, 1))
            names = "".join(f"{index},{name}\n" for index, name in enumerate(CLASSES))
            (unfinished / "classes.csv").write_text("id,name\n" + names, encoding="utf-8")
            (unfinished / STAMP).write_text(stamp, encoding="utf-8")
            unfinished.rename(root)
    except OSError as error:
        raise DataError(f"{root}: the demo data cannot be written: {error}") from error
    return True


def _write_split(root: Path, name: str, videos: int, size: int, num_frames: int, key: tuple[int, int]) -> None:
    """The frames of one split and its list; the classes take turns."""
    lines = []
    for index in tqdm(range(videos), desc=f"{name} videos", disable=None):
        label = index % len(CLASSES)
        video = f"{name}_{index:05d}"
        folder = root / "frames" / video
        folder.mkdir(parents=True)
        for number, frame in enumerate(render_video(label, np.random.default_rng([*key, index]), size, num_frames), 1):
            Image.fromarray(frame).save(folder / f"img_{number:05d}.jpg", quality=JPEG_QUALITY)
        lines.append(f"{video} {num_frames} {label}\n")
    (root / f"{name}.txt").write_text("".join(lines), encoding="utf-8")


def _write_video_files(root: Path, videos: int, size: int, num_frames: int, key: tuple[int, int]) -> None:
    """The first videos of the validation split as H.264 in full colour, and their list."""
    (root / "videos").mkdir()
    lines = []
    for index in range(videos):
        label, path = index % len(CLASSES), f"val_{index:05d}.mp4"
        with av.open(str(root / "videos" / path), "w") as container:
            stream = container.add_stream("libx264", rate=10, options={"crf": "5"})
            stream.width, stream.height, stream.pix_fmt = size, size, "yuv444p"
            for frame in render_video(label, np.random.default_rng([*key, index]), size, num_frames):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        lines.append(f"{path} {label}\n")
    (root / "val_videos.txt").write_text("".join(lines), encoding="utf-8")


def _texture(
    rng: np.random.Generator,
    size: int,
    lowest: float,
    highest: float,
    contrast: float,
    colours: tuple[float, float],
    stretch: float = 1.0,
) -> np.ndarray:
    """Smooth periodic colours, float (size, size, 3) in 0..1, around a random one within `colours`.

    Noise of `lowest` to `highest` waves across the picture, weaker as they get finer; `stretch` draws it out along x.
    """
    waves = np.fft.fftfreq(size, 1 / size)
    frequency = np.hypot(stretch * waves, waves[:, None])[:, : size // 2 + 1]  # the half that rfft2 keeps
    band = np.where((frequency >= lowest) & (frequency <= highest), 1 / np.maximum(frequency, 1), 0)
    grey_and_colours = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((4, size, size))) * band, (size, size))
    noise = grey_and_colours[0] + 0.5 * grey_and_colours[1:]
    noise *= contrast / max(noise.std(), 1e-9)
    return np.clip(rng.uniform(*colours, 3) + noise.transpose(1, 2, 0), 0, 1)


def _object(rng: np.random.Generator) -> np.ndarray:
    """A blob with streaks, RGBA float32 (TEXELS, TEXELS, 4); long, with a thick end, so it looks new at every angle."""
    across = (np.arange(TEXELS) + 0.5) * (2 / TEXELS) - 1
    direction = np.arctan2(across[:, None], across)
    outline = 1 + 0.25 * np.cos(2 * direction + rng.uniform(0, 2 * np.pi))
    outline += 0.2 * np.cos(3 * direction + rng.uniform(0, 2 * np.pi))
    outline *= 0.95 / outline.max()
    alpha = np.clip((outline - np.hypot(across[:, None], across)) * 10 + 0.5, 0, 1)
    colours = _texture(rng, TEXELS, lowest=0.7, highest=3, contrast=0.12, colours=(0.6, 0.95), stretch=3.0)
    return np.concatenate([colours, alpha[..., None]], axis=-1).astype(np.float32)


def main(argv: list[str]) -> None:
    """Generate the data set from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.motion_demo", description="Generate the demo data set.")
    parser.add_argument("root", type=Path, help="folder to make")
    parser.add_argument("--train_videos", type=int, default=640)
    parser.add_argument("--val_videos", type=int, default=160)
    parser.add_argument("--size", type=int, default=64, help="height and width of the frames in pixels")
    parser.add_argument("--num_frames", type=int, default=16, help="frames of a video")
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args(argv))
    made = generate(**arguments)
    videos = f"{arguments['train_videos']} training and {arguments['val_videos']} validation videos"
    sys.stdout.write(f"{arguments['root']}: {videos} {'written' if made else 'are there already'}\n")


if __name__ == "__main__":
    run_program(main)
