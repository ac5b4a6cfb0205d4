"""Write the screen of a command as an SVG, as docs/images/train.svg and data_show.svg are.

    python scripts/terminal_svg.py data_show.svg -- loraloom data show support.yaml --rows 1
    python -m loraloom.data.tiny_base --output tiny-base
    python scripts/terminal_svg.py train.svg --until " 14/20 .* 14/20 " -- \\
        loraloom train run.yaml --set base_model=tiny-base

The files are those of docs/data.md and docs/training.md. With --until, the screen is taken as soon
as it shows the pattern, and the command is interrupted.
"""

from __future__ import annotations

import argparse
import codecs
import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import termios
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

LINES = 24
FONT_FILES = re.compile(r"@font-face \{\{.*?\}\}\s*", re.DOTALL)
STEP = re.compile(r"\x1b\[1A|\x1b\[2K|\x1b\[\?25[lh]|\r\n|\r|\n|.", re.DOTALL)
"""What moves or clears on a screen of rich, or one character."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("--until", help="regular expression")
    parser.add_argument("--width", type=int, default=84)
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    screen = run(args.command, args.width, args.until)
    console = Console(file=io.StringIO(), record=True, width=args.width, force_terminal=True)
    console.print(*map(Text.from_ansi, screen), sep="\n")
    title = " ".join(args.command)
    fonts = CONSOLE_SVG_FORMAT.replace("Fira Code", "ui-monospace")
    svg = console.export_svg(title=title, code_format=FONT_FILES.sub("", fonts), unique_id="t")
    args.image.write_text(svg, encoding="utf-8")


def run(command: list[str], width: int, until: str | None) -> list[str]:
    """Run a command on a terminal, and return its lines."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, width, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(width)}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, env=environment
    )
    os.close(theirs)
    decoder, written = codecs.getincrementaldecoder("utf-8")(), ""
    try:
        while data := os.read(ours, 65536):
            written += decoder.decode(data)
            lines = replay(written)
            if until and re.search(until, Text.from_ansi("\n".join(lines)).plain, re.DOTALL):
                process.send_signal(signal.SIGINT)
                return lines
    except OSError:  # Linux's end of a terminal
        pass
    finally:
        process.wait()
        os.close(ours)
    return replay(written)


def replay(written: str) -> list[str]:
    """Apply what a program wrote to an empty screen."""
    lines, at = [""], 0
    for step in STEP.findall(written):
        match step:
            case "\x1b[1A":
                at -= 1
            case "\x1b[2K":
                lines[at] = ""
            case "\n" | "\r\n":
                at += 1
                lines += [""] * (at == len(lines))
            case "\r" | "\x1b[?25l" | "\x1b[?25h":
                pass
            case _:
                lines[at] += step
    return lines


if __name__ == "__main__":
    main()
