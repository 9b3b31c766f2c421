"""Names of a ViT's weights in this project, timm and Hugging Face."""

import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

# The parts of a block under timm's names, which this project uses too.
BLOCK_PARTS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
# The same in Hugging Face: the names in files, then those of modules since v5.
HUGGING_FACE_PARTS = {
    "norm1": ("layernorm_before",),
    "attn.q": ("attention.attention.query", "attention.q_proj"),
    "attn.k": ("attention.attention.key", "attention.k_proj"),
    "attn.v": ("attention.attention.value", "attention.v_proj"),
    "attn.proj": ("attention.output.dense", "attention.o_proj"),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
    "mlp.fc2": ("output.dense", "mlp.fc2"),
}
EMBEDDING_NAMES = ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")


def _one_of(words: Sequence[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, words))})"


_KIND = r"\.(weight|bias)"
ENCODER = rf"(?:{_one_of(EMBEDDING_NAMES)}|blocks\.\d+\.{_one_of(BLOCK_PARTS)}\.(?:weight|bias))"
ATTENTION_POOL = r"attn_pool\.(?:queries|value\.(?:weight|bias))"  # of an attentive probe


class WeightNames(NamedTuple):
    """The names of the weights in one kind of file."""

    kind: str
    patterns: dict[str, str]
    """Pattern of a whole name -> timm's name, or "" to leave it out; the first match counts."""

    def rename(self, name: str) -> str | None:
        """Return timm's name; "" to leave the weight out, None if the name is unknown."""
        matches = ((re.fullmatch(p, name), new) for p, new in self.patterns.items())
        return next((match.expand(new) for match, new in matches if match), None)


PRETRAINED = WeightNames(
    "pre-training checkpoint of this project",
    {
        rf"encoder\.({ENCODER})": r"\1",
        rf"decoder\.context_norm{_KIND}": r"norm.\1",
        r"decoder\..+": "",
    },
)
TIMM = WeightNames(
    "released or timm checkpoint",
    {
        rf"({ENCODER}|(?:fc_)?norm\.(?:weight|bias)|{ATTENTION_POOL}|head\..+)": r"\1",
        r"mask_token|(?:decoder_|wfm\.|dec_norms\.|pre_logits\.).+": "",
    },
)
HUGGING_FACE = WeightNames(
    "Hugging Face checkpoint",
    {
        r"(?:vit\.)?embeddings\.cls_token": "cls_token",
        r"(?:vit\.)?embeddings\.position_embeddings": "pos_embed",
        rf"(?:vit\.)?embeddings\.patch_embeddings\.projection{_KIND}": r"patch_embed.proj.\1",
        **{
            rf"(?:vit\.)?(?:encoder\.layer|layers)\.(\d+)\.{_one_of(theirs)}{_KIND}": (
                rf"blocks.\1.{ours}.\2"
            )
            for ours, theirs in HUGGING_FACE_PARTS.items()
        },
        rf"(?:vit\.)?layernorm{_KIND}": r"norm.\1",
        rf"classifier{_KIND}": r"head.\1",
        r"(?:vit\.)?(?:pooler\.|embeddings\.mask_token|decoder\.).*": "",
    },
)
# Next to one of these, a final norm is that of a mix of feature maps, not the last (App. A.3).
MIXING_WEIGHTS = r"decoder\.inter_block_attention\..+|wfm\..+"


def find_encoders(names: Collection[str]) -> dict[str, WeightNames]:
    """Return the naming scheme of each encoder among names, by the prefix of its names.

    The scheme of this project counts only where it knows all names: other programs also have an
    `encoder.`, as a prefix.
    """

    def schemes(prefix: str, cls_token: str) -> Iterator[WeightNames]:
        within = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        if PRETRAINED.rename(cls_token) and None not in map(PRETRAINED.rename, within):
            yield PRETRAINED
        yield from (s for s in (TIMM, HUGGING_FACE) if s.rename(cls_token) == "cls_token")

    found = {}
    for name in names:
        parts = name.split(".") if name.endswith("cls_token") else []
        prefixes = ("".join(f"{part}." for part in parts[:i]) for i in range(len(parts)))
        encoders = ((p, s) for p in prefixes for s in schemes(p, name.removeprefix(p)))
        found.update(itertools.islice(encoders, 1))  # the shortest prefix counts
    return found


def hugging_face_names(
    state: dict[str, Tensor], names: dict[str, str], *, layers: str
) -> dict[str, Tensor]:
    """Rename weights from timm's names to those in Hugging Face's files.

    Args:
        names: timm's name outside the blocks -> Hugging Face's, both without .weight and .bias.
        layers: prefix of a block's number, such as "encoder.layer".
    """
    renamed = {}
    for name, tensor in state.items():
        if not name.startswith("blocks."):
            part, dot, kind = name.rpartition(".")
            renamed[names[part] + dot + kind if part else names[name]] = tensor
            continue
        _, block, *parts, kind = name.split(".")
        part = ".".join(parts)
        split = {part: tensor}
        if part == "attn.qkv":
            split = dict(zip(("attn.q", "attn.k", "attn.v"), tensor.chunk(3), strict=True))
        for ours, piece in split.items():
            renamed[f"{layers}.{block}.{HUGGING_FACE_PARTS[ours][0]}.{kind}"] = piece
    return renamed


# Names for `hugging_face_names`, of an encoder and of an MAE's decoder.
ENCODER_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
DECODER_NAMES = {
    "mask_token": "decoder.mask_token",
    "pos_embed": "decoder.decoder_pos_embed",
    "embed": "decoder.decoder_embed",
    "norm": "decoder.decoder_norm",
    "pred": "decoder.decoder_pred",
}
