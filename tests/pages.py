"""The pages of the documentation as their readers use them: the blocks of a page, and its commands, done in order.

`follow` does every command of a page. Most run in this process, on tiny material. Commands that ONLY_PARSED lists need
what a test does not have; their arguments go through the parser of the real program. So do usage lines, which have
placeholders in capitals, brackets or dots. A command that is none of these is an error: nothing is passed over.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import pytest
from tiny import REPOSITORY, save_untrained

import test as test_program
import train as train_program
from tools import predict
from tools.motion_demo import generate
from utils import config as config_program
from utils.config_schema import FIELDS

ALL = ["README.md", "CHANGELOG.md", "clip_pretrain/README.md"]
ALL += sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))
IN_THE_FOLDER = ("benchmarks", "datasets", "engine", "hubconf.py", "inference", "modules", "scripts", "test.py")
IN_THE_FOLDER += ("tools", "train.py", "utils")

FENCE = r"^(?P<indent> *)```(\w*)\n(.*?)^(?P=indent)```$"  # it may be indented, in a list
FLAGS = re.MULTILINE | re.DOTALL
VAL_VIDEOS = 9  # of the demo's data in the folder

# Beginnings of commands whose arguments are parsed only, and why they are not run.
ONLY_PARSED = {
    "sbatch": "needs Slurm",
    "docker run": "needs Docker and GPUs",
    "python tools/download_weights.py ViT": "downloads",
    "python tools/download_weights.py EVA": "downloads",
    "sh scripts/run_demo.sh": "five minutes; its commands are parsed one by one",
    "sh scripts/run_tests.sh": "runs this test",
    "sh scripts/run_tests_oldest.sh": "installs packages",
    "sh scripts/gpu_report.sh": "needs a GPU; tests/test_gpu_report.py runs its bodies",
    "NUM_GPUS=": "needs several GPUs; tests/test_programs.py runs two processes",
    "NNODES=": "needs several machines; tests/test_scripts.py shows what is launched",
    "CUDA_VISIBLE_DEVICES=": "needs GPUs",
    "python -m benchmarks.": "minutes",
    "python -m tools.memory_page": "minutes; tests/test_plan.py compares the page",
    "python -m tools.list_architectures": "a minute; tests/test_towers.py compares the table",
    "python tools/plan.py": "seconds for each tower; tests/test_plan.py runs it",
    "python tools/demo_page.py": "needs Gradio, and serves until Ctrl+C; tests/test_demo_page.py",
    "sh scripts/run_train_vision.sh configs/k400/": "needs Kinetics and a tower's weights",
    "sh scripts/run_test_vision.sh configs/k400/": "needs Kinetics",
    "python tools/convert_checkpoint.py configs/k400/": "needs a released checkpoint",
    "sh scripts/run_predict.sh released.pth": "needs a released checkpoint",
    "python -m utils.config_schema": "tests/test_config.py compares the page",
    "python tests/bad_input.py": "tests/test_bad_input.py compares the page",
    "python tools/draw_method.py": "tests/test_documents.py compares the figure",
    "python tools/draw_predictions.py": "replaces the picture of the README; tests/test_draw_predictions.py runs it",
    "tensorboard": "serves until Ctrl+C",
}
# Commands of other programs, word for word; nothing of ours can check their arguments.
FOREIGN = {
    ". .venv/bin/activate",
    "pre-commit install",
    "python -m pip install -r requirements.txt",
    "python -m pip install -r requirements-extras.txt",
    "pip install -r requirements-extras.txt",
    "wandb sync",
    "hf auth login",
    "hf download laion/CLIP-ViT-B-16-laion2B-s34B-b88K open_clip_model.safetensors open_clip_config.json "
    "--local-dir clip_pretrain/laion",
    "zip -0 -j out/001.zip frames/001/*",
}
VARIABLES = {"NUM_GPUS", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "DEVICE", "CUDA_VISIBLE_DEVICES"}
PLACEHOLDERS = {"SOURCE": "folders", "N": "1", "E": "1", "SECONDS": "1.0", "P": "fp32", "W": "1", "1,": "1"}
STARTS = r"(?:sh scripts/|python |sbatch |docker run|tensorboard |pip |hf |wandb |zip |pre-commit |[A-Z_]+=\S+ sh )"


class Block(NamedTuple):
    """A fenced block of a page: sh, python, yaml, json, or "" for what is shown."""

    language: str
    text: str


def read(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page in order."""
    text = read(page)
    found = [Block(language, dedent(inside)) for _, language, inside in re.findall(FENCE, text, FLAGS)]
    assert text.count("```") == 2 * len(found), f"{page}: a fence that is not closed, or ends further in or out"
    return found


