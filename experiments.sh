#!/usr/bin/env bash
# The commands of the study and its ablations.  Those of the demo are in the Makefile.
#   ./experiments.sh                    the study and its controls: one GPU; data and ImageNet weights are downloaded if missing
#   ./experiments.sh ablation           the causes of DKD's collapse, on CIFAR-100: one GPU
#   ./experiments.sh ablation-small     the same on the embedded data: 84 minutes on two cores of an AMD EPYC
#   ./experiments.sh published          KD and DKD for every pair of DKD's tables, 6 teachers and 66 students: one GPU
# After an interruption the same command continues.
set -euo pipefail
cd "$(dirname "$0")"

study() {
    # The teacher, and the stronger teacher of v4: the same network fine-tuned at 128 pixels (16 times the FLOPs).
    python train_teacher.py --resume auto
    python train_teacher.py --image-size 128 --output runs/teacher-strong --resume auto

    for seed in 1 2 3; do
        # The control: the student on labels alone, from random weights like the students below.
        python train_teacher.py --model efficientnet_v2_s --no-pretrained --seed $seed --output runs/alone-s$seed --resume auto

        # The study.
        python distill.py --experiment v1 --seed $seed --resume auto      # KD, Mixup/CutMix only
        python distill.py --experiment v2 --seed $seed --resume auto      # KD, all four augmentations
        python distill.py --experiment v3 --seed $seed --resume auto      # DKD, beta 8
        python distill.py --experiment v3.1 --seed $seed --resume auto    # DKD, beta 2
        python distill.py --experiment v4 --seed $seed --resume auto      # KD, stronger teacher

        # Alternative explanations of v3: the scale of its loss, no warm-up, the target of mixed images.
        python distill.py --method kd --alpha 8 --ce-weight 1 --seed $seed --resume auto
        python distill.py --method dkd --dkd-warmup 20 --seed $seed --output runs/dkd-beta8-warmup20-s$seed --resume auto
        python distill.py --method dkd --mixed-target dominant --seed $seed --output runs/dkd-beta8-dominant-s$seed --resume auto
    done
    python plots/make_figures.py
}

# Plan a sweep.  $1: its name; then common flags, and grids.
sweep() {
    sweeps+=(--sweep "$1" "${student[@]}" "${seeds[@]}" "${@:2}")
}

run_sweeps() {
    python sweep.py --jobs "$jobs" --output "runs/$experiment" distill.py "${common[@]}" "${sweeps[@]}"
}

ablation() {
    local weaker="runs/$experiment/teacher" stronger="runs/$experiment/teacher-strong" three=(--seed 0 1 2)
    python train_teacher.py "${common[@]}" "${short[@]}" "${teacher[@]}" --output "$weaker" --resume auto
    python train_teacher.py "${common[@]}" "${short[@]}" "${teacher[@]}" --init "$weaker/best.pt" --image-size 48 --output "$stronger" \
        --resume auto
    student=(--student "$pico" --teacher-checkpoint "$weaker/best.pt" --teacher-logits "runs/$experiment/teacher-logits")

    # The recipe of the study (AdamW, weight decay, label smoothing, DKD without cross-entropy): clipped as in the study, not
    # clipped, and KD clipped as often as DKD is; and with more epochs.
    seeds=(--seed 0 1 2 3 4)
    sweep recipe "${recipe[@]}" --epochs "${lengths[0]}" -- --method kd --clip-grad 1 0 0.1 \
        -- --method dkd --beta 8 2 --ce-weight 0 --clip-grad 1 0 -- --method dkd --beta 8 --ce-weight 1 --clip-grad 1
    sweep recipe-long "${recipe[@]}" --epochs "${lengths[1]}" -- --method kd --clip-grad 1 \
        -- --method dkd --beta 8 --ce-weight 0 --clip-grad 1 0

    # A high learning rate at which KD does not collapse.  A larger loss or another one: each scaled to about the gradient norm of the
    # other, and matched to it in every step; the weight of the cross-entropy; labels alone; without mixing.  Then, with fewer
    # seeds, remedies, and beta against augmentation.
    sweep high "${short[@]}" "${high[@]}" --clip-grad 0 -- --method kd -- --method dkd --beta 8 \
        -- --method dkd --beta 8 --loss-scale 0.22 -- --method kd --loss-scale 4.5 \
        -- --method dkd --beta 8 --match-norm kd -- --method kd --match-norm dkd \
        -- --method kd --alpha 0 --ce-weight 0.3 -- --method kd --ce-weight 1 -- --method dkd --beta 8 --ce-weight 0 \
        -- train_teacher.py --model "$pico" -- --method kd dkd --beta 8 --mix-prob 0 \
        -- --method dkd --beta 2 "${three[@]}" -- --method kd --alpha 8 --ce-weight 1 "${three[@]}" \
        -- --method dkd --beta 8 --mixed-target dominant "${three[@]}" -- --method dkd --beta 8 --dkd-warmup "$warmup" "${three[@]}" \
        -- --method dkd --beta 8 --clip-grad 1 "${three[@]}" -- --method dkd --beta 8 --standardize "${three[@]}" \
        -- --method dkd --beta 1 "${few[@]}" -- --method dkd --beta 1 2 --mix-prob 0 "${few[@]}" \
        -- --method kd dkd --beta 1 2 8 --policy none --random-erasing 0 --mix-prob 0 1 "${few[@]}"
    sweep high-long "${long[@]}" "${high[@]}" --clip-grad 0 -- --method kd -- --method dkd --beta 8 \
        -- train_teacher.py --model "$pico"

    # A learning rate that suits KD: method, weight, target of mixed images, clipping, precision on a GPU, two remedies from the
    # literature.
    seeds=("${three[@]}")
    sweep usual "${short[@]}" "${usual[@]}" --clip-grad 0 -- --method kd -- train_teacher.py --model "$pico" \
        -- --method dkd --beta 2 8 -- --method kd --alpha 8 --ce-weight 1 \
        -- --method dkd --beta 8 --mixed-target dominant -- --method dkd --beta 8 --clip-grad 1 "${precision[@]}" \
        -- --method kd --standardize -- --method dkd --beta 8 --standardize -- --method dist

    # The findings of the study, with its optimizer and clipping; and without clipping.
    sweep findings "${short[@]}" "${adamw[@]}" --clip-grad 1 -- --experiment v2 v1 v3 v3.1 -- --experiment v3 --clip-grad 0 \
        -- --experiment v4 --teacher-checkpoint "$stronger/best.pt"
    run_sweeps
    rm -rf "runs/$experiment/teacher-logits"
    for name in recipe recipe-long high high-long usual findings; do
        python results/tables.py "runs/$experiment/$name" "runs/$experiment/$name"
    done
    python results/ablation-small/figures.py --tables "runs/$experiment" --output figures
}

