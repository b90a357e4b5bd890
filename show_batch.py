"""Draw a contact sheet of an augmented training batch: each image as it is stored and augmented, with classes and parameters.

    python show_batch.py                                              CIFAR-100 under the study's augmentation -> batch.png
    python show_batch.py --dataset synthetic --policy none            synthetic data; only Mixup/CutMix and erasing
    python show_batch.py --mix-mode elem --epoch 7 --step 3           Mixup/CutMix per image; any batch of any epoch
    python show_batch.py --dataset imagefolder --data-dir photos --image-size 224    windows of photographs, resized
    python show_batch.py --config runs/x/config.json                  a batch of this run

With the flags and the seed of a training run, the batch is identical to that of the run.
"""
from cli import options
from rundir import errors


def main(args):
    import torch

    from augment import BatchAugmenter
    from data import datasets, pictures
    from rundir.files import write_atomic
    from training.device import global_batch_size, setup_context

    context = setup_context(args.device, "off", args.seed, args.kernels)
    data = datasets.load(**options.data(args), device=context.device)
    augmenter = BatchAugmenter(*data.train, **options.augmentation(args), mean=data.mean, std=data.std,
                               batch_size=global_batch_size(args.batch_size, data, context))
    if args.step >= augmenter.steps:
        raise errors.Failure(errors.USAGE, f"no such step (--step {args.step})", f"choose one below {augmenter.steps}")
    augmenter.set_epoch(args.epoch)
    batch = augmenter(args.step)
    mean, std = (torch.tensor(values, device=context.device).view(3, 1, 1) for values in (data.mean, data.std))
    images = (batch.images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()

    shown = augmenter.sources(args.step).to(context.device)[:args.images]
    stored, own = data.train.part(shown).cpu(), data.train.labels[shown]
    columns = stored.numpy(), own.tolist(), images, augmenter.describe(args.step), *(part.tolist() for part in batch.targets)
    cells = []
    for original, true, image, parameters, label, other, lam in zip(*columns):
        names = data.classes[label] if lam == 1 else f"{lam:.2f} {data.classes[label]}\n{1 - lam:.2f} {data.classes[other]}"
        cells += [(original, data.classes[true], ""), (image, names, parameters.replace(", ", ",\n").replace(" | ", "\n"))]
    write_atomic(args.output, pictures.contact_sheet(cells, height=1.6))
    print(f"{args.output}: batch {args.step} of epoch {args.epoch}, {len(stored)} of {args.batch_size} images of {args.dataset}")


if __name__ == "__main__":
    errors.run(main, options.parse_show(*__doc__.split("\n\n", 1)))
