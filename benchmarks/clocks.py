"""Wall time, CUDA graph time, kernels and peak memory of a call."""
import itertools
import time

import torch

from rundir.errors import first_line


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(calls: dict, time_one, repeats: int) -> dict[str, list[float]]:
    """The times of each call; the calls take turns within a repeat."""
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(time_one(call))
    return times


def wall_us(call, calls: int, device) -> float:
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - started) / calls * 1e6


def captured(call, pool=None, warm_ups: int = 3):
    """The replay of a CUDA graph of `call`; None where capture fails.  Graphs of one pool share memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(warm_ups):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, pool=pool):
            call()
        return graph.replay
    except RuntimeError as failure:
        print(f"  not captured: {first_line(failure)}")
        torch.cuda.synchronize()
        return None


def graph_us(replay, flush) -> float:
    """Of one replay, after `flush` has overwritten the L2 cache."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    start.record()
    replay()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) * 1e3


def kernels_of(call) -> tuple[int, float]:
    """How many CUDA kernels and copies `call` starts, and their microseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    found = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(found), sum(event.time_range.elapsed_us() for event in found)


def peak_bytes(call, device) -> int:
    """The most that PyTorch allocates at a time during one call."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
