"""What a terminal shows: lines, and a live one, which the next one of either kind takes the place of.  Imports no torch."""
import shutil
import sys

CLEAR = "\r\033[K"  # back to the start of the terminal's line, and empty it


def live(text: str) -> None:
    """Show `text` on the terminal that is stdout, cut to its width: of a longer one, only the last row could be replaced."""
    print(CLEAR + text[:shutil.get_terminal_size().columns - 1], end="", flush=True)


def say(text: str, stream=None) -> None:
    """Print a line of its own.  stream: where; None is stdout."""
    stream = stream or sys.stdout
    print(f"{CLEAR * stream.isatty()}{text}", file=stream, flush=True)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
