"""Check a score file against its list, checkpoint, tower and class names, and say what its accuracy is worth.

    python tools/certify.py SCORES.npz CONFIG [--checkpoint CHECKPOINT] [--weights TOWER] [--expected N] [key=value ...]

SCORES.npz is a file of `test.py --save_scores`. Each check prints a line: ok, FAILED, or not checked, with the reason.
The checkpoint is the file that the score file names, if it is there, or the one of --checkpoint. If a check fails, the
exit status is 1, and no line for a paper is printed. docs/publishing.md explains the output.
"""

import argparse
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dotmap import DotMap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.annotations import read_annotations, read_class_names
from datasets.decoders import describe_decoder
from engine.certificate import OFFICIAL_VIDEOS, Bounds, bounds, describe_environment, hash_names
from engine.configuration import TRAINED_WITH, read_config
from engine.report import ranks
from engine.scores import Scores, describe_views, load_scores, seal_of
from modules.checkpoint import read_checkpoint, tower_hash_of
from modules.checkpoint_places import find_checkpoint
from modules.hashing import hash_tensors
from modules.tower_files import MissingTowerError, load_whole_model
from utils.errors import ConfigError, DataError, UserError, run_program
from utils.published_weights import hash_file

OK, FAILED, NOT_CHECKED = "ok", "FAILED", "not checked"
DIGITS = 12  # of a hash in the line for a paper


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    what: one or two words
    state: OK, FAILED or NOT_CHECKED
    words: what was compared, what differs, or why it was not checked
    """

    what: str
    state: str
    words: str


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="certify.py", description="Check a score file and what it was made from.")
    parser.add_argument("scores", metavar="SCORES.npz", type=Path, help="file of test.py --save_scores")
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the test, see docs/configuration.md")
    parser.add_argument(
        "--checkpoint", metavar="CHECKPOINT", help="file, folder or ORG/NAME (default: the file that SCORES.npz names)"
    )
    parser.add_argument("--weights", metavar="FILE", help="the tower's file, if it is not in clip_pretrain/")
    parser.add_argument(
        "--expected", type=int, metavar="N", help="videos of the whole data set (default: of its official list)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    args = parser.parse_intermixed_args(argv)
    result = load_scores(args.scores)
    config = read_config(args.config, args.overrides, purpose="model")
    total, origin = expected_videos(result, config, args.expected)

    checks = [
        check_seal(args.scores, result),
        *check_list(result, config),
        *check_checkpoint(result, config, args.checkpoint, args.weights),
        check_class_names(result, config),
        check_protocol(result, config),
        check_counts(result),
    ]
    for check in checks:
        print(f"{check.what:<12} {check.state:<12} {check.words}")
    if result.certificate is None:
        print(
            f"{args.scores}: holds no certificate, as test.py of older versions writes it: whether it has changed, the "
            "checkpoint's file, tower, class names, versions and counts cannot be checked"
        )
    for line in describe_environments(result, config):
        print(line)
    if failed := [check.what for check in checks if check.state == FAILED]:
        raise DataError(f"{args.scores}: {', '.join(failed)}: not as certified; see the lines that say {FAILED}")
    if not result.labelled:
        print("no labels: there is no accuracy to certify")
        return
    found = bounds(int((ranks(result.scores, result.labels) == 1).sum()), scored(result), total)
    for line in describe_accuracy(result, found, origin):
        print(line)
    print(f"\n{cite(args.scores, result, found, [check.what for check in checks if check.state == NOT_CHECKED])}")


def expected_videos(result: Scores, config: DotMap, stated: int | None) -> tuple[int, str]:
    """Number of videos of the whole data set, and in words where it comes from.

    Raises:
        ConfigError: `stated` is fewer than the score file has.
    """
    listed = len(result.paths)
    if stated is not None:
        if stated < listed:
            raise ConfigError(f"--expected: {stated} is fewer than the {listed} videos of the score file")
        return stated, "as --expected says"
    official = OFFICIAL_VIDEOS.get(config.data.dataset)
    if official is not None and official >= listed:
        return official, f"the published validation list of {config.data.dataset}"
    return listed, "those of the list; --expected N gives another number"


def scored(result: Scores) -> int:
    return int((~np.isnan(result.scores).any(axis=1)).sum())


def check_seal(file: Path, result: Scores) -> Check:
    """Whether the score file is as it was written."""
    intact = seal_of(file)
    if intact is None and result.certificate is None:
        return Check("score file", NOT_CHECKED, "it has no seal")
    if intact:
        return Check("score file", OK, f"unchanged since it was written, {len(result.paths)} videos")
    return Check("score file", FAILED, "its bytes are not those that were written")


def check_list(result: Scores, config: DotMap) -> list[Check]:
    """The list of the configuration against the hash of the test, and against paths and labels of the score file."""
    data = config.data
    path = None if data.val_list is None else Path(data.val_list)
    if path is None or not path.is_file():
        why = "the configuration names none" if path is None else f"{path} is not there"
        return [Check("list", NOT_CHECKED, f"data.val_list: {why}")]
    found, stated = hashlib.sha256(path.read_bytes()).hexdigest(), result.protocol.get("list_sha256")
    try:
        records = read_annotations(str(path), data.num_classes, data.modality, True, data.segments)
    except UserError as error:
        return [Check("list", FAILED, error.line)]
    listed = [(record.name, record.label) for record in records]
    held = list(zip(result.paths, result.labels.tolist(), strict=True))
    difference = next((i for i, pair in enumerate(zip(listed, held, strict=False)) if pair[0] != pair[1]), None)
    words = ""
    if difference is not None:
        here, there = listed[difference], held[difference]
        words = f"; video {difference + 1} is {here[0]} {here[1]} here, {there[0]} {there[1]} in the score file"
    elif len(listed) != len(held):
        words = f"; {len(listed)} videos here, {len(held)} in the score file"
    if stated is None:
        return [Check("list", FAILED if words else OK, f"{path}, hash unknown{words}")]
    if found != stated:
        return [Check("list", FAILED, f"{path} is another list: SHA-256 {found}, tested was {stated}{words}")]
    return [Check("list", FAILED if words else OK, f"{path}, SHA-256 {found}{words}")]


def check_checkpoint(result: Scores, config: DotMap, name: str | None, weights: str | None) -> list[Check]:
    """The checkpoint's file, its trained tensors and its tower against the hashes of the test."""
    protocol, certificate = result.protocol, result.certificate or {}
    named = protocol.get("checkpoint")
    if name is None and (named is None or not Path(named).is_file()):
        why = f"{named or 'a checkpoint'} is not there; name it by --checkpoint"
        return [Check(what, NOT_CHECKED, why) for what in ("checkpoint", "weights", "tower")]
    try:
        path = find_checkpoint(name or named)
        checkpoint = read_checkpoint(path)
        found = hash_file(path)
    except UserError as error:
        return [Check("checkpoint", FAILED, error.line)]
    checks = [_compare("checkpoint", found, certificate.get("checkpoint_sha256"), str(path))]
    if checks[0].state == FAILED and checkpoint.get("source_sha256") == certificate["checkpoint_sha256"]:
        words = f"{path}, published from the file with SHA-256 {checkpoint['source_sha256']}"
        checks = [Check("checkpoint", OK, words)]
    try:
        model = load_whole_model(config, checkpoint, path, weights)
    except MissingTowerError as error:
        own = hash_tensors(checkpoint["trained"])
        tower = _compare("tower", checkpoint["tower_sha256"], certificate.get("tower_sha256"), "as the checkpoint says")
        if tower.state == OK:
            tower = Check("tower", NOT_CHECKED, f"it is the one that the checkpoint names, but {error.line}")
        return [*checks, _compare("weights", own, protocol.get("model_sha256"), "trained tensors"), tower]
    except UserError as error:
        return [*checks, Check("weights", FAILED, error.line)]
    own = hash_tensors(model.trained.state_dict())
    tower_file = model.backbone.weight_file or "held by the checkpoint"
    return [
        *checks,
        _compare("weights", own, protocol.get("model_sha256"), "trained tensors"),
        _compare("tower", tower_hash_of(model, checkpoint, path), certificate.get("tower_sha256"), tower_file),
    ]


