"""Executes compiled Triton kernels on a CPU: their PTX, instruction by instruction, in numpy.

    with executed(op, "_softmax_kl_kernel", sm=90) as launches:
        op.softmax_kl_triton(...)                                the real launcher, on CPU tensors
    launches[0].counts["warp instructions"]

Needs a process in which Triton compiles instead of interpreting: `python ptx.py FILE` prints a JSON object for each of the
`cases()` of FILE, `{sm, case} | execute(sm, *case)`, or the fault, and for each barrier of `without_barriers(sm)`.

It shows what the interpreter of Triton cannot: what the compiler made of the kernel.  `Fault` is raised for an address outside
of a tensor or not aligned, for memory that is read before it was written, for a race in shared memory between two barriers, for
a shuffle with a lane that is elsewhere, and for a barrier that not all threads reach.  With a seed, programs and warps take
turns in random order.  Counts are exact: instructions that a warp issues, 32-byte sectors of global memory, wavefronts of shared
memory, barriers.

All programs run at once: a register is an array with one number per thread of the grid, and a step executes one instruction for
all threads that are at it.  What numpy cannot tell: ex2, lg2, rcp and sqrt are rounded correctly here and approximated on a GPU;
fma is rounded twice, from 64 bits.  There is no time and no cache.
"""
import json
import re
import sys
from collections import Counter
from contextlib import contextmanager
from functools import partial
from unittest import mock

import numpy as np
import sass
import torch

KINDS = {"u8": np.uint8, "s8": np.int8, "b8": np.uint8, "u16": np.uint16, "s16": np.int16, "b16": np.uint16, "f16": np.float16,
         "bf16": np.uint16,
         "u32": np.uint32, "s32": np.int32, "b32": np.uint32, "f32": np.float32, "u64": np.uint64, "s64": np.int64,
         "b64": np.uint64,
         "f64": np.float64, "pred": np.bool_}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


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
        return [number for number, instruction in enumerate(self.code) if instruction.name in ("bar", "barrier")
                and instruction.has("sync")
                and not instruction.has("warp")]


# --- instructions that compute: name -> (types of the operands, function) -----------------------------------------------------
# In the types, t is the instruction's own, u is u32, p a predicate, w the result's of a wide product, i the signed or unsigned
# bits of t.

def flushed(instruction, *values):
    """Subnormal numbers are 0 with .ftz."""
    if not instruction.has("ftz"):
        return values
    return [np.where(np.abs(value) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), value), value) for value in values]


def arithmetic(function):
    """For a function of numbers that wraps, or that rounds once."""
    def compute(instruction, *values):
        if instruction.type == "f32":
            values = flushed(instruction, *values)
        return function(*values)
    return compute


def smaller(instruction, a, b):
    return np.minimum(a, b) if instruction.type[0] != "f" or instruction.has("NaN") else np.fmin(a, b)


def larger(instruction, a, b):
    return np.maximum(a, b) if instruction.type[0] != "f" or instruction.has("NaN") else np.fmax(a, b)


def product(instruction, a, b):
    if instruction.type[0] == "f":
        return arithmetic(np.multiply)(instruction, a, b)
    if instruction.has("lo"):
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
    if instruction.type[0] == "f":
        return a / b
    whole = np.abs(a.astype(np.int64)) // np.maximum(np.abs(b.astype(np.int64)), 1)
    return np.where((a < 0) != (b < 0), -whole, whole).astype(a.dtype)


def remainder(instruction, a, b):
    return a - quotient(instruction, a, b) * b


def shift_left(instruction, a, count):
    bits = 8 * a.dtype.itemsize
    return np.where(count < bits, a << np.minimum(count, bits - 1).astype(a.dtype), 0).astype(a.dtype)


def shift_right(instruction, a, count):
    """Signed numbers keep their sign; a count beyond the width leaves nothing else."""
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count < bits, shifted, 0).astype(a.dtype)


