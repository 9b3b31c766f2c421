"""What is compared: settings, what is measured of each, and the claims that are checked.

The claims, with their margins, were written down before the first run. Flags of a setting follow
those of its suite, so that they replace them. Nothing here imports PyTorch.
"""

from typing import NamedTuple

REGRESSION = "logistic regression, all images"
NEIGHBORS = "20-NN"
FINE_TUNED, PROBE = "fine-tuning", "attentive probe"
LOSS, PSNR = "validation loss", "PSNR"
PRETRAIN = "pretrain"  # the first step of every run


class Setting(NamedTuple):
    """A row of the table."""

    label: str
    flags: str
    """Of main_pretrain.py."""
    seeds: int | None = None
    """Number of runs; None is the suite's."""
    finetune: str = ""
    """Flags of main_finetune.py, after the suite's."""
    paper: str = ""
    """The paper's accuracy after fine-tuning."""


class Step(NamedTuple):
    """What is done with every pre-trained encoder."""

    main: str
    flags: str
    metric: str = ""
    """Name of the accuracy that main_finetune.py or main_linprobe.py reports at the end."""
    settings: tuple[str, ...] = ()
    """Those it is done with; all if empty."""


class Claim(NamedTuple):
    """What the paper says of two settings, and what counts as seeing it here.

    An accuracy that should be "not worse" may be lower by `margin` points; one that should be
    "equal" may differ by as much. "higher" and "lower" have no margin. PSNR's is in percent.
    """

    text: str
    source: str
    first: str
    relation: str
    """Of the first setting to the second: "not worse", "equal", "higher" or "lower"."""
    second: str
    paper: str = ""
    """The two numbers."""
    metric: str = REGRESSION
    margin: float = 2.0


class Suite(NamedTuple):
    """A comparison."""

    about: str
    pretrain: str
    """Flags of main_pretrain.py for all settings."""
    settings: dict[str, Setting]
    steps: dict[str, Step]
    claims: tuple[Claim, ...] = ()
    seeds: int = 1
    per_class: int | None = None
    """Training images of each class, evenly spaced; None: all."""


MICRO_MAE = "--model mae_vit_micro_patch4"
MICRO = "--model crossmae_vit_micro_patch4"
TWO = ("mae", "gamma_25")  # cost too much for all

