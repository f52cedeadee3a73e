"""What the older library has and this version has not yet."""

from __future__ import annotations

_LINEAR = "use 'linear' or 'causal-linear', which are linear in the length"
_FULL = "use 'full', or 'causal-linear' for long sequences"

LATER = {
    "clustered": _LINEAR,
    "improved-clustered": _LINEAR,
    "causal-improved-clustered": "use 'causal-linear', which is linear in the length",
    "reformer": _LINEAR,
    "exact-topk": _FULL,
    "local": _FULL,
    "aft-full": _LINEAR,
    "aft-simple": _LINEAR,
}

LATER_CLASSES = {
    "ClusteredAttention": LATER["clustered"],
    "ImprovedClusteredAttention": LATER["improved-clustered"],
    "ImprovedClusteredCausalAttention": LATER["causal-improved-clustered"],
    "ReformerAttention": LATER["reformer"],
    "ExactTopKAttention": LATER["exact-topk"],
    "LocalAttention": LATER["local"],
    "AFTFullAttention": LATER["aft-full"],
    "AFTSimpleAttention": LATER["aft-simple"],
}
