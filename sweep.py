"""Run a grid of flags times seeds, and make one table of it, each cell compared with a control.

    python sweep.py distill.py --method dkd --beta 1 2 4 8 --mixed-target pair dominant --seed 0 1 2       8 cells, 24 runs
    python sweep.py distill.py --method kd dkd --beta 2 8 --seed 0 1 2                3 cells: KD has no beta, and is the control
    python sweep.py --jobs 2 --output runs/ablation distill.py --student v2_pico --seed 0 1 2 -- --method kd \\
        -- --method dkd --beta 2 8 -- train_teacher.py --model v2_pico                four cells, the student alone among them
    python sweep.py --dry-run distill.py --method dkd --beta 1 2 4 8                  lists the runs

A flag with several values is an axis of the grid; -- separates grids that share the flags before the first --.  Every run is a
process of its own.  Killed or stopped, the same command goes on; what has finished, or diverged, is not run again.
Leaves the runs, logs/, table.md and table.csv in --output.
"""
import signal
import time
from pathlib import Path

from cli import sweep_grid, sweep_jobs
from rundir import errors
from rundir.files import as_csv, write_atomic, write_json
from rundir.terminal import clock

ROOT = Path(__file__).resolve().parent
LOOK = 0.1  # seconds between two looks at the processes


def main(args):
    cells = sweep_grid.expand(args.script, args.flags)
    control, output = sweep_grid.find_control(cells, args.control), Path(args.output)
    repeats = range(max(len(cell.seeds) for cell in cells))  # a seed of every cell before the next: pairs are complete early
    jobs = [sweep_jobs.Job(cell, cell.seeds[at], output, ROOT) for at in repeats for cell in cells if at < len(cell.seeds)]
    print(f"{len(jobs)} runs of {len(cells)} cells, {args.jobs} at once, compared with {control.label} -> {output}", flush=True)
    if args.dry_run:
        print(*(each.shown() for each in jobs), sep="\n")
        return

    with sweep_jobs.alone(output), errors.stopping_on_signals():
        try:
            record(jobs, output / "sweep.json")
            from cli import sweep_table  # not before: SciPy takes its time
            run(jobs, args.jobs, args.metric)
            failed = [each for each in jobs if each.code]
            results = sweep_jobs.results([each for each in jobs if each not in failed], cells)
            rows, note = sweep_table.table(results, control.label, args.metric, len(failed))
            write_atomic(output / "table.csv", as_csv(list(rows[0]), rows))
            write_atomic(output / "table.md", sweep_table.as_markdown(rows, note).encode())
            print("", sweep_table.as_markdown(rows, note), sep="\n", end="", flush=True)
        except BaseException as failure:
            signalled = getattr(failure, "number", None)
            sweep_jobs.stop(jobs, signalled or signal.SIGTERM)
            if signalled:
                raise errors.Failure(errors.STOPPED + signalled, f"stopped ({failure})", "the same command goes on") from None
            raise
    if failed:
        raise errors.Failure(failed[0].code, f"{len(failed)} of {len(jobs)} runs failed ({failed[0].log}: {failed[0].reason()})",
                             "mend it, and the same command goes on")


def record(jobs, path: Path) -> None:
    """Check what earlier runs left, before any is started; and note with which flags each was begun."""
    recorded = sweep_jobs.read_json(path) or {}
    if not all(isinstance(flags, dict) for flags in recorded.values()):
        raise sweep_jobs.damaged(path, "not the flags of runs")
    others = recorded.keys() - {each.directory.name for each in jobs}
    if others:
        print(f"the tables there will be of this sweep; {len(others)} runs of another are left out: {min(others)}, ...")
    for each in jobs:
        recorded[each.directory.name] = each.compare(recorded.get(each.directory.name))
        each.result()
    write_json(path, recorded)


def run(jobs, at_once: int, metric: str) -> None:
    """Run what has not ended, `at_once` at a time, and say how each ended."""
    waiting, active, ended, took = list(jobs), [], 0, []
    while waiting or active:
        active += [waiting.pop(0) for _ in range(min(at_once - len(active), len(waiting)))]
        over = [each for each in active if each.ended(at_once)]
        for each in over:
            active.remove(each)
            ended, took = ended + 1, took + [each.seconds] * (each.seconds > 0)
            left = f", eta {clock(sorted(took)[(len(took) - 1) // 2] * (len(jobs) - ended) / at_once)}" if took else ""
            print(f"[{ended}/{len(jobs)}] {each}: {each.outcome(metric)}  "
                  f"({clock(each.seconds) if each.seconds else 'it was there'}{left})", flush=True)
        if not over:
            time.sleep(LOOK)


if __name__ == "__main__":
    errors.run(main, sweep_grid.parse_sweep(*__doc__.split("\n\n", 1)))
