"""The parts of a run that both scripts share: run directory, lock, resuming, data, log, summary."""
import time
from contextlib import ExitStack
from pathlib import Path

import torch

import models
from augment import is_fused
from cli import options
from data import datasets
from data.imagefolder import Unreadable
from data.split import Split
from diagnostics.alarms import judge
from diagnostics.classes import Confusion
from losses.cross_entropy import class_weights_of
from plots import confusion
from rundir import resume
from rundir.checkpoint import Writer
from rundir.errors import CHECKPOINT, DATA, USAGE, Failure
from rundir.files import as_csv, write_atomic
from rundir.identity import listed
from rundir.run_directory import EpochRow, RunDirectory
from rundir.terminal import say
from training.cuda_graph import use_cuda_graph
from training.device import RunContext, global_batch_size, micro_batches, set_threads
from training.evaluation import EarlyStop, Evaluation, count, evaluate
from training.grad_checkpoint import recompute
from training.metrics import Progress
from training.optimization import Recipe

CLEAN = 512  # training images, at least (at most twice as many), for the accuracy without augmentation
CLASS_COLUMNS = ("class", "train_images", "val_images", "test_images", "val_acc1", "test_acc1")  # of classes.csv
CONFUSION_CORNER = "true/predicted"  # of confusion.csv: no folder, and so no class, has a slash in its name
FROM_LOG = ("grad_norm_mean", "clip_frac")  # columns that diagnostics.csv has, too


