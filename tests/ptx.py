"""Executes compiled Triton kernels on a CPU: their PTX, instruction by instruction, in numpy.

    with executed(op, sm=90) as launches:
        op.softmax_kl_triton(...)                                the real launcher, on CPU tensors
    launches[0].counts["warp instructions"]

Needs a process in which Triton compiles instead of interpreting: `python ptx.py FILE` prints a JSON object for each of the
`cases()` of FILE, `{sm, case} | execute(sm, *case)`, or the fault, and for each barrier of `without_barriers(sm, numbers)`.
Cases and barriers are for sm_80 and sm_90 in turn, or each for both if TORTURE is in the environment.

It shows what the interpreter of Triton cannot: what the compiler made of the kernel.  `Fault` is raised for an address outside
of a tensor or not aligned, for memory that is read before it was written, for a race in shared memory between two barriers, in
global memory for a warp that reads what another one of its program wrote, for a shuffle with a lane that is elsewhere, and for a
barrier that not all threads reach.  With a seed, programs and warps take turns in random order.  Counts are exact: instructions
that a warp issues, 32-byte sectors of global memory, wavefronts of shared memory, barriers.

All programs run at once: a register is an array with one number per thread of the grid, and a step executes one instruction for
all threads that are at it.  What numpy cannot tell: ex2, lg2, rcp and sqrt are rounded correctly here and approximated on a GPU;
fma is rounded twice, from 64 bits.  There is no time and no cache.
"""
import itertools
import json
import os
import re
import sys
from collections import Counter
from contextlib import contextmanager
from functools import partial
from unittest import mock

import numpy as np
import sass
import torch

UNSIGNED, SIGNED = ({size: np.dtype(f"{letter}{size}").type for size in (1, 2, 4, 8)} for letter in "ui")
KINDS = {"f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16, "pred": np.bool_} | {
    f"{letter}{8 * size}": kinds[size] for letter, kinds in (("u", UNSIGNED), ("s", SIGNED), ("b", UNSIGNED)) for size in kinds}


ARCHITECTURES = (80, 90)
TORTURE = "TORTURE" in os.environ


class Fault(AssertionError):
    """The compiled kernel does what no kernel may."""


# --- the program --------------------------------------------------------------------------------------------------------

class Instruction:
    """`@!%p1 ld.global.b32 %r1, [%rd1+4]`: guard p1, negated; name ld, modifiers (global, b32), of which the last is the type."""

    def __init__(self, text: str):
        match = re.match(r"(?:@(!?)%(\w+)\s+)?([a-z]\w*)([\w.:]*)\s*(.*)", text, re.S)
        if not match:
            raise ValueError(f"not an instruction of PTX: {text!r}")
        negated, self.guard, self.name, modifiers, operands = match.groups()
        self.text, self.negated, self.modifiers = text, bool(negated), tuple(modifiers.replace("::", ".").split(".")[1:])
        self.type = self.modifiers[-1] if self.modifiers else ""
        self.operands = [operand.strip() for operand in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", operands)]

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers


class Program:
    """The one kernel of a PTX text: parameters, registers, instructions, and where the labels are."""

    def __init__(self, text: str):
        text = re.sub(r"//[^\n]*", "", text)
        head, parameters, limits, body = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\n\{(.*)\n\}", text, re.S).groups()
        self.name = head
        self.parameters = re.findall(r"\.param[^,]*?(\w+_param_\d+)", parameters)
        self.threads = int(re.search(r"\.reqntid\s+(\d+)", limits)[1])
        self.registers = {f"{prefix}{number}": KINDS[kind] for kind, prefix,
                          count in re.findall(r"\.reg\s+\.(\w+)\s+%(\w+?)<(\d+)>;", body)
                          for number in range(int(count))}
        body = re.sub(r"\.(reg|loc|pragma|file)[^;\n]*[;\n]", "\n", body)
        self.code, self.labels = [], {}
        for part in re.split(r";|(?<=:)\s", body):
            part = part.strip()
            if part.endswith(":"):
                self.labels[part[:-1]] = len(self.code)
            elif part.strip("{}\n\t "):
                self.code.append(Instruction(re.sub(r"^[{}\s]+", "", part)))

    def without(self, number: int) -> "Program":
        """The same program whose instruction `number` does nothing."""
        copy = object.__new__(Program)
        vars(copy).update(vars(self))
        copy.code = [*self.code[:number], Instruction("nop"), *self.code[number + 1:]]
        return copy

    @property
    def barriers(self) -> list[int]:
        return [number for number, instruction in enumerate(self.code) if instruction.name == "bar"]


# --- instructions that compute: name -> (types of the operands, function) -----------------------------------------------------
# What Triton 3.6 to 3.9 makes of these kernels.  In the types, t is the instruction's own, u is u32, p a predicate, w the
# result's of a wide product.

def plain(function):
    """For a function of numbers that wraps, or that rounds once."""
    return lambda instruction, *values: function(*values)


def flushed(instruction, *values):
    """Subnormal numbers are 0 with .ftz."""
    if not instruction.has("ftz"):
        return values
    return [np.where(np.abs(value) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), value), value) for value in values]


