# Shared by the recipes, which source it in the root of the repository. Environment variables
# (hardware_*.sh, whose GPUs are in their names, use only DATA, OUTPUT and DRY_RUN):
#   DATA        folder of the images, ImageNet with train/ and val/ unless the recipe says otherwise
#   GPUS        GPUs of this machine, one process each (8)
#   BATCH_SIZE  most images that a GPU takes at once (should fit into 80 GB, not measured)
#   OUTPUT      folder of the results (output)
#   DRY_RUN     if set, commands are shown but not run
# The number of GPUs and BATCH_SIZE never change the effective batch, but fine-tuning mixes images
# within what a GPU takes at once, and the probe normalizes features there.
# shellcheck disable=SC2034  # the recipes use what is set here
fail() {
    echo "${0##*/}: error: $*" >&2
    exit 2
}

# need_count NAME VALUE
need_count() {
    [[ $2 =~ ^[1-9][0-9]{0,8}$ ]] || fail "$1 is '$2' and must be a whole number from 1"
}

[ -n "${DATA:-}" ] || fail "set DATA to the folder of the images"
[ -e "$DATA" ] || fail "DATA is '$DATA', which is not there, seen from $PWD"
GPUS=${GPUS:-8}
need_count GPUS "$GPUS"
[ -z "${BATCH_SIZE:-}" ] || need_count BATCH_SIZE "$BATCH_SIZE"

python=python
[ ! -x .venv/bin/python ] || python=.venv/bin/python
folder=${OUTPUT:-output}/$(basename "$0" .sh)
images_per_gpu=512 # of ViT-S and ViT-B, in pre-training, which encodes a quarter of each

# choose_size SIZE CHOICES: sets `vit`, such as vit_base_patch16, and the row's folder.
choose_size() {
    [[ $1 =~ ^($2)$ ]] || fail "the size is '$1' and must be one of ${2//|/, }"
    vit=vit_$1_patch16
    case $1 in
        large) images_per_gpu=256 ;;
        huge) images_per_gpu=128 vit=vit_huge_patch14 ;;
    esac
    folder+=_$1
}

# need_checkpoint PATH ADVICE
need_checkpoint() {
    [ -e "$1" ] || fail "the checkpoint '$1' is not there, seen from $PWD: $2"
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

# train EFFECTIVE MOST MAIN ARGUMENT...: MOST is how many images a GPU takes at once.
train() {
    local most=${BATCH_SIZE:-$2}
    local each=$(($1 / GPUS))
    local size=$((each < most ? each : most))
    ((size > 0 && GPUS * size * (each / size) == $1)) ||
        fail "$GPUS GPUs with up to $most images each cannot make up a batch of $1:" \
            "set GPUS and BATCH_SIZE to powers of two"
    local command=("$python" -m torch.distributed.run --standalone --nproc_per_node "$GPUS" "$3")
    command+=(--data_path "$DATA" --batch_size "$size" --accum_iter "$((each / size))" "${@:4}")
    show_and_run "${command[@]}"
}

# pretrain EPOCHS ARGUMENT...: sets `checkpoint` to the result. A finished run is not repeated.
pretrain() {
    train 4096 "$images_per_gpu" main_pretrain.py --output_dir "$folder" --epochs "$@"
    checkpoint=$folder/$(checkpoint_name "$1")
}

# checkpoint_name EPOCHS
checkpoint_name() {
    printf 'checkpoint-e%04d-s000000.pth' "$1"
}

# finetune CHECKPOINT FOLDER ARGUMENT...: all patches are encoded, so fewer images fit.
finetune() {
    train 1024 "$((images_per_gpu / 4))" main_finetune.py --finetune "$1" --output_dir "${@:2}"
}

# finetune_row CHECKPOINT ARGUMENT...: in a folder named after the checkpoint.
finetune_row() {
    need_checkpoint "$1" "name one of pre-training"
    local path
    path=$(realpath "$1")
    finetune "$1" "$folder/$(basename "$(dirname "$path")")-$(basename "$path" .pth)" "${@:2}"
}

# linprobe CHECKPOINT ARGUMENT...
linprobe() {
    train 16384 "$images_per_gpu" main_linprobe.py --finetune "$1" --output_dir "$folder" "${@:2}"
}
