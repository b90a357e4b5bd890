"""Run a grid of flags and seeds, and write a table with each cell compared to a control.

    python sweep.py distill.py --method dkd --beta 1 2 4 8 --mixed-target pair dominant --seed 0 1 2       8 cells, 24 runs
    python sweep.py distill.py --method kd dkd --beta 2 8 --seed 0 1 2                3 cells; KD has no beta and is the control
    python sweep.py --jobs 2 --output runs/ablation distill.py --student v2_pico --seed 0 1 2 -- --method kd \\
        -- --method dkd --beta 2 8 -- train_teacher.py --model v2_pico                4 cells, one of them the student alone
    python sweep.py --dry-run distill.py --method dkd --beta 1 2 4 8                  lists the runs

A flag with several values is an axis of the grid; -- separates grids that share the flags before the first --.  Every run is its
own process; those with one teacher and one seed share its logits.  After an interruption the same command continues; runs that
finished or diverged are not repeated.
Writes the runs, logs/, table.md and table.csv to --output.
"""
import os
import shutil
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
    cells = sweep_grid.expand(args.script, args.flags)
    control, output = sweep_grid.find_control(cells, args.control), Path(args.output)
    repeats = range(max(len(cell.seeds) for cell in cells))  # seed by seed, so that pairs are complete early
    jobs = [sweep_jobs.Job(cell, cell.seeds[at], output, ROOT) for at in repeats for cell in cells if at < len(cell.seeds)]
    store = output / "teacher-logits"
    sweep_jobs.share_teacher_logits(jobs, store)
    print(f"{len(jobs)} runs of {len(cells)} cells, {args.jobs} at once, compared with {control.label} -> {output}", flush=True)
    if args.dry_run:
        print(*(job.shown() for job in jobs), sep="\n")
        return

    with lock(output, "sweep"):
        sweep_jobs.record(jobs, output / "sweep.json")
        from cli import sweep_table  # imports SciPy, which is slow
        run(jobs, args.jobs, args.metric)
        failed = [job for job in jobs if job.code]
        results = sweep_jobs.results([job for job in jobs if not job.code], cells)
        rows, note = sweep_table.table(results, control.label, args.metric, len(failed))
        write_atomic(output / "table.csv", as_csv(list(rows[0]), rows))
        write_atomic(output / "table.md", sweep_table.as_markdown(rows, note).encode())
        print("", sweep_table.as_markdown(rows, note), sep="\n", end="", flush=True)
    if failed:
        raise errors.Failure(failed[0].code, f"{len(failed)} of {len(jobs)} runs failed ({failed[0].log}: {failed[0].reason()})",
                             "fix it and repeat the command")
    shutil.rmtree(store, ignore_errors=True)


def run(jobs, at_once: int, metric: str) -> None:
    """Run the jobs without a result, `at_once` in parallel; print each outcome, and on a terminal a live line of them all."""
    waiting = [job for job in jobs if not job.result()]
    done, seconds, threads = len(jobs) - len(waiting), [], max(1, len(os.sched_getaffinity(0)) // at_once)
    print(f"{done} of them are already done", flush=True)
    began, end = time.monotonic(), None
    with ThreadPoolExecutor(at_once) as pool:
        try:
            running = {pool.submit(job.run, threads) for job in waiting}
            while running:
                ended, running = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                for job in (future.result() for future in ended):
                    done += 1
                    seconds.append(job.seconds)
                    left = median_low(seconds) * (len(jobs) - done) / at_once
                    end = time.monotonic() + left
                    say(f"[{done}/{len(jobs)}] {job}: {job.outcome(metric)}  ({clock(job.seconds)}, eta {clock(left)})")
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
