"""Generated videos that look and compress like filmed ones, as input of the data benchmarks.

A camera pans and zooms over a textured background, and textured objects move across it. As in filmed scenes, the
amplitude of all textures falls with the frequency, and every frame has some noise of its own.
"""

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

FRAMES, RATE = 250, 25
JPEG_QUALITY = 90
OBJECTS = 6
STEEPNESS = 1.3  # amplitude = frequency ** -STEEPNESS; photographs have 1, frames of filmed video more
NOISE = 1.0  # standard deviation of the noise of a frame, in grey levels


def render(seed: int, width: int, height: int) -> Iterator[Image.Image]:
    """Yield the FRAMES frames of a video, which `seed` determines."""
    rng = np.random.default_rng((seed, width, height))
    ground = _texture(rng, 2 * width, 2 * height)
    objects = [_object(rng, int(height * rng.uniform(0.2, 0.6))) for _ in range(OBJECTS)]
    camera = _path(rng, slowest=0.2, fastest=0.8)
    paths = [_path(rng, slowest=0.5, fastest=2.0) for _ in range(OBJECTS)]
    noise = np.rint(NOISE * rng.standard_normal((2 * height, 2 * width, 1), dtype=np.float32)).astype(np.int16)
    for t in range(FRAMES):
        x, y, zoom = camera[t]
        scale = 0.7 + 0.3 * zoom
        corner = (2 - scale) * np.array([x * width, y * height])
        matrix = (scale, 0, corner[0], 0, scale, corner[1])
        frame = ground.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
        for picture, path in zip(objects, paths, strict=True):
            x, y, zoom = path[t]
            side = int(picture.width * (0.7 + 0.3 * zoom))
            place = int(1.2 * x * width - 0.1 * width) - side // 2, int(y * height) - side // 2
            scaled = picture.resize((side, side), Image.Resampling.BICUBIC)
            frame.paste(scaled, place, scaled)
        down, across = rng.integers((height, width))
        grain = noise[down : down + height, across : across + width]
        yield Image.fromarray(np.clip(np.asarray(frame) + grain, 0, 255).astype(np.uint8))


def write_images(folder: Path, seed: int, width: int, height: int) -> None:
    """Write a video as JPEG files img_00001.jpg, ... to a new folder."""
    folder.mkdir(parents=True)
    for number, frame in enumerate(render(seed, width, height), 1):
        frame.save(folder / f"img_{number:05d}.jpg", quality=JPEG_QUALITY)


def write_video(path: Path, seed: int, width: int, height: int, keys: int) -> None:
    """Write a video as H.264 with x264's defaults, which include B-frames, and a key frame every `keys` frames or less.

    Width and height must be even.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"g": str(keys)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in render(seed, width, height):
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def _texture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Return coloured noise around grey whose amplitude falls with the frequency."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    amplitude = np.maximum(frequency, 1 / max(width, height)) ** -STEEPNESS
    spectrum = np.fft.rfft2(rng.standard_normal((4, height, width))) * amplitude
    grey, *colours = np.fft.irfft2(spectrum, (height, width))
    pixels = np.stack([grey + 0.4 * colour for colour in colours], -1)
    pixels = rng.uniform(80, 150, 3) + 50 * pixels / pixels.std()
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _object(rng: np.random.Generator, side: int) -> Image.Image:
    """Return a textured polygon with soft edges, RGBA."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
    radii = side / 2 * rng.uniform(0.5, 1, 9)
    mask = Image.new("L", (side, side))
    corners = zip(side / 2 + radii * np.cos(angles), side / 2 + radii * np.sin(angles), strict=True)
    ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in corners], fill=255)
    picture = _texture(rng, side, side)
    picture.putalpha(mask.filter(ImageFilter.GaussianBlur(1)))
    return picture


def _path(rng: np.random.Generator, slowest: float, fastest: float) -> np.ndarray:
    """Return x, y and zoom of every frame, (FRAMES, 3) in 0..1: each oscillates `slowest` to `fastest` times."""
    times = np.linspace(0, 1, FRAMES)[:, None]
    return 0.5 + 0.5 * np.sin(2 * np.pi * (rng.uniform(slowest, fastest, 3) * times + rng.random(3)))
