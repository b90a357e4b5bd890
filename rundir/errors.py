"""Exit codes, one-line error messages, signals.

Every expected error is one line on stderr, `error: what (path or value). what to do`, with one of the exit codes below;
anything else is a bug and keeps its traceback.  Imports no torch.
"""
import argparse
import errno
import os
import signal
import sys
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from io import TextIOWrapper

from rundir.terminal import say

DONE, BUG, USAGE, IN_USE, DATA, CHECKPOINT, DIVERGED, OUT_OF_MEMORY, DISK = range(9)
NONFINITE_HINT = "lower --lr or the weights of the loss, or use --amp bf16"
STOPPED = 128  # plus the signal's number: 130 is SIGINT, 143 SIGTERM
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENOTDIR)


class Failure(Exception):
    """A user error.  code: exit code.  what: cause with path or value.  remedy: advice."""

    def __init__(self, code: int, what: str, remedy: str):
        super().__init__(f"{what}. {remedy}")
        self.code = code


class Parser(argparse.ArgumentParser):
    """ArgumentParser with one-line errors and exit code 2; under torchrun, only the first process to fail prints."""

    def error(self, message):
        if first_to_fail():
            sys.stderr.write(f"error: {message}. see {self.prog} --help\n")
        raise SystemExit(USAGE)


class Unwritable(OSError):
    """The error for an output file or directory that cannot be written.

    needed, free: bytes.  saved: epoch of the last good checkpoint, 0 for none.
    """
    needed = free = saved = 0


class Stopped(KeyboardInterrupt):

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def optional(module: str, purpose: str):
    """The module of an optional package.  Failure USAGE: it is not installed.  purpose: what it does, for the error."""
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError as failure:
        raise Failure(USAGE, f"missing package {package}, which {purpose}", f"python -m pip install {package}") from failure


def first_line(failure: BaseException) -> str:
    return str(failure).strip().partition("\n")[0]


def expected(failure: BaseException, batch_size: int | None = None, resumes: bool = True) -> tuple[int, str] | None:
    """Exit code and message of an expected error, None for a bug.  resumes: whether the script has --resume."""
    names, message = [kind.__name__ for kind in type(failure).__mro__], str(failure)  # by name, because torch is not imported
    if isinstance(failure, Stopped):
        remedy = "the same command with --resume auto continues" if resumes else "run it again"
        return STOPPED + failure.number, f"stopped ({failure}). {remedy}"
    if isinstance(failure, Failure):
        return failure.code, message
    if isinstance(failure, BrokenPipeError):
        return STOPPED + signal.SIGPIPE, "the output has no reader (broken pipe). redirect it to a file"
    if isinstance(failure, Unwritable) or isinstance(failure, OSError) and failure.errno in DISK_ERRORS:
        return DISK, unwritable_line(failure)
    if isinstance(failure, PermissionError):
        return DISK, f"no access to {failure.filename or 'a file'} ({failure.strerror}). check its permissions"
    if isinstance(failure, MemoryError) or "can't allocate memory" in message:
        what = f"--batch-size {batch_size}" if batch_size else first_line(failure) or "on the CPU"
        remedy = "try a smaller --image-size or --batch-size" if batch_size else "use smaller images, or close other programs"
        return OUT_OF_MEMORY, f"out of memory ({what}). {remedy}"
    if "OutOfMemoryError" in names:
        return OUT_OF_MEMORY, gpu_memory_line(batch_size or 0)
    if "DistError" in names or "gloo/transport" in message:
        reason = message.partition(". ")[0].rpartition("] ")[2]
        return BUG, f"another process of this run stopped responding ({reason}). the same command with --resume auto continues"
    if type(failure).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return USAGE, f"the networks cannot be compiled ({type(failure).__name__}: {first_line(failure)}). leave out --compile"
    if "does not have a deterministic implementation" in message:
        return USAGE, f"an operation without a deterministic implementation ({message.split()[0]}). leave out --deterministic"
    return None


def unwritable_line(failure: OSError) -> str:
    room, remedy = "", "free space, or choose another --output"
    needed, free, saved = (getattr(failure, name, 0) for name in ("needed", "free", "saved"))
    if needed:
        room = f"; needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB free"
    if saved:
        remedy = f"free space and continue with --resume auto: the last good checkpoint is of epoch {saved}"
    return f"cannot write {failure.filename or 'a file'} ({failure.strerror}{room}). {remedy}"


def gpu_memory_line(batch_size: int) -> str:
    from torch import cuda
    used, half = f"--batch-size {batch_size}", max(2, batch_size // 2)
    if cuda.is_available():
        used += f", {cuda.max_memory_allocated() / 2**30:.1f} of {cuda.mem_get_info()[1] / 2**30:.1f} GiB at the peak"
    return f"out of GPU memory ({used}). try --grad-checkpoint, --grad-accum 2, --batch-size {half}, or a smaller --image-size"


def run(main, args) -> None:
    """Run `main(args)` and exit with the codes above; with `--debug`, expected errors also show a traceback.

    In a distributed run only the first process to fail prints its error: the others fail as a consequence, or in the same way.
    """
    attempt = run_main
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # for the traceback of a bug in torchrun's report
        from torch.distributed.elastic.multiprocessing.errors import record
        attempt = record(attempt)
    attempt(main, args)


def run_main(main, args) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # file names may be arbitrary bytes, and a terminal may lack ± and →
            stream.reconfigure(errors="backslashreplace")
    with stopping_on_signals() as stopped:
        try:
            main(args)
        except BaseException as failure:
            # The interrupted code may have converted Stopped to another exception.
            outcome = expected(stopped[0] if stopped else failure, vars(args).get("batch_size"), "resume" in vars(args))
            first = first_to_fail()
            if first and (outcome is None or vars(args).get("debug")):
                raise
            if isinstance(failure, BrokenPipeError):  # avoids a second error when Python flushes stdout at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code, line = outcome or (BUG, "")
            if first:
                say(f"error: {' '.join(line.split())}", sys.stderr)
            raise SystemExit(code) from None


def first_to_fail() -> bool:
    """True for the first process of a run that calls this, and always for a single process."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    from torch.distributed import TCPStore
    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"fusekd/failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (KeyError, ValueError, RuntimeError):  # the process of the store has ended
        return True


@contextmanager
def stopping_on_signals():
    """SIGINT and SIGTERM raise Stopped in the main thread; a second signal ends the process at once.

    The current epoch is lost; earlier ones are in last.pt or in the writer thread, which finishes.  Under torchrun no handler is
    installed, since it would delay torchrun's shutdown.  Yields the list of the raised exceptions.
    """
    stopped, numbers = [], (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in numbers}

    def stop(number, frame):
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        stopped.append(Stopped(number))
        raise stopped[0]

    if "RANK" in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    else:
        for number in numbers:
            signal.signal(number, stop)
    try:
        yield stopped
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
