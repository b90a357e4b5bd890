"""A store of teacher logits: computed by one run, read by later ones with the same teacher, seed, data and augmentation.

Method, loss weights, optimiser and student may differ between the runs, and the logits are the same bits.  The teacher's
evaluations are kept with them.
"""
import hashlib
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from cli import options
from rundir import checkpoint
from rundir.errors import Failure, Unwritable
from rundir.files import make_directory
from training.evaluation import Evaluation

ROOT = Path(__file__).parent.parent
# The code that makes a teacher's images, logits and evaluations.
SOURCES = ("augment/*.py", "kernels/*.py", "models/*.py", "training/evaluation.py")
SEAL = 16  # bytes of checksum in front of each step's logits
GB = 10**9


class TeacherLogits:
    """The teacher's logits of an epoch, (steps, rows, C) on the device, backed by a file.

    A record of the file is a step's logits behind a checksum of them and of their place: what is missing, cut off or altered is
    computed anew.  Several runs may read and write the file at once, and may be killed: records have fixed places.
    In a step, call `read` where `found[position]`, else `add`; both may be captured in a CUDA graph.

    folder: has one file for each `key`; None: nothing is stored.  limit: bytes of all logits in it.
    rows: of each batch, those of this process.  example: logits (any, C), for their number and type.
    Unwritable: the folder or the file cannot be made.
    """

    @classmethod
    def of(cls, args, run, teacher, steps: int) -> "TeacherLogits":
        """By the flags.  teacher: of models.load_teachers.  steps: of an epoch."""
        context = run.context
        shape = {"epochs": args.epochs, "steps": steps, "rows": context.ranks.rows(args.batch_size)}
        if args.teacher_logits is None:
            return cls(None, 0, "", **shape, example=None)
        with context.autocast:
            example = teacher(torch.zeros(1, 3, run.data.image_size, run.data.image_size, device=context.device))
        facts = {
            "teacher": run.config["teacher_sha256"], "network": teacher.info["model"],
            "inputs": options.teacher_inputs(args), "temperature": getattr(teacher, "temperature", None),
            "data": run.data.fingerprint, **options.data(args) | {"data_dir": None}, **options.augmentation(args),
            "batch_size": run.batch_size, "micro_batches": len(run.micro_batches), "deterministic": args.deterministic}
        return cls(args.teacher_logits, args.teacher_logits_limit * GB, key_of(facts, context), **shape, example=example,
                   alone=context.ranks.size == 1)

    def __init__(self, folder: str | None, limit: float, key: str, *, epochs: int, steps: int, rows: range, example, alone=True):
        self.folder, self.first, self.steps, self.epoch, self.found = folder, rows.start, steps, 0, [False] * steps
        self.taken, self.read_steps, self.evaluations, self.alone = 0, 0, 0, alone
        if folder is None:
            return
        self.key, self.path = key, Path(folder, f"{key[:32]}.logits")
        self.logits = torch.zeros(steps, len(rows), example.shape[1], dtype=example.dtype, device=example.device)
        self.record = SEAL + self.logits[0].nbytes
        make_directory(self.path.parent)
        try:
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as failure:
            raise Unwritable(failure.errno, failure.strerror, str(self.path)) from failure
        others = sum(512 * path.stat().st_blocks for path in self.path.parent.glob("*.logits") if path != self.path)
        self.last = min(epochs, max(0, int(limit - others)) // (self.record * steps))  # the last epoch that may be stored
        limited = "" if self.last == epochs else f"; the limit leaves room for {self.last} of {epochs} epochs"
        print(f"teacher logits: {epochs * self.record * steps / GB:.2f} GB in {self.path}{limited}")

    def evaluation(self, compute) -> Evaluation:
        """That of the teacher by `compute()`, or, from a file, by the same call of an earlier run.

        Several processes, which evaluate together, compute.
        """
        if self.folder is None or not self.alone:
            return compute()
        self.evaluations += 1
        key, path = f"{self.key} {self.evaluations}", self.path.with_suffix(f".{self.evaluations}.pt")
        with suppress(Failure):  # missing, or damaged
            if (content := checkpoint.read(path)).get("key") == key:
                return Evaluation(*content["numbers"], content["predictions"].to(self.logits.device))
        *numbers, predictions = found = compute()
        with suppress(OSError):  # as of a full disk
            checkpoint.write(path, key=key, numbers=numbers, predictions=predictions.cpu())
        return found

    def read(self, position: int | torch.Tensor, rows: range) -> torch.Tensor:
        """(rows, C): those of the step at `position`, in a CUDA graph a 0-dim int64 tensor."""
        step = self.logits[position] if isinstance(position, int) else self.logits.index_select(0, position.view(1))[0]
        return step[rows.start - self.first:rows.stop - self.first]

    def add(self, position: int | torch.Tensor, rows: range, logits: torch.Tensor) -> None:
        """Keep `logits`, (rows, C), of the step at `position`."""
        part = self.logits[:, rows.start - self.first:rows.stop - self.first]
        if isinstance(position, int):
            part[position].copy_(logits)
        else:
            part.index_copy_(0, position.view(1), logits[None])

    def set_epoch(self, epoch: int) -> None:
        """Read what the file has of `epoch`."""
        if self.folder is None:
            return
        self.epoch, content = epoch, np.zeros((self.steps, self.record), np.uint8)
        for position, record in enumerate(content, (epoch - 1) * self.steps):  # one read is limited to 2 GiB
            os.preadv(self.file, [record], position * self.record)  # what the file does not have stays 0
        self.found = [record[:SEAL].tobytes() == self._seal(position, record[SEAL:].tobytes())
                      for position, record in enumerate(content)]
        if any(self.found):
            logits = torch.from_numpy(content[:, SEAL:].copy()).view(self.logits.dtype)
            self.logits.copy_(logits.view_as(self.logits))

    def end_epoch(self) -> None:
        """Write what `add` was given in this epoch."""
        self.taken, self.read_steps = self.taken + self.steps, self.read_steps + sum(self.found)
        if self.folder is None or self.epoch > self.last or all(self.found):
            return
        logits = self.logits.cpu().view(torch.uint8).numpy()
        for position in (position for position, found in enumerate(self.found) if not found):
            content = logits[position].tobytes()
            record = self._seal(position, content) + content
            try:
                written = os.pwrite(self.file, record, ((self.epoch - 1) * self.steps + position) * self.record)
                reason = "" if written == len(record) else "the disk is full"
            except OSError as failure:
                reason = failure.strerror
            if reason:
                print(f"no more teacher logits are stored ({self.path}: {reason})")
                self.last = 0
                return

    @property
    def summary(self) -> dict:
        """The entry of summary.json: the share of this process's steps whose logits were read; None without a store."""
        return {"teacher_logits_read": self.read_steps / (self.taken or 1) if self.folder else None}

    def _seal(self, position: int, content: bytes) -> bytes:
        place = f"{self.key} {self.epoch} {position} ".encode()
        return hashlib.blake2b(place + content, digest_size=SEAL).digest()


def key_of(facts: dict, context) -> str:
    """SHA-256 of all that the bits of the logits depend on: `facts`, device, precision, threads, versions and our own code."""
    code = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        code.update(path.read_bytes())
    gpu = context.device.type == "cuda"
    packages = ("torch", "torchvision", *["timm"] * ("timm/" in facts["network"]))  # of the teacher
    versions = {name: sys.modules[name].__version__ for name in packages}
    machine = {**versions, "threads": torch.get_num_threads(), "code": code.hexdigest(),
               "processor": torch.backends.cpu.get_cpu_capability(), "rank": context.ranks.rank,
               "gpu": torch.cuda.get_device_name(context.device) if gpu else None,
               "cudnn": torch.backends.cudnn.version() if gpu else None}
    return hashlib.sha256(json.dumps(facts | context.describe() | machine, sort_keys=True).encode()).hexdigest()
