"""Generate the demo data set: videos whose class is a motion, which no single frame shows.

    python -m tools.motion_demo ROOT [--train_videos N] [--val_videos N] [--size PIXELS] [--num_frames N] [--seed N]

Two textured objects move over a textured ground with joined borders (a torus). The state of an object is four cyclic
numbers in [0, 1): x position, y position, angle, and logarithm of the size (after the largest size comes the smallest).
In each class, some of these numbers change at a constant rate and the others stay. All start uniformly at random.
Therefore single frames have the same distribution in every class, a video played backwards belongs to the opposite
class, and a mirrored "left" is a "right".

Letters: T frames of a video, O objects, H = W pixels.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.errors import DataError, run_program

VERSION = 1  # raise it when the videos change: it is part of the stamp, so files of another version are refused
X, Y, ANGLE, SIZE = range(4)
# Class name -> direction in state space. Opposite classes are neighbours. The y axis points down, as pixel rows do.
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
# Slowest and fastest rate of each state in cycles per frame: 1.3 to 1.9 pixels of 64; size changes by 2 to 3 percent.
RATES = ((0.02, 0.03), (0.02, 0.03), (0.0, 0.0), (0.03, 0.045))
OBJECTS = 2
SMALLEST, LARGEST = 0.2, 0.36  # largest radius of an object, as a fraction of the frame width
TEXELS = 96  # width of an object's picture: over twice its largest width in a frame, so nearest sampling looks smooth
JPEG_QUALITY = 95
VIDEO_FILES = 16  # number of validation videos that are also written as mp4 files, or all if there are fewer
STAMP = "motion_demo.json"


def trajectory(class_index: int, rng: np.random.Generator, num_frames: int) -> np.ndarray:
    """States of one video, float64 (T, O, 4) in [0, 1): x, y, angle, log size.

    With an equal `rng`, the states of the opposite class are the same in reverse order, exactly.
    """
    start = rng.random((OBJECTS, 4))
    slowest, fastest = np.transpose(RATES)
    rate = np.array(MOTIONS[CLASSES[class_index]]) * (slowest + rng.random() * (fastest - slowest))
    time = np.arange(num_frames) - (num_frames - 1) / 2
    return (start + rate * time[:, None, None]) % 1.0


def render_video(class_index: int, rng: np.random.Generator, size: int = 64, num_frames: int = 16) -> np.ndarray:
    """One video of a class, uint8 (T, H, W, 3)."""
    return draw(*_scene(class_index, rng, size, num_frames))


def object_masks(class_index: int, rng: np.random.Generator, size: int = 64, num_frames: int = 16) -> np.ndarray:
    """Where the objects of `render_video` with an equal `rng` are, bool (T, H, W)."""
    states, ground, objects = _scene(class_index, rng, size, num_frames)
    white = [np.concatenate([np.ones_like(picture[..., :3]), picture[..., 3:]], axis=-1) for picture in objects]
    return draw(states, np.zeros_like(ground), white)[..., 0] > 127


def _scene(
    class_index: int, rng: np.random.Generator, size: int, num_frames: int
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """The arguments of `draw`."""
    states = trajectory(class_index, rng, num_frames)
    ground = _texture(rng, size, lowest=1, highest=4, contrast=0.04, colours=(0.05, 0.3))
    return states, ground, [_object(rng) for _ in range(OBJECTS)]


def draw(states: np.ndarray, ground: np.ndarray, objects: list[np.ndarray]) -> np.ndarray:
    """Draw objects over a ground, later objects on top, and return uint8 (T, H, W, 3).

    Args:
        states: (T, O, 4), of `trajectory`.
        ground: (H, W, 3), RGB in 0..1.
        objects: O pictures (TEXELS, TEXELS, 4), RGBA in 0..1.
    """
    size = len(ground)
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    frames = np.repeat(ground[None].astype(np.float32), len(states), axis=0)
    for picture, (x, y, angle, log_size) in zip(objects, states.astype(np.float32).transpose(1, 2, 0), strict=True):
        across = ((pixels - x[:, None] + 0.5) % 1.0 - 0.5)[:, None, :]  # (T, 1, W), the shorter way round the torus
        down = ((pixels - y[:, None] + 0.5) % 1.0 - 0.5)[:, :, None]  # (T, H, 1)
        radius = SMALLEST * (LARGEST / SMALLEST) ** log_size
        cos, sin = (f(2 * np.pi * angle)[:, None, None] / radius[:, None, None] for f in (np.cos, np.sin))
        u, v = cos * across + sin * down, cos * down - sin * across  # (T, H, W), the picture spans -1..1
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
    """Write the data set to `root`. Returns False if it exists already with the same settings.

    The files are `frames/train_00012/img_00001.jpg` and so on, `train.txt` and `val.txt` (lines `path num_frames
    label`, relative to `frames`), `classes.csv`, `videos/val_00000.mp4` and so on, and `val_videos.txt` (lines `path
    label`, relative to `videos`). `root` appears when it is complete.

    Raises:
        DataError: wrong settings, `root` holds something else, or it cannot be written.
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
    """Write the frames and the list of one split. Consecutive videos have consecutive classes."""
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
    """Write the first validation videos as H.264 files without chroma subsampling, and their list."""
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
    """Smooth periodic noise around a random colour, float64 (size, size, 3) in 0..1.

    Args:
        size: width and height in pixels.
        lowest, highest: number of waves across the picture. The amplitude falls with the frequency.
        contrast: standard deviation of the noise.
        colours: range of the mean of each channel.
        stretch: factor by which the noise is stretched along x.
    """
    waves = np.fft.fftfreq(size, 1 / size)
    frequency = np.hypot(stretch * waves, waves[:, None])[:, : size // 2 + 1]  # the half that rfft2 keeps
    band = np.where((frequency >= lowest) & (frequency <= highest), 1 / np.maximum(frequency, 1), 0)
    grey_and_colours = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((4, size, size))) * band, (size, size))
    noise = grey_and_colours[0] + 0.5 * grey_and_colours[1:]
    noise *= contrast / max(noise.std(), 1e-9)
    return np.clip(rng.uniform(*colours, 3) + noise.transpose(1, 2, 0), 0, 1)