CPU = Suite(
    about="ViT of 6 blocks of width 128, CIFAR-10's images at 32 px (64 patches)",
    per_class=2000,
    seeds=3,
    pretrain="--input_size 32 --decoder_depth 4 --epochs 5 --batch_size 32 --blr 8e-3 "
    "--pred_ratio 0.75 --amp fp32 --num_workers 0 --eval_every 5 --visualize_every 5 --knn_every 0",
    settings={
        "mae": Setting("MAE", MICRO_MAE),
        "gamma_75": Setting("CrossMAE, γ = .75", MICRO),
        "gamma_25": Setting("CrossMAE, γ = .25", f"{MICRO} --pred_ratio 0.25"),
        "gamma_15": Setting("CrossMAE, γ = .15", f"{MICRO} --pred_ratio 0.15"),
        "last_map": Setting("last feature map only", f"{MICRO} --feature_maps last"),
        "depth_1": Setting("decoder of 1 block", f"{MICRO} --decoder_depth 1"),
        "self_attention": Setting("with self-attention", f"{MICRO} --decoder_self_attention"),
        "grid": Setting("grid masks", f"{MICRO} --mask_sampling grid"),
        "mask_65": Setting("mask ratio .65", f"{MICRO} --mask_ratio 0.65 --pred_ratio 0.65"),
        "mask_85": Setting("mask ratio .85", f"{MICRO} --mask_ratio 0.85 --pred_ratio 0.85"),
        "mae_iba": Setting("MAE, inter-block attention", f"{MICRO_MAE} --feature_maps all"),
    },
    steps={
        "features": Step(
            "knn", "--crop_pct 1 --k 20 --amp fp32 --num_workers 0 --save_predictions"
        ),
        "untrained": Step(
            "knn",
            "--crop_pct 1 --k 20 --amp fp32 --num_workers 0 --untrained --save_predictions",
            settings=("mae",),
        ),
        "finetune": Step(
            "finetune",
            "--auto_augment none --reprob 0 --mixup 0 --cutmix 0 --drop_path 0 --crop_pct 1 "
            "--batch_size 32 --epochs 2 --lr 1e-3 --amp fp32 --num_workers 0",
            FINE_TUNED,
            TWO,
        ),
        "probe": Step(
            "linprobe",
            "--probe attentive --num_queries 8 --crop_pct 1 --batch_size 64 --epochs 3 --lr 3 "
            "--amp fp32 --num_workers 0",
            PROBE,
            TWO,
        ),
    },
    claims=(
        Claim(
            "Cross-attention alone is enough",
            *("Tables 1, 3a, 4", "gamma_75", "not worse", "mae", "83.3, 83.0"),
        ),
        Claim(
            "Decoding a third of the masked patches is enough",
            *("Table 4", "gamma_25", "not worse", "mae", "83.2, 83.0"),
        ),
        Claim(
            "Decoding a third is as good as decoding all",
            *("Table 3c", "gamma_25", "not worse", "gamma_75", "83.2, 83.3"),
        ),
        Claim(
            "Decoding a fifth of them is enough",
            *("Table 3c", "gamma_15", "not worse", "gamma_75", "83.1, 83.3"),
        ),
        Claim(
            "Self-attention in the decoder adds nothing",
            *("Table 3a", "gamma_75", "not worse", "self_attention", "83.3, 83.3"),
        ),
        Claim(
            "Mask ratios of .65 and .75 are as good",
            *("Table 3b", "mask_65", "equal", "gamma_75", "83.5, 83.3"),
        ),
        Claim(
            "Mask ratios of .85 and .75 are as good",
            *("Table 3b", "mask_85", "equal", "gamma_75", "83.3, 83.3"),
        ),
        Claim(
            "Grid masks are no better than random ones",
            *("Table 15", "gamma_75", "not worse", "grid", "83.3, 83.2"),
        ),
        Claim(
            "All feature maps are better than the last",
            *("Table 3d", "gamma_75", "higher", "last_map", "83.3, 82.9"),
        ),
        Claim(
            "All feature maps reconstruct better than the last",
            *("Sec. 3.4", "gamma_75", "lower", "last_map", ""),
            metric=LOSS,
        ),
        Claim(
            "A deeper decoder is better",
            *("Table 3e", "gamma_75", "higher", "depth_1", "83.3, 83.0"),
        ),
        Claim(
            "A deeper decoder reconstructs better",
            *("ours", "gamma_75", "lower", "depth_1", ""),
            metric=LOSS,
        ),
        Claim(
            "One decoder block is as good as MAE's decoder",
            *("Table 3e", "depth_1", "not worse", "mae", "83.0, 83.0"),
        ),
        Claim(
            "MAE does not gain from inter-block attention",
            *("Table 7", "mae_iba", "equal", "mae", "83.0, 83.0"),
        ),
        Claim(
            "CrossMAE reconstructs as well as MAE",
            *("Table 13", "gamma_75", "not worse", "mae", "20.05, 20.11 dB"),
            metric=PSNR,
            margin=1.0,
        ),
        Claim(
            "With γ = .25 it does, too",
            *("Table 13", "gamma_25", "not worse", "mae", "19.97, 20.11 dB"),
            metric=PSNR,
            margin=1.0,
        ),
    ),
)

# Why γ = .25 may lose here: the paper's rule lowers its learning rate, and its steps take less
# time. With the cpu suite's --output_dir, what that has run already is not run again.
WHY = CPU._replace(
    about="the cpu suite's γ = .25 at MAE's learning rate, and for as long as MAE",
    settings={
        **{name: CPU.settings[name] for name in ("mae", "gamma_75", "gamma_25")},
        "gamma_25_lr": Setting("γ = .25, MAE's rate", f"{MICRO} --pred_ratio 0.25 --blr 2.4e-2"),
        "gamma_25_time": Setting(
            "γ = .25, MAE's rate and time",
            f"{MICRO} --pred_ratio 0.25 --blr 2.4e-2 --epochs 8 --eval_every 8",
        ),
    },
    steps={name: step for name, step in CPU.steps.items() if not step.settings},
    claims=tuple(
        Claim(text, "Table 4", first, "not worse", second, "83.2, 83.0")
        for first, text in (
            ("gamma_25_lr", "γ = .25 at MAE's rate is as good"),
            ("gamma_25_time", "γ = .25 at MAE's rate and time is as good"),
        )
        for second in ("mae", "gamma_75")
    ),
)

