"""Run directories with invented numbers, in the form in which the training scripts leave them."""
import csv
import json


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def write_run(path, config, val_acc1, summary=None, status=None, diagnostics=None):
    """config: of a script, dataset, epochs, seed, networks, method.  val_acc1: of every epoch.

    summary: what replaces invented values of summary.json; None for a run that is unfinished.  diagnostics: rows.
    """
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    write_csv(path / "log.csv", [{"epoch": epoch, "train_loss_kl": "", "val_loss": 1.5, "val_acc1": accuracy, "peak_mem_mb": ""}
                                 for epoch, accuracy in enumerate(val_acc1, 1)])
    if summary is not None:
        distilled, stopped = config["script"] == "distill", len(val_acc1) < config["epochs"]
        (path / "summary.json").write_text(json.dumps({
            "test_acc1_last": 59.0, "test_acc1_best": 60.0, "best_epoch": val_acc1.index(max(val_acc1)) + 1,
            "stopped_early": stopped, "selected_on": "validation split of 5000 training images", "params": 20_000_000,
            "flops": 120_000_000, "teacher_test_acc1": 80.0 if distilled else None, "retention": 75.0 if distilled else None,
            "compression": 5.85 if distilled else None, "wall_s": 90.0, "verdict": "early stop" if stopped else "completed",
            "note": "student initialisation: none" if distilled else "initialisation: none"} | summary))
    if status:
        (path / "status.json").write_text(json.dumps(status))
    if diagnostics:
        write_csv(path / "diagnostics.csv", diagnostics)
    return path
