"""The published checkpoints' own layouts: names, shapes, and what the networks compute, written out in plain torch.

Nothing here imports transformers or the package: it is what the key maps and the rewards are compared with.
"""

import torch
from torch import Tensor
from torch.nn.functional import conv2d, embedding, gelu, layer_norm, linear

Shapes = dict[str, tuple[int, ...]]

HEAD_WIDTHS = (1024, 128, 64, 16, 1)
HEAD_LAYERS = (0, 2, 4, 6, 7)


def _norm(name: str, d: int) -> Shapes:
    return {f"{name}.weight": (d,), f"{name}.bias": (d,)}


def _dense(name: str, d_out: int, d_in: int) -> Shapes:
    return {f"{name}.weight": (d_out, d_in), f"{name}.bias": (d_out,)}


def _open_clip_blocks(prefix: str, d: int, layers: int) -> Shapes:
    found: Shapes = {}
    for i in range(layers):
        block = f"{prefix}transformer.resblocks.{i}"
        found |= {f"{block}.attn.in_proj_weight": (3 * d, d), f"{block}.attn.in_proj_bias": (3 * d,)}
        found |= _dense(f"{block}.attn.out_proj", d, d) | _norm(f"{block}.ln_1", d) | _norm(f"{block}.ln_2", d)
        found |= _dense(f"{block}.mlp.c_fc", 4 * d, d) | _dense(f"{block}.mlp.c_proj", d, 4 * d)
    return found


