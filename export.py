"""Export a trained network to ONNX, torch.export or ExecuTorch, and check the file in its runtime on the test set.

    python export.py runs/v2-s42/best.pt                                  -> runs/v2-s42/export/best-fp32.onnx
    python export.py runs/v2-s42/best.pt --precision int8                 weights 4 times smaller; refused above --max-drop
    python export.py runs/v2-s42/best.pt --format executorch --precision int8 --output phone
    python export.py runs/v2-s42/best.pt --check openvino opencv          refused if it predicts otherwise there

The exported graph maps images to probabilities and logits.  FILE.json beside it has its metadata, export.csv the comparison with
the checkpoint.  A failed or refused export leaves no files.
"""
from deploy.options import parse_export
from rundir import errors


def main(args):
    from pathlib import Path
    from tempfile import TemporaryDirectory

    import models
    from deploy import check, other_runtimes, runtime, writers
    from rundir.files import digest

    runtime.require(*writers.needs(args.format, args.precision))
    for other in args.check:
        other_runtimes.version(other)
    checkpoint = Path(args.checkpoint)
    trained = models.read(checkpoint)
    original, module = runtime.from_checkpoint(trained), writers.from_checkpoint(trained, args.input, args.precision)
    with TemporaryDirectory() as folder:
        data = check.data_of_run(checkpoint, module.info["classes"], args.data_dir)
        print(data)
        stated = check.stated_accuracy(module.info, data)
        suffix = "-float" if args.input == "float" else ""
        path = Path(folder) / f"{checkpoint.stem}-{args.precision}{suffix}{writers.FORMATS[args.format][0]}"
        writers.export(module, args.format, args.precision, check.calibration(data), path)

        metadata = writers.metadata(module, args.format, args.precision, trained["sha256"])
        images, labels = data.test.images.numpy(), data.test.labels.numpy()
        exported, expected = (model(images)[1] for model in (runtime.open_exported(path, metadata), original))
        rows = [check.compare(path, checkpoint, metadata, exported, expected, labels)]
        print(check.described(rows[0]))
        check.judge(rows[0], args.max_drop, stated, module.info["amp"])
        for other in args.check:
            found = other_runtimes.logits(other, path, metadata, images)
            rows.append(check.compare(path, checkpoint, metadata, found, expected, labels, other, exported))
            print(check.described(rows[-1]))
            check.judge_other(rows[-1], other)
        metadata |= {"test_acc1": rows[0].accuracy, "checkpoint_test_acc1": rows[0].checkpoint_accuracy, "sha256": digest(path)}
        published = check.publish(path, metadata, rows, Path(args.output or checkpoint.parent / "export"))
        print(f"{published}: {metadata['images']} -> {' and '.join(metadata['outputs'])}")


if __name__ == "__main__":
    errors.run(main, parse_export(*__doc__.split("\n\n", 1)))
