"""A page in the browser: drop a video, see its classes, the frames as the model saw them, and a time line.

    python tools/demo_page.py CHECKPOINT [--host 127.0.0.1] [--port 7860] [--window SECONDS] [--topk 5]
                              [--max_mb 100] [--max_seconds 300] [--config FILE] [--weights FILE] [--device auto]
                              [--precision amp] [--set KEY=VALUE] ...

It needs Gradio: python -m pip install -r requirements-extras.txt
Only this machine can open the page, unless --host names another address. Uploaded files are removed after the answer.
docs/prediction.md says more.
"""

import argparse
import importlib
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.video_files import VIDEO_SUFFIXES
from inference.page import TITLE, Limits, answers, introduction_html, remove_older
from inference.recognizer import Recognizer
from tools.recognizer_options import add_checkpoint_options, load_recognizer
from utils.errors import ConfigError, UserError, run_program

UNANSWERED_SECONDS = 3600  # an upload that nobody waits for any more is removed after so long
WAITING = 16  # answers that may wait for their turn; one is computed at a time
# The browser asks this server only: Gradio's page would load a few things from elsewhere.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


def main(argv: list[str]) -> None:
    args = parse(argv)
    gradio = import_gradio()
    with tempfile.TemporaryDirectory(prefix="demo_page.") as folder, listen(args.host, args.port) as server:
        app = build_app(gradio, build_page(gradio, load_recognizer(args), args, folder), args.max_mb)
        host, port = server.getsockname()[:2]
        sys.stdout.write(f"the page is at http://{f'[{host}]' if ':' in host else host}:{port}/ until Ctrl+C\n")
        sys.stdout.flush()
        uvicorn = importlib.import_module("uvicorn")  # comes with Gradio, as FastAPI does
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[server])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo_page.py", description="Show a page that recognises uploaded videos.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="model_best.pt of a run, its folder, a released one")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="to listen on; 0.0.0.0 is every network (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--max_mb", type=float, default=100, metavar="N", help="of a file (default: %(default)s)")
    parser.add_argument("--max_seconds", type=float, default=300, metavar="N", help="of a video (default: %(default)s)")
    parser.add_argument(
        "--window",
        type=float,
        default=4,
        metavar="SECONDS",
        help="of the time line; videos of two windows get one (default: 4)",
    )
    parser.add_argument("--topk", type=int, default=5, metavar="N", help="classes of a video (default: %(default)s)")
    add_checkpoint_options(parser)
    parser.set_defaults(workers=0)  # one video at a time
    args = parser.parse_args(argv)
    for name in ("max_mb", "max_seconds", "window", "topk"):
        if not 0 < getattr(args, name) < float("inf"):
            parser.error(f"--{name}: must be a number above 0, got {getattr(args, name)}")
    if not 0 <= args.port < 2**16:
        parser.error(f"--port: must be between 0 and 65535, got {args.port}")
    return args


def import_gradio() -> ModuleType:
    """Gradio, which reports nothing to anybody.

    Raises:
        ConfigError: it is not installed, or does not work.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise ConfigError(
            f"the page needs Gradio, which cannot be imported ({error}); run python -m pip install -r "
            "requirements-extras.txt"
        ) from error


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = f"{host}:{port} cannot be used ({error.strerror or error})"
        raise UserError(f"--host, --port: {reason}; another port, or 0 for a free one, may help") from error


def build_page(gradio: ModuleType, recognizer: Recognizer, args: argparse.Namespace, folder: str) -> Any:
    """Gradio's Blocks; uploads are in `folder`."""
    os.environ["GRADIO_TEMP_DIR"] = folder
    limits = Limits(args.max_mb, args.max_seconds)

    def answer(path: str | None) -> Iterator[tuple[Any, str, str]]:
        remove_older(folder, time.time() - UNANSWERED_SECONDS)
        if path is not None:
            for texts in answers(recognizer, path, limits, args.window, args.topk):
                yield None, *texts

    with gradio.Blocks(title=TITLE, analytics_enabled=False) as page:
        gradio.HTML(introduction_html(recognizer, args.checkpoint, limits))
        upload = gradio.File(label="Video", file_types=list(VIDEO_SUFFIXES), height=140)
        shown = gradio.HTML(), gradio.HTML()
        upload.upload(answer, upload, [upload, *shown], api_visibility="private", show_progress_on=shown[0])
    return page.queue(max_size=WAITING)


def build_app(gradio: ModuleType, page: Any, max_mb: float) -> Callable:
    """The ASGI application that has the page at its root."""
    app = importlib.import_module("fastapi").FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    options = {"theme": theme, "footer_links": [], "ssr_mode": False, "mcp_server": False, "show_error": False}
    gradio.mount_gradio_app(app, page, path="/", max_file_size=int(max_mb * 1e6), **options)
    return with_policy(app)


def with_policy(app: Callable) -> Callable:
    """The ASGI application with the header of POLICY in its responses."""

    async def wrapped(scope: Any, receive: Callable, send: Callable) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message["headers"], header]}
            await send(message)

        await app(scope, receive, send_with_policy)

    return wrapped


if __name__ == "__main__":
    run_program(main)
