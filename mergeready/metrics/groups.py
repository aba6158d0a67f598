from __future__ import annotations

import re

GROUPS = ("attention", "mlp", "embedding", "norm", "other")
"""What parameters are for, as far as their names tell."""

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|resblocks|stages?)\.(\d+)\.")
_RULES = (
    ("norm", re.compile(r"norm|(?:^|\.)ln_|\.bn\d*\.", re.IGNORECASE)),
    ("embedding", re.compile(r"embed|(?:^|\.)wte\.|(?:^|\.)wpe\.|lm_head", re.IGNORECASE)),
    ("attention", re.compile(r"attn|attention|\.[qkvo]_proj\.|\.(?:query|key|value)\.", re.IGNORECASE)),
    (
        "mlp",
        re.compile(
            r"mlp|ffn|feed_forward|fc\d|intermediate|output\.dense|DenseReluDense|_proj\.|experts",
            re.IGNORECASE,
        ),
    ),
)


def group_of(name: str) -> str:
    """The group of a parameter, from its name.

    >>> [group_of(n) for n in ("h.0.attn.c_proj.weight", "encoder.layer.1.output.dense.weight", "wte.weight")]
    ['attention', 'mlp', 'embedding']
    """
    return next((group for group, rule in _RULES if rule.search(name)), "other")


def layer_of(name: str) -> int | None:
    """The index of the layer that a parameter belongs to, or None outside the layers.

    >>> layer_of("model.layers.11.mlp.up_proj.weight"), layer_of("lm_head.weight")
    (11, None)
    """
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None
