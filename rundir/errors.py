"""How a script ends: exit codes, errors in one line, signals.

Every expected error is one line on stderr, `error: what (path or value). what to do`, and one of the exit codes below;
anything else is a bug and keeps its traceback.  Imports no torch.
"""
import argparse
import errno
import os
import signal
import sys
from contextlib import contextmanager
from datetime import timedelta

from rundir.terminal import say

DONE, BUG, USAGE, IN_USE, DATA, CHECKPOINT, DIVERGED, OUT_OF_MEMORY, DISK = range(9)
NONFINITE_HINT = "lower --lr or the weights of the loss, or use --amp bf16"
STOPPED = 128  # plus the signal's number: 130 is SIGINT, 143 SIGTERM
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENOTDIR)


class Failure(Exception):
    """An error that the user can fix: exit `code`, `what` went wrong and with which file or value, and the `remedy`."""

    def __init__(self, code: int, what: str, remedy: str):
        super().__init__(f"{what}. {remedy}")
        self.code = code


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line on stderr, also where torchrun starts several processes, and exit code 2."""

    def error(self, message):
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"error: {message}. see {self.prog} --help\n")
        raise SystemExit(USAGE)


class Unwritable(OSError):
    """A file or directory of a run that cannot be written, for any reason that the system gives.

    `needed` and `free` are bytes, `saved` the epoch of the last good checkpoint; 0 where there is none.
    """
    needed = free = saved = 0


class Stopped(KeyboardInterrupt):
    """The process got SIGINT or SIGTERM."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def first_line(failure: BaseException) -> str:
    """The message of other software's error, without the lines that follow the first."""
    return str(failure).strip().partition("\n")[0]


def expected(failure: BaseException, batch_size: int | None = None, resumes: bool = True) -> tuple[int, str] | None:
    """The exit code and the line of an error that is not a bug; None for one that is.  resumes: whether there is a --resume."""
    names, message = [kind.__name__ for kind in type(failure).__mro__], str(failure)  # torch's by name: it is not imported
    if isinstance(failure, Stopped):
        remedy = "the same command with --resume auto continues" if resumes else "run it again"
        return STOPPED + failure.number, f"stopped ({failure}). {remedy}"
    if isinstance(failure, Failure):
        return failure.code, message
    if isinstance(failure, BrokenPipeError):
        return STOPPED + signal.SIGPIPE, "nobody reads what is printed (broken pipe). send it to a file"
    if isinstance(failure, Unwritable) or isinstance(failure, OSError) and failure.errno in DISK_ERRORS:
        return DISK, unwritable_line(failure)
    if isinstance(failure, PermissionError):
        return DISK, f"no access to {failure.filename or 'a file'} ({failure.strerror}). check its permissions"
    if isinstance(failure, MemoryError) or "can't allocate memory" in message:
        return OUT_OF_MEMORY, f"out of memory (--batch-size {batch_size}). try a smaller --image-size or --batch-size"
    if "OutOfMemoryError" in names:
        return OUT_OF_MEMORY, gpu_memory_line(batch_size or 0)
    if "DistError" in names or "gloo/transport" in message:
        reason = message.partition(". ")[0].rpartition("] ")[2]
        return BUG, f"another process of this run stopped responding ({reason}). the same command with --resume auto continues"
    if type(failure).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return USAGE, f"the networks cannot be compiled ({type(failure).__name__}: {first_line(failure)}). leave out --compile"
    if "does not have a deterministic implementation" in message:
        return USAGE, f"an operation without a deterministic form here ({message.split()[0]}). leave out --deterministic"
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
    """Run `main(args)` and exit by the rules above; `--debug`, where there is one, shows the traceback of an expected error too.

    Of several processes on one run only the first to fail says why: the others fail because of it, or as it did.
    """
    attempt = ended_by_the_rules
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun's report shows the traceback of a bug
        from torch.distributed.elastic.multiprocessing.errors import record
        attempt = record(attempt)
    attempt(main, args)


def ended_by_the_rules(main, args) -> None:
    with stopping_on_signals() as stopped:
        try:
            main(args)
        except BaseException as failure:
            # Whatever the interrupted code made of the exception, the signal is what ended the run.
            outcome = expected(stopped[0] if stopped else failure, vars(args).get("batch_size"), "resume" in vars(args))
            first = first_to_fail()
            if first and (outcome is None or vars(args).get("debug")):
                raise
            if isinstance(failure, BrokenPipeError):  # else Python would fail once more, when it empties stdout at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code, line = outcome or (BUG, "")
            if first:
                say(f"error: {' '.join(line.split())}", sys.stderr)
            raise SystemExit(code) from None


def first_to_fail() -> bool:
    """Whether no other process of this run has asked this before; alone, always."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    from torch.distributed import TCPStore
    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"fusekd/failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (KeyError, ValueError, RuntimeError):  # the store has ended with the process that kept it
        return True


@contextmanager
def stopping_on_signals():
    """SIGINT and SIGTERM raise Stopped wherever the main thread is, a second signal ends the process at once.

    That drops the epoch in flight; the epochs before it are in last.pt or being written by another thread, which is waited
    for.  Under torchrun a handler would only delay its own shutdown.  Yields the list of what was raised.
    """
    stopped, numbers = [], (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

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
        for number, handler in before.items():
            signal.signal(number, handler)
