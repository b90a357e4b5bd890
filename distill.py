"""Distil a saved teacher into a student, with KD or DKD.

    python distill.py --method kd                              the recipe of experiment v2, teacher from runs/teacher/best.pt
    python distill.py --method dkd --beta 8                    the setting that is said to collapse
    python distill.py --experiment v3.1 --seed 2               a preset of the study (v1, v2, v3, v3.1, v4)
    python distill.py --experiment v2 --resume auto            whatever happened to it: goes on, or starts
    torchrun --nproc-per-node 2 distill.py --batch-size 64     on two GPUs, 64 images each

Teacher and student see the same augmented images; the criterion reads both logits and both labels of each mixed image.
To add a method: a file and a line in losses/, and its numbers in training/options.py.  Leaves log.csv, summary.json,
best.pt and last.pt in --output; plots/make_figures.py draws them.
"""
import time
from pathlib import Path

from training import options, runlog


def main(args):
    import torch

    from augment import BatchAugmenter
    from losses import METHODS
    from training import checkpoint, loop, models
    from training import data as datasets

    machine = loop.prepare_machine(args.device, args.amp, args.seed, args.kernels, args.deterministic)
    config = vars(args) | {"script": "distill"} | machine.describe()
    runlog.announce(config, options.objective(args))
    if args.dry_run:
        return

    if not Path(args.teacher_checkpoint).exists():
        raise runlog.Failure(runlog.CHECKPOINT, f"no teacher ({args.teacher_checkpoint})",
                             "train one first: python train_teacher.py, or name one with --teacher-checkpoint")
    config["teacher_sha256"] = checkpoint.digest(args.teacher_checkpoint)
    ranks = machine.ranks
    directory = runlog.RunDirectory(args.output, overwrite=args.overwrite, resume=args.resume, writes=ranks.first)
    with ranks, directory as run, checkpoint.Writer() as writer:
        saved, stop = ranks.decide(lambda: checkpoint.find(run, config)), loop.EarlyStop(args.monitor, args.patience)
        if checkpoint.is_finished(run, saved, args.epochs, stop):
            return
        teacher = models.load(args.teacher_checkpoint, machine.device, machine.dtype)
        with ranks.in_turn():
            data = datasets.load(**options.data(args), device=machine.device)
            image_size = args.image_size or data.image_size
            student = models.build(args.student, len(data.classes), image_size)
            if not saved:
                models.initialise(student, args.student, pretrained=args.student_init == "imagenet",
                                  init=None if args.student_init in ("none", "imagenet") else args.student_init)
        student.to(machine.device)
        batch_size = loop.global_batch_size(args.batch_size, data, machine)
        teacher_test = loop.check_teacher(teacher, data, machine, args.batch_size)
        teacher_val = loop.evaluate(teacher, data.val, data.mean, data.std, machine, args.batch_size)
        augmenter = BatchAugmenter(*data.train, **options.augmentation(args), mean=data.mean, std=data.std, dtype=machine.dtype,
                                   batch_size=batch_size)
        update = loop.Update(student, loop.build_optimizer(student, args), machine, args.clip_grad, args.model_ema)
        model, rows = ranks.parallel(student, args.seed, (3, image_size, image_size)), ranks.rows(args.batch_size)
        criterion, numbers = METHODS[args.method], options.loss_numbers(args)
        card = {"model": args.student, "classes": data.classes, "image_size": image_size, "mean": list(data.mean),
                "std": list(data.std), "dataset": args.dataset, "seed": args.seed}
        print(f"{data}\n"
              f"teacher {teacher.info['model']}: {models.parameters(teacher) / 1e6:.2f} M parameters, "
              f"{teacher.info['image_size']} pixels, test accuracy {teacher_test.acc1:.2f} %\n"
              f"student {args.student}: {models.parameters(student) / 1e6:.2f} M parameters")
        run.open(config | {"teacher": teacher.info["model"], "image_size": image_size}, update.checkpoint_bytes)

        state = checkpoint.State(run, writer, config, update=update, stop=stop, ranks=ranks)
        first = state.restore(saved)
        means, progress = loop.Means(machine, augmenter.steps), loop.Progress(args.epochs, augmenter.steps, first)
        for epoch in range(first, args.epochs + 1):
            if stop.stop:
                break
            begun = time.perf_counter()
            student.train()
            augmenter.set_epoch(epoch)
            numbers |= options.ramped(args, epoch)
            for step in range(augmenter.steps):
                lr = loop.learning_rate((epoch - 1) * augmenter.steps + step, args, augmenter.steps)
                batch = augmenter(step, rows)
                with machine.autocast():
                    with torch.no_grad():
                        teacher_logits = teacher(batch.images)
                    logits = model(batch.images)
                loss, terms = criterion(logits, teacher_logits, batch.targets, **numbers)
                skipped = update(loss, lr)
                means.add(batch_size, skipped, loop.accuracy(logits, batch.targets.dominant), train_loss=loss,
                          **{f"train_loss_{name}": term for name, term in terms.items()})
                progress.step(epoch, step, lr, means)
            columns = means.epoch_columns(epoch) | update.epoch_columns()  # the epoch's one wait for the device
            update.agree()
            trained = time.perf_counter()
            val = loop.evaluate(update.evaluated, data.val, data.mean, data.std, machine, args.batch_size)
            best = stop.update(epoch, val)
            evaluated, samples = time.perf_counter(), augmenter.steps * batch_size
            state.save(runlog.EpochRow(
                epoch=epoch, lr=lr, **columns, **val.columns(), **stop.columns(), teacher_agree=val.agreement(teacher_val),
                samples=samples, images_per_s=samples / (trained - begun), epoch_s=trained - begun, val_s=evaluated - trained,
                total_s=run.elapsed(), peak_mem_mb=machine.peak_memory_mb()), card if best else None)
            progress.epoch(run.rows[-1], best)

        writer.wait()
        results = loop.test(run, update.evaluated, data, machine, args.batch_size)
        run.close(results | {
            "best_epoch": stop.best_epoch, "epochs": len(run.rows), "stopped_early": len(run.rows) < args.epochs,
            "selected_on": data.selected_on,
            "params": models.parameters(student), "flops": models.flops(student, image_size),
            "teacher_test_acc1": teacher_test.acc1, "teacher_params": models.parameters(teacher),
            "retention": 100 * results["test_acc1_best"] / teacher_test.acc1,
            "compression": models.parameters(teacher) / models.parameters(student),
            "verdict": runlog.verdict(run.rows, len(data.classes), len(run.rows) < args.epochs),
            "note": f"student initialisation: {args.student_init}",
        })


if __name__ == "__main__":
    arguments = options.parse_distill(*__doc__.split("\n\n", 1))
    runlog.run(main, arguments)