def funnel_shift(instruction, low, high, count):
    count = count.astype(np.uint64)
    count = count & np.uint64(31) if instruction.has("wrap") else np.minimum(count, np.uint64(32))
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    return (both >> count if instruction.has("r") else (both << count) >> np.uint64(32)).astype(np.uint32)


def extract_bits(instruction, a, start, length):
    mask = (np.uint64(1) << np.minimum(length, 32).astype(np.uint64)) - np.uint64(1)
    field = a.view(np.uint32).astype(np.uint64) >> np.minimum(start, 63).astype(np.uint64) & mask
    if a.dtype.kind == "i":
        sign = (np.uint64(1) << np.maximum(length, 1).astype(np.uint64) - np.uint64(1)).astype(np.int64)
        return ((field.astype(np.int64) ^ sign) - sign).astype(np.int32)
    return field.astype(np.uint32)


def insert_bits(instruction, field, a, start, length):
    mask = ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)) << start.astype(np.uint64)
    return (a & ~mask | field.astype(np.uint64) << start.astype(np.uint64) & mask).astype(np.uint32)


def permute_bytes(instruction, a, b, selection):
    both, result = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.zeros(len(a), np.uint32)
    for number in range(4):
        wanted = selection >> np.uint32(4 * number) & np.uint32(15)
        byte = (both >> (8 * (wanted & 7)).astype(np.uint64) & np.uint64(255)).astype(np.uint32)
        sign = np.where(byte & 128, 255, 0).astype(np.uint32)
        result |= np.where(wanted & 8, sign, byte).astype(np.uint32) << np.uint32(8 * number)
    return result


def three_input_logic(instruction, a, b, c, table):
    result = np.zeros_like(a)
    for number in range(8):
        chosen = (a if number & 4 else ~a) & (b if number & 2 else ~b) & (c if number & 1 else ~c)
        result |= np.where(table >> np.uint32(number) & np.uint32(1), chosen, 0).astype(a.dtype)
    return result


def compare(instruction, a, b):
    """A comparison of floats is false with a NaN, and true where its name ends with u."""
    how = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(instruction.modifiers[0], instruction.modifiers[0])
    unordered = np.isnan(a) | np.isnan(b) if instruction.type[0] == "f" else np.zeros(len(a), bool)
    if how in ("num", "nan"):
        return unordered == (how == "nan")
    base = how[:-1] if len(how) == 3 else how
    result = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
              "ge": np.greater_equal}[base](a, b)
    return result | unordered if len(how) == 3 else result & ~unordered


def power_of_two(instruction, a):
    return flushed(instruction, np.exp2(*flushed(instruction, a)))[0]


def logarithm(instruction, a):
    return np.log2(*flushed(instruction, a))


def to_bf16(a):
    bits = a.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(a), 0x7FFF, rounded).astype(np.uint16)


def from_bf16(a):
    return (a.astype(np.uint32) << np.uint32(16)).view(np.float32)


def convert(instruction, a):
    target, source = instruction.modifiers[-2:]
    if source == "bf16":
        a = from_bf16(a)
    if target == "bf16":
        return to_bf16(a)
    kind = KINDS[target]
    if target[0] in "us" and source[-3:-2] == "f":
        if instruction.has("rzi"):
            a = np.trunc(a)
        elif instruction.has("rmi") or instruction.has("rpi"):
            a = np.floor(a) if instruction.has("rmi") else np.ceil(a)
        else:
            a = np.rint(a)
        limits = np.iinfo(kind)
        return np.clip(np.nan_to_num(a.astype(np.float64)), limits.min, limits.max).astype(kind)
    if instruction.has("sat"):
        limits = np.iinfo(kind)
        a = np.clip(a, limits.min, limits.max)
    return a.astype(kind)


def convert_two(instruction, high, low):
    """Two floats to one word of two 16-bit floats."""
    half = to_bf16 if instruction.modifiers[-2] == "bf16x2" else lambda a: a.astype(np.float16).view(np.uint16)
    return half(high).astype(np.uint32) << np.uint32(16) | half(low)


