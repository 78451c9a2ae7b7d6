"""Write a trained model as one file that runs without this project: an ONNX graph, or a program of torch.export.

    python tools/export.py CHECKPOINT OUT.onnx|OUT.pt2 [--verify] [--half] [--split] [--video FILE]
                           [--config FILE] [--weights FILE] [--set KEY=VALUE] ...

uint8 clips (B, T, 3, H, W) in, any B; softmax scores, float32 (B, K), out. Normalisation is inside; frames, pixels and
class names are in the metadata. An .onnx file needs python -m pip install -r requirements-extras.txt
inference/deployed.py runs an .onnx file on a video. docs/deployment.md says more.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inference.exporting import BATCHES, ONNX, OPSET, Exported, example_clips, export, file_kind, real_clips
from inference.recognizer import Recognizer
from modules.checkpoint_places import find_checkpoint
from tools.recognizer_options import add_source_options, load_recognizer
from utils.atomic import probe
from utils.errors import DataError, run_program
from utils.published_weights import hash_file


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="export.py", description="Write a model that runs without this project.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="model_best.pt of a run, its folder, a released one")
    parser.add_argument("out", metavar="OUT.onnx|OUT.pt2", type=Path, help="the file to write")
    parser.add_argument("--verify", action="store_true", help="run it too, and keep it only if scores equal PyTorch's")
    parser.add_argument("--half", action="store_true", help="weights and products in float16")
    parser.add_argument(
        "--split", action="store_true", help="two graphs, for streams: OUT-frames and OUT-mix in place of OUT"
    )
    parser.add_argument(
        "--video", metavar="FILE", help="real clips of --verify (default: the first video of the checkpoint's val_list)"
    )
    add_source_options(parser)
    parser.set_defaults(device="cpu", precision="fp32", workers=0)
    args = parser.parse_args(argv)
    if args.video and not args.verify:
        parser.error("--video: goes with --verify")
    file_kind(args.out)
    probe(args.out)
    recognizer = load_recognizer(args)
    check = clips_to_check(recognizer, args.video) if args.verify else None
    digest = hash_file(find_checkpoint(args.checkpoint))
    done = export(recognizer, args.out, digest, half=args.half, split=args.split, check=check)
    sys.stdout.write(described(done, args.out.suffix))


def clips_to_check(recognizer: Recognizer, video: str | None) -> dict:
    """Random clips and real ones. Raises DataError without real ones."""
    try:
        real = real_clips(recognizer, video)
    except DataError as error:
        if video is not None:
            raise
        raise DataError(f"--verify needs a real clip ({error.line}); name a video by --video FILE") from error
    return {"random": example_clips(recognizer.config.data, max(BATCHES), seed=1), "real": real}


def described(done: Exported, kind: str) -> str:
    """Lines about what was written and found."""
    opset = f", opset {OPSET}" if kind == ONNX else ""
    lines = [f"{path}: {size / 1e6:.1f} MB" for path, size in done.files]
    lines[-1] += opset
    lines += [
        f"  {found.clips} clips, batch {found.batch}: scores at most {found.largest:.1e} from PyTorch's"
        for found in done.differences
    ]
    if done.differences:
        lines.append(f"verified: at most {done.tolerance:g} is allowed")
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    run_program(main)
