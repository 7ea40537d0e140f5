"""The released sizes of the Zipformer, and a tiny one for demonstrations and small corpora."""

from dataclasses import dataclass, fields

from speechllm.errors import InputError


@dataclass(frozen=True)
class ZipformerConfig:
    """What decides the shapes of an encoder; one entry per stack in each tuple.

    A tuple with a single entry means that value in every stack.
    """

    num_encoder_layers: tuple[int, ...]
    downsampling_factor: tuple[int, ...]
    feedforward_dim: tuple[int, ...]
    num_heads: tuple[int, ...]
    encoder_dim: tuple[int, ...]
    encoder_unmasked_dim: tuple[int, ...]
    cnn_module_kernel: tuple[int, ...]
    query_head_dim: tuple[int, ...] = (32,)
    value_head_dim: tuple[int, ...] = (12,)
    pos_head_dim: tuple[int, ...] = (4,)
    frontend_channels: int = 128  # of icefall's released models, all of them
    pos_dim: int = 48
    feature_dim: int = 80

    def __post_init__(self):
        stacks = len(self.encoder_dim)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                if len(value) == 1:
                    object.__setattr__(self, field.name, value * stacks)
                elif len(value) != stacks:
                    raise InputError(
                        f"{field.name} has {len(value)} entries, encoder_dim has {stacks}"
                    )

    @classmethod
    def from_strings(cls, values: dict) -> "ZipformerConfig":
        """The configuration icefall writes, such as `{"encoder_dim": "192,256"}`.

        Keys of other parts of icefall's models are ignored.
        """
        config = {}
        for field in fields(cls):
            if field.name in values:
                value = tuple(int(v) for v in str(values[field.name]).split(","))
                config[field.name] = value[0] if field.type is int else value
        return cls(**config)


_COMMON = dict(downsampling_factor=(1, 2, 4, 8, 4, 2), cnn_module_kernel=(31, 31, 15, 15, 15, 31))

SIZES = {
    "tiny": ZipformerConfig(
        num_encoder_layers=(1, 1, 1),
        downsampling_factor=(2, 4, 2),
        feedforward_dim=(256, 384, 256),
        num_heads=(4,),
        encoder_dim=(96, 144, 96),
        encoder_unmasked_dim=(64, 96, 64),
        cnn_module_kernel=(31, 15, 31),
        frontend_channels=16,
    ),
    "small": ZipformerConfig(
        num_encoder_layers=(2, 2, 2, 2, 2, 2),
        feedforward_dim=(512, 768, 768, 768, 768, 768),
        num_heads=(4, 4, 4, 8, 4, 4),
        encoder_dim=(192, 256, 256, 256, 256, 256),
        encoder_unmasked_dim=(192,),
        **_COMMON,
    ),
    "medium": ZipformerConfig(
        num_encoder_layers=(2, 2, 3, 4, 3, 2),
        feedforward_dim=(512, 768, 1024, 1536, 1024, 768),
        num_heads=(4, 4, 4, 8, 4, 4),
        encoder_dim=(192, 256, 384, 512, 384, 256),
        encoder_unmasked_dim=(192, 192, 256, 256, 256, 192),
        **_COMMON,
    ),
    "large": ZipformerConfig(
        num_encoder_layers=(2, 2, 4, 5, 4, 2),
        feedforward_dim=(512, 768, 1536, 2048, 1536, 768),
        num_heads=(4, 4, 4, 8, 4, 4),
        encoder_dim=(192, 256, 512, 768, 512, 256),
        encoder_unmasked_dim=(192, 192, 256, 320, 256, 192),
        **_COMMON,
    ),
}
