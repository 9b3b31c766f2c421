# Shared functions of the recipes, which source this file in the root of the repository. Environment
# variables (hardware_*.sh, which have their number of GPUs in their names, use only DATA, OUTPUT and
# DRY_RUN):
#   DATA        folder of the images, ImageNet with train/ and val/ unless the recipe says otherwise
#   GPUS        number of GPUs on this machine, with a process each (8)
#   BATCH_SIZE  maximum micro-batch per GPU (what should fit in 80 GB, not measured)
#   OUTPUT      folder for results (output)
#   DRY_RUN     if set, commands are shown but not run
# GPUS and BATCH_SIZE never change the effective batch size, but fine-tuning mixes images within a
# micro-batch, and linear probing normalizes features over it.
# shellcheck disable=SC2034  # the recipes use what is set here
fail() {
    echo "${0##*/}: error: $*" >&2
    exit 2
}

# need_count NAME VALUE
need_count() {
    [[ $2 =~ ^[1-9][0-9]{0,8}$ ]] || fail "$1 must be an integer of at least 1, not '$2'"
}

[ -n "${DATA:-}" ] || fail "set DATA to the folder of the images"
[ -e "$DATA" ] || fail "DATA not found: '$DATA' (in $PWD)"
GPUS=${GPUS:-8}
need_count GPUS "$GPUS"
[ -z "${BATCH_SIZE:-}" ] || need_count BATCH_SIZE "$BATCH_SIZE"

python=python
[ ! -x .venv/bin/python ] || python=.venv/bin/python
folder=${OUTPUT:-output}/$(basename "$0" .sh)
images_per_gpu=512 # ViT-S and ViT-B in pre-training, which encodes a quarter of each image

# choose_size SIZE CHOICES: sets `vit`, such as vit_base_patch16, `folder` and `images_per_gpu`.
choose_size() {
    [[ $1 =~ ^($2)$ ]] || fail "the size must be one of ${2//|/, }, not '$1'"
    vit=vit_$1_patch16
    case $1 in
        large) images_per_gpu=256 ;;
        huge) images_per_gpu=128 vit=vit_huge_patch14 ;;
    esac
    folder+=_$1
}

# need_checkpoint PATH ADVICE
need_checkpoint() {
    [ -e "$1" ] || fail "checkpoint not found: '$1' (in $PWD): $2"
}

# split_arguments WORD...: those before "--" are for pre-training, those after it for fine-tuning.
split_arguments() {
    pretrain_args=()
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        pretrain_args+=("$1")
        shift
    done
    finetune_args=("${@:2}")
}

show_and_run() {
    printf '%q ' "$@"
    echo
    [ -n "${DRY_RUN:-}" ] || "$@"
}

# train EFFECTIVE MAX MAIN ARGUMENT...: MAX is the maximum micro-batch per GPU.
train() {
    local max=${BATCH_SIZE:-$2}
    local each=$(($1 / GPUS))
    local size=$((each < max ? each : max))
    ((size > 0 && GPUS * size * (each / size) == $1)) ||
        fail "$GPUS GPUs with up to $max images each cannot form a batch of $1:" \
            "set GPUS and BATCH_SIZE to powers of two"
    local command=("$python" -m torch.distributed.run --standalone --nproc_per_node "$GPUS" "$3")
    command+=(--data_path "$DATA" --batch_size "$size" --accum_iter "$((each / size))" "${@:4}")
    show_and_run "${command[@]}"
}

# pretrain EPOCHS ARGUMENT...: sets `checkpoint` to the final one. A finished run is not repeated.
pretrain() {
    train 4096 "$images_per_gpu" main_pretrain.py --output_dir "$folder" --epochs "$@"
    checkpoint=$folder/$(checkpoint_name "$1")
}

# checkpoint_name EPOCHS
checkpoint_name() {
    printf 'checkpoint-e%04d-s000000.pth' "$1"
}

# finetune CHECKPOINT FOLDER ARGUMENT...: fewer images fit, because all patches are encoded.
finetune() {
    train 1024 "$((images_per_gpu / 4))" main_finetune.py --finetune "$1" --output_dir "${@:2}"
}

# finetune_row CHECKPOINT ARGUMENT...: writes to a folder named after the checkpoint.
finetune_row() {
    need_checkpoint "$1" "give one from pre-training"
    local path
    path=$(realpath "$1")
    finetune "$1" "$folder/$(basename "$(dirname "$path")")-$(basename "$path" .pth)" "${@:2}"
}

# linprobe CHECKPOINT ARGUMENT...
linprobe() {
    train 16384 "$images_per_gpu" main_linprobe.py --finetune "$1" --output_dir "$folder" "${@:2}"
}