def _compare(what: str, found: str | None, stated: str | None, words: str) -> Check:
    if stated is None:
        return Check(what, NOT_CHECKED, f"{words}; the score file holds no hash of it")
    if found != stated:
        return Check(what, FAILED, f"{words} is another: SHA-256 {found}, tested was {stated}")
    return Check(what, OK, f"{words}, SHA-256 {found}")


def check_class_names(result: Scores, config: DotMap) -> Check:
    """The names in the score file and those of `data.label_list` against the hash of the test."""
    stated = (result.certificate or {}).get("class_names_sha256")
    held = _compare("class names", hash_names(result.class_names), stated, "names in the score file")
    if result.class_names is None or held.state == FAILED:
        return held
    file = config.data.label_list
    if file is None or not Path(file).is_file():
        return Check(held.what, held.state, f"{held.words}; no data.label_list to compare with")
    try:
        names = read_class_names(file, config.data.num_classes)
    except UserError as error:
        return Check(held.what, FAILED, error.line)
    if names != result.class_names:
        return Check(held.what, FAILED, f"{file} has other names, or another order, than the score file")
    return Check(held.what, held.state, f"{held.words}; {file} agrees")


def check_protocol(result: Scores, config: DotMap) -> Check:
    """Frames and pixels of the configuration against those of the test."""
    protocol, data = result.protocol, config.data
    if not protocol:
        return Check("protocol", NOT_CHECKED, "the score file holds none")
    keys = ["dataset", "on_damage", *(key.partition(".")[2] for key in TRAINED_WITH if key.startswith("data."))]
    different = [
        f"data.{key} is {data[key]} here, tested was {protocol[key]}"
        for key in keys
        if key in protocol and protocol[key] != _plain(data[key])
    ]
    if "decoder" in protocol and (protocol["decoder"] is None) != (describe_decoder(data) is None):
        different.append(f"data.modality is {data.modality} here, tested were {protocol['decoder'] or 'frame files'}")
    if different:
        return Check("protocol", FAILED, "; ".join(different))
    accepted = protocol.get("accepted_changes")
    changed = f"; accepted changes since the training: {', '.join(accepted)}" if accepted else ""
    return Check(
        "protocol", OK, f"{describe_views(protocol)}, {protocol.get('precision', 'unknown precision')}{changed}"
    )


