"""What an adapter's tensors are called at their ends: the part of a module that each is, in every layout.

Whatever stands before that is the module's name, in one of several ways to write it. The ends were checked against the
code that writes them: PEFT, diffusers, kohya-ss/sd-scripts, LyCORIS and MLX-LM.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# The names of parts in PEFT's layout, and of those that have none there:
ALPHA = "alpha"  # a number: what rank is set against
MIDDLE = "lora_mid.weight"  # the core of a convolution's Tucker form (LyCORIS' LoCon)
CHANGE, BIAS_CHANGE = "diff", "diff_b"  # what is added to a whole weight, or to a bias
MAGNITUDE = "lora_magnitude_vector"
DORA_SCALE = "dora_scale"  # the same in LyCORIS' shape
MLX_DOWN, MLX_UP, MLX_MAGNITUDE = "mlx_a", "mlx_b", "mlx_m"
SCALED, ON_INPUT = "weight", "on_input"  # LyCORIS' IA3
UNKNOWN = "?"

# One name of an adapter in PEFT's own code may follow a part: ``lora_A.default.weight``.
_ADAPTER = r"(?:\.(?!weight$|bias$)[A-Za-z0-9_-]+)?"
_ENDS: tuple[tuple[str, str], ...] = (
    (rf"\.lora_A{_ADAPTER}(?:\.weight)?", "lora_A.weight"),
    (rf"\.lora_B{_ADAPTER}\.bias", "lora_B.bias"),
    (rf"\.lora_B{_ADAPTER}(?:\.weight)?", "lora_B.weight"),
    (rf"\.lora_embedding_A{_ADAPTER}(?:\.weight)?", "lora_embedding_A"),
    (rf"\.lora_embedding_B{_ADAPTER}(?:\.weight)?", "lora_embedding_B"),
    (rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?", MAGNITUDE),
    # kohya, and diffusers before it took up PEFT: to_q.lora.down, to_q_lora.down, q_proj.lora_linear_layer.down
    (r"(?:\.lora_down(?:\.default)?|[._]lora\.down|\.lora_linear_layer\.down)\.weight", "lora_A.weight"),
    (r"(?:\.lora_up(?:\.default)?|[._]lora\.up|\.lora_linear_layer\.up)\.weight", "lora_B.weight"),
    (r"\.lora_mid\.weight", MIDDLE),
    (r"\.dora_scale", DORA_SCALE),
    (r"(?:[._]lora)?\.alpha", ALPHA),
    (r"\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))" + rf"{_ADAPTER}", r"\1"),
    (r"\.(?:diff|w_norm)", CHANGE),
    (r"\.(?:diff_b|b_norm)", BIAS_CHANGE),
    (r"\.on_input", ON_INPUT),
    (r"\.lora_a", MLX_DOWN),
    (r"\.lora_b", MLX_UP),
    # XLabs numbers the streams of a block: qkv_lora1.down
    (r"(?<=_lora[12])\.down\.weight", "lora_A.weight"),
    (r"(?<=_lora[12])\.up\.weight", "lora_B.weight"),
    # Of kinds that no layout here can say in PEFT's terms.
    (
        r"\.(?:oft_blocks|oft_diag|boft_blocks|rescale|lokr_t1|a1\.weight|a2\.weight|b1\.weight|b2\.weight|bm\.weight)",
        "?",
    ),
    (r"\.(?:lora_a\.weight|lora_b\.weight|set_weight|set_bias|reshape_weight|scalar|bundle_emb\..+)", "?"),
)
_PART = re.compile("(?P<stem>.+?)(?:" + "|".join(f"(?P<p{i}>{end})" for i, (end, _) in enumerate(_ENDS)) + r")\Z")
_WEIGHT = re.compile(r"(?P<stem>.+)\.weight\Z")
# By these a file is known to be an adapter's; a model may well have a tensor named alpha, or diff.
_TELLING = re.compile(
    r"[._]lora_?[AaBbdmlue]|[._]lora\.|_lora[12]?\.(?:down|up)|dora_scale|hada_w|lokr_w|\.on_input\Z|oft_blocks"
)
_KOHYA = re.compile(r"(?:lora|lycoris|oft)_[A-Za-z0-9]")
# Names of tensors are at most this long where they are taken apart; longer ones belong to no adapter.
_LONGEST = 1_000


def split(name: str) -> tuple[str, str] | None:
    """Return what a tensor's name says: the module, as its layout writes it, and the part; None if it is no part.

    Parts go by PEFT's names, or by those of this module; ``UNKNOWN`` for one that is known to belong to an adapter, and
    to be beyond what can be converted.
    """
    if len(name) > _LONGEST:
        return None
    match = _PART.match(name)
    if match is None:
        return None
    end = next(i for i in range(len(_ENDS)) if match[f"p{i}"] is not None)
    part = _ENDS[end][1]
    if part == r"\1":
        part = match[f"p{end}"].split(".")[1]
    return match["stem"], part


def split_scaling(name: str) -> tuple[str, str] | None:
    """Return module and part of LyCORIS' IA3, whose vectors are named as a whole weight is."""
    match = _WEIGHT.match(name)
    return (match["stem"], SCALED) if match is not None and _KOHYA.match(name) else split(name)


def is_adapter(names: Iterable[str]) -> bool:
    """Whether tensors are those of an adapter: by their names alone, of which every single one must say so."""
    telling = False
    for name in names:
        kohya = _KOHYA.match(name) is not None and "." not in name.partition(".")[0]
        if not (split(name) or (kohya and name.endswith(".weight"))):
            return False
        telling = telling or _TELLING.search(name) is not None or (kohya and split(name) is not None)
    return telling
