#!/usr/bin/env bash
# From an HSTU that generative-recommenders trained to the cross-domain model that continues it.
#
# Run inside a checkout of generative-recommenders: bash from_upstream_hstu.sh [EPOCHS] [USERS]
# A GPU is not needed; with one, `python main.py` takes the place of `hstu-xd upstream-train`.
set -euo pipefail
epochs=${1:-3} users=${2:-800}
# Sizes for a first look; drop the second line for the gin file's own.
small=(--gin_bindings "train_fn.num_epochs = $epochs"
       --gin_bindings "train_fn.num_negatives = 128")

# The gin files, and a log to train on: yours comes in with `hstu-xd prepare`.
hstu-xd init .
hstu-xd synth --out data/amazon --users "$users" --domains 3

# 1. An HSTU, as the team has it already.
hstu-xd upstream-train --gin_config_file gin/amazon_hstu.gin "${small[@]}"
checkpoint=$(find ckpts -type f -name "HSTU-*_ep$((epochs - 1))" | head -1)

# 2. The cross-domain model that starts from it. TAPE and DDSR start at zero: before the first step
#    it computes what the checkpoint computed. A domain mask would change that at once; add it with
#    xd_encoder.domain_mask = True where histories are long enough for its speed to count.
cat > gin/continued.gin <<EOF
# python main.py --gin_config_file gin/continued.gin
include "gin/amazon_hstu.gin"
train_fn.main_module = "HSTU_XD"
xd_encoder.tape = True
xd_encoder.ddsr = True
xd_upstream.warm_start = "$checkpoint"
EOF
hstu-xd upstream-train --gin_config_file gin/continued.gin "${small[@]}"

# 3. Both on the test split, which training never read.
continued=$(find ckpts -type f -name "HSTU_XD-*_ep$((epochs - 1))" | head -1)
hstu-xd upstream-evaluate "$checkpoint" --gin_config_file gin/amazon_hstu.gin
hstu-xd upstream-evaluate "$continued" --gin_config_file gin/continued.gin
