"""Configuration of LongLLaVA (arXiv 2409.02889): everything that decides a token count or a shape."""

from typing import Any, Literal

from transformers import CLIPVisionConfig, JambaConfig, PreTrainedConfig

# What config.json tells `trust_remote_code=True`: the file beside it, and the class in that file. TRL, pipelines,
# lmms-eval and vLLM each ask for another of the four model classes.
_MODEL = "modeling_longllava.LongLlavaForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_longllava.LongLlavaConfig",
    "AutoModel": _MODEL,
    "AutoModelForImageTextToText": _MODEL,
    "AutoModelForMultimodalLM": _MODEL,
    "AutoModelForCausalLM": _MODEL,
}


class LongLlavaConfig(PreTrainedConfig):
    r"""
    A CLIP vision tower, pooling, a two-layer projector and a Jamba language model.

    The defaults are the sizes of LongLLaVA-A13B: CLIP ViT-L/14 at 336 pixels, 576 patches pooled to 144 tokens, Jamba
    with 32 layers of 4,096 and 16 experts of which 2. The 9B has `text_config.num_experts = 1`.

    Args:
        vision_config (`CLIPVisionConfig` or `dict`, *optional*): the vision tower.
        text_config (`JambaConfig` or `dict`, *optional*): the language model; dense where `num_experts` is 1.
        image_token_id (`int`, *optional*, defaults to 516): id of `<image>`, inside the vocabulary.
        vision_feature_layer (`int`, *optional*, defaults to -2): hidden state of the tower that is read; 0 is the
            output of its embeddings, negative numbers count from the last. The class token is dropped.
        pooling (`"2d"`, `"1d"` or `"none"`, *optional*, defaults to `"2d"`): mean over equal areas of the patch grid
            (paper, section 3.1), over equal stretches of the flat patch sequence, or no pooling.
        tokens_per_image (`int`, *optional*, defaults to 144): tokens of a picture without an `image_grid_hw`.
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`): activation between the projector's two layers.
        vision_batch_size (`int`, *optional*, defaults to 32): pictures the vision tower encodes at a time.
        prefill_chunk_size (`int`, *optional*, defaults to 8192): tokens that go through the language model at a time
            where a cache is filled and no gradient is needed; memory beside the cache grows with this number, not with
            the prompt.

    Raises:
        ValueError: if `tokens_per_image` does not fit the patch grid, or an id or layer is out of range.
    """

    _auto_class = "AutoConfig"  # saving copies this file along
    model_type = "longllava"
    sub_configs = {"vision_config": CLIPVisionConfig, "text_config": JambaConfig}

    vision_config: Any = None  # a CLIPVisionConfig after __post_init__
    text_config: Any = None  # a JambaConfig after __post_init__
    image_token_id: int = 516
    vision_feature_layer: int = -2
    pooling: Literal["2d", "1d", "none"] = "2d"
    tokens_per_image: int = 144
    projector_hidden_act: str = "gelu"
    vision_batch_size: int = 32
    prefill_chunk_size: int = 8192
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.vision_config is None:
            self.vision_config = {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 336,
                "patch_size": 14,
                "projection_dim": 768,
            }
        if isinstance(self.vision_config, dict):
            self.vision_config = CLIPVisionConfig(**self.vision_config)
        if isinstance(self.text_config, dict):
            self.text_config = JambaConfig(**self.text_config)
        elif self.text_config is None:
            self.text_config = JambaConfig()
        # The language model knows whether its head is its embedding; the head is the outer model's.
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)
        # Not what a loaded config.json says: a folder saved anew holds its own code.
        self.auto_map = dict(AUTO_MAP)
        self._check()

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of the square picture that the tower sees, such as 24."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def image_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of a picture for which no `image_grid_hw` is given, such as (12, 12)."""
        if self.pooling == "none":
            return self.patches_per_side, self.patches_per_side
        if self.pooling == "1d":
            return 1, self.tokens_per_image
        side = round(self.tokens_per_image**0.5)
        return side, side

    def _check(self) -> None:
        side, tokens = self.patches_per_side, self.tokens_per_image
        if self.pooling not in ("2d", "1d", "none"):
            raise ValueError(f'pooling is {self.pooling!r}, but must be "2d", "1d" or "none"')
        rows, columns = self.image_grid
        if self.pooling == "2d" and (rows * columns != tokens or side % rows):
            raise ValueError(
                f"tokens_per_image is {tokens}, but 2d pooling of {side} x {side} patches needs "
                f"the square of a divisor of {side}"
            )
        if self.pooling == "1d" and side * side % tokens:
            raise ValueError(f"tokens_per_image is {tokens}, but 1d pooling needs a divisor of {side * side} patches")
        if self.pooling == "none" and tokens != side * side:
            raise ValueError(f"tokens_per_image is {tokens}, but without pooling a picture has {side * side} tokens")
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"image_token_id is {self.image_token_id}, but the vocabulary has {self.text_config.vocab_size} tokens"
            )
        layers = self.vision_config.num_hidden_layers
        if not -layers - 1 <= self.vision_feature_layer <= layers:
            raise ValueError(f"vision_feature_layer is {self.vision_feature_layer}, but the tower has {layers} layers")
        for name in ("vision_batch_size", "prefill_chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")


__all__ = ["LongLlavaConfig"]
