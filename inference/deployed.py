"""Run models of tools/export.py on videos with onnxruntime, numpy and av alone, as datasets/ and inference/ do.

python deployed.py MODEL.onnx VIDEO [--crops 1|3|5|10] [--clips N]
python deployed.py MODEL.onnx VIDEO --window SECONDS [--stride SECONDS]    runs MODEL-frames.onnx and MODEL-mix.onnx
"""

import argparse
import contextlib
import itertools
import json
import sys

import av
import numpy as np
import onnxruntime


class Model:
    """An exported graph: its metadata, and `run`, which takes arrays by name. T frames of a clip, K classes."""

    def __init__(self, path, graph="whole", providers=("CPUExecutionProvider",)):
        session = onnxruntime.InferenceSession(path, providers=list(providers))
        self.facts, self.run = session.get_modelmeta().custom_metadata_map, lambda **x: session.run(None, x)
        if self.facts.get("graph") != graph:
            raise ValueError(f"{path}: is not the graph {graph!r} of tools/export.py, but {self.facts.get('graph')!r}")
        self.frames, self.pixels, self.names = (json.loads(self.facts[n]) for n in ("frames", "pixels", "class_names"))

    def scores(self, video, crops=1, clips=1):
        """float32 (K,), the mean over crops * clips views, which run one by one, of the softmax."""
        indices = self.indices(sum(1 for _ in decoded(video)), clips)
        frames = {number: upright(frame) for number, frame in enumerate(decoded(video)) if number in indices}
        views = (view for clip in indices for view in self.views([frames[number] for number in clip], crops))
        return np.mean([self.run(clips=view[None])[0][0] for view in views], axis=0)

    def indices(self, n, clips):
        """Which of n frames, from 0, make the clips, int (clips, T)."""
        if not n:
            raise ValueError("no frame of the video can be decoded")
        T, i, clip = self.frames, np.arange(self.frames), np.arange(clips)[:, None]
        if self.facts["dense"] == "true":
            return ((clip + (clips == 1)) * (max(0, n - 128) // (clips - 1 or 2)) + i * (128 // T)) % n
        if self.facts["protocol"] == "something":
            return ((n - 1) / T / (clips + 1) * (clip + 1)).astype(int) + np.rint((n - 1) / T * i).astype(int)
        return np.trunc(np.floor(np.linspace(0, n / T - 1, clips))[:, None] + n / T * i).astype(int) % n

    def views(self, frames, crops=1):
        """Frames (H, W, 3) of a clip -> uint8 (crops, T, 3, size, size)."""
        size, resize, (height, width) = self.pixels["size"], self.pixels["resize"], frames[0].shape[:2]
        shape = [int(resize * side / min(height, width)) for side in (height, width)] if type(resize) is int else resize
        half, (y, x) = [round((side - size) / 2) for side in shape], [(side - size) // 4 for side in shape]
        five = [(0, 0), (0, 4 * x), (4 * y, 0), (4 * y, 4 * x), (2 * y, 2 * x)]
        corners = {1: [tuple(half)], 3: [(2 * y, 0), (2 * y, 4 * x), five[4]], 5: five, 10: five}[crops]
        clip = np.stack([resized(frame, *shape) for frame in frames])
        found = np.stack([clip[..., top : top + size, left : left + size] for top, left in corners])
        return np.concatenate([found, found[..., ::-1]]) if crops == 10 else found


def windows(frames, mix, video, window, stride=None):
    """(start, end, scores) of windows, in seconds; each frame goes through the model `frames` once."""
    T, spacing, number, origin, length, ring = frames.frames, window / frames.frames, 0, None, 0.0, list[list]()
    step = 1 if stride is None else round(stride / spacing)
    if step < 1 or abs(step * spacing - (stride or spacing)) > 1e-6 * window:
        raise ValueError(f"stride: {stride} s is no multiple of {spacing:g} s, window / frames")
    if frames.facts["checkpoint_sha256"] != mix.facts["checkpoint_sha256"]:
        raise ValueError("the graphs of frames and of mix are of two checkpoints; export them together")
    for frame, following in itertools.pairwise(itertools.chain(decoded(video), [None])):
        origin = frame.time if origin is None else origin
        length = following.time - frame.time if following else length  # the last one is shown as long as the one before
        while origin + (number + 0.5) * spacing < frame.time + length:  # it is shown in the middle of cell `number`
            if number % step < T:  # no window needs the others
                ring = [*ring, frames.run(frames=frames.views([upright(frame)])[0])][-T:]
            number += 1
            if number >= T and (number - T) % step == 0:
                products, tokens = (np.stack(part, 1) for part in zip(*ring, strict=True))  # (1, T, ...)
                yield (
                    origin + (number - T) * spacing,
                    origin + number * spacing,
                    mix.run(products=products, tokens=tokens)[0][0],
                )
    if number < T:
        raise ValueError(f"{video}: is shorter than a window of {window:g} s")


def resized(frame, height, width):
    """Pillow's antialiased bicubic resize, across and then down: (H, W, 3) -> uint8 (3, height, width)."""
    lines = frame.transpose(2, 0, 1) @ bicubic(frame.shape[1], width).T  # exact: integers below 2**53
    lines = bicubic(frame.shape[0], height) @ np.clip((lines + 2**21) // 2**22, 0, 255)
    return np.clip((lines + 2**21) // 2**22, 0, 255).astype(np.uint8)


def bicubic(old, new):
    """The weight of each old pixel in each new one, in units of 2**-22, float64 (new, old)."""
    place, stretch = np.arange(old), max(old / new, 1.0)
    centre = (np.arange(new)[:, None] + 0.5) * (old / new)
    first, stop = ((centre + side * 2 * stretch + 0.5).astype(int) for side in (-1, 1))
    x = np.abs((place - centre + 0.5) * (1 / stretch))
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where((first <= place) & (place < stop), np.where(x < 1, near, np.where(x < 2, far, 0)), 0)
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # adds one by one, as Pillow
    return np.trunc(weights * 2**22 + np.copysign(0.5, weights))


def decoded(video):
    """The frames of PyAV; packets that cannot be decoded are passed over."""
    source = sys.stdin.buffer if video == "-" else video if "://" in video else f"file:{video}"
    with av.open(source, metadata_errors="replace") as container:
        streams = [container.streams.best("video"), *container.streams.video]
        streams = [found for found in streams if found and not found.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise ValueError(f"{video}: holds no video")
        streams[0].codec_context.thread_count = 1  # several fill up damaged frames otherwise
        for packet in container.demux(streams[0]):
            with contextlib.suppress(av.FFmpegError):
                yield from packet.decode()


def upright(frame):
    """Pixels (H, W, 3) of a frame, turned and mirrored as its display matrix says."""
    matrix, plain = frame.side_data.get("DISPLAYMATRIX"), frame
    if frame.interlaced_frame:  # FFmpeg 8 converts its two fields apart, unless the mark is gone
        plain = av.VideoFrame.from_ndarray(frame.to_ndarray(), frame.format.name)
        plain.colorspace, plain.color_range = frame.colorspace, frame.color_range
    rgb = plain.reformat(format="rgb24", interpolation="BICUBIC").to_ndarray()
    a, b, _, c, d = [1, 0, 0, 0, 1] if matrix is None else np.frombuffer(matrix, np.int32)[:5].astype(int)
    rgb, a, d = (rgb.transpose(1, 0, 2), c, b) if abs(b) + abs(c) > abs(a) + abs(d) else (rgb, a, d)
    return rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def main(argv):
    parser = argparse.ArgumentParser(prog="deployed.py", description="Run an exported model on a video.")
    parser.add_argument("model"), parser.add_argument("video")
    for name, kind, default in (("crops", int, 1), ("clips", int, 1), ("window", float, None), ("stride", float, None)):
        parser.add_argument(f"--{name}", type=kind, default=default, choices=(1, 3, 5, 10) if name == "crops" else None)
    args = parser.parse_args(argv)
    onnxruntime.set_default_logger_severity(3)  # it warns of constants that it does not fold
    if args.window:
        frames, mix = (Model(f"{args.model.removesuffix('.onnx')}-{part}.onnx", part) for part in ("frames", "mix"))
        for start, end, scores in windows(frames, mix, args.video, args.window, args.stride):
            print(f"{start:9.2f} {end:9.2f}  {scores.max():.4f}  {mix.names[scores.argmax()]}", flush=True)
    else:
        scores = (model := Model(args.model)).scores(args.video, args.crops, args.clips)
        print(*(f"  {scores[k]:.4f}  {model.names[k]}" for k in np.argsort(-scores, kind="stable")[:5]), sep="\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Exception as error:  # those of onnxruntime have no common base
        sys.exit(f"error: {str(error) or type(error).__name__}")
