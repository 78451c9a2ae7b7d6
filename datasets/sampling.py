"""Sampling of frames: which frames of a video make a clip (docs/protocol.md, section 4).

Pure functions of `num_frames` (n), `num_segments` (T frames of a clip) and, in training, a random generator. Results
are zero-based int64 indices in 0..n-1. Divisions come before multiplications, in double precision (n / T, then times
i), as in the released code: the other order rounds differently for some n. The clip of validation is the only clip of a
test with one clip.
"""

import numpy as np

DENSE_WINDOW = 128


def protocol_of(dataset_name: str) -> str:
    """Return the protocol for a data set of this name: "something" if the name contains it, otherwise "kinetics"."""
    return "something" if "something" in dataset_name.lower() else "kinetics"


def sample_train(
    num_frames: int, num_segments: int, protocol: str, rng: np.random.Generator, dense: bool = False
) -> np.ndarray:
    """Draw the indices of one training clip, (T,)."""
    sample = dense_train if dense else {"kinetics": kinetics_train, "something": something_train}[protocol]
    return sample(num_frames, num_segments, rng)


def sample_test(
    num_frames: int, num_segments: int, protocol: str, num_clips: int = 1, dense: bool = False
) -> np.ndarray:
    """Return the indices of the test clips, (num_clips, T). One clip is that of validation."""
    sample = dense_test if dense else {"kinetics": kinetics_test, "something": something_test}[protocol]
    return sample(num_frames, num_segments, num_clips)


def kinetics_train(num_frames: int, num_segments: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one index from each of T intervals. An interval includes both ends, so neighbours share a frame."""
    edges = _round((num_frames - 1) / num_segments * np.arange(num_segments + 1))
    return rng.integers(edges[:-1], edges[1:], endpoint=True)


def kinetics_test(num_frames: int, num_segments: int, num_clips: int) -> np.ndarray:
    """Spread the starts of the clips over the first of T equal intervals; frames are one interval apart."""
    spacing = num_frames / num_segments
    # With fewer than T frames, starts after the first are -1: these clips begin at the last frame.
    starts = np.floor(np.linspace(0, spacing - 1, num_clips))
    return np.trunc(starts[:, None] + spacing * np.arange(num_segments)).astype(np.int64) % num_frames


def something_train(num_frames: int, num_segments: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one index from each of T disjoint intervals. With at most T frames, take all and repeat random ones."""
    if num_frames <= num_segments:
        extra = rng.integers(num_frames, size=num_segments - num_frames)
        return np.sort(np.concatenate([np.arange(num_frames), extra]))
    bounds = np.floor(num_frames / num_segments * np.arange(num_segments + 1)).astype(np.int64)
    return rng.integers(bounds[:-1], bounds[1:])


def something_test(num_frames: int, num_segments: int, num_clips: int) -> np.ndarray:
    """Take the rounded start of each of T intervals, shifted for each clip by another part of an interval."""
    spacing = (num_frames - 1) / num_segments
    shifts = (spacing / (num_clips + 1) * np.arange(1, num_clips + 1)).astype(np.int64)
    return shifts[:, None] + _round(spacing * np.arange(num_segments))


def dense_train(num_frames: int, num_segments: int, rng: np.random.Generator) -> np.ndarray:
    """Take T frames of a window of 128 frames at a random start. A shorter video is repeated from its beginning."""
    return _dense(num_frames, num_segments, int(rng.integers(max(1, num_frames - DENSE_WINDOW))))


def dense_test(num_frames: int, num_segments: int, num_clips: int) -> np.ndarray:
    """Take T frames of windows of 128 frames, spread evenly over the video; one clip is in the middle."""
    latest = max(0, num_frames - DENSE_WINDOW)
    starts = np.arange(num_clips) * (latest // (num_clips - 1)) if num_clips > 1 else np.array([latest // 2])
    return _dense(num_frames, num_segments, starts[:, None])


def _dense(num_frames: int, num_segments: int, start: np.ndarray | int) -> np.ndarray:
    return (start + np.arange(num_segments) * (DENSE_WINDOW // num_segments)) % num_frames


def _round(values: np.ndarray) -> np.ndarray:
    """Round to the nearest integers, halves to even."""
    return np.rint(values).astype(np.int64)
