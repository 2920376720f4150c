"""How wide each layer of a checkpoint is, by its config."""

from dataclasses import dataclass

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Widths:
    """Units of each layer, first to last.

    Attributes:
        neurons: of the MLPs.
        groups: key-value heads of the attentions.
        per_group: query heads that read one key-value head, in all layers.
        head_dim: dimension of a head.
    """

    neurons: list[int]
    groups: list[int]
    per_group: int
    head_dim: int

    @property
    def alike(self) -> bool:
        """Whether all layers have the same widths."""
        return len(set(self.neurons)) == len(set(self.groups)) == 1


def widths_of(config: PreTrainedConfig) -> Widths:
    """The widths that a config states, whether they differ between layers or not."""
    count, heads, groups = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
    return Widths(
        list(getattr(config, "intermediate_sizes", None) or [config.intermediate_size] * count),
        list(getattr(config, "key_value_heads", None) or [groups] * count),
        heads // groups,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
    )
