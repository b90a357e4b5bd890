"""What a Triton launch compiles to on GPUs that are not here: `python sass.py FILE` -> one JSON object per launch and
architecture.

FILE defines `launches()`, which yields (a dict that says what it is, kernel, call): `call()` runs the real launcher on CPU
tensors, so types, alignment and tile sizes are those of a real launch; instead of being launched, `kernel` is compiled by the
assembler inside the Triton wheel, and disassembled, for each of the ARCHITECTURES.  Needs a process of its own, since here Triton
must not interpret.
"""
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import triton
from packaging.version import Version

ARCHITECTURES = (80, 90, 120)
OLD = Version(triton.__version__) < Version("3.8")  # takes more registers and instructions, as the tests say


def inspect(file) -> list[dict]:
    """A dict of each launch in `file`: sm, limit (of registers), registers, spills (instructions), stack (bytes), instructions
    (the kernel's length, padding included), warps, loads128, stores128, fused (FFMA)."""
    return in_a_process(__file__, file)


def in_a_process(*command) -> list[dict]:
    """What `python COMMAND` prints, one JSON object a line, where Triton compiles: the process of the tests has it interpret."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)])}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def load(file):
    """The module of a file."""
    specification = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


class OfflineDriver:
    """Stands in for Triton's CUDA driver: names the GPU to compile for and can launch nothing."""

    def __init__(self, sm: int):
        from triton.backends.compiler import GPUTarget
        self.target = GPUTarget("cuda", sm, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # the kernel cache is per device

    def get_current_stream(self, device=None):
        return 0


def compile_for(sm: int, kernel, call):
    """The compiled kernel of the one launch that `call()` makes."""
    from triton.runtime import driver
    compiled, run = [], kernel.run
    kernel.run = lambda *arguments, grid, warmup, **options: compiled.append(run(*arguments, grid=grid, warmup=True, **options))
    driver.set_active(OfflineDriver(sm))
    try:
        call()
    finally:
        driver._active, kernel.run = None, run  # reset_active() would look for a real driver
    (only,) = compiled
    return only.result() if hasattr(only, "result") else only


TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def run_on_cubin(compiled, tool: str, *options) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        return subprocess.run([TOOLS / tool, *options, cubin.name], capture_output=True, text=True, check=True).stdout


def resources(compiled) -> dict:
    """Of a kernel from `compile_for`; a kernel that spills registers has a stack."""
    usage = run_on_cubin(compiled, "cuobjdump", "--dump-resource-usage")
    return {
        "limit": compiled.metadata.maxnreg or 255, "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]), "warps": compiled.metadata.num_warps,
        "loads128": len(re.findall(r"ld\.global(?:\.L1\S*)?\.(?:v4\.b32|v2\.b64)", compiled.asm["ptx"])),
        "stores128": len(re.findall(r"st\.global(?:\.L1\S*)?\.(?:v4\.b32|v2\.b64)", compiled.asm["ptx"])),
    }


@cache
def describe(compiled) -> dict:
    """Of a kernel from `compile_for`, which is the same object for every launch of one specialisation; takes half a second."""
    sass = run_on_cubin(compiled, "nvdisasm", "-c")
    return resources(compiled) | {
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/\s", sass)),
        "fused": len(re.findall(r"\bFFMA\b", sass)),
    }


if __name__ == "__main__":
    for about, kernel, call in load(sys.argv[1]).launches():
        for sm in ARCHITECTURES:
            print(json.dumps(about | {"sm": sm} | describe(compile_for(sm, kernel, call))), flush=True)
