#!/usr/bin/env bash
# Every run behind every table and figure, as plain commands that can be copied one by one.
# One GPU; the data set and the ImageNet weights are downloaded by the first command that needs them.
set -euo pipefail
cd "$(dirname "$0")"

# The teacher, and the stronger one of v4: the same network fine-tuned at 128 pixels (16 times the computation).
python train_teacher.py
python train_teacher.py --image-size 128 --output runs/teacher-strong

for seed in 1 2 3; do
    # The control: the student's network on labels alone, from random weights as the students below.
    python train_teacher.py --model efficientnet_v2_s --no-pretrained --seed $seed --output runs/alone-s$seed

    # The study.
    python distill.py --experiment v1 --seed $seed      # KD, Mixup/CutMix only
    python distill.py --experiment v2 --seed $seed      # KD, all four augmentations
    python distill.py --experiment v3 --seed $seed      # DKD, beta 8
    python distill.py --experiment v3.1 --seed $seed    # DKD, beta 2
    python distill.py --experiment v4 --seed $seed      # KD, stronger teacher

    # What else could explain v3: the loudness of its loss, its missing warm-up, the target of a mixed image.
    python distill.py --method kd --alpha 8 --ce-weight 1 --seed $seed
    python distill.py --method dkd --beta 8 --dkd-warmup 20 --seed $seed --output runs/dkd-beta8-warmup20-s$seed
    python distill.py --method dkd --beta 8 --mixed-target dominant --seed $seed --output runs/dkd-beta8-dominant-s$seed
done
python plots/make_figures.py

# One row of the published tables, resnet32x4 -> resnet8x4 (KD 73.33, DKD 76.32): their recipe, which selects on the test set.
published=(--opt sgd --lr 0.05 --weight-decay 5e-4 -b 64 --epochs 240 --sched multistep --milestones 150 180 210 --warmup-epochs 0
           --label-smoothing 0 --clip-grad 0 --patience 0 --monitor val_acc1 --amp off --val-size 0
           --policy none --random-erasing 0 --mixup 0 --cutmix 0)
python train_teacher.py --model resnet32x4 "${published[@]}" --output runs/published/teacher
for seed in 1 2 3; do
    pair=(--student resnet8x4 --teacher-checkpoint runs/published/teacher/best.pt --seed $seed)
    python distill.py --method kd --alpha 0.9 --ce-weight 0.1 "${pair[@]}" "${published[@]}" --output runs/published/kd-s$seed
    python distill.py --method dkd --beta 8 --dkd-warmup 20 "${pair[@]}" "${published[@]}" --output runs/published/dkd-s$seed
done
