"""List line -> batch: annotations, sampling, readers, decoders, transforms, augmentation, loaders. Knows no model."""

import os
import tempfile
from pathlib import Path

# numba keeps compiled loops in __pycache__, or below the home folder. Where neither can be written to, as in a
# read-only container, it would refuse to compile at all. This must be set before numba is imported.
if "NUMBA_CACHE_DIR" not in os.environ:
    places = [Path(__file__).parent, Path(os.path.expanduser("~"))]
    if not any(os.access(place, os.W_OK) for place in places):
        os.environ["NUMBA_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), f"side4video_numba_{os.getuid()}")