def open_clip_shapes(
    vision: int,
    vision_layers: int,
    text: int,
    text_layers: int,
    common: int,
    image: int,
    patch: int,
    words: int,
    n: int,
) -> Shapes:
    found: Shapes = {"logit_scale": (), "text_projection": (text, common), "visual.proj": (vision, common)}
    found |= {"token_embedding.weight": (words, text), "positional_embedding": (n, text)}
    found |= {"visual.class_embedding": (vision,), "visual.conv1.weight": (vision, 3, patch, patch)}
    found |= {"visual.positional_embedding": (1 + (image // patch) ** 2, vision)}
    found |= _norm("ln_final", text) | _norm("visual.ln_pre", vision) | _norm("visual.ln_post", vision)
    return found | _open_clip_blocks("visual.", vision, vision_layers) | _open_clip_blocks("", text, text_layers)


def head_shapes(prefix: str, d: int) -> Shapes:
    found: Shapes = {}
    for i, e in zip(HEAD_LAYERS, HEAD_WIDTHS, strict=True):
        found |= _dense(f"{prefix}layers.{i}", e, d)
        d = e
    return found


def image_reward_shapes(
    vision: int, vision_layers: int, text: int, text_layers: int, image: int, patch: int, words: int, n: int
) -> Shapes:
    see, told = "blip.visual_encoder.", "blip.text_encoder."
    found: Shapes = {f"{see}cls_token": (1, 1, vision), f"{see}pos_embed": (1, 1 + (image // patch) ** 2, vision)}
    found |= {f"{see}patch_embed.proj.weight": (vision, 3, patch, patch), f"{see}patch_embed.proj.bias": (vision,)}
    for i in range(vision_layers):
        block = f"{see}blocks.{i}"
        found |= _norm(f"{block}.norm1", vision) | _norm(f"{block}.norm2", vision)
        found |= _dense(f"{block}.attn.qkv", 3 * vision, vision) | _dense(f"{block}.attn.proj", vision, vision)
        found |= _dense(f"{block}.mlp.fc1", 4 * vision, vision) | _dense(f"{block}.mlp.fc2", vision, 4 * vision)
    found |= _norm(f"{see}norm", vision)
    found |= {f"{told}embeddings.position_ids": (1, n)}
    found |= {f"{told}embeddings.word_embeddings.weight": (words, text)}
    found |= {f"{told}embeddings.position_embeddings.weight": (n, text)} | _norm(f"{told}embeddings.LayerNorm", text)
    for i in range(text_layers):
        layer = f"{told}encoder.layer.{i}"
        for attention, width in (("attention", text), ("crossattention", vision)):
            found |= _dense(f"{layer}.{attention}.self.query", text, text)
            found |= _dense(f"{layer}.{attention}.self.key", text, width)
            found |= _dense(f"{layer}.{attention}.self.value", text, width)
            found |= _dense(f"{layer}.{attention}.output.dense", text, text)
            found |= _norm(f"{layer}.{attention}.output.LayerNorm", text)
        found |= _dense(f"{layer}.intermediate.dense", 4 * text, text)
        found |= _dense(f"{layer}.output.dense", text, 4 * text) | _norm(f"{layer}.output.LayerNorm", text)
    return found | head_shapes("mlp.", text)


def random_weights(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Every weight matters: norms near 1, matrices that keep a vector's length, position ids as they are saved."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        if name.endswith("position_ids"):
            x = torch.arange(shape[1])[None]
        elif ("norm" in name.lower() or ".ln_" in name or name.startswith("ln_")) and name.endswith("weight"):
            x = 1 + 0.1 * x
        elif len(shape) > 1:
            x = x / shape[-1] ** 0.5
        state[name] = x
    return state


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, allowed: Tensor | None = None) -> Tensor:
    """Softmax attention, (B, n, D) each; `allowed` (.., n, m) says who may look at whom."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def _ln(x: Tensor, state: dict[str, Tensor], name: str, eps: float) -> Tensor:
    return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def _fc(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _open_clip_tower(x: Tensor, state: dict[str, Tensor], prefix: str, heads: int, allowed: Tensor | None) -> Tensor:
    for i in range(len([k for k in state if k.startswith(prefix) and k.endswith("ln_1.weight")])):
        block = f"{prefix}{i}"
        h = _ln(x, state, f"{block}.ln_1", 1e-5)
        mixed = linear(h, state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"])
        x = x + _fc(_attention(*mixed.chunk(3, -1), heads, allowed), state, f"{block}.attn.out_proj")
        h = gelu(_fc(_ln(x, state, f"{block}.ln_2", 1e-5), state, f"{block}.mlp.c_fc"))
        x = x + _fc(h, state, f"{block}.mlp.c_proj")
    return x


def open_clip_image(state: dict[str, Tensor], pixels: Tensor, heads: int) -> Tensor:
    kernel = state["visual.conv1.weight"]
    patches = conv2d(pixels, kernel, stride=kernel.shape[-1]).flatten(2).mT
    first = state["visual.class_embedding"].expand(len(pixels), 1, -1)
    x = torch.cat([first, patches], 1) + state["visual.positional_embedding"]
    x = _open_clip_tower(_ln(x, state, "visual.ln_pre", 1e-5), state, "visual.transformer.resblocks.", heads, None)
    return _ln(x[:, 0], state, "visual.ln_post", 1e-5) @ state["visual.proj"]


def open_clip_text(state: dict[str, Tensor], tokens: Tensor, heads: int) -> Tensor:
    n = tokens.shape[1]
    x = embedding(tokens, state["token_embedding.weight"]) + state["positional_embedding"][:n]
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    x = _ln(_open_clip_tower(x, state, "transformer.resblocks.", heads, causal), state, "ln_final", 1e-5)
    # The end token has the largest number of all.
    return x[torch.arange(len(tokens)), tokens.argmax(1)] @ state["text_projection"]


def head(state: dict[str, Tensor], prefix: str, f: Tensor) -> Tensor:
    for i in HEAD_LAYERS:
        f = _fc(f, state, f"{prefix}layers.{i}")
    return f[:, 0]


def _blip_image(state: dict[str, Tensor], pixels: Tensor, heads: int) -> Tensor:
    see = "blip.visual_encoder."
    kernel = state[f"{see}patch_embed.proj.weight"]
    patches = conv2d(pixels, kernel, state[f"{see}patch_embed.proj.bias"], stride=kernel.shape[-1]).flatten(2).mT
    x = torch.cat([state[f"{see}cls_token"].expand(len(pixels), -1, -1), patches], 1) + state[f"{see}pos_embed"]
    for i in range(len([k for k in state if k.startswith(see) and k.endswith("norm1.weight")])):
        block = f"{see}blocks.{i}"
        qkv = _fc(_ln(x, state, f"{block}.norm1", 1e-6), state, f"{block}.attn.qkv")
        x = x + _fc(_attention(*qkv.chunk(3, -1), heads), state, f"{block}.attn.proj")
        h = gelu(_fc(_ln(x, state, f"{block}.norm2", 1e-6), state, f"{block}.mlp.fc1"))
        x = x + _fc(h, state, f"{block}.mlp.fc2")
    return _ln(x, state, f"{see}norm", 1e-6)


def _bert_attention(
    x: Tensor, seen: Tensor, state: dict[str, Tensor], name: str, heads: int, allowed: Tensor | None
) -> Tensor:
    q = _fc(x, state, f"{name}.self.query")
    k, v = (_fc(seen, state, f"{name}.self.{part}") for part in ("key", "value"))
    mixed = _fc(_attention(q, k, v, heads, allowed), state, f"{name}.output.dense")
    return _ln(mixed + x, state, f"{name}.output.LayerNorm", 1e-12)


def image_reward(
    state: dict[str, Tensor], pixels: Tensor, tokens: Tensor, mask: Tensor, vision_heads: int, text_heads: int
) -> Tensor:
    patches = _blip_image(state, pixels, vision_heads)
    told = "blip.text_encoder."
    x = embedding(tokens, state[f"{told}embeddings.word_embeddings.weight"])
    x = x + state[f"{told}embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = _ln(x, state, f"{told}embeddings.LayerNorm", 1e-12)
    for i in range(len([k for k in state if k.startswith(told) and k.endswith("intermediate.dense.weight")])):
        layer = f"{told}encoder.layer.{i}"
        x = _bert_attention(x, x, state, f"{layer}.attention", text_heads, mask.bool()[:, None, None, :])
        x = _bert_attention(x, patches, state, f"{layer}.crossattention", text_heads, None)
        h = gelu(_fc(x, state, f"{layer}.intermediate.dense"))
        x = _ln(_fc(h, state, f"{layer}.output.dense") + x, state, f"{layer}.output.LayerNorm", 1e-12)
    return (head(state, "mlp.", x[:, 0]) - 0.16717362830052426) / 1.0333394966054072
