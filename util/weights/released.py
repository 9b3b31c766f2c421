"""Names and options in checkpoints of the released CrossMAE and MAE code, converted to ours."""

from collections.abc import Mapping

from torch import Tensor

from util.errors import InputError

# Prefixes of the released CrossMAE and MAE checkpoints, and ours. The rest of a name is the same.
RELEASED_PREFIXES = {
    "cls_token": "encoder.cls_token",
    "pos_embed": "encoder.pos_embed",
    "patch_embed.": "encoder.patch_embed.",
    "blocks.": "encoder.blocks.",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.pos_embed",
    "wfm.linear.weight": "decoder.inter_block_attention.weight",
    "dec_norms.": "decoder.context_norms.",
    "norm.": "decoder.context_norm.",
    "decoder_embed.": "decoder.embed.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.pred.",
}


def from_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a released CrossMAE or MAE checkpoint to ours.

    Raises:
        InputError: a name is unknown.
    """
    renamed = {}
    for name, tensor in state.items():
        prefix = next((p for p in RELEASED_PREFIXES if name.startswith(p)), None)
        if prefix is None:
            raise InputError(f"{name} is not the name of a weight of released CrossMAE or MAE")
        renamed[RELEASED_PREFIXES[prefix] + name.removeprefix(prefix)] = tensor
    return renamed


def to_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a masked autoencoder to those of released checkpoints.

    Raises:
        InputError: a weight has no name there.
    """
    renamed = {}
    for name, tensor in state.items():
        found = [(theirs, p) for theirs, p in RELEASED_PREFIXES.items() if name.startswith(p)]
        if not found:
            raise InputError(f"released MAE and CrossMAE have no {name}")
        theirs, prefix = found[0]
        renamed[theirs + name.removeprefix(prefix)] = tensor
    return renamed


def released_feature_maps(
    depth: int, *, weight_fm: bool, use_input: bool, use_fm: list[int] | None
) -> str | list[int]:
    """Convert the released code's choice of feature maps to ours.

    Args:
        weight_fm: whether inter-block attention is on.
        use_input: whether feature map 0, the encoder's input, is mixed too.
        use_fm: the blocks to mix, counted from 0, or from the end if negative; None or [-1] means
            all. They are mixed from shallow to deep in any case.

    Raises:
        InputError: a block does not exist.
    """
    if not weight_fm:
        return "last"
    if use_fm in (None, [-1]):
        use_fm = range(depth)
    blocks = sorted(block + depth if block < 0 else block for block in use_fm)
    if not all(0 <= block < depth for block in blocks):
        raise InputError(f"use_fm {use_fm} names a block that an encoder of {depth} does not have")
    return [0] * use_input + [block + 1 for block in blocks]


def released_options(state: Mapping[str, Tensor], args: Mapping[str, object]) -> dict:
    """Infer the model of a released checkpoint from its weights.

    Args:
        state: weights under their released names.
        args: training arguments, if the file has them.

    Returns:
        `kind` ("crossmae" or "mae"), `patch_size`, `embed_dim` and `depth`, which give the size,
        and the `options` of the model's factory.

    Raises:
        InputError: these are not pre-training weights, or the choice of feature maps is invalid.
    """
    try:
        embed_dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
        side = round((state["pos_embed"].shape[1] - 1) ** 0.5) * patch_size
        decoder_embed_dim = state["mask_token"].shape[-1]
        depth, decoder_depth = (
            1 + max(int(name.split(".")[1]) for name in state if name.startswith(prefix))
            for prefix in ("blocks.", "decoder_blocks.")
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"it has no masked autoencoder ({error})") from error
    options = {
        "img_size": [side, side],
        "in_chans": in_chans,
        "decoder_embed_dim": decoder_embed_dim,
        "decoder_depth": decoder_depth,
        "norm_pix_loss": bool(args.get("norm_pix_loss", True)),
    }
    is_mae = "decoder_embed.weight" in state
    if not is_mae:
        mixing = state.get("wfm.linear.weight")
        options["feature_maps"] = "all"
        if mixing is None or mixing.shape[1] != depth + 1:
            options["feature_maps"] = released_feature_maps(
                depth,
                weight_fm=mixing is not None,
                use_input=bool(args.get("use_input", False)),
                use_fm=args.get("use_fm"),
            )
        options["decoder_self_attention"] = "decoder_blocks.0.self_attn.qkv.weight" in state
    return {
        "kind": "mae" if is_mae else "crossmae",
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": depth,
        "options": options,
    }
