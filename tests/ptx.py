"""Executes compiled Triton kernels on a CPU: their PTX, instruction by instruction, in numpy.

    with executed(op, sm=90) as launches:
        op.softmax_kl_triton(...)                                the real launcher, on CPU tensors
    launches[0].counts["warp instructions"]

Needs a process in which Triton compiles, not interprets: in_a_process(FILE) returns what `results()` of FILE yields in one.

It shows what the interpreter of Triton cannot: what the compiler made of the kernel.  `Fault` is raised for an address outside
of a tensor or not aligned, for memory that is read before it was written, for a race of two warps of a program between two
barriers, in shared or global memory, for a shuffle with a lane that is elsewhere, and for a barrier that not all threads reach.
With a seed, programs and warps take turns in random order.  Counts are exact: instructions that a warp issues, 32-byte sectors of
global memory, wavefronts of shared memory, barriers.

All programs run at once: a register is an array with one number per thread of the grid, and a step executes one instruction for
all threads that are at it.  What numpy cannot tell: ex2, lg2, rcp and sqrt are rounded correctly here and approximated on a GPU;
fma is rounded twice, from 64 bits.  There is no time and no cache.
"""
import json
import re
import sys
from collections import Counter
from contextlib import contextmanager
from functools import cache, partial
from unittest import mock

import numpy as np
import sass
import torch

UNSIGNED, SIGNED = ({size: np.dtype(f"{letter}{size}").type for size in (1, 2, 4, 8)} for letter in "ui")
KINDS = {"f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16, "pred": np.bool_} | {
    f"{letter}{8 * size}": kinds[size] for letter, kinds in (("u", UNSIGNED), ("s", SIGNED), ("b", UNSIGNED)) for size in kinds}
CONTROL = ("bra", "bar", "ret")


class Fault(AssertionError):
    """The compiled kernel does what no kernel may."""


# --- the program --------------------------------------------------------------------------------------------------------

class Instruction:
    """`@!%p1 ld.global.b32 %r1, [%rd1+4]`: guard %p1, negated; name ld, modifiers (global, b32), of which the last is the type.

    sources: the operands of one that computes, with their types.
    """

    def __init__(self, text: str):
        match = re.match(r"(?:@(!?)(%\w+)\s+)?([a-z]\w*)([\w.:]*)\s*(.*)", text, re.S)
        if not match:
            raise ValueError(f"not an instruction of PTX: {text!r}")
        negated, self.guard, self.name, modifiers, operands = match.groups()
        self.text, self.negated, self.modifiers = text, bool(negated), tuple(modifiers.replace("::", ".").split(".")[1:])
        self.type = self.modifiers[-1] if self.modifiers else ""
        self.operands = [operand.strip() for operand in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", operands)]
        types, function = COMPUTE.get(self.name, ("", None))
        if self.name == "cvt" and self.modifiers[-2].endswith("x2"):
            types, function = "ff", convert_two
        self.compute = function if function is None or isinstance(function, np.ufunc) else partial(function, self)
        wide = f"{self.type[:1]}{2 * int(self.type[1:])}" if self.name == "mad" and self.has("wide") else self.type
        kinds = {"t": self.type, "u": "u32", "f": "f32", "p": "pred", "w": wide}
        self.sources = [(operand, kinds[kind]) for operand, kind in zip(self.operands[1:], types)]

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers


class Program:
    """The one kernel of a PTX text: parameters, registers, instructions, and where the labels are."""

    def __init__(self, text: str):
        text = re.sub(r"//[^\n]*", "", text)
        parameters, limits, body = re.search(r"\.entry\s+\w+\s*\((.*?)\)(.*?)\n\{(.*)\n\}", text, re.S).groups()
        self.parameters = re.findall(r"\.param[^,]*?(\w+_param_\d+)", parameters)
        self.threads = int(re.search(r"\.reqntid\s+(\d+)", limits)[1])
        self.registers = {f"{prefix}{number}": KINDS[kind] for kind, prefix,
                          count in re.findall(r"\.reg\s+\.(\w+)\s+(%\w+?)<(\d+)>;", body)
                          for number in range(int(count))}
        body = re.sub(r"\.(reg|loc|pragma|file)[^;\n]*[;\n]", "\n", body)
        self.code, self.labels = [], {}
        for part in re.split(r";|(?<=:)\s", body):
            part = part.strip()
            if part.endswith(":"):
                self.labels[part[:-1]] = len(self.code)
            elif part.strip("{}\n\t "):
                self.code.append(Instruction(re.sub(r"^[{}\s]+", "", part)))
        self.barriers = [number for number, instruction in enumerate(self.code) if instruction.name == "bar"]


# --- instructions that compute: name -> (types of the operands, function) -----------------------------------------------------
# What Triton 3.6 to 3.9 makes of these kernels.  In the types, t is the instruction's own, u is u32, p a predicate, w the
# result's of a wide product.  Operands are arrays of one number per thread, or single numbers; functions of numpy get them alone.

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
    words = two_words(a, b)
    chosen = ((words >> (8 * (selection >> 4 * place & 7)).astype(np.uint64) & 255) << 8 * place for place in range(4))
    return sum(chosen).astype(np.uint32)


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
    "add": ("tt", np.add), "sub": ("tt", np.subtract), "mul": ("tt", product), "mad": ("ttw", multiply_add),
    "fma": ("ttt", fused_multiply_add), "div": ("tt", quotient), "min": ("tt", np.fmin), "max": ("tt", np.fmax),
    "neg": ("t", np.negative), "and": ("tt", np.bitwise_and), "or": ("tt", np.bitwise_or),
    "xor": ("tt", np.bitwise_xor), "not": ("t", np.invert), "shl": ("tu", shift_left), "shr": ("tu", shift_right),
    "shf": ("uuu", funnel_shift), "bfe": ("tuu", extract_bits), "prmt": ("uuu", permute_bytes),
    "popc": ("u", lambda instruction, a: sum(a >> bit & 1 for bit in range(32))),
    "selp": ("ttp", lambda instruction, a, b, choice: np.where(choice, a, b)), "cvt": ("t", convert), "ex2": ("t", power_of_two),
    "setp": ("tt", lambda instruction, a, b: COMPARE[instruction.modifiers[0]](a, b)),
}