COMPUTE = {
    "add": ("tt", arithmetic(np.add)), "sub": ("tt", arithmetic(np.subtract)), "mul": ("tt", product),
    "mad": ("ttw", multiply_add),
    "fma": ("ttt", fused_multiply_add), "div": ("tt", quotient), "rem": ("tt", remainder), "min": ("tt", smaller),
    "max": ("tt", larger),
    "neg": ("t", arithmetic(np.negative)), "abs": ("t", arithmetic(np.abs)), "and": ("tt", arithmetic(np.bitwise_and)),
    "or": ("tt", arithmetic(np.bitwise_or)), "xor": ("tt", arithmetic(np.bitwise_xor)), "not": ("t", arithmetic(np.invert)),
    "shl": ("tu", shift_left), "shr": ("tu", shift_right), "shf": ("uuu", funnel_shift), "bfe": ("tuu", extract_bits),
    "bfi": ("uuuu", insert_bits), "prmt": ("uuu", permute_bytes), "lop3": ("uuuu", three_input_logic),
    "selp": ("ttp", lambda instruction, a, b, choice: np.where(choice, a, b)), "setp": ("tt", compare), "cvt": ("t", convert),
    "ex2": ("t", power_of_two), "lg2": ("t", logarithm), "rcp": ("t", lambda instruction, a: 1 / a),
    "sqrt": ("t", arithmetic(np.sqrt)),
    "popc": ("u", lambda instruction, a: np.unpackbits(a.view(np.uint8).reshape(len(a), 4), axis=1).sum(1).astype(np.uint32)),
}


# --- memory -------------------------------------------------------------------------------------------------------------