def product(instruction, a, b):
    if instruction.type[0] == "f" or instruction.has("lo"):
        return a * b
    wide = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[2 * a.dtype.itemsize]
    exact = a.astype(wide) * b.astype(wide)
    return exact if instruction.has("wide") else (exact >> wide(8 * a.dtype.itemsize)).astype(a.dtype)


def multiply_add(instruction, a, b, c):
    whole = product(instruction, a, b)
    return whole + c.view(whole.dtype)


def fused_multiply_add(instruction, a, b, c):
    a, b, c = flushed(instruction, a, b, c)
    return (a.astype(np.longdouble) * b + c).astype(a.dtype)


def quotient(instruction, a, b):
    return a / b if instruction.type[0] == "f" else np.trunc(a / b).astype(a.dtype)


def shift_left(instruction, a, count):
    bits = 8 * a.dtype.itemsize
    return np.where(count < bits, a << np.minimum(count, bits - 1).astype(a.dtype), 0).astype(a.dtype)


def shift_right(instruction, a, count):
    """Signed numbers keep their sign; a count beyond the width leaves nothing else."""
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count < bits, shifted, 0).astype(a.dtype)


def two_words(low, high):
    return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)


def funnel_shift(instruction, low, high, count):
    """To the right, by a count below 32."""
    return (two_words(low, high) >> (count & 31).astype(np.uint64)).astype(np.uint32)


def extract_bits(instruction, a, start, length):
    wide = a.astype(SIGNED[8] if a.dtype.kind == "i" else UNSIGNED[8])
    return (wide << (64 - start - length).astype(wide.dtype) >> (64 - length).astype(wide.dtype)).astype(a.dtype)


def permute_bytes(instruction, a, b, selection):
    wanted = selection[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 7
    return np.take_along_axis(two_words(a, b).view(np.uint8).reshape(-1, 8), wanted, 1).view(np.uint32).ravel()


COMPARE = {"eq": np.equal, "ne": np.not_equal, "neu": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
           "ge": np.greater_equal}


def power_of_two(instruction, a):
    return flushed(instruction, np.exp2(*flushed(instruction, a)))[0]


def to_bf16(a):
    bits = a.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(a), 0x7FFF, rounded).astype(np.uint16)