# --- memory -------------------------------------------------------------------------------------------------------------

class Memory:
    """Bytes at places, which are arrays of numbers.  Of each 32-bit word it remembers which warp wrote and read it last, in which
    interval between two barriers of its program, and in which it was counted in by atomic operations, which may meet each
    other."""
    SEVERAL = -2

    def __init__(self, size: int):
        self.bytes, self.written = np.zeros(-(-size // 8) * 8, np.uint8), np.zeros(size, bool)
        self.writer, self.reader, self.wrote, self.read, self.counted = np.full((5, -(-size // 4)), -1)

    def look(self, place, warp, interval):
        """The words at `place`, and whether another warp of the program wrote, and read, each since the last barrier."""
        word = place // 4
        return (word, (self.wrote[word] == interval) & (self.writer[word] != warp),
                (self.read[word] == interval) & (self.reader[word] != warp))

    def load(self, place, width: int, warp, interval):
        if not self.written[place].all():
            raise Fault("memory is read before it was written")
        word, by_another, _ = self.look(place, warp, interval)
        if (by_another | (self.counted[word] == interval)).any():
            raise Fault("race: a warp reads what another one wrote without a barrier between")
        alone = (self.read[word] != interval) | (self.reader[word] == warp)
        self.reader[word] = np.where(alone, warp, self.SEVERAL)
        self.reader[word[self.reader[word] != warp]] = self.SEVERAL  # of several warps at once only one was noted
        self.read[word] = interval
        return self.bytes.view(UNSIGNED[width])[place // width]

    def store(self, place, values, warp, interval) -> None:
        width, view = values.dtype.itemsize, self.bytes.view(values.dtype)
        word, written, read = self.look(place, warp, interval)
        if (written & (view[place // width] != values)).any():
            raise Fault("race: two warps write different values without a barrier between")
        if read.any():
            raise Fault("race: a warp writes what another one read without a barrier between")
        view[place // width] = values
        self.writer[word], self.wrote[word] = warp, interval
        for byte in range(width):
            self.written[place + byte] = True

    def add(self, place, values, warp, interval):
        """Adds 32-bit words one after the other -> what was there before each."""
        word, written, read = self.look(place, warp, interval)
        if (written | read).any():
            raise Fault("race: an atomic operation and another warp's plain access without a barrier between")
        if not self.written[place].all():
            raise Fault("memory is counted in before it was written")
        self.counted[word] = interval
        order = np.argsort(word, kind="stable")
        sorted_values, memory = values[order], self.bytes.view(np.uint32)
        before = np.cumsum(sorted_values, dtype=values.dtype) - sorted_values
        first = np.r_[True, np.diff(word[order]) != 0]
        before -= before[np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))]  # what was added elsewhere
        old = np.empty_like(values)
        old[order] = memory[word[order]] + before
        np.add.at(memory, word, values)
        return old


class GlobalMemory(Memory):
    """The tensors of a launch side by side, with forbidden zones between them; `fresh` ones have not been written."""
    BASE, GUARD, ALIGNMENT = 1 << 20, 4096, 256

    def __init__(self, tensors, fresh):
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        self.arrays = {key: torch.tensor([], dtype=torch.uint8).set_(storage).numpy() for key, storage in storages.items()}
        self.starts, end = {}, self.GUARD
        for key, array in self.arrays.items():
            self.starts[key] = end
            end += -(-(array.nbytes + self.GUARD) // self.ALIGNMENT) * self.ALIGNMENT
        super().__init__(end)
        self.valid = np.zeros(end, bool)
        for key, array in self.arrays.items():
            part = slice(self.starts[key], self.starts[key] + array.nbytes)
            self.bytes[part], self.valid[part], self.written[part] = array, True, key not in fresh

    def address(self, tensor) -> int:
        return self.BASE + self.starts[tensor.untyped_storage().data_ptr()] + tensor.storage_offset() * tensor.element_size()

    def give_back(self) -> None:
        for key, array in self.arrays.items():
            array[:] = self.bytes[self.starts[key]:self.starts[key] + array.nbytes]

    def place(self, address, width: int, program):
        place = address - self.BASE
        bad = (place < 0) | (place + width > len(self.valid)) | (address % width != 0)
        bad |= ~self.valid[np.clip(place, 0, len(self.valid) - 1)]
        if bad.any():
            raise Fault(f"an address outside of the tensors, or not aligned ({address[bad][0] - self.BASE})")
        return place


class SharedMemory(Memory):
    """A block for every program."""

    def __init__(self, programs: int, size: int):
        self.size = max(16, -(-size // 16) * 16)
        super().__init__(programs * self.size)

    def place(self, address, width: int, program):
        if (address < 0).any() or (address + width > self.size).any() or (address % width).any():
            raise Fault(f"a shared address outside of {self.size} bytes, or not aligned ({address.min()} to {address.max()})")
        return program * self.size + address


# --- the machine --------------------------------------------------------------------------------------------------------

@cache
def immediate(operand: str, kind: str):
    """The number that is written in the code, as one of type `kind`."""
    if operand.startswith(("0f", "0d")):
        bits = UNSIGNED[4 if operand[1] == "f" else 8](int(operand[2:], 16))
    else:
        bits = np.uint64(0 if operand == "global_smem" else int(operand.rstrip("U"), 0) & 2**64 - 1)
    return as_kind(bits, kind)


def as_kind(value, kind: str):
    """Numbers as those of type `kind`; of wider ones the low bits."""
    wanted = KINDS.get(kind, np.uint32)
    if kind == "pred" or value.dtype == wanted:
        return value.astype(wanted, copy=False)
    size = np.dtype(wanted).itemsize
    return (value if value.dtype.itemsize == size and value.dtype != bool else value.astype(UNSIGNED[size])).view(wanted)


def parts(operand: str) -> list[str]:
    """The registers of a vector operand."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


class Lanes:
    """Threads that execute an instruction together: their numbers, what selects them in an array of all, and whose they are."""

    def __init__(self, machine: "Machine", numbers):
        self.machine, self.numbers, self.size = machine, numbers, len(numbers)
        whole = numbers[-1] - numbers[0] == self.size - 1
        self.index = slice(numbers[0], numbers[-1] + 1) if whole else numbers
        self.warp, self.program, self.interval = (of[self.index] for of in (machine.warp, machine.home, machine.interval))
        self.warps = 1 + int(np.count_nonzero(np.diff(self.warp)))

    def where(self, chosen) -> "Lanes | None":
        """Those that are chosen, or None."""
        return self if chosen.all() else Lanes(self.machine, self.numbers[chosen]) if chosen.any() else None


class Machine:
    """All threads of a launch: registers, where each of them is, and the counts."""

    def __init__(self, program: Program, programs: int, arguments: list[int], memory: GlobalMemory, shared_bytes: int,
                 seed: int | None, without: int | None):
        self.program, self.programs, self.memory, self.without = program, programs, memory, without
        self.shared, self.counts = SharedMemory(programs, shared_bytes), Counter()
        self.arguments = dict(zip(program.parameters, arguments))
        threads = programs * program.threads
        thread = np.arange(threads)
        self.warp, self.home = thread // 32, thread // program.threads
        self.registers = {name: np.zeros(threads, kind) for name, kind in program.registers.items()} | {
            "%tid.x": (thread % program.threads).astype(np.uint32), "%ctaid.x": self.home.astype(np.uint32),
            "%laneid": (thread % 32).astype(np.uint32), "%nctaid.x": np.full(threads, programs, np.uint32)}
        self.at, self.waiting, self.done = np.zeros(threads, np.int64), np.zeros(threads, bool), np.zeros(threads, bool)
        self.interval = self.home * 2**32  # of each thread
        self.random = None if seed is None else np.random.default_rng(seed)

    def run(self) -> Counter:
        while len(ready := np.flatnonzero(~(self.waiting | self.done))):
            limit = len(self.program.code)
            if self.random is not None:
                ready = ready[self.warp[ready] == self.random.choice(np.unique(self.warp[ready]))]
                limit = self.random.integers(1, 200)
            self.advance(ready, limit)
            if self.waiting.any():
                self.open_barriers()
        if not self.done.all():
            raise Fault("a barrier that not all threads of a program reach")
        return self.counts

    def open_barriers(self) -> None:
        waiting, done = (state.reshape(self.programs, -1) for state in (self.waiting, self.done))
        complete = (waiting | done).all(1) & waiting.any(1)
        waiting[complete] = False
        self.interval.reshape(self.programs, -1)[complete] += 1

    def advance(self, ready, limit: int) -> None:
        """Those threads that are furthest behind, to where they meet others or may part, by at most `limit` instructions."""
        at = self.at[ready]
        first = at.min()
        lanes = Lanes(self, ready[at == first])
        end = min(first + limit, at[at > first].min(initial=len(self.program.code)))
        for number in range(first, end):
            instruction, active = self.program.code[number], lanes
            self.counts["warp instructions"] += lanes.warps
            if instruction.guard:
                active = lanes.where(self.registers[instruction.guard][lanes.index] != instruction.negated)
            if instruction.name in CONTROL:
                self.at[lanes.index] = number + 1
            if active and number != self.without:
                self.execute(instruction, active)
            if instruction.name in CONTROL:
                return
        self.at[lanes.index] = end

    def execute(self, instruction, lanes) -> None:
        if instruction.compute is None:
            method = getattr(self, f"do_{instruction.name}", None)
            if method is None:
                raise NotImplementedError(f"no instruction {instruction.name}: {instruction.text}")
            return method(instruction, lanes)
        values = [self.read(operand, lanes, kind) for operand, kind in instruction.sources]
        if instruction.type in ("s16x2", "u16x2"):
            halves = [np.expand_dims(value, -1).view(KINDS[instruction.type[:-2]]) for value in values]
            return self.write(instruction.operands[0], lanes, instruction.compute(*halves).view(np.uint32)[:, 0])
        self.write(instruction.operands[0], lanes, instruction.compute(*values))

    # operands

    def read(self, operand: str, lanes, kind: str):
        """An operand of `lanes` as numbers of type `kind`, or as one number."""
        register = self.registers.get(operand)
        return immediate(operand, kind) if register is None else as_kind(register[lanes.index], kind)

    def write(self, operand: str, lanes, value) -> None:
        if operand == "_":
            return
        register = self.registers[operand]
        # A narrow number is extended by its own sign.
        if register.dtype != bool and value.dtype.itemsize != register.dtype.itemsize:
            value = value.astype((SIGNED if value.dtype.kind == "i" else UNSIGNED)[register.dtype.itemsize])
        register[lanes.index] = value if register.dtype == bool else value.view(register.dtype)

    def address(self, operand: str, lanes):
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        kind = "s64" if base in self.registers and self.registers[base].dtype.itemsize == 8 else "u32"
        return np.full(lanes.size, int(offset or 0)) + self.read(base, lanes, kind).astype(np.int64)

    # control

    def do_bra(self, instruction, lanes) -> None:
        self.at[lanes.index] = self.program.labels[instruction.operands[0]]

    def do_ret(self, instruction, lanes) -> None:
        self.done[lanes.index] = True

    def do_bar(self, instruction, lanes) -> None:
        self.counts["barriers"] += lanes.warps
        self.waiting[lanes.index] = True

    def do_mov(self, instruction, lanes) -> None:
        """To one register from another one or from two halves, or to the parts of a wide one."""
        target, source = instruction.operands
        if source.startswith("{"):
            low, high = (self.read(part, lanes, "u16").astype(np.uint32) for part in parts(source))
            return self.write(target, lanes, low | high << 16)
        value, targets = self.read(source, lanes, instruction.type), parts(target)
        if len(targets) == 1:
            return self.write(target, lanes, value)
        size = value.dtype.itemsize // len(targets)
        for number, part in enumerate(targets):
            self.write(part, lanes, (value >> value.dtype.type(8 * size * number)).astype(UNSIGNED[size]))

    # memory

    def space(self, instruction) -> Memory:
        return self.shared if instruction.has("shared") else self.memory

    def load(self, instruction, address, width: int, lanes):
        memory = self.space(instruction)
        return memory.load(memory.place(address, width, lanes.program), width, lanes.warp, lanes.interval)

    def store(self, instruction, address, values, lanes) -> None:
        memory = self.space(instruction)
        memory.store(memory.place(address, values.dtype.itemsize, lanes.program), values, lanes.warp, lanes.interval)

    def do_ld(self, instruction, lanes) -> None:
        target, source = instruction.operands
        if instruction.has("param"):
            value = self.arguments[source.strip("[] ").partition("+")[0]]
            return self.write(target, lanes, np.uint64(value & 2**64 - 1).astype(KINDS[instruction.type]))
        targets, width, address = parts(target), int(instruction.type[1:]) // 8, self.address(source, lanes)
        self.count(instruction, "load", address, len(targets) * width, lanes)
        for number, register in enumerate(targets):
            self.write(register, lanes, self.load(instruction, address + number * width, width, lanes))

    def do_st(self, instruction, lanes) -> None:
        target, source = instruction.operands
        sources, width, address = parts(source), int(instruction.type[1:]) // 8, self.address(target, lanes)
        self.count(instruction, "store", address, len(sources) * width, lanes)
        for number, register in enumerate(sources):
            self.store(instruction, address + number * width, self.read(register, lanes, f"u{8 * width}"), lanes)

    def count(self, instruction, kind: str, address, width: int, lanes) -> None:
        """Sectors that each warp touches in global memory; in shared memory wavefronts: the most words that it wants of one
        bank."""
        if instruction.has("shared"):
            warp = lanes.warp - lanes.warp[0]
            words = np.unique((warp * 2**32 + address // 4)[:, None] + np.arange(-(-width // 4)))
            wanted = np.bincount((words >> 32) * 32 + words % 32, minlength=32 * (int(warp[-1]) + 1)).reshape(-1, 32)
            self.counts["shared wavefronts"] += int(wanted.max(1).sum())
            self.counts["shared accesses"] += lanes.warps
        else:
            self.counts[f"{kind} sectors"] += len(np.unique(lanes.warp * 2**40 + address // 32))

    def do_atom(self, instruction, lanes) -> None:
        """Additions of 32-bit numbers, in the order of the lanes."""
        target, place, value = instruction.operands
        if not instruction.has("add") or instruction.type != "u32":
            raise NotImplementedError(f"no such atomic operation: {instruction.text}")
        address, memory = self.address(place, lanes), self.space(instruction)
        if instruction.has("shared"):
            self.count(instruction, "atomic", address, 4, lanes)
        values = np.full(lanes.size, self.read(value, lanes, "u32"))
        self.write(target, lanes, memory.add(memory.place(address, 4, lanes.program), values, lanes.warp, lanes.interval))

    # between the lanes of a warp

    def do_shfl(self, instruction, lanes) -> None:
        lane, given = lanes.numbers % 32, self.read(instruction.operands[2], lanes, "u32").astype(np.int64)
        sources = {"bfly": lane ^ given, "up": np.where(lane >= given, lane - given, lane), "idx": given % 32}
        source = lanes.numbers - lane + sources[instruction.modifiers[1]]
        here = np.zeros(len(self.at), bool)
        here[lanes.index] = True
        if not here[source].all():
            raise Fault("a shuffle with a lane that is elsewhere")
        self.write(instruction.operands[0].partition("|")[0].strip(), lanes, self.registers[instruction.operands[1]][source])

    def reduce(self, target: str, lanes, function, values) -> None:
        """`function` of all values of a warp, to each of its lanes."""
        first = np.flatnonzero(np.r_[True, np.diff(lanes.warp) != 0])
        self.write(target, lanes, np.repeat(function.reduceat(values, first), np.diff(np.r_[first, lanes.size])))

    def do_redux(self, instruction, lanes) -> None:
        function = {"min": np.minimum, "max": np.maximum, "add": np.add}[instruction.modifiers[1]]
        self.reduce(instruction.operands[0], lanes, function, self.read(instruction.operands[1], lanes, instruction.type))

    def do_vote(self, instruction, lanes) -> None:
        """The predicates of a warp as the bits of a word (ballot)."""
        values = np.full(lanes.size, self.read(instruction.operands[1], lanes, "pred")).astype(np.uint32)
        self.reduce(instruction.operands[0], lanes, np.bitwise_or, values << (lanes.numbers % 32).astype(np.uint32))

    def matrices(self, operand: str, lanes):
        """Where the words of 8 x 8 matrices of 16-bit numbers are: lane l names row l % 8 of matrix l // 8, and holds a word of
        each -> the address of row r of matrix n for every lane, and the lane in its warp."""
        if lanes.size % 32:
            raise Fault("a matrix is moved by a part of a warp")
        address, lane = self.address(operand, lanes), lanes.numbers % 32
        return lambda number, row: address[np.arange(lanes.size) - lane + 8 * number + row], lane

    def do_stmatrix(self, instruction, lanes) -> None:
        row_of, lane = self.matrices(instruction.operands[0], lanes)
        for number, register in enumerate(parts(instruction.operands[1])):
            value, place = self.read(register, lanes, "u32"), row_of(number, lane // 4) + 4 * (lane % 4)
            self.count(instruction, "store", place, 4, lanes)
            if not instruction.has("trans"):
                self.store(instruction, place, value, lanes)
                continue
            for half in (0, 1):
                self.store(instruction, row_of(number, 2 * (lane % 4) + half) + 2 * (lane // 4),
                           (value >> np.uint32(16 * half)).astype(np.uint16), lanes)

    def do_ldmatrix(self, instruction, lanes) -> None:
        row_of, lane = self.matrices(instruction.operands[1], lanes)
        for number, register in enumerate(parts(instruction.operands[0])):
            place = row_of(number, lane // 4) + 4 * (lane % 4)
            self.count(instruction, "load", place, 4, lanes)
            self.write(register, lanes, self.load(instruction, place, 4, lanes))


# --- launches -----------------------------------------------------------------------------------------------------------

class Launch:
    """One launch: its compiled program, what it is given, and, once it has run, its counts.  fresh: storages that nothing was
    written to."""

    def __init__(self, compiled, grid: int, arguments: list, fresh: set):
        self.compiled, self.program, self.grid, self.arguments = compiled, program_of(compiled.asm["ptx"]), grid, arguments
        self.shared_bytes, self.warps, self.counts = compiled.metadata.shared, compiled.metadata.num_warps, None
        self.tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        self.fresh = fresh & {tensor.untyped_storage().data_ptr() for tensor in self.tensors}

    def run(self, seed: int | None = None, without: int | None = None) -> None:
        """Executes it, `without` the instruction of that number, on the tensors that it was given.  Fault: see the head of this
        file."""
        memory = GlobalMemory(self.tensors, self.fresh)
        arguments = [memory.address(argument) if isinstance(argument, torch.Tensor) else int(argument)
                     for argument in self.arguments]
        scratch = len(self.program.parameters) - len(arguments)  # pointers of Triton's own, which these kernels do not use
        machine = Machine(self.program, self.grid, arguments + [0] * scratch, memory, self.shared_bytes, seed, without)
        with np.errstate(all="ignore"):
            self.counts = machine.run()
        memory.give_back()

    def results(self) -> list[bytes]:
        return [tensor.numpy().tobytes() for tensor in self.tensors if tensor.untyped_storage().data_ptr() in self.fresh]

    def without_barriers(self, numbers: slice):
        """After it has run, takes out the barriers `numbers` one at a time -> number, and what noticed it: a Fault, wrong
        results, or ""."""
        right = self.results()
        for number, barrier in list(enumerate(self.program.barriers))[numbers]:
            try:
                self.run(without=barrier)
                noticed = "wrong results" if self.results() != right else ""
            except Fault as fault:
                noticed = str(fault)
            yield number, noticed


program_of = cache(Program)


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
    """What `results()` of FILE yields."""
    return sass.in_a_process(__file__, file)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for result in sass.load(sys.argv[1]).results():
        print(json.dumps(result), flush=True)
