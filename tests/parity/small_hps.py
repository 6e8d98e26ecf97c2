"""HPSv2 with a small network of the same layout as `small_config.SMALL`."""

from typing import Any

from lightning_tilt import rewards


class HPSv2(rewards.HPSv2):
    """The real class, the real tokens and images, but a small network."""

    @staticmethod
    def configuration() -> Any:
        from transformers import CLIPConfig

        shared = {"num_attention_heads": 2, "hidden_act": "gelu"}
        text = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3, **shared}
        vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "patch_size": 32, **shared}
        return CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
