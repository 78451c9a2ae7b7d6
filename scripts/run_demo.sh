#!/bin/sh
# Run the whole project on generated videos: make .venv and the data, train, test on video files, test 3 crops x 2 clips.
# The last line names the report of the last test, a page for a browser.
set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
. scripts/environment.sh

make_environment requirements.txt
"$PYTHON" -m tools.motion_demo demo_data/motion
rm -rf exp_onehot/demo # of an earlier demo: training refuses a folder that holds another run
sh scripts/run_train_vision.sh configs/demo/motion.yaml --output exp_onehot/demo
sh scripts/run_test_vision.sh configs/demo/motion.yaml exp_onehot/demo/model_best.pt \
    data.modality=video data.val_root=demo_data/motion/videos data.val_list=demo_data/motion/val_videos.txt
sh scripts/run_test_vision.sh configs/demo/motion.yaml exp_onehot/demo/model_best.pt --test_crops 3 --test_clips 2 \
    --report exp_onehot/demo/report
