"""Which frames of a video make a clip: docs/protocol.md section 4.

Pure functions of the number of frames n, the number of segments T (frames per clip) and, in training, a generator.
Results are zero-based int64 indices within 0..n-1. Quotients come first, in double precision (t = n / T, then t * i):
the other order rounds differently for some n. A validation clip is the only clip of a one-clip test.
"""

import numpy as np

DENSE_WINDOW = 128


def protocol_of(dataset_name: str) -> str:
    """The frame and pixel protocol of a data set: "something" or "kinetics"."""
    return "something" if "something" in dataset_name.lower() else "kinetics"


def sample_train(
    num_frames: int, num_segments: int, protocol: str, rng: np.random.Generator, dense: bool = False
) -> np.ndarray:
    """Randomly shifted indices of one training clip, (T,)."""
    sample = dense_train if dense else {"kinetics": kinetics_train, "something": something_train}[protocol]
    return sample(num_frames, num_segments, rng)


def sample_test(
    num_frames: int, num_segments: int, protocol: str, num_clips: int = 1, dense: bool = False
) -> np.ndarray:
    """Fixed indices of C = `num_clips` test clips, (C, T); with one clip, those of validation."""
    sample = dense_test if dense else {"kinetics": kinetics_test, "something": something_test}[protocol]
    return sample(num_frames, num_segments, num_clips)


def kinetics_train(num_frames: int, num_segments: int, rng: np.random.Generator) -> np.ndarray:
    """One index from each of T stretches; both ends belong to a stretch, so neighbours share one frame."""
    edges = _round((num_frames - 1) / num_segments * np.arange(num_segments + 1))
    return rng.integers(edges[:-1], edges[1:], endpoint=True)


def kinetics_test(num_frames: int, num_segments: int, num_clips: int) -> np.ndarray:
    spacing = num_frames / num_segments
    # Below T frames a start of -1 occurs: clips after the first then open on the last frame.
    starts = np.floor(np.linspace(0, spacing - 1, num_clips))
    return np.trunc(starts[:, None] + spacing * np.arange(num_segments)).astype(np.int64) % num_frames


def something_train(num_frames: int, num_segments: int, rng: np.random.Generator) -> np.ndarray:
    """One index from each of T stretches that share no frame; a short video gives every frame, some of them again."""
    if num_frames <= num_segments:
        extra = rng.integers(num_frames, size=num_segments - num_frames)
        return np.sort(np.concatenate([np.arange(num_frames), extra]))
    bounds = np.floor(num_frames / num_segments * np.arange(num_segments + 1)).astype(np.int64)
    return rng.integers(bounds[:-1], bounds[1:])


def something_test(num_frames: int, num_segments: int, num_clips: int) -> np.ndarray:
    spacing = (num_frames - 1) / num_segments
    shifts = (spacing / (num_clips + 1) * np.arange(1, num_clips + 1)).astype(np.int64)
    return shifts[:, None] + _round(spacing * np.arange(num_segments))


def dense_train(num_frames: int, num_segments: int, rng: np.random.Generator) -> np.ndarray:
    """Frames of one window of 128 at a random start; a shorter video is repeated from its beginning."""
    return _dense(num_frames, num_segments, rng.integers(max(1, num_frames - DENSE_WINDOW)))


def dense_test(num_frames: int, num_segments: int, num_clips: int) -> np.ndarray:
    latest = max(0, num_frames - DENSE_WINDOW)
    starts = np.arange(num_clips) * (latest // (num_clips - 1)) if num_clips > 1 else np.array([latest // 2])
    return _dense(num_frames, num_segments, starts[:, None])


def _dense(num_frames: int, num_segments: int, start: np.ndarray | int) -> np.ndarray:
    return (start + np.arange(num_segments) * (DENSE_WINDOW // num_segments)) % num_frames


def _round(values: np.ndarray) -> np.ndarray:
    """Nearest integers, halves to the even one."""
    return np.rint(values).astype(np.int64)