SMALL = "--model crossmae_vit_small_patch16"
GPU = Suite(
    about="ViT-S, photographs at 128 px (64 patches), 200 epochs",
    seeds=2,
    pretrain="--input_size 128 --decoder_depth 4 --epochs 200 --batch_size 256 --blr 1e-3 "
    "--pred_ratio 0.75 --eval_every 50 --knn_every 50",
    settings={
        "mae": Setting("MAE", "--model mae_vit_small_patch16"),
        "gamma_75": Setting("CrossMAE, γ = .75", SMALL),
        "gamma_25": Setting("CrossMAE, γ = .25", f"{SMALL} --pred_ratio 0.25"),
        "last_map": Setting("last feature map only", f"{SMALL} --feature_maps last"),
    },
    steps={
        "features": Step("knn", "--crop_pct 1 --k 20 --untrained --save_predictions"),
        "probe": Step(
            "linprobe", "--probe attentive --crop_pct 1 --batch_size 256 --epochs 90", PROBE
        ),
    },
    claims=tuple(
        claim
        for claim in CPU.claims
        if {claim.first, claim.second} <= {"mae", "gamma_75", "gamma_25", "last_map"}
    ),
)

# Table 1: method, its flags, and the paper's accuracies of these sizes.
SIZES = ("small_patch16", "base_patch16", "large_patch16", "huge_patch14")
TABLE_1 = {
    f"{name}_{size.partition('_')[0]}_800": Setting(
        f"{label}, ViT-{size[0].upper()}, 800 epochs",
        f"--model {method}_vit_{size} --epochs 800 {flags}",
        finetune="--epochs 50" if size[0] in "lh" else "",  # Table 11
        paper=accuracy,
    )
    for name, label, method, flags, accuracies in (
        ("mae", "MAE", "mae", "", "78.9 83.3 85.4 85.8"),
        ("gamma_25", "CrossMAE, γ = .25", "crossmae", "--pred_ratio 0.25", "79.2 83.5 85.4 86.3"),
        ("gamma_75", "CrossMAE, γ = .75", "crossmae", "--pred_ratio 0.75", "79.3 83.7 85.4 86.4"),
    )
    for size, accuracy in zip(SIZES, accuracies.split(), strict=True)
}
# The other tables, of ViT-B. The paper does not name the feature maps of Table 3d: these are evenly
# spaced, with the encoder's input.
BASE_ROWS = (
    ("mae", "MAE", "83.0", ""),
    ("gamma_75", "CrossMAE, γ = .75", "83.3", ""),
    ("gamma_25", "CrossMAE, γ = .25", "83.2", "--pred_ratio 0.25"),
    ("gamma_15", "CrossMAE, γ = .15", "83.1", "--pred_ratio 0.15"),
    ("self_attention", "with self-attention", "83.3", "--decoder_self_attention"),
    ("mask_65", "mask ratio .65", "83.5", "--mask_ratio 0.65 --pred_ratio 0.65"),
    ("mask_85", "mask ratio .85", "83.3", "--mask_ratio 0.85 --pred_ratio 0.85"),
    ("last_map", "last feature map only", "82.9", "--feature_maps last"),
    ("maps_3", "3 feature maps", "83.3", "--feature_maps 0,4,8,12"),
    ("maps_6", "6 feature maps", "83.5", "--feature_maps 0,2,4,6,8,10,12"),
    ("depth_1", "decoder of 1 block", "83.0", "--decoder_depth 1"),
    ("depth_4", "decoder of 4 blocks", "83.1", "--decoder_depth 4"),
    ("depth_8", "decoder of 8 blocks", "83.1", "--decoder_depth 8"),
    ("input_448", "γ = .25, 448 px", "84.6", "--pred_ratio 0.25 --input_size 448"),
    ("mae_iba", "MAE, inter-block attention", "83.0", "--feature_maps all"),
    ("softmax", "γ = .25, softmax of the mix", "83.2", "--pred_ratio 0.25 --iba_softmax"),
    ("projection", "a projection of each map", "83.5", "--iba_projection"),
    ("grid", "grid masks", "83.2", "--mask_sampling grid"),
)
SEEDS = {"gamma_25": 4}  # Table 14
PAPER = Suite(
    about="ImageNet-1K: Table 1, and Tables 3a-f, 7, 8, 9, 14 and 15 with ViT-B and 400 epochs",
    pretrain="--epochs 400 --effective_batch_size 4096 --batch_size auto --pred_ratio 0.75",
    settings=TABLE_1
    | {
        name: Setting(
            label,
            f"--model {'mae' if name.startswith('mae') else 'crossmae'}_vit_base_patch16 {flags}",
            seeds=SEEDS.get(name),
            paper=accuracy,
        )
        for name, label, accuracy, flags in BASE_ROWS
    },
    steps={
        "finetune": Step(
            "finetune", "--epochs 100 --effective_batch_size 1024 --batch_size 32", FINE_TUNED
        )
    },
)

SUITES = {"cpu": CPU, "why": WHY, "gpu": GPU, "paper": PAPER}
