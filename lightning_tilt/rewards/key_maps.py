"""The names of published checkpoints, translated to those of transformers' networks.

open_clip (HPSv2)  ->  `CLIPModel`:  D is the width of a tower, P of the common space

    logit_scale                                  logit_scale
    text_projection (D, P)                       text_projection.weight (P, D)
    visual.proj (D, P)                           visual_projection.weight (P, D)
    token_embedding, positional_embedding        text_model.embeddings.*
    visual.class_embedding, visual.conv1,
      visual.positional_embedding                vision_model.embeddings.*
    ln_final, visual.ln_pre, visual.ln_post      text_model.final_layer_norm, vision_model.{pre_layrnorm,post_layernorm}
    [visual.]transformer.resblocks.i.*           {vision,text}_model.encoder.layers.i.*
      attn.in_proj_{weight,bias} (3D, ...)         self_attn.{q,k,v}_proj.{weight,bias}, in this order
      attn.out_proj, ln_1, ln_2                    self_attn.out_proj, layer_norm1, layer_norm2
      mlp.c_fc, mlp.c_proj                         mlp.fc1, mlp.fc2

BLIP's vision tower (ImageReward)  ->  `BlipVisionModel`:  names only.  (`pre_layrnorm` is spelt so in transformers.)
"""

from collections.abc import Mapping

from torch import Tensor

__all__ = ["blip_vision_to_transformers", "open_clip_to_transformers"]

_CLIP_WHOLE = {
    "logit_scale": "logit_scale",
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
}
_CLIP_TRANSPOSED = {"text_projection", "visual.proj"}
_CLIP_PARTS = (
    ("ln_final.", "text_model.final_layer_norm."),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("transformer.resblocks.", "text_model.encoder.layers."),
)
_CLIP_BLOCK = (
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
_IN_PROJ = ".attn.in_proj_"

_BLIP_WHOLE = {"cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding"}
_BLIP_PARTS = (
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("norm.", "post_layernorm."),
    ("blocks.", "encoder.layers."),
)
_BLIP_BLOCK = (
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
)


def open_clip_to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an open_clip CLIP (fused `in_proj`, transformer towers) under the names of `CLIPModel`.

    Names that the map does not know stay as they are, for `check_fit` to refuse.
    """
    renamed = {}
    for name, weight in state.items():
        if _IN_PROJ in name:
            block, kind = _translate(name, {}, _CLIP_PARTS, ()).split(_IN_PROJ)
            for letter, part in zip("qkv", weight.chunk(3), strict=True):
                renamed[f"{block}.self_attn.{letter}_proj.{kind}"] = part
        else:
            whole = weight.T if name in _CLIP_TRANSPOSED else weight
            renamed[_translate(name, _CLIP_WHOLE, _CLIP_PARTS, _CLIP_BLOCK)] = whole.contiguous()
    return renamed


def blip_vision_to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of BLIP's own vision tower under the names of `BlipVisionModel`."""
    return {_translate(name, _BLIP_WHOLE, _BLIP_PARTS, _BLIP_BLOCK): weight for name, weight in state.items()}


def _translate(
    name: str, whole: Mapping[str, str], parts: tuple[tuple[str, str], ...], block: tuple[tuple[str, str], ...]
) -> str:
    """A whole name, or its beginning and, inside a block, its end."""
    if name in whole:
        return whole[name]
    for old, new in parts:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in block:
        name = name.replace(old, new)
    return name
