"""Which linears of a model are quantised, and how."""

from __future__ import annotations

from dataclasses import dataclass

FORMATS = ("int8", "int4", "fp8")
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Quantization:
    """How to quantise a checkpoint while it is loaded.

    Embeddings, norms, the head and attention itself keep the model's dtype always, and so do the
    mergers and the patch embedding: quantising all of the vision tower is known to spoil pictures.

    Attributes:
        format: ``int8`` (one scale a channel and one a token), ``int4`` (the same with weights of
            4 bits and a multiplier for each group of inputs) or ``fp8`` (e4m3).
        vision: quantise the linears of the vision blocks as well.
        down_proj: quantise the second half of the decoder's MLP, whose inputs have the largest
            outliers.
        group: inputs that share a multiplier, for ``int4``: 32, 64 or 128.
        weight_only: for ``int4``: inputs of the products stay in the model's dtype and are not
            rounded to int8, weights that a checkpoint stores as int4 among them. The Triton kernels
            and the reference do that; the CPU kernels have int8 inputs only.
    """

    format: str
    vision: bool = False
    down_proj: bool = True
    group: int = 64
    weight_only: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(
                f"quantization {self.format!r} is unknown: use one of {', '.join(FORMATS)}"
            )
        if self.group not in GROUPS:
            raise ValueError(f"quantization group is {self.group}: use 32, 64 or 128")
        if self.weight_only and self.format != "int4":
            raise ValueError(
                f"quantization weight_only is for 'int4', not for {self.format!r}: leave it out, "
                "or use format='int4'"
            )

    @classmethod
    def parse(cls, value: str | Quantization | None) -> Quantization | None:
        """A format's name, or the whole plan, or None for none.

        Raises:
            ValueError: no such format.
        """
        if value is None or isinstance(value, Quantization):
            return value
        if not isinstance(value, str):
            raise ValueError(
                f"quantization is {value!r}: use a string such as 'int8', or qvlfast.Quantization"
            )
        return cls(value)

    def covers(self, name: str) -> bool:
        """Whether the linear of that published name (without ``model.``) is quantised."""
        if name.startswith("language_model.layers."):
            return self.down_proj or not name.endswith("down_proj")
        return self.vision and name.startswith("visual.blocks.")