def _plain(value: Any) -> Any:
    return value.toDict() if isinstance(value, DotMap) else value


def check_counts(result: Scores) -> Check:
    """Numbers of videos, counted again."""
    certificate = result.certificate
    counted = {
        "expected": len(result.paths),
        "scored": scored(result),
        "unreadable": len(result.paths) - scored(result),
        "damaged": int(result.damaged.sum()),
    }
    words = ", ".join(f"{number} {what}" for what, number in counted.items())
    if certificate is None:
        return Check("counts", NOT_CHECKED, words)
    wrong = [what for what, number in counted.items() if certificate.get(what) != number]
    return Check(
        "counts", FAILED if wrong else OK, f"{words}{'; stated otherwise: ' if wrong else ''}{', '.join(wrong)}"
    )


def describe_environments(result: Scores, config: DotMap) -> list[str]:
    """What the scores were computed with, a line each."""
    lines = [f"scored with  {describe_environment(of)}" for of in (result.certificate or {}).get("environments", [])]
    there, here = result.protocol.get("decoder"), describe_decoder(config.data)
    return [*lines, *([f"decoded by   {there}" + (f" ({here} is here)" if here != there else "")] if there else [])]


def describe_accuracy(result: Scores, found: Bounds, origin: str) -> list[str]:
    """The accuracy over the list, and what is known of it over all videos of the data set."""
    listed, low_high = len(result.paths), [f"{100 * bound:.2f}" for bound in found.others]
    lines = [
        f"top-1        {100 * found.right / listed:.2f} % of the {listed} videos of the list, "
        f"{listed - found.scored} of them without scores and counted as wrong",
        f"             {100 * found.right / max(1, found.scored):.2f} % of the {found.scored} with scores; 95 % "
        f"interval for other videos of the same kind: {low_high[0]} to {low_high[1]}",
    ]
    if result.scores.shape[1] > 5:
        top5 = 100 * float((ranks(result.scores, result.labels) <= 5).mean())
        lines.append(f"top-5        {top5:.2f} % of the {listed} videos of the list")
    missing = found.total - found.scored
    lines.append(f"whole set    {found.total} videos ({origin}), {missing} missing")
    if missing:
        lines.append(
            f"             top-1 over all of them lies between {100 * found.worst:.2f} % (each missing one wrong) and "
            f"{100 * found.best:.2f} % (each right); if they are missing at random, 95 % interval "
            f"{100 * found.at_random.low:.2f} to {100 * found.at_random.high:.2f}"
        )
    return lines


def cite(file: Path, result: Scores, found: Bounds, not_checked: list[str]) -> str:
    """One line for a paper."""
    protocol, certificate = result.protocol, result.certificate or {}
    low, high = (100 * bound for bound in found.others)
    missing = found.total - found.scored
    bounds_text = (
        f" {missing} of {found.total} videos are missing: over all, top-1 lies between {100 * found.worst:.2f} and "
        f"{100 * found.best:.2f} % (if missing at random, {100 * found.at_random.low:.2f} to "
        f"{100 * found.at_random.high:.2f})."
        if missing
        else " No video is missing."
    )
    hashes = [
        (what, value)
        for what, value in (
            ("checkpoint", certificate.get("checkpoint_sha256")),
            ("trained weights", protocol.get("model_sha256")),
            ("list", protocol.get("list_sha256")),
            ("scores", hash_file(file)),
        )
        if value
    ]
    names = ("Side4Video", "commit", "torch", "timm")
    software = " and ".join(
        ", ".join(f"{name} {of[name]}" for name in names if name in of) or "unknown versions"
        for of in certificate.get("environments") or [{}]
    )
    accepted = protocol.get("accepted_changes")
    return (
        f"Top-1 {100 * found.right / max(1, found.scored):.2f} % (95 % interval {low:.2f} to {high:.2f}) on "
        f"{found.scored} videos of {protocol.get('dataset', 'an unknown data set')}, {describe_views(protocol)}, "
        f"precision {protocol.get('precision', 'unknown')}.{bounds_text} SHA-256: "
        f"{', '.join(f'{what} {value[:DIGITS]}' for what, value in hashes)}. Scored with {software}."
        + (f" Changed since the training: {', '.join(accepted)}." if accepted else "")
        + (f" Not checked: {', '.join(not_checked)}." if not_checked else "")
    )


if __name__ == "__main__":
    run_program(main)
