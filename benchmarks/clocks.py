"""How long one call takes, on the host's clock or as a CUDA graph on the GPU's, and how much memory."""
import itertools
import time

import torch

from benchmarks import table
from rundir.errors import first_line


def captured(call, pool):
    """The replay of a CUDA graph of `call`, None where it cannot be captured.  Graphs of one pool reuse each other's memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and makes what is made once
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


def peak_bytes(call, device) -> int:
    """The most that is allocated at a time during one call."""
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


def wall_us(call, calls: int, device) -> float:
    table.synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    table.synchronize(device)
    return (time.perf_counter() - started) / calls * 1e6


def graph_us(replay, flush) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    start.record()
    replay()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) * 1e3
