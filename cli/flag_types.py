"""argparse types."""
import argparse
import math
import re


def number(kind, at_least=None, above=None, at_most=None, below=None):
    """An argparse type: a finite `kind` (int or float) within the bounds."""
    limits = ((">=", at_least), (">", above), ("<=", at_most), ("<", below))
    bounds = [f"{sign} {limit}" for sign, limit in limits if limit is not None]
    wanted = f"must be {'an integer' if kind is int else 'a number'} {' and '.join(bounds)}".rstrip()

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{wanted} ({text})") from None
        if not (math.isfinite(value) and (at_least is None or value >= at_least) and (above is None or value > above)
                and (at_most is None or value <= at_most) and (below is None or value < below)):
            raise argparse.ArgumentTypeError(f"{wanted} ({text})")
        return value

    return parse


def matching(pattern: str, wanted: str):

    def parse(text):
        if not re.fullmatch(pattern, text, re.DOTALL):
            raise argparse.ArgumentTypeError(f"{wanted} ({text})")
        return text

    return parse


nonempty, png = matching(".+", "must not be empty"), matching(r".*\.png", "must end in .png")
device = matching(r"auto|cpu|cuda(:(0|[1-9][0-9]?))?", "must be auto, cpu, cuda or cuda:N")
count, whole, seed = number(int, above=0), number(int, at_least=0), number(int, at_least=0, below=2**63)
positive, nonnegative, probability = number(float, above=0), number(float, at_least=0), number(float, at_least=0, at_most=1)
