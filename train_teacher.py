"""Train a network on labels alone: the teacher, or the student without distillation as a control.

    python train_teacher.py                                                    EfficientNetV2-L on CIFAR-100
    python train_teacher.py --model efficientnet_v2_s --output runs/alone      the student without distillation
    python train_teacher.py --dataset imagefolder --data-dir photos            your own images: photos/train/CLASS/*.jpg
    python train_teacher.py --resume auto                                      resume an interrupted run, or start it
    torchrun --nproc-per-node 2 train_teacher.py --batch-size 64               on two GPUs, 64 images each

The data are on the device as uint8, and every step augments a batch there.  Writes log.csv, summary.json, best.pt and last.pt to
--output.
"""
from cli import method_flags, options
from rundir import errors


def main(args):
    import models
    from augment import BatchAugmenter
    from diagnostics.gradients import LOG_EVERY, Diagnostics
    from rundir.run_directory import announce
    from training.advice import describe_data
    from training.cuda_graph import CudaGraph
    from training.device import setup_context
    from training.metrics import Metrics
    from training.optimization import Recipe, Update, learning_rate
    from training.run import Run

    context = setup_context(args.device, args.amp, args.seed, args.kernels, args.deterministic, args.compile)
    pretrained = models.has_weights(args.model) and not args.init if args.pretrained is None else args.pretrained
    config = vars(args) | {"script": "train_teacher", "pretrained": pretrained} | context.describe()
    method = method_flags.chosen(args)
    announce(config, *options.chosen_defaults(args), method.objective)
    if args.dry_run:
        models.check_name(args.model)
        return print(*describe_data(args), sep="\n")

    with Run(args, config, context) as run:
        if run.finished:
            return
        data, criterion, recipe = run.load_data(), method.criterion(context.device, run.class_weights), Recipe.of(args)
        net = run.new_network(args.model, pretrained=pretrained, init=args.init)
        augmenter = BatchAugmenter(*data.train, **options.augmentation(args), mean=data.mean, std=data.std, dtype=context.dtype,
                                   batch_size=run.batch_size)
        update = Update(net, recipe, context, len(run.micro_batches))
        metrics = Metrics(context.ranks, augmenter.steps, args.clip_grad)
        diagnostics = Diagnostics(method, augmenter, run.micro_batches[-1], context.ranks)
        model = run.wrap(net)

        def step(position, lr, diagnose):
            for rows in run.micro_batches:
                batch = augmenter(position, rows)
                with context.autocast:
                    logits = model(batch.images)
                loss, terms = criterion(logits, None, batch.targets)
                update.backward(loss)
                metrics.add(logits, batch.targets, loss, terms)
            result = update(lr, diagnose)
            metrics.end_step(position, result)
            if diagnose:
                diagnostics.add(position, result, batch.targets, logits)

        step = CudaGraph(step, context.device) if run.cuda_graph else step
        run.start(update, metrics, diagnostics)
        for epoch in run.epochs():
            net.train()
            augmenter.set_epoch(epoch)
            diagnostics.set_epoch(epoch)
            for position in range(augmenter.steps):
                lr = learning_rate((epoch - 1) * augmenter.steps + position, recipe, augmenter.steps)
                step(position, lr, position % LOG_EVERY == 0)
                metrics.log()
                run.progress.step(epoch, position, lr, metrics)
            run.end_training(lr)
            run.end_epoch(run.evaluate(update.evaluated, data.val))

        run.close(note="initialisation: " + ("imagenet" if pretrained else args.init or "none"))


if __name__ == "__main__":
    errors.run(main, options.parse_teacher(*__doc__.split("\n\n", 1)))
