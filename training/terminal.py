"""What a terminal shows: lines, and a live one, which the next one of either kind takes the place of.

Imports nothing of ours and no torch.
"""
import shutil
import sys

CLEAR = "\r\033[K"  # back to the start of the terminal's line, and empty it


def live(text: str, stream) -> None:
    """Show `text` on a terminal, cut to its width: of a longer line, the next could take the place of the last row only."""
    print(CLEAR + text[:shutil.get_terminal_size().columns - 1], end="", file=stream, flush=True)


def say(text: str, stream=None) -> None:
    """Print a line of its own.  stream: where; None is stdout."""
    stream = stream or sys.stdout
    print(f"{CLEAR * stream.isatty()}{text}", file=stream, flush=True)
