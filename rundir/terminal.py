"""Terminal output: lines, and a live line that the next output replaces; names in figures.  Imports no torch."""
import shutil
import sys

CLEAR = "\r\033[K"  # carriage return, and erase to the end of the line


def live(text: str) -> None:
    """Print a live line where stdout is a terminal, cut to its width, since a wrapped line cannot be replaced."""
    if sys.stdout.isatty():
        print(CLEAR + text[:shutil.get_terminal_size().columns - 1], end="", flush=True)


def say(text: str, stream=None) -> None:
    """Print a line, in place of a live line.  stream: default stdout."""
    stream = stream or sys.stdout
    print(f"{CLEAR * stream.isatty()}{text}", file=stream, flush=True)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def shortened(name: str, characters: int) -> str:
    """`name` for a figure: cut to `characters`, and bytes that are not UTF-8, which names of folders may have, as escapes."""
    name = name.encode(errors="backslashreplace").decode()
    return name if len(name) <= characters else name[:characters - 1] + "…"