class Run:
    """A training run, from the lock on its directory to its summary; the script keeps the loop.

    `with Run(...) as run:` locks --output and finds the checkpoint for --resume; if `run.finished`, the run is complete.
    Call `start`, iterate over `epochs`, call `end_training` and `end_epoch` in each, and `close` after the last.
    args: of cli.options.  config: must be the same when the run is resumed.
    """

    def __init__(self, args, config: dict, context: RunContext):
        self.args, self.config, self.context, self.ranks = args, config, context, context.ranks
        models.check_name(config.get("student") or config["model"])
        if args.overwrite:
            for path in (path for name in ("teacher_checkpoint", "init", "student_init") for path in listed(config.get(name))):
                if path and Path(path).resolve().parent == Path(args.output).resolve():
                    raise Failure(USAGE, f"--overwrite would delete the initial weights of the run ({path})",
                                  "choose another --output")
        self.directory = RunDirectory(args.output, overwrite=args.overwrite, resume=args.resume, writes=self.ranks.is_main)
        self.stop = EarlyStop(args.monitor, args.patience)

    def __enter__(self):
        with ExitStack() as stack:
            stack.enter_context(self.ranks)
            stack.enter_context(self.directory)
            self.writer = stack.enter_context(Writer())
            self.saved = self.ranks.broadcast(lambda: resume.find(self.directory, self.config))
            self.began = self.saved["began"] if self.saved else {}
            set_threads(self.began.setdefault("threads", torch.get_num_threads()))
            self.finished = False
            if self.saved and self.saved["has_summary"]:  # written last: of a complete run
                self.stop.load_state_dict(self.saved["stop"])
                self.finished = self.saved["epoch"] >= self.args.epochs or self.stop.stop
            if self.finished and self.saved["config"]["data_dir"] != self.args.data_dir:
                self.load_data()  # raises if the images differ
            if self.finished:
                print(f"already finished ({self.directory.path}): {self.saved['epoch']} epochs{', early stop' * self.stop.stop}, "
                      f"best epoch {self.stop.best_epoch}")
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *failure):
        return self.stack.__exit__(*failure)

    def load_data(self) -> datasets.Dataset:
        try:
            with self.ranks.local_main_first():
                self.data = datasets.load(**options.data(self.args), device=self.context.device)
        except Unreadable as failure:
            raise Unreadable(failure.files, failure.total, self.directory.list_unreadable(failure.files)) from None
        self.directory.list_unreadable(self.data.unreadable)
        if self.began.setdefault("data_sha256", self.data.fingerprint) != self.data.fingerprint:
            raise Failure(DATA, f"images, labels or classes differ from those at the start of the run ({self.data.name})",
                          "restore them, or start another run in another --output")
        self.class_weights = class_weights_of(self.args.class_weights, self.data.train.labels, len(self.data.classes))
        self.batch_size = global_batch_size(self.args.batch_size, self.data, self.context)
        self.micro_batches = micro_batches(self.ranks.rows(self.args.batch_size), self.args.grad_accum or 1)
        self.rows_at_once = len(self.micro_batches[0])
        images, augmented = self.data.train.stored, options.augmentation(self.args)["image_size"]
        stride = max(1, len(self.data.train.labels) // CLEAN)
        self.clean = Split(self.data.train.part(slice(None, None, stride)), self.data.train.labels[::stride])
        self.cuda_graph = use_cuda_graph(self.args.cuda_graph, self.context, deterministic=self.args.deterministic,
                                         grad_checkpoint=self.args.grad_checkpoint,
                                         fused=is_fused(images, augmented or self.data.image_size))
        return self.data

    def new_network(self, name: str, *, pretrained: bool, init: str | None):
        """The network to train, on the device; `net.info` is the metadata of best.pt.  `start` restores the checkpoint."""
        data, sizes = self.data, models.input_sizes(self.args.image_size, self.data.image_size, self.args.crop)
        image_size = sizes["image_size"]
        with self.ranks.local_main_first():
            net = models.build(name, len(data.classes), image_size)
            if not self.saved:
                self.began["init_sha256"] = models.initialise(net, name, pretrained=pretrained, init=init)
        if self.args.grad_checkpoint:
            recompute(net, name)
        net.info = {"model": name, "classes": data.classes, **sizes, "mean": list(data.mean), "std": list(data.std),
                    "dataset": self.args.dataset, "data_sha256": data.fingerprint, "seed": self.args.seed,
                    "amp": self.context.precision}
        print(f"{data}\n{'student ' * ('student' in self.config)}{models.describe(name, net, image_size)}")
        return net.to(self.context.device)

    def wrap(self, net):
        """`net`, under DDP if several processes train it, and compiled with --compile."""
        if net.training:
            net = self.ranks.data_parallel(net, self.args.seed, (3, net.info["image_size"], net.info["image_size"]))
        return self.context.compile(net, self.cuda_graph)

    def start(self, update, metrics, diagnostics, teacher=None, **facts) -> None:
        """Write the first files, or restore the checkpoint.  facts: further entries of config.json."""
        self.update, self.metrics, self.diagnostics = update, metrics, diagnostics
        if "nckd" in diagnostics.method.record.terms and len(self.data.classes) == 2:
            print("with two classes NCKD is 0 by definition: --beta has no effect")
        facts |= {"teacher": teacher.info["model"]} if teacher else {}
        self.directory.open(self.config | self.began | facts | {"image_size": update.net.info["image_size"]},
                            update.checkpoint_bytes, self.saved["epoch"] if self.saved else 0)
        self.first = resume.restore(self, self.saved)
        self.progress = Progress(self.args.epochs, metrics.steps, self.batch_size)

    def epochs(self):
        """The epochs to train, from 1 or after the restored one, up to --epochs or the early stop."""
        for self.epoch in range(self.first, self.args.epochs + 1):
            if self.stop.stop:
                return
            self.begun = time.perf_counter()
            yield self.epoch

    def end_training(self, lr: float) -> None:
        """Read the epoch's metrics, which waits for the device, and average running statistics.  lr: of the last step."""
        self.lr, self.samples = lr, self.batch_size * self.metrics.taken
        self.columns, clipping = self.metrics.epoch_columns(self.epoch)
        self.columns["amp_scale"] = self.update.amp_scale()
        self.measured = clipping | self.diagnostics.columns()
        self.update.sync_buffers()
        self.trained = time.perf_counter()

    def evaluate(self, net, split) -> Evaluation:
        return evaluate(net, split, self.data.mean, self.data.std, self.context, self.rows_at_once)

    def end_epoch(self, val: Evaluation, **more) -> None:
        """Save the epoch and print its line.  more: columns of log.csv that only this script has."""
        best, evaluated, train_s = self.stop.update(self.epoch, val), time.perf_counter(), self.trained - self.begun
        device = self.context.device
        on_gpu = device.type == "cuda"
        row = EpochRow(
            epoch=self.epoch, lr=self.lr, **self.columns, **val.columns(), **self.stop.columns(), **more, samples=self.samples,
            images_per_s=self.samples / train_s, epoch_s=train_s, val_s=evaluated - self.trained,
            total_s=self.directory.elapsed(),
            peak_mem_mb=round(torch.cuda.max_memory_allocated(device) / 2**20, 1) if on_gpu else None)
        clean = self.evaluate(self.update.evaluated, self.clean).acc1
        if self.epoch == self.first and on_gpu:
            reserved, total = torch.cuda.max_memory_reserved(device), torch.cuda.mem_get_info(device)[1]  # with CUDA graphs
            say(f"peak memory in the first epoch: {reserved / 2**30:.1f} of {total / 2**30:.1f} GiB")
        diagnostics = {"epoch": self.epoch, **{name: self.columns[name] for name in FROM_LOG}, **self.measured,
                       **val.class_columns(len(self.data.classes)), "train_acc1_clean": clean}
        resume.save(self, row, diagnostics, self.update.net.info if best else None)
        self.progress.epoch(row, best)

    def close(self, note: str, teacher=None, teacher_acc1: float | None = None, **more) -> None:
        """Evaluate the last weights and best.pt once on the test set, and write the results.

        more: entries of summary.json that only this script has.
        """
        self.writer.wait()
        self.ranks.barrier()  # rank 0 writes best.pt
        path, net, rows, data = self.directory / "best.pt", self.update.net, self.directory.rows, self.data
        best_net = models.load(path, self.context.device)
        if best_net.info["epoch"] != self.stop.best_epoch:  # continued from prev.pt with flags under which it is not the best
            raise Failure(CHECKPOINT, f"best.pt is of another epoch than the best ({path}: {best_net.info['epoch']}, not "
                                      f"{self.stop.best_epoch})", "start the run again with --overwrite")
        evaluation = self.evaluate(best_net, data.test)
        best = evaluation.acc1
        last = best if self.stop.best_epoch == len(rows) else self.evaluate(self.update.evaluated, data.test).acc1
        test = evaluation.confusion(data.test.labels, data.classes)
        val = test if data.val is data.test else self.evaluate(best_net, data.val).confusion(data.val.labels, data.classes)
        if self.ranks.is_main:
            models.save(path, best_net, **best_net.info | {"test_acc1": best})
            self.write_classes(val, test)
        stopped, params = len(rows) < self.args.epochs, models.parameters(net)
        self.directory.close({
            "test_acc1_last": last, "test_acc1_best": best, "best_epoch": self.stop.best_epoch, "epochs": len(rows),
            "stopped_early": stopped, "selected_on": self.data.selected_on, "unreadable": len(self.data.unreadable),
            "params": params, "flops": models.flops(net, net.info["image_size"]),
            "teacher_test_acc1": teacher_acc1, "teacher_params": teacher and teacher.size,
            "retention": 100 * best / teacher_acc1 if teacher_acc1 else None, "compression": teacher and teacher.size / params,
            "test_balanced_acc1": test.balanced_accuracy, "chance": val.chance, "val_images": int(val.labels.sum()),
            **judge(self.diagnostics.method, Recipe.of(self.args), self.args.monitor, rows, self.directory.diagnostics_rows, val,
                    stopped),
            "note": note, **more,
        })

    def write_classes(self, val: Confusion, test: Confusion) -> None:
        train = count(self.data.train.labels, len(val.names))
        columns = (test.names, map(int, train), val.labels, test.labels, val.accuracies, test.accuracies)
        rows = [dict(zip(CLASS_COLUMNS, row)) for row in zip(*columns)]
        write_atomic(self.directory / "classes.csv", as_csv(list(CLASS_COLUMNS), rows))
        header = [CONFUSION_CORNER, *test.names]
        write_atomic(self.directory / "confusion.csv", as_csv(header, [dict(zip(header, (name, *row)))
                                                                       for name, row in zip(test.names, test.counts.tolist())]))
        if len(test.names) <= confusion.MOST:
            title = f"test set, best weights: accuracy {100 * test.counts.trace() / test.counts.sum():.2f} %, "
            write_atomic(self.directory / "confusion.png", confusion.picture(
                test, f"{title}mean over the classes {test.balanced_accuracy:.2f} %"))