class GlobalMemory:
    """The tensors of a launch side by side, with forbidden zones between them; new ones have not been written."""
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

    def load(self, address, width: int):
        place = self.place(address, width)
        if not self.written[place].all():
            raise Fault("global memory is read before it was written")
        return self.bytes.view(UNSIGNED[width])[place // width]

    def store(self, address, values) -> None:
        place = self.place(address, values.dtype.itemsize)
        self.bytes.view(values.dtype)[place // values.dtype.itemsize] = values
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
        elif operand.startswith("0f"):
            value = np.full(len(lanes), int(operand[2:], 16), np.uint32)
        elif operand.startswith("0d"):
            value = np.full(len(lanes), int(operand[2:], 16), np.uint64)
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

    do_membar = do_fence = do_nop

    def do_bra(self, instruction, lanes) -> None:
        self.at[lanes] = self.program.labels[instruction.operands[0]]

    def do_ret(self, instruction, lanes) -> None:
        self.done[lanes] = True

    do_exit = do_ret

    def do_bar(self, instruction, lanes) -> None:
        if not instruction.has("warp"):
            self.counts["barriers"] += self.warps(lanes)
            self.waiting[lanes] = True

    do_barrier = do_bar

    # moves

    def do_mov(self, instruction, lanes) -> None:
        """Of one register, or of the parts of a wide one."""
        target, source = instruction.operands
        parts = self.parts(target if target.startswith("{") else source)
        bits = int(instruction.type[1:]) // len(parts) if instruction.type != "pred" else 0
        if target.startswith("{"):
            whole = self.read(source, lanes, instruction.type)
            for number, part in enumerate(parts):
                self.write(part, lanes, (whole >> whole.dtype.type(bits * number)).astype(UNSIGNED[bits // 8]))
        elif source.startswith("{"):
            kind = KINDS[instruction.type]
            whole = np.zeros(len(lanes), kind)
            for number, part in enumerate(parts):
                whole |= self.read(part, lanes, f"u{bits}").astype(kind) << kind(bits * number)
            self.write(target, lanes, whole)
        else:
            self.write(target, lanes, self.read(source, lanes, instruction.type))

    do_cvta = do_mov

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
                value = self.memory.load(address + number * width, width)
            self.write(register, lanes, value.view(KINDS[instruction.type]) if width > 1
                       else value.view(KINDS[instruction.type]).astype(
                np.int16 if instruction.type[0] == "s" else np.uint16))

    def do_st(self, instruction, lanes) -> None:
        target, source = instruction.operands
        registers, width, address = self.parts(source), int(instruction.type[1:]) // 8, self.address(target, lanes)
        self.count(instruction, "store", address, len(registers) * width, lanes)
        for number, register in enumerate(registers):
            value = self.read(register, lanes, f"u{8 * width}")
            if instruction.has("shared"):
                self.shared.store(self.home[lanes], address + number * width, value, self.warp[lanes])
            else:
                self.memory.store(address + number * width, value)

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
        *target, place, value = instruction.operands
        if not instruction.has("add") or instruction.type not in ("u32", "s32", "b32"):
            raise NotImplementedError(f"no such atomic operation: {instruction.text}")
        address, value = self.address(place, lanes), self.read(value, lanes, "u32")
        if instruction.has("shared"):
            self.count(instruction, "atomic", address, 4, lanes)
            old = self.shared.add(self.home[lanes], address, value, self.warp[lanes])
        else:
            self.memory.load(address, 4)
            old = add_in_turn(self.memory.bytes.view(np.uint32), (address - self.memory.BASE) // 4, value)
        if target:
            self.write(target[0], lanes, old)

    do_red = do_atom

    # between the lanes of a warp

    def do_shfl(self, instruction, lanes) -> None:
        lane, given = lanes % 32, self.read(instruction.operands[2], lanes, "u32").astype(np.int64)
        if instruction.has("bfly"):
            source = lane ^ given
        elif instruction.has("up"):
            source = np.where(lane >= given, lane - given, lane)
        elif instruction.has("down"):
            source = np.where(lane + given < 32, lane + given, lane)
        else:
            source = given % 32
        source = lanes - lane + source
        here = np.zeros(len(self.at), bool)
        here[lanes] = True
        if not here[source].all():
            raise Fault("a shuffle with a lane that is elsewhere")
        target = instruction.operands[0].partition("|")[0].strip()
        self.write(target, lanes, self.read(instruction.operands[1], source, "u32"))

    def do_redux(self, instruction, lanes) -> None:
        values, warp = self.read(instruction.operands[1], lanes, instruction.type), self.warp[lanes]
        first = np.flatnonzero(np.r_[True, np.diff(warp) != 0])
        operation = {"min": np.minimum, "max": np.maximum, "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or,
                     "xor": np.bitwise_xor}
        reduced = operation[instruction.modifiers[1]].reduceat(values, first)
        self.write(instruction.operands[0], lanes, np.repeat(reduced, np.diff(np.r_[first, len(lanes)])))

    def do_vote(self, instruction, lanes) -> None:
        values, warp = self.read(instruction.operands[1], lanes, "pred"), self.warp[lanes]
        first = np.flatnonzero(np.r_[True, np.diff(warp) != 0])
        sizes = np.diff(np.r_[first, len(lanes)])
        if instruction.has("ballot"):
            bits = np.where(values, np.uint32(1) << (lanes % 32).astype(np.uint32), 0).astype(np.uint32)
            return self.write(instruction.operands[0], lanes, np.repeat(np.bitwise_or.reduceat(bits, first), sizes))
        reduced = (np.logical_and if instruction.has("all") else np.logical_or).reduceat(values, first)
        self.write(instruction.operands[0], lanes, np.repeat(reduced, sizes))

    def matrix(self, operand: str, lanes):
        """Where ldmatrix and stmatrix have the rows: lane l names row l % 8 of matrix l // 8, and holds a word of each."""
        if len(lanes) % 32:
            raise Fault("a matrix is moved by a part of a warp")
        return self.address(operand, lanes), lanes % 32, np.arange(len(lanes)) - lanes % 32

    def do_stmatrix(self, instruction, lanes) -> None:
        (address, lane, first), registers = self.matrix(instruction.operands[0], lanes), self.parts(instruction.operands[1])
        for number, register in enumerate(registers):
            value = self.read(register, lanes, "u32")
            if instruction.has("trans"):
                for half in (0, 1):
                    place = address[first + 8 * number + 2 * (lane % 4) + half] + 2 * (lane // 4)
                    self.shared.store(self.home[lanes], place, (value >> np.uint32(16 * half)).astype(np.uint16),
                                      self.warp[lanes])
            else:
                place = address[first + 8 * number + lane // 4] + 4 * (lane % 4)
                self.shared.store(self.home[lanes], place, value, self.warp[lanes])
            self.count(instruction, "store", address[first + 8 * number + lane // 4] + 4 * (lane % 4), 4, lanes)

    def do_ldmatrix(self, instruction, lanes) -> None:
        (address, lane, first), registers = self.matrix(instruction.operands[1], lanes), self.parts(instruction.operands[0])
        if instruction.has("trans"):
            raise NotImplementedError(instruction.text)
        for number, register in enumerate(registers):
            place = address[first + 8 * number + lane // 4] + 4 * (lane % 4)
            self.count(instruction, "load", place, 4, lanes)
            self.write(register, lanes, self.shared.load(self.home[lanes], place, 4, self.warp[lanes]))


# --- launches -----------------------------------------------------------------------------------------------------------

class Launch:
    """One launch: its compiled program, what it is given, and, once it has run, its counts.  fresh: storages that nothing was
    written to."""

    def __init__(self, compiled, grid: int, arguments: list, fresh: set):
        self.program, self.grid, self.arguments = Program(compiled.asm["ptx"]), grid, arguments
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


def without_barriers(launch: Launch, wrong, numbers, seeds=(None,)):
    """Takes out the barriers `numbers` one at a time -> number, and what noticed it: a Fault, `wrong()` results in one of the
    orders, or ""."""
    for number in numbers:
        noticed = ""
        for seed in seeds:
            try:
                launch.run(seed, launch.program.without(launch.program.barriers[number]))
                noticed = "wrong results" if wrong() else ""
            except Fault as fault:
                noticed = str(fault)
            if noticed:
                break
        yield number, noticed


@contextmanager
def executed(module, name: str, sm: int, seed: int | None = None):
    """While it is entered, each launch of the kernel `module.name` is compiled for `sm` and executed here -> list of the
    launches so far.

    seed: of random orders of programs and warps; None: all together.
    """
    launches, fresh, kernel, empty = [], set(), getattr(module, name), torch.empty

    def new(*shape, **options):
        tensor = empty(*shape, **options)
        fresh.add(tensor.untyped_storage().data_ptr())
        return tensor

    def launch(grid, *arguments, **options):
        compiled = sass.compile_for(sm, kernel, lambda: kernel[grid](*arguments, **options))
        launches.append(Launch(compiled, grid[0], list(given(arguments, compiled.src.constants)), fresh))
        launches[-1].run(seed)
        fresh.difference_update(launches[-1].fresh)

    with mock.patch.object(module, name, ByGrid(launch)), mock.patch.object(torch, "empty", new):
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
    for sm in (80, 90):
        for case in module.cases():
            try:
                found = module.execute(sm, *case)
            except (Fault, NotImplementedError) as fault:
                found = {"fault": str(fault)}
            print(json.dumps({"sm": sm, "case": case} | found), flush=True)
    for sm in (80, 90):
        for number, noticed in module.without_barriers(sm):
            print(json.dumps({"sm": sm, "removed": number, "noticed": noticed}), flush=True)


if __name__ == "__main__":
    import ptx  # not this module under another name, whose Fault would be another class
    ptx.main(sys.argv[1])