# $1: teacher.  $2: student.  $3: learning rate.  $4: DKD's beta.
pair() {
    student=(--student "$2" --teacher-checkpoint "runs/$experiment/$1/best.pt" --lr "$3")
    sweep "$1-$2" -- --method kd --alpha 0.9 --ce-weight 0.1 -- --method dkd --beta "$4" --dkd-warmup 20
}

published() {
    for name in resnet56 resnet110 resnet32x4 wrn_40_2 vgg13 cifar_resnet50; do
        python train_teacher.py "${common[@]}" --model $name --lr 0.05 --output "runs/$experiment/$name" --resume auto
    done

    # The pairs of DKD's tables on CIFAR-100 (arXiv 2203.08679), with the accuracies that the README of its code states.
    # Teacher and student of one kind:
    pair resnet56 resnet20 0.05 2           # KD 70.66, DKD 71.97
    pair resnet110 resnet32 0.05 2          # KD 73.08, DKD 74.11
    pair resnet32x4 resnet8x4 0.05 8        # KD 73.33, DKD 76.32
    pair wrn_40_2 wrn_16_2 0.05 6           # KD 74.92, DKD 76.23
    pair wrn_40_2 wrn_40_1 0.05 6           # KD 73.54, DKD 74.81
    pair vgg13 vgg8 0.05 6                  # KD 72.98, DKD 74.68
    # Of different kinds:
    pair resnet32x4 shufflenet_v1 0.01 8    # KD 74.07, DKD 76.45
    pair wrn_40_2 shufflenet_v1 0.01 8      # KD 74.83, DKD 76.70
    pair vgg13 mobilenet_v2 0.01 6          # KD 67.37, DKD 69.71
    pair cifar_resnet50 mobilenet_v2 0.01 8 # KD 67.35, DKD 70.35
    pair resnet32x4 shufflenet_v2 0.01 8    # KD 74.45, DKD 77.07 (there its student is called MobileNet-V2)
    run_sweeps
}

sweeps=()
case ${1:-study} in
    study) study ;;
    published)
        # The recipe of the tables, which selects on the test set.
        experiment=published jobs=4 seeds=(--seed 1 2 3)
        common=(--opt sgd --weight-decay 5e-4 -b 64 --epochs 240 --sched multistep --milestones 150 180 210 --warmup-epochs 0
                --label-smoothing 0 --clip-grad 0 --patience 0 --monitor val_acc1 --amp off --val-size 0 --policy none
                --random-erasing 0 --mixup 0 --cutmix 0)
        published ;;
    ablation)
        experiment=ablation pico=resnet8x4 jobs=4 warmup=20 precision=(-- --method dkd --beta 8 --amp bf16 off) few=(--seed 0 1 2)
        common=() lengths=(100 200)
        short=(--epochs 100 --warmup-epochs 5 --label-smoothing 0 --weight-decay 5e-4) long=(--epochs 400 "${short[@]:2}")
        recipe=(--opt adamw --lr 1e-3 --weight-decay 0.05 --label-smoothing 0.1 --warmup-epochs 5 --patience 0)
        teacher=(--model resnet32x4 --opt sgd --lr 0.1 --patience 0)
        usual=(--opt sgd --lr 0.1 --patience 0) high=(--opt sgd --lr 0.8 --patience 0)
        adamw=(--opt adamw --lr 1e-3 --patience 0)
        ablation ;;
    ablation-small)
        experiment=ablation-small pico=v2_pico jobs=2 warmup=3 precision=() few=(--seed 0)
        common=(--dataset synthetic --batch-size 64) lengths=(12 30)
        short=(--epochs 6 --warmup-epochs 2 --label-smoothing 0 --weight-decay 5e-4) long=(--epochs 24 "${short[@]:2}")
        recipe=(--opt adamw --lr 1e-3 --weight-decay 0.05 --label-smoothing 0.1 --warmup-epochs 2 --patience 0)
        teacher=(--model v2_tiny --opt sgd --lr 0.2 --mix-prob 0.5 --clip-grad 0 --patience 0 --epochs 8)
        usual=(--opt sgd --lr 0.2 --patience 0) high=(--opt sgd --lr 1.6 --patience 0)
        adamw=(--opt adamw --lr 4e-3 --patience 0)
        ablation ;;
    *) echo "error: no such experiment ($1). choose study, ablation, ablation-small or published" >&2; exit 2 ;;
esac
