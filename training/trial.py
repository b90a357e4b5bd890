"""`--amp auto` and `--compile auto`: what ten steps of the networks say is faster.

A trial step is the teacher's forward pass and the student's forward and backward pass on noise; the rest of a step costs the same
in each case.  The contenders take turns, and the median counts.
"""
import time
from statistics import median

import torch

from training.machine import Machine, cannot_compile

STEPS = 10
LONG_S = 600  # of training, from where on the minute that compiling takes is worth a try


def step_ms(machine: Machine, teacher, student, images) -> float:
    """A step on `images`, (N, 3, H, W); milliseconds."""
    started = time.perf_counter()
    machine.begin_step()
    with machine.autocast():
        teacher_logits = teacher(images).float() if teacher is not None else 0.0
        logits = student(images)
    (logits.float() - teacher_logits).square().mean().backward()
    student.zero_grad(set_to_none=True)
    if machine.device.type == "cuda":
        torch.cuda.synchronize(machine.device)
    return 1000 * (time.perf_counter() - started)


def compare(machines: dict[str, Machine], networks, batch_size: int, image_size: int) -> dict[str, float]:
    """Milliseconds of a step by the name of each machine.  networks: makes (teacher or None, student) for a machine."""
    with torch.random.fork_rng():
        noise = torch.rand(batch_size, 3, image_size, image_size)
        runners = {}
        for name, machine in machines.items():
            teacher, student = networks(machine)
            images = noise.to(machine.device, machine.dtype, memory_format=torch.channels_last)
            compiled = (machine.compile(net) if net is not None else None for net in (teacher, student.train()))
            runners[name] = (machine, *compiled, images)
        taken = {name: [] for name in runners}
        for _ in range(STEPS + 1):
            for name, runner in runners.items():
                taken[name].append(step_ms(*runner))
    return {name: median(times[1:]) for name, times in taken.items()}


def settle(machine: Machine, networks, batch_size: int, image_size: int, steps: int) -> Machine:
    """`machine` with what is "auto" in it settled; prints how.  steps: of the whole run."""
    def eager(precision):
        return machine._replace(precision=precision, compiled=False)

    ms = None
    if machine.precision == "auto":
        ms = compare({name: eager(name) for name in ("off", "bf16")}, networks, batch_size, image_size)
        machine = machine._replace(precision=min(ms, key=ms.get))
        print(f"--amp auto: {machine.precision}; the networks took {ms['bf16']:.1f} ms a step in bf16, {ms['off']:.1f} in fp32")
    if machine.compiled == "auto":
        now = machine.precision
        each = ms[now] if ms else compare({now: eager(now)}, networks, batch_size, image_size)[now]
        if each * steps < 1000 * LONG_S:
            print(f"--compile auto: no, because the run takes about {each * steps / 60000:.1f} minutes")
            return eager(now)
        print("--compile auto: compiling the networks, which takes a minute or more", flush=True)
        try:
            ms = compare({"eager": eager(now), "compiled": machine._replace(compiled=True)}, networks, batch_size, image_size)
        except Exception as failure:
            reason = cannot_compile(failure)
            if reason is None:
                raise
            print(f"--compile auto: no, because they cannot be compiled ({reason})")
            return eager(now)
        machine = machine._replace(compiled=ms["compiled"] < ms["eager"])
        print(f"--compile auto: {'yes' if machine.compiled else 'no'}; the networks took {ms['compiled']:.1f} ms a step "
              f"compiled, {ms['eager']:.1f} as they are")
    return machine
