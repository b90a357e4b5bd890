"""Distil a saved teacher into a student, with KD, DKD, or another method.

    python distill.py --method kd                              the recipe of experiment v2, teacher from runs/teacher/best.pt
    python distill.py --method dkd --beta 8                    the setting that collapsed in the study
    python distill.py --experiment v3.1 --seed 2               a preset of the study (v1, v2, v3, v3.1, v4)
    python distill.py --experiment v2 --resume auto            resume an interrupted run, or start it
    torchrun --nproc-per-node 2 distill.py --batch-size 64     on two GPUs, 64 images each
Writes log.csv, summary.json, best.pt and last.pt to --output.
"""
from cli import method_flags, options
from rundir import errors


def main(args):
    import models
    from augment import BatchAugmenter
    from diagnostics.gradients import LOG_EVERY, Diagnostics
    from rundir.run_directory import announce
    from training.advice import advise
    from training.cuda_graph import CudaGraph
    from training.device import setup_context
    from training.evaluation import check_teacher
    from training.metrics import Metrics
    from training.optimization import Recipe, Update, learning_rate
    from training.run import Run
    from training.teacher_logits import TeacherLogits

    context = setup_context(args.device, args.amp, args.seed, args.kernels, args.deterministic, args.compile)
    config, method = vars(args) | {"script": "distill"} | context.describe(), method_flags.chosen(args)
    announce(config, *options.chosen_defaults(args), method.objective)
    if args.dry_run:
        return print(*advise(args, method, context), sep="\n")
    checkpoints, config["teacher_sha256"] = models.read_teachers(args.teacher_checkpoint, args.teacher)
    with Run(args, config, context) as run:
        if run.finished:
            return
        data, (criterion, matched), recipe = run.load_data(), method.criteria(context.device, run.class_weights), Recipe.of(args)
        student = run.new_network(args.student, pretrained=args.student_init == "imagenet",
                                  init=None if args.student_init in ("none", "imagenet") else args.student_init)
        teacher = models.load_teachers(checkpoints, data, student.info, options.teacher_inputs(args),
                                       temperature=method.hyperparameters.get("temperature", 1.0), folded=True,
                                       device=context.device, dtype=context.dtype)
        augmenter = BatchAugmenter(*data.train, **options.augmentation(args), mean=data.mean, std=data.std, dtype=context.dtype,
                                   batch_size=run.batch_size)
        store = TeacherLogits.of(args, run, teacher, augmenter.steps)
        teacher_test = check_teacher(teacher, data, context, run.rows_at_once, args.allow_weak_teacher, store.evaluation)
        teacher_val = store.evaluation(lambda: run.evaluate(teacher, data.val))
        update = Update(student, recipe, context, len(run.micro_batches))
        metrics = Metrics(context.ranks, augmenter.steps, args.clip_grad)
        diagnostics = Diagnostics(method, augmenter, run.micro_batches[-1], context.ranks)
        model, teacher_model = run.wrap(student), run.wrap(teacher)

        def step(position, lr, diagnose, stored):
            for rows in run.micro_batches:
                batch = augmenter(position, rows)
                with context.autocast:  # without no_grad() for the teacher: its parameters are frozen
                    teacher_logits = store.read(position, rows) if stored else teacher_model(batch.images)
                    logits = model(batch.images)
                if store.folder and not stored:
                    store.add(position, rows, teacher_logits)
                loss, terms = criterion(logits, teacher_logits, batch.targets)
                update.backward(loss, matched and matched(logits, teacher_logits, batch.targets)[0])
                metrics.add(logits, batch.targets, loss, terms)
            result = update(lr, diagnose)
            metrics.end_step(position, result)
            if diagnose:
                diagnostics.add(position, result, batch.targets, logits, teacher_logits)

        step = CudaGraph(step, context.device) if run.cuda_graph else step
        run.start(update, metrics, diagnostics, teacher, **method.labels)
        for epoch in run.epochs():
            student.train()
            for each in (augmenter, diagnostics, method, store):
                each.set_epoch(epoch)
            for position in range(augmenter.steps):
                lr = learning_rate((epoch - 1) * augmenter.steps + position, recipe, augmenter.steps)
                step(position, lr, position % LOG_EVERY == 0, store.found[position])
                metrics.log()
                run.progress.step(epoch, position, lr, metrics)
            run.end_training(lr)
            store.end_epoch()
            val = run.evaluate(update.evaluated, data.val)
            run.end_epoch(val, teacher_agree=val.agreement(teacher_val))

        run.close(f"student initialisation: {args.student_init}", teacher, teacher_test.acc1, **store.summary)


if __name__ == "__main__":
    errors.run(main, options.parse_distill(*__doc__.split("\n\n", 1)))