def steps(page: str) -> list[tuple[str, str]]:
    """(what, text) of each block that a reader types: "sh" and commands, or a yaml file's name and content.

    The file of a yaml block is the last one that the text above it names.
    """
    found, file = [], ""
    for name, _, language, text in re.findall(rf"`(configs/\w+\.yaml)`|{FENCE}", read(page), FLAGS):
        file = name or file
        if language in ("sh", "yaml"):
            found.append((file if language == "yaml" else "sh", dedent(text)))
    return found


def split(text: str) -> list[str]:
    """The commands of a block, one a line; comments are left out, and lines that go on are joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in (re.sub(r"(^|\s)#\s.*", "", line) for line in lines) if line.strip()]


def commands(page: str) -> list[str]:
    """Every command in the sh blocks of a page."""
    return [command for block in blocks(page) if block.language == "sh" for command in split(block.text)]


def other_commands(page: str) -> list[str]:
    """Commands that stand elsewhere on a page: in the text, as `command`, in other blocks, and in indented lines."""
    others = "\n".join(block.text for block in blocks(page) if block.language != "sh")
    text = re.sub(FENCE, "", read(page), flags=FLAGS)
    lines = re.findall(rf"^({STARTS}.*)$", others, re.MULTILINE) + re.findall(
        rf"^ {{4,}}({STARTS}.*)$", text, re.MULTILINE
    )
    spans = re.findall(r"`([^`]+)`", text)
    return [" ".join(command.split()) for command in [*lines, *(span for span in spans if re.match(STARTS, span))]]


def is_usage(command: str) -> bool:
    """Whether a command has placeholders for what its reader puts in."""
    words = re.findall(r"\S+", command)
    return bool(re.search(r"(^|\s)\[|\.\.\.", command)) or any(
        re.fullmatch(r"(?:[\w.]+=)?(?!RGB)[A-Z]{2,}(?:\.\w+)?|[NEPW]", word) for word in words
    )


def only_parsed(command: str) -> bool:
    return is_usage(command) or any(command.startswith(start) for start in ONLY_PARSED)


class Parsed(Exception):
    """The arguments of a program, once its parser has read them."""


@contextlib.contextmanager
def stopping_after_the_parser() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            original = getattr(argparse.ArgumentParser, name)

            def parse(self, args=None, namespace=None, original=original):
                raise Parsed(original(self, args, namespace))

            patch.setattr(argparse.ArgumentParser, name, parse)
        yield


def program(words: list[str]) -> tuple[Callable, list[str]]:
    """(main, arguments) of a command of this repository."""
    match words:
        case ["sh", "scripts/run_train_vision.sh", config, *rest]:
            return train_program.main, ["--config", config, *rest]
        case ["sh", "scripts/run_test_vision.sh", *rest]:
            with_config = rest[0] == "CONFIG" or rest[0].endswith(".yaml")
            config = ["--config", rest.pop(0)] if with_config else []
            return test_program.main, [*config, "--weights", *rest]
        case ["sh", "scripts/gpu_report.sh", *rest]:
            return importlib.import_module("benchmarks.gpu_report").main, rest
        case ["sh", "scripts/run_predict.sh", *rest]:
            return predict.main, rest
        case ["python", "-m", "utils.config", *rest]:
            return config_program.main, rest
        case ["python", "-m", module, *rest]:
            return importlib.import_module(module).main, rest
        case ["python", path, *rest] if path.endswith(".py"):
            assert (REPOSITORY / path).is_file(), f"{path} is not there"
            return importlib.import_module(path.removesuffix(".py").replace("/", ".")).main, rest
    raise AssertionError(f"not a command that a test can run or parse: {shlex.join(words)}")


def parse(command: str) -> None:
    """Let the real parser read the arguments of a command, and the real configuration its keys; run nothing."""
    if command in FOREIGN:
        return None
    command = re.sub(r" > docs/\w+\.(md|svg)$", "", command)
    command = re.sub(r"\s\[|\]|(?<=\w)\.\.\.|\s\.\.\.", " ", command).replace("\\|", "|")
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(re.sub(r"\|\d[\d|]*", "", command))]
    words = ["seed=1" if word == "key=value" else word for word in words]
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        assert words[0].partition("=")[0] in VARIABLES, f"{words[0]}: no variable that a script or program reads"
        words.pop(0)
    match words:
        case ["sh", "scripts/run_demo.sh"]:
            lines = [re.sub(r'^"\$PYTHON"', "python", line) for line in split(read("scripts/run_demo.sh"))]
            ours = [line for line in lines if line.startswith(("python -m", "sh "))]
            assert len(ours) == 4
            for line in ours:
                parse(line)
            return None
        case ["sh" | "python", path]:  # a name in the text
            assert (REPOSITORY / path).is_file(), f"{path} is not there"
            return None
        case ["python", "-m", module]:
            assert importlib.util.find_spec(module), f"{module} is not there"
            return None
        case ["sbatch", *rest] | ["docker", "run", *rest]:
            while not rest[0].startswith(("sh", "scripts/")):
                rest.pop(0)
            rest = rest[1:] if rest[0] == "sh" else rest
            name = "scripts/run_train_vision.sh" if rest[0] == "scripts/slurm_train.sh" else rest[0]
            return parse(shlex.join(["sh", name, *rest[1:]]))
        case ["sh", "scripts/run_tests.sh" | "scripts/run_tests_oldest.sh", *rest]:
            missing = [word for word in rest if word.endswith(".py") and not (REPOSITORY / word).exists()]
            assert not missing, missing
            return None
        case ["python", "-m", "torch.distributed.run", *rest]:
            from torch.distributed.run import get_args_parser

            found = get_args_parser().parse_args(rest)
            return parse(shlex.join(["python", found.training_script, *found.training_script_args]))
        case ["tensorboard", *rest]:
            from tensorboard.program import TensorBoard

            TensorBoard().configure(["tensorboard", *rest])
            return None
    main, arguments = program(words)
    check_keys(arguments)
    if main is config_program.main:
        return None
    output = contextlib.redirect_stdout(io.StringIO())
    with stopping_after_the_parser(), output, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            main(arguments)
        except Parsed:
            return None
        except SystemExit as ended:
            assert not ended.code, f"{command}: {errors.getvalue().strip()}"
            return None  # -h
    raise AssertionError(f"{command}: the program has no parser")


def check_keys(arguments: list[str]) -> None:
    """The keys of `key=value` arguments exist, and their values are allowed; a named configuration can be read."""
    pairs = [word for word in arguments if re.match(r"[a-z]\w*(\.\w+)?=", word)]
    for key in (pair.partition("=")[0] for pair in pairs):
        assert key in FIELDS, f"{key}: no such key"
    configs = [word for word in arguments if word.startswith("configs/") and word.endswith(".yaml")]
    values = [pair for pair in pairs if not re.search(r"=[A-Z]+$", pair)]
    for config in configs:
        if (path := REPOSITORY / config).exists():
            config_program.load_config(path, values, "model")


def run(command: str) -> str:
    """What a command prints. Pipes and torchrun run in a shell, all others in this process and without its scripts.

    Trainings and tests load their data without processes of their own, unless the command says how many.
    """
    if re.search(r"\s[|<>]\s|torch\.distributed\.run", command):
        environment = {**os.environ, "PATH": f"{Path('bin').resolve()}:{os.environ['PATH']}", "PYTHON": sys.executable}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            ["sh", "-eu", "-c", command], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout
    main, arguments = program(shlex.split(command))
    check_keys(arguments)
    if main in (train_program.main, test_program.main) and "data.workers=" not in command:
        arguments = [*arguments, "data.workers=0"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            main(arguments)
        except SystemExit as ended:
            assert not ended.code, f"{command}: ended with status {ended.code}"
    return output.getvalue()


def follow(page: str, folder: Path) -> list[tuple[str, str]]:
    """Write the files of a page below `folder` and do its commands there, in order; (command, what it printed) of each.

    A command that is only parsed prints "".
    """
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for what, text in steps(page):
            if what != "sh":
                Path(what).parent.mkdir(exist_ok=True)
                Path(what).write_text(text)
                continue
            for command in split(text):
                if only_parsed(command) or command in FOREIGN:
                    parse(command)
                    printed.append((command, ""))
                else:
                    printed.append((command, run(command)))
    return printed


def output_of(printed: list[tuple[str, str]], words: str) -> str:
    """What the only command with these words printed."""
    (output,) = [output for command, output in printed if words in command]
    return output


def make_folder(root: Path) -> None:
    """A clone of the repository for a reader, with a small data set of the demo and an untrained checkpoint of it."""
    for name in IN_THE_FOLDER:
        (root / name).symlink_to(REPOSITORY / name)  # a copy would be compiled anew
    shutil.copytree(REPOSITORY / "configs", root / "configs")
    generate(root / "demo_data" / "motion", train_videos=32, val_videos=VAL_VIDEOS, size=64, num_frames=16)
    (root / "exp_onehot" / "demo").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        save_untrained("configs/demo/motion.yaml", Path("exp_onehot/demo/model_best.pt"))
    (root / "bin").mkdir()
    (root / "bin" / "python").write_text(f"#!/bin/sh\nexec '{sys.executable}' \"$@\"\n")
    (root / "bin" / "python").chmod(0o755)
