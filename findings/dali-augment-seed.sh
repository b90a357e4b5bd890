#!/usr/bin/env bash
# NVIDIA DALI 2.4.0, nvidia.dali.auto_aug: AutoAugment, RandAugment and TrivialAugment with seed=..., "to be used to randomly sample
# operations (and to negate magnitudes)", on a CPU.
# Expected: as without it, but repeatable: which operation, with which sign and magnitude, and whether it is applied, are independent.
# Seen: all of them come from the same random numbers. Of two sub-policies of AutoAugment with probability 0.5, the first is always
# applied, and the second never. An operation of RandAugment has one sign only. TrivialAugment of two operations draws, for one with a
# sign, a fourth of its magnitudes, all of one sign.
# So images are augmented far less variedly, without a warning: give a seed to the pipeline, and none to these functions.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check nvidia-dali-cuda120==2.4.0 numpy==2.4.6
cat > "$folder/seed.py" <<'PYTHON'
import numpy as np
from nvidia.dali import pipeline_def, types
from nvidia.dali.auto_aug import augmentations, auto_augment, rand_augment, trivial_augment
from nvidia.dali.auto_aug.core import Policy

BRIGHTNESS, INVERT = augmentations.brightness, augmentations.invert  # of a grey of 100: 10 to 190, but not 100; 155
FUNCTIONS = {
    "AutoAugment": lambda data, seed: auto_augment.apply_auto_augment(
        Policy("two", 11, [[(BRIGHTNESS, 0.5, 10)], [(INVERT, 0.5, None)]]), data, seed=seed),
    "RandAugment": lambda data, seed: rand_augment.apply_rand_augment([BRIGHTNESS, INVERT], data, n=1, m=30, seed=seed),
    "TrivialAugment": lambda data, seed: trivial_augment.apply_trivial_augment([BRIGHTNESS, INVERT], data, seed=seed),
}


@pipeline_def(batch_size=64, num_threads=1, device_id=None, enable_conditionals=True, seed=1)
def pipeline(function, seed):
    return function(types.Constant(np.full((4, 4, 3), 100, np.uint8), layout="HWC"), seed)


def greys(function, seed):
    """The grey of each of 3,200 images after augmentation."""
    built = pipeline(function, seed)
    built.build()
    return np.concatenate([[np.array(image)[0, 0, 0] for image in built.run()[0]] for _ in range(50)])


def kinds(name, seed):
    """How many images were left as they were, inverted, made darker and made brighter, and to how many different greys."""
    found = greys(FUNCTIONS[name], seed)
    inverted, changed = found == 155, found[(found != 100) & (found != 155)]
    counts = sum(found == 100), sum(inverted), sum(changed < 100), sum(changed > 100), len(set(changed.tolist()))
    print(f"{name}, seed {seed}: {counts[0]} unchanged, {counts[1]} inverted, {counts[2]} darker, {counts[3]} brighter, "
          f"{counts[4]} greys")
    return counts


for name in FUNCTIONS:
    unseeded, seeded = kinds(name, None), [kinds(name, seed) for seed in (1, 2)]
    assert min(unseeded[1:4]) > 300, "without a seed, images are inverted, darker and brighter"
    for unchanged, inverted, darker, brighter, levels in seeded:
        if name == "AutoAugment":
            assert inverted == 0 and unchanged > 1000, "the second sub-policy is never applied"
        assert (darker == 0) != (brighter == 0), "brightness has one sign"
        if name == "TrivialAugment":
            assert levels == unseeded[4] / 4, "a fourth of the magnitudes"
print("as described")
PYTHON
"$folder/venv/bin/python" "$folder/seed.py"