def convert(instruction, a):
    target, source = instruction.modifiers[-2:]
    if source == "bf16":
        a = (a.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if target == "bf16":
        return to_bf16(a)
    if instruction.has("rzi"):
        limits = np.iinfo(KINDS[target])
        a = np.clip(np.nan_to_num(np.trunc(a.astype(np.float64))), limits.min, limits.max)
    return a.astype(KINDS[target])


def convert_two(instruction, high, low):
    """Two floats to one word of two 16-bit floats."""
    half = to_bf16 if instruction.modifiers[-2] == "bf16x2" else lambda a: a.astype(np.float16).view(np.uint16)
    return half(high).astype(np.uint32) << np.uint32(16) | half(low)


COMPUTE = {
    "add": ("tt", plain(np.add)), "sub": ("tt", plain(np.subtract)), "mul": ("tt", product), "mad": ("ttw", multiply_add),
    "fma": ("ttt", fused_multiply_add), "div": ("tt", quotient), "min": ("tt", plain(np.fmin)), "max": ("tt", plain(np.fmax)),
    "neg": ("t", plain(np.negative)), "and": ("tt", plain(np.bitwise_and)), "or": ("tt", plain(np.bitwise_or)),
    "xor": ("tt", plain(np.bitwise_xor)), "not": ("t", plain(np.invert)), "shl": ("tu", shift_left), "shr": ("tu", shift_right),
    "shf": ("uuu", funnel_shift), "bfe": ("tuu", extract_bits), "prmt": ("uuu", permute_bytes),
    "popc": ("u", lambda instruction, a: np.unpackbits(a.view(np.uint8).reshape(-1, 4), axis=1).sum(1).astype(np.uint32)),
    "selp": ("ttp", lambda instruction, a, b, choice: np.where(choice, a, b)), "cvt": ("t", convert), "ex2": ("t", power_of_two),
    "setp": ("tt", lambda instruction, a, b: COMPARE[instruction.modifiers[0]](a, b)),
}


# --- memory -------------------------------------------------------------------------------------------------------------

class GlobalMemory:
    """The tensors of a launch side by side, with forbidden zones between them; new ones have not been written.

    Of each 32-bit word it remembers which warp wrote it last, and in which interval between two barriers of its program.
    """
    BASE, GUARD, ALIGNMENT = 1 << 20, 4096, 256

    def __init__(self, tensors, fresh):
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        self.arrays = {key: torch.tensor([], dtype=torch.uint8).set_(storage).numpy() for key, storage in storages.items()}
        self.starts, end = {}, self.GUARD
        for key, array in self.arrays.items():
            self.starts[key] = end
            end += -(-(array.nbytes + self.GUARD) // self.ALIGNMENT) * self.ALIGNMENT
        self.bytes, self.valid, self.written = np.zeros(end, np.uint8), np.zeros(end, bool), np.zeros(end, bool)
        for key, array in self.arrays.items():
            part = slice(self.starts[key], self.starts[key] + array.nbytes)
            self.bytes[part], self.valid[part] = array, True
            self.written[part] = key not in fresh
        self.writer, self.interval = np.full(end // 4 + 1, SharedMemory.NOBODY), np.zeros(end // 4 + 1, np.int64)

    def address(self, tensor) -> int:
        return self.BASE + self.starts[tensor.untyped_storage().data_ptr()] + tensor.storage_offset() * tensor.element_size()

    def give_back(self) -> None:
        for key, array in self.arrays.items():
            array[:] = self.bytes[self.starts[key]:self.starts[key] + array.nbytes]

    def place(self, address, width: int):
        place = address - self.BASE
        bad = (place < 0) | (place + width > len(self.bytes)) | (address % width != 0)
        bad |= ~self.valid[np.clip(place, 0, len(self.bytes) - 1)]
        if bad.any():
            raise Fault(f"an address outside of the tensors, or not aligned ({address[bad][0] - self.BASE})")
        return place

    def load(self, address, width: int, warp, interval):
        place = self.place(address, width)
        if not self.written[place].all():
            raise Fault("global memory is read before it was written")
        writer = self.writer[place // 4]
        if ((writer >= 0) & (writer != warp) & (self.interval[place // 4] == interval)).any():
            raise Fault("race: a warp reads global memory that another one wrote without a barrier between")
        return self.bytes.view(UNSIGNED[width])[place // width]

    def store(self, address, values, warp, interval) -> None:
        place = self.place(address, values.dtype.itemsize)
        self.bytes.view(values.dtype)[place // values.dtype.itemsize] = values
        self.writer[place // 4], self.interval[place // 4] = warp, interval
        for byte in range(values.dtype.itemsize):
            self.written[place + byte] = True


class SharedMemory:
    """A block for every program.  Of each 32-bit word it remembers which warp wrote and read it since the last barrier."""
    NOBODY, SEVERAL = -1, -2

    def __init__(self, programs: int, size: int):
        self.size = max(16, -(-size // 16) * 16)
        self.bytes, self.known = np.zeros(programs * self.size, np.uint8), np.zeros(programs * self.size, bool)
        self.writer, self.reader = np.full((2, programs, self.size // 4), self.NOBODY)
        self.counted = np.zeros((programs, self.size // 4), bool)  # by atomic operations, which may meet each other

    def barrier(self, programs) -> None:
        self.writer[programs] = self.reader[programs] = self.NOBODY
        self.counted[programs] = False

    def place(self, program, address, width: int):
        if (address < 0).any() or (address + width > self.size).any() or (address % width).any():
            raise Fault(f"a shared address outside of {self.size} bytes, or not aligned ({address.min()} to {address.max()})")
        return program * self.size + address, (program, address // 4)

    def load(self, program, address, width: int, warp):
        place, word = self.place(program, address, width)
        if not self.known[place].all():
            raise Fault("shared memory is read before it was written")
        if (((self.writer[word] >= 0) & (self.writer[word] != warp)) | self.counted[word]).any():
            raise Fault("race: a warp reads what another one wrote without a barrier between")
        self.reader[word] = np.where((self.reader[word] == self.NOBODY) | (self.reader[word] == warp), warp, self.SEVERAL)
        late = self.reader[word]
        self.reader[word[0][late != warp], word[1][late != warp]] = self.SEVERAL  # of several warps at once only one was noted
        return self.bytes.view(UNSIGNED[width])[place // width]

    def store(self, program, address, values, warp) -> None:
        width = values.dtype.itemsize
        place, word = self.place(program, address, width)
        view = self.bytes.view(values.dtype)
        if ((self.writer[word] >= 0) & (self.writer[word] != warp) & (view[place // width] != values)).any():
            raise Fault("race: two warps write different values without a barrier between")
        if ((self.reader[word] != self.NOBODY) & (self.reader[word] != warp)).any():
            raise Fault("race: a warp writes what another one read without a barrier between")
        self.writer[word] = warp
        view[place // width] = values
        for byte in range(width):
            self.known[place + byte] = True

    def add(self, program, address, values, warp):
        """Adds 32-bit words one after the other -> what was there before each."""
        place, word = self.place(program, address, 4)
        writer, reader = self.writer[word], self.reader[word]
        others = (writer >= 0) & (writer != warp) | (reader != self.NOBODY) & (reader != warp)
        if others.any():
            raise Fault("race: an atomic operation and another warp's plain access without a barrier between")
        if not self.known[place].all():
            raise Fault("shared memory is counted in before it was written")
        self.counted[word] = True
        return add_in_turn(self.bytes.view(np.uint32), place // 4, values)


def add_in_turn(memory, places, values):
    """memory[places] += values, one after the other -> what was there before each."""
    order = np.argsort(places, kind="stable")
    sorted_values = values[order]
    before = np.cumsum(sorted_values, dtype=values.dtype) - sorted_values
    first = np.r_[True, np.diff(places[order]) != 0]
    before -= before[np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))]  # only what was added at the same place
    old = np.empty_like(values)
    old[order] = memory[places[order]] + before
    np.add.at(memory, places, values)
    return old


# --- the machine --------------------------------------------------------------------------------------------------------

class Machine:
    """All threads of a launch: registers, where each of them is, and the counts."""

    def __init__(self, program: Program, programs: int, arguments: list[int], memory: GlobalMemory, shared_bytes: int,
                 seed: int | None = None):
        self.program, self.programs, self.memory = program, programs, memory
        self.shared, self.counts = SharedMemory(programs, shared_bytes), Counter()
        self.arguments = dict(zip(program.parameters, arguments))
        threads = programs * program.threads
        self.registers = {name: np.zeros(threads, kind) for name, kind in program.registers.items()}
        self.at, self.waiting, self.done = np.zeros(threads, np.int64), np.zeros(threads, bool), np.zeros(threads, bool)
        thread = np.arange(threads)
        self.warp, self.home = thread // 32, thread // program.threads
        self.special = {"tid.x": (thread % program.threads).astype(np.uint32), "ctaid.x": self.home.astype(np.uint32),
                        "laneid": (thread % 32).astype(np.uint32), "nctaid.x": np.full(threads, programs, np.uint32)}
        self.interval = self.home * 2**32  # of each thread
        self.random = None if seed is None else np.random.default_rng(seed)

    def run(self) -> Counter:
        while not self.done.all():
            ready = ~(self.waiting | self.done)
            if not ready.any():
                raise Fault("a barrier that not all threads of a program reach")
            if self.random is None:
                self.step(ready)
            else:
                mine = self.warp == self.random.choice(np.unique(self.warp[ready]))
                for _ in range(self.random.integers(1, 200)):
                    ready = mine & ~(self.waiting | self.done)
                    if not ready.any():
                        break
                    self.step(ready)
            self.open_barriers()
        return self.counts

    def open_barriers(self) -> None:
        if self.waiting.any():
            waiting, done = (state.reshape(self.programs, -1) for state in (self.waiting, self.done))
            complete = (waiting | done).all(1) & waiting.any(1)
            waiting[complete] = False
            self.interval.reshape(self.programs, -1)[complete] += 1
            self.shared.barrier(complete)

    def step(self, ready) -> None:
        """The instruction that is furthest behind, for all ready threads that are at it."""
        at = self.at[ready].min()
        lanes = np.flatnonzero(ready & (self.at == at))
        instruction = self.program.code[at]
        self.counts["warp instructions"] += self.warps(lanes)
        self.at[lanes] = at + 1
        if instruction.guard:
            lanes = lanes[self.registers[instruction.guard][lanes] != instruction.negated]
        if len(lanes):
            self.execute(instruction, lanes)

    def warps(self, lanes) -> int:
        return 1 + int(np.count_nonzero(np.diff(self.warp[lanes])))

    def execute(self, instruction, lanes) -> None:
        name = instruction.name
        if name == "cvt" and instruction.modifiers[-2].endswith("x2"):
            return self.write(instruction.operands[0], lanes, convert_two(instruction, *(self.read(o, lanes, "f32")
                                                                                         for o in instruction.operands[1:])))
        if name in COMPUTE:
            types, function = COMPUTE[name]
            kinds = {"t": instruction.type, "u": "u32", "p": "pred", "w": instruction.type}
            if name == "mad" and instruction.has("wide"):
                kinds["w"] = f"{instruction.type[0]}{2 * int(instruction.type[1:])}"
            values = [self.read(operand, lanes, kinds[kind]) for operand, kind in zip(instruction.operands[1:], types)]
            if instruction.type in ("s16x2", "u16x2"):
                values = [value.view(KINDS[instruction.type[:-2]]) for value in values]
                return self.write(instruction.operands[0], lanes, function(instruction, *values).view(np.uint32))
            return self.write(instruction.operands[0], lanes, function(instruction, *values))
        method = getattr(self, f"do_{name}", None)
        if method is None:
            raise NotImplementedError(f"no instruction {name}: {instruction.text}")
        method(instruction, lanes)

    # operands

    def read(self, operand: str, lanes, kind: str):
        """An operand of `lanes` as numbers of type `kind`; of wider registers the low bits."""
        if operand.startswith("%"):
            name = operand[1:]
            if name in self.registers:
                value = self.registers[name][lanes]
            else:
                value = self.special[name][lanes] if name in self.special else np.zeros(len(lanes), np.uint32)
        elif operand.startswith(("0f", "0d")):
            value = np.full(len(lanes), int(operand[2:], 16), np.uint32 if operand[1] == "f" else np.uint64)
        elif operand == "global_smem":
            value = np.zeros(len(lanes), np.uint64)
        else:
            value = np.full(len(lanes), int(operand.rstrip("U"), 0) & 2**64 - 1, np.uint64)
        if kind == "pred":
            return value.astype(bool)
        wanted = np.dtype(KINDS.get(kind, np.uint32))
        return (value if value.dtype.itemsize == wanted.itemsize and value.dtype != bool
                else value.astype(UNSIGNED[wanted.itemsize])).view(wanted)

    def write(self, operand: str, lanes, value) -> None:
        if operand == "_":
            return
        register = self.registers[operand[1:]]
        # A narrow number is extended by its own sign.
        if register.dtype != bool and value.dtype.itemsize != register.dtype.itemsize:
            kinds = SIGNED if value.dtype.kind == "i" else UNSIGNED
            value = value.astype(kinds[register.dtype.itemsize])
        register[lanes] = value if register.dtype == bool else value.view(register.dtype)

    def address(self, operand: str, lanes):
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        kind = "s64" if base.startswith("%") and self.registers[base[1:]].dtype.itemsize == 8 else "u32"
        return self.read(base, lanes, kind).astype(np.int64) + int(offset or 0)

    @staticmethod
    def parts(operand: str) -> list[str]:
        """The registers of a vector operand."""
        return [part.strip() for part in operand.strip("{} ").split(",")]

    # control

    def do_nop(self, instruction, lanes) -> None:
        pass

    def do_bra(self, instruction, lanes) -> None:
        self.at[lanes] = self.program.labels[instruction.operands[0]]

    def do_ret(self, instruction, lanes) -> None:
        self.done[lanes] = True

    def do_bar(self, instruction, lanes) -> None:
        self.counts["barriers"] += self.warps(lanes)
        self.waiting[lanes] = True

    def do_mov(self, instruction, lanes) -> None:
        """To one register from another one or from two halves, or to the parts of a wide one."""
        target, source = instruction.operands
        if source.startswith("{"):
            halves = [self.read(part, lanes, "u16") for part in self.parts(source)]
            return self.write(target, lanes, np.stack(halves, 1).view(np.uint32).ravel())
        value, parts = self.read(source, lanes, instruction.type), self.parts(target)
        if len(parts) == 1:
            return self.write(parts[0], lanes, value)
        size = value.dtype.itemsize // len(parts)
        for number, part in enumerate(parts):
            self.write(part, lanes, (value >> value.dtype.type(8 * size * number)).astype(UNSIGNED[size]))

    # memory

    def do_ld(self, instruction, lanes) -> None:
        target, source = instruction.operands
        if instruction.has("param"):
            value = self.arguments[source.strip("[] ").partition("+")[0]]
            return self.write(target, lanes, np.full(len(lanes), value & 2**64 - 1, np.uint64).astype(KINDS[instruction.type]))
        registers, width, address = self.parts(target), int(instruction.type[1:]) // 8, self.address(source, lanes)
        self.count(instruction, "load", address, len(registers) * width, lanes)
        for number, register in enumerate(registers):
            if instruction.has("shared"):
                value = self.shared.load(self.home[lanes], address + number * width, width, self.warp[lanes])
            else:
                value = self.memory.load(address + number * width, width, self.warp[lanes], self.interval[lanes])
            self.write(register, lanes, value)

    def do_st(self, instruction, lanes) -> None:
        target, source = instruction.operands
        registers, width, address = self.parts(source), int(instruction.type[1:]) // 8, self.address(target, lanes)
        self.count(instruction, "store", address, len(registers) * width, lanes)
        for number, register in enumerate(registers):
            value = self.read(register, lanes, f"u{8 * width}")
            if instruction.has("shared"):
                self.shared.store(self.home[lanes], address + number * width, value, self.warp[lanes])
            else:
                self.memory.store(address + number * width, value, self.warp[lanes], self.interval[lanes])

    def count(self, instruction, kind: str, address, width: int, lanes) -> None:
        """Sectors that each warp touches in global memory; in shared memory wavefronts: the most words that it wants of one
        bank."""
        warp = self.warp[lanes]
        if instruction.has("shared"):
            words = (address // 4)[:, None] + np.arange(-(-width // 4))
            pairs = np.unique(np.stack([np.broadcast_to(warp[:, None], words.shape).ravel(), words.ravel()]), axis=1)
            banks = (pairs[0] - pairs[0][0]) * 32 + pairs[1] % 32
            wanted = np.bincount(banks, minlength=32 * (int(pairs[0][-1] - pairs[0][0]) + 1)).reshape(-1, 32)
            self.counts["shared wavefronts"] += int(wanted.max(1).sum())
            self.counts["shared accesses"] += self.warps(lanes)
        else:
            self.counts[f"{kind} sectors"] += len(np.unique(warp * 2**40 + address // 32))

    def do_atom(self, instruction, lanes) -> None:
        """Additions of 32-bit numbers, in the order of the lanes."""
        target, place, value = instruction.operands
        if not instruction.has("add") or instruction.type != "u32":
            raise NotImplementedError(f"no such atomic operation: {instruction.text}")
        address, value = self.address(place, lanes), self.read(value, lanes, "u32")
        if instruction.has("shared"):
            self.count(instruction, "atomic", address, 4, lanes)
            old = self.shared.add(self.home[lanes], address, value, self.warp[lanes])
        else:
            self.memory.load(address, 4, self.warp[lanes], self.interval[lanes])
            old = add_in_turn(self.memory.bytes.view(np.uint32), (address - self.memory.BASE) // 4, value)
        self.write(target, lanes, old)

    # between the lanes of a warp

    def do_shfl(self, instruction, lanes) -> None:
        lane, given = lanes % 32, self.read(instruction.operands[2], lanes, "u32").astype(np.int64)
        sources = {"bfly": lane ^ given, "up": np.where(lane >= given, lane - given, lane), "idx": given % 32}
        source = lanes - lane + sources[instruction.modifiers[1]]
        here = np.zeros(len(self.at), bool)
        here[lanes] = True
        if not here[source].all():
            raise Fault("a shuffle with a lane that is elsewhere")
        target = instruction.operands[0].partition("|")[0].strip()
        self.write(target, lanes, self.read(instruction.operands[1], source, "u32"))

    def reduce(self, target: str, lanes, function, values) -> None:
        """`function` of all values of a warp, to each of its lanes."""
        first = np.flatnonzero(np.r_[True, np.diff(self.warp[lanes]) != 0])
        self.write(target, lanes, np.repeat(function.reduceat(values, first), np.diff(np.r_[first, len(lanes)])))

    def do_redux(self, instruction, lanes) -> None:
        function = {"min": np.minimum, "max": np.maximum, "add": np.add}[instruction.modifiers[1]]
        self.reduce(instruction.operands[0], lanes, function, self.read(instruction.operands[1], lanes, instruction.type))

    def do_vote(self, instruction, lanes) -> None:
        """The predicates of a warp as the bits of a word (ballot)."""
        values = self.read(instruction.operands[1], lanes, "pred").astype(np.uint32)
        self.reduce(instruction.operands[0], lanes, np.bitwise_or, values << (lanes % 32).astype(np.uint32))

    def matrices(self, operand: str, lanes):
        """Where the words of 8 x 8 matrices of 16-bit numbers are: lane l names row l % 8 of matrix l // 8, and holds a word of
        each -> the address of row r of matrix n for every lane, and the lane in its warp."""
        if len(lanes) % 32:
            raise Fault("a matrix is moved by a part of a warp")
        address, lane = self.address(operand, lanes), lanes % 32
        return lambda number, row: address[np.arange(len(lanes)) - lane + 8 * number + row], lane

    def do_stmatrix(self, instruction, lanes) -> None:
        row_of, lane = self.matrices(instruction.operands[0], lanes)
        for number, register in enumerate(self.parts(instruction.operands[1])):
            value, place = self.read(register, lanes, "u32"), row_of(number, lane // 4) + 4 * (lane % 4)
            self.count(instruction, "store", place, 4, lanes)
            if not instruction.has("trans"):
                self.shared.store(self.home[lanes], place, value, self.warp[lanes])
                continue
            for half in (0, 1):
                self.shared.store(self.home[lanes], row_of(number, 2 * (lane % 4) + half) + 2 * (lane // 4),
                                  (value >> np.uint32(16 * half)).astype(np.uint16), self.warp[lanes])

    def do_ldmatrix(self, instruction, lanes) -> None:
        row_of, lane = self.matrices(instruction.operands[1], lanes)
        for number, register in enumerate(self.parts(instruction.operands[0])):
            place = row_of(number, lane // 4) + 4 * (lane % 4)
            self.count(instruction, "load", place, 4, lanes)
            self.write(register, lanes, self.shared.load(self.home[lanes], place, 4, self.warp[lanes]))


# --- launches -----------------------------------------------------------------------------------------------------------

class Launch:
    """One launch: its compiled program, what it is given, and, once it has run, its counts.  fresh: storages that nothing was
    written to."""

    def __init__(self, compiled, grid: int, arguments: list, fresh: set):
        self.compiled, self.program, self.grid, self.arguments = compiled, Program(compiled.asm["ptx"]), grid, arguments
        self.shared_bytes, self.warps, self.counts = compiled.metadata.shared, compiled.metadata.num_warps, None
        self.tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        self.fresh = fresh & {tensor.untyped_storage().data_ptr() for tensor in self.tensors}

    def run(self, seed: int | None = None, program: Program | None = None) -> None:
        """Executes it, or `program` in its place, on the tensors that it was given.  Fault: see the head of this file."""
        memory = GlobalMemory(self.tensors, self.fresh)
        arguments = [memory.address(argument) if isinstance(argument, torch.Tensor) else int(argument)
                     for argument in self.arguments]
        scratch = len(self.program.parameters) - len(arguments)  # pointers of Triton's own, which these kernels do not use
        machine = Machine(program or self.program, self.grid, arguments + [0] * scratch, memory, self.shared_bytes, seed)
        with np.errstate(all="ignore"):
            self.counts = machine.run()
        memory.give_back()


def without_barriers(launch: Launch, wrong, numbers: slice, seeds=(None,)):
    """Takes out the barriers `numbers` one at a time -> number, and what noticed it: a Fault, `wrong()` results in one of the
    orders, or ""."""
    for number, barrier in list(enumerate(launch.program.barriers))[numbers]:
        noticed = ""
        for seed in seeds:
            try:
                launch.run(seed, launch.program.without(barrier))
                noticed = "wrong results" if wrong() else ""
            except Fault as fault:
                noticed = str(fault)
            if noticed:
                break
        yield number, noticed


@contextmanager
def executed(module, sm: int, seed: int | None = None):
    """While it is entered, each launch of a kernel of `module` is compiled for `sm` and executed here -> list of the launches so
    far.

    seed: of random orders of programs and warps; None: all together.
    """
    launches, fresh, empty = [], set(), torch.empty

    def new(*shape, **options):
        tensor = empty(*shape, **options)
        fresh.add(tensor.untyped_storage().data_ptr())
        return tensor

    def launch(kernel, grid, *arguments, **options):
        compiled = sass.compile_for(sm, kernel, lambda: kernel[grid](*arguments, **options))
        launches.append(Launch(compiled, grid[0], list(given(arguments, compiled.src.constants)), fresh))
        launches[-1].run(seed)
        fresh.difference_update(launches[-1].fresh)

    kernels = {name: ByGrid(partial(launch, kernel)) for name, kernel in vars(module).items() if name.endswith("_kernel")}
    with mock.patch.multiple(module, **kernels), mock.patch.object(torch, "empty", new):
        yield launches


def given(arguments, constants, path=()):
    """The arguments that are no constants of the compiled kernel, tuples taken apart."""
    for number, argument in enumerate(arguments):
        place = (*path, number)
        if isinstance(argument, tuple):
            yield from given(argument, constants, place)
        elif place not in constants:
            yield argument


class ByGrid:
    """`kernel[grid](...)`, as Triton has it, for `launch(grid, ...)`."""

    def __init__(self, launch):
        self.launch = launch

    def __getitem__(self, grid):
        return partial(self.launch, grid)


def in_a_process(file) -> list[dict]:
    """What `python ptx.py FILE` prints."""
    return sass.in_a_process(__file__, file)


def main(file) -> None:
    torch.set_num_threads(1)
    module = sass.load(file)
    cases = list(module.cases())
    for sm, case in itertools.product(ARCHITECTURES, cases) if TORTURE else zip(itertools.cycle(ARCHITECTURES), cases):
        try:
            found = module.execute(sm, *case)
        except (Fault, NotImplementedError) as fault:
            found = {"fault": str(fault)}
        print(json.dumps({"sm": sm, "case": case} | found), flush=True)
    for sm in ARCHITECTURES if TORTURE else ARCHITECTURES[-1:]:
        for number, noticed in module.without_barriers(sm, slice(None, None, 1 if TORTURE else 8)):
            print(json.dumps({"sm": sm, "removed": number, "noticed": noticed}), flush=True)


if __name__ == "__main__":
    import ptx  # not this module under another name, whose Fault would be another class
    ptx.main(sys.argv[1])
