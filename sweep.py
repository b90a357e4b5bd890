"""Run a grid of flags and seeds, and write a table with each cell compared to a control.

    python sweep.py distill.py --method dkd --beta 1 2 4 8 --mixed-target pair dominant --seed 0 1 2       8 cells, 24 runs
    python sweep.py distill.py --method kd dkd --beta 2 8 --seed 0 1 2                3 cells; KD has no beta and is the control
    python sweep.py --jobs 2 --output runs/ablation distill.py --student v2_pico --seed 0 1 2 -- --method kd \\
        -- --method dkd --beta 2 8 -- train_teacher.py --model v2_pico                4 cells, one of them the student alone
    python sweep.py distill.py --seed 0 1 --sweep low --lr 1e-4 --method kd dkd --sweep high --lr 1e-2 --beta 2 8    2 tables
    python sweep.py --dry-run distill.py --method dkd --beta 1 2 4 8                  lists the runs

A flag with several values is an axis of the grid; -- separates grids that share the flags before the first --.  --sweep NAME
begins a sweep with its own table, in --output/NAME; all have the flags before the first --sweep.  Every run is its own process;
those of a sweep with one teacher and one seed share its logits.  After an interruption the same command continues; runs that
finished or diverged are not repeated.
Writes the runs, logs/, table.md and table.csv to --output.
"""
import os
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from signal import SIGTERM
from statistics import median_low

from cli import sweep_grid, sweep_jobs
from rundir import errors
from rundir.files import as_csv, lock, write_atomic
from rundir.terminal import clock, live, say

ROOT = Path(__file__).resolve().parent


def main(args):
    output, sweeps = Path(args.output), []
    for name, words in sweep_grid.named(args.flags).items():
        cells = sweep_grid.expand(args.script, words)
        sweeps.append(sweep_jobs.Sweep(name, output / name, cells, sweep_grid.find_control(cells, args.control), ROOT))
        print(f"{len(sweeps[-1].jobs)} runs of {len(cells)} cells, {args.jobs} at once, compared with {sweeps[-1].control.label} "
              f"-> {sweeps[-1].output}", flush=True)
    jobs = [job for each in sweeps for job in each.jobs]
    if args.dry_run:
        print(*(job.shown() for job in jobs), sep="\n")
        return
    with lock(output, "sweep"):
        for each in sweeps:
            each.record()
        from cli import sweep_table  # imports SciPy, which is slow
        run(jobs, args.jobs, args.metric)
        for each in sweeps:
            failures = sum(job.code > 0 for job in each.jobs)
            rows, note = sweep_table.table(each.results(), each.control.label, args.metric, failures)
            write_atomic(each.output / "table.csv", as_csv(list(rows[0]), rows))
            write_atomic(each.output / "table.md", sweep_table.as_markdown(rows, note).encode())
            print("", sweep_table.as_markdown(rows, note), sep="\n", end="", flush=True)
    failed = [job for job in jobs if job.code]
    if failed:
        raise errors.Failure(failed[0].code, f"{len(failed)} of {len(jobs)} runs failed ({failed[0].log}: {failed[0].reason()})",
                             "fix it and repeat the command")


def run(jobs, at_once: int, metric: str) -> None:
    """Run the jobs without a result, `at_once` in parallel; print each outcome, and on a terminal a live line of them all."""
    waiting = [job for job in jobs if not job.result()]
    sweep_jobs.start_server(ROOT, waiting)
    done, epoch_s, threads = len(jobs) - len(waiting), [], max(1, len(os.sched_getaffinity(0)) // at_once)
    print(f"{done} of them are already done", flush=True)
    epochs, began, end = sum(job.flags["epochs"] for job in waiting), time.monotonic(), None
    with ThreadPoolExecutor(at_once) as pool:
        try:
            running = {pool.submit(job.run, threads) for job in waiting}
            while running:
                ended, running = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                for job in (future.result() for future in ended):
                    done, epochs = done + 1, epochs - job.flags["epochs"]
                    epoch_s.append(job.seconds / job.flags["epochs"])
                    left = median_low(epoch_s) * epochs / at_once
                    end = time.monotonic() + left
                    say(f"[{done}/{len(jobs)}] {job}: {job.outcome(metric)}  ({clock(job.seconds)}, eta {clock(left)})")
                    job.sweep.tidy()
                if running:
                    now = time.monotonic()
                    eta = f", eta {clock(max(0.0, end - now))}" if end else ""
                    live(f"{done} of {len(jobs)} runs, {min(at_once, len(running))} running, {clock(now - began)}{eta}")
        except BaseException as failure:
            for job in waiting:
                job.stop(getattr(failure, "number", SIGTERM))
            raise


if __name__ == "__main__":
    errors.run(main, sweep_grid.parse_sweep(*__doc__.split("\n\n", 1)))