def _object(rng: np.random.Generator) -> np.ndarray:
    """A striped object, RGBA float32 (TEXELS, TEXELS, 4): long, with one thick end, so that its angle is visible."""
    across = (np.arange(TEXELS) + 0.5) * (2 / TEXELS) - 1
    direction = np.arctan2(across[:, None], across)
    outline = 1 + 0.25 * np.cos(2 * direction + rng.uniform(0, 2 * np.pi))
    outline += 0.2 * np.cos(3 * direction + rng.uniform(0, 2 * np.pi))
    outline *= 0.95 / outline.max()
    alpha = np.clip((outline - np.hypot(across[:, None], across)) * 10 + 0.5, 0, 1)
    colours = _texture(rng, TEXELS, lowest=0.7, highest=3, contrast=0.12, colours=(0.6, 0.95), stretch=3.0)
    return np.concatenate([colours, alpha[..., None]], axis=-1).astype(np.float32)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.motion_demo", description="Generate the demo data set.")
    parser.add_argument("root", type=Path, help="folder to create")
    parser.add_argument("--train_videos", type=int, default=640, help="number of training videos")
    parser.add_argument("--val_videos", type=int, default=160, help="number of validation videos")
    parser.add_argument("--size", type=int, default=64, help="height and width of the frames in pixels")
    parser.add_argument("--num_frames", type=int, default=16, help="frames per video")
    parser.add_argument("--seed", type=int, default=0, help="of all random draws")
    arguments = vars(parser.parse_args(argv))
    made = generate(**arguments)
    videos = f"{arguments['train_videos']} training and {arguments['val_videos']} validation videos"
    sys.stdout.write(f"{arguments['root']}: {videos} {'written' if made else 'are there already'}\n")


if __name__ == "__main__":
    run_program(main)
