"""Train one network on labels alone: the teacher, or the student without one as the control.

    python train_teacher.py                                                    EfficientNetV2-L on CIFAR-100
    python train_teacher.py --model efficientnet_v2_s --output runs/alone      the student's size, for comparison
    python train_teacher.py --dataset imagefolder --data-dir photos            your own images: photos/train/CLASS/*.jpg
    python train_teacher.py --resume auto                                      whatever happened to it: goes on, or starts
    torchrun --nproc-per-node 2 train_teacher.py --batch-size 64               on two GPUs, 64 images each

The data live on the device as uint8; every step augments a batch there, reads both labels of each mixed image and makes
one optimizer step.  Leaves log.csv, summary.json, best.pt and last.pt in --output.
"""
import time

from training import options, runlog


def main(args):
    from augment import BatchAugmenter
    from losses import mixed_ce
    from training import checkpoint, loop, models
    from training import data as datasets

    machine = loop.prepare_machine(args.device, args.amp, args.seed, args.kernels, args.deterministic)
    pretrained = models.is_torchvision(args.model) and not args.init if args.pretrained is None else args.pretrained
    config = vars(args) | {"script": "train_teacher", "pretrained": pretrained} | machine.describe()
    runlog.announce(config, options.objective(args))
    if args.dry_run:
        return

    ranks = machine.ranks
    directory = runlog.RunDirectory(args.output, overwrite=args.overwrite, resume=args.resume, writes=ranks.first)
    with ranks, directory as run, checkpoint.Writer() as writer:
        saved, stop = ranks.decide(lambda: checkpoint.find(run, config)), loop.EarlyStop(args.monitor, args.patience)
        if checkpoint.is_finished(run, saved, args.epochs, stop):
            return
        with ranks.in_turn():
            data = datasets.load(**options.data(args), device=machine.device)
            image_size = args.image_size or data.image_size
            net = models.build(args.model, len(data.classes), image_size)
            if not saved:
                models.initialise(net, args.model, pretrained=pretrained, init=args.init)
        net.to(machine.device)
        batch_size = loop.global_batch_size(args.batch_size, data, machine)
        augmenter = BatchAugmenter(*data.train, **options.augmentation(args), mean=data.mean, std=data.std, dtype=machine.dtype,
                                   batch_size=batch_size)
        update = loop.Update(net, loop.build_optimizer(net, args), machine, args.clip_grad, args.model_ema)
        model, rows = ranks.parallel(net, args.seed, (3, image_size, image_size)), ranks.rows(args.batch_size)
        card = {"model": args.model, "classes": data.classes, "image_size": image_size, "mean": list(data.mean),
                "std": list(data.std), "dataset": args.dataset, "seed": args.seed}
        print(f"{data}\n{args.model}: {models.parameters(net) / 1e6:.2f} M parameters")
        run.open(config | {"image_size": image_size}, update.checkpoint_bytes)

        state = checkpoint.State(run, writer, config, update=update, stop=stop, ranks=ranks)
        first = state.restore(saved)
        means, progress = loop.Means(machine, augmenter.steps), loop.Progress(args.epochs, augmenter.steps, first)
        for epoch in range(first, args.epochs + 1):
            if stop.stop:
                break
            begun = time.perf_counter()
            net.train()
            augmenter.set_epoch(epoch)
            for step in range(augmenter.steps):
                lr = loop.learning_rate((epoch - 1) * augmenter.steps + step, args, augmenter.steps)
                batch = augmenter(step, rows)
                with machine.autocast():
                    logits = model(batch.images)
                loss = mixed_ce(logits, batch.targets, label_smoothing=args.label_smoothing)
                skipped = update(loss, lr)
                means.add(batch_size, skipped, loop.accuracy(logits, batch.targets.dominant), train_loss=loss, train_loss_ce=loss)
                progress.step(epoch, step, lr, means)
            columns = means.epoch_columns(epoch) | update.epoch_columns()  # the epoch's one wait for the device
            update.agree()
            trained = time.perf_counter()
            val = loop.evaluate(update.evaluated, data.val, data.mean, data.std, machine, args.batch_size)
            best = stop.update(epoch, val)
            evaluated, samples = time.perf_counter(), augmenter.steps * batch_size
            state.save(runlog.EpochRow(
                epoch=epoch, lr=lr, **columns, **val.columns(), **stop.columns(), samples=samples,
                images_per_s=samples / (trained - begun), epoch_s=trained - begun, val_s=evaluated - trained,
                total_s=run.elapsed(), peak_mem_mb=machine.peak_memory_mb()), card if best else None)
            progress.epoch(run.rows[-1], best)

        writer.wait()
        run.close(loop.test(run, update.evaluated, data, machine, args.batch_size) | {
            "best_epoch": stop.best_epoch, "epochs": len(run.rows), "stopped_early": len(run.rows) < args.epochs,
            "selected_on": data.selected_on,
            "params": models.parameters(net), "flops": models.flops(net, image_size),
            "teacher_test_acc1": None, "teacher_params": None, "retention": None, "compression": None,
            "verdict": runlog.verdict(run.rows, len(data.classes), len(run.rows) < args.epochs),
            "note": "initialisation: " + ("imagenet" if pretrained else args.init or "none"),
        })


if __name__ == "__main__":
    arguments = options.parse_teacher(*__doc__.split("\n\n", 1))
    runlog.run(main, arguments)
