"""The mathematics: functions on tensors, without modules, masks or events.

One shape legend for the whole library:

===  ==========================================================
N    batch
L    number of queries
S    number of keys and values
H    heads
E    dimensions of a query or a key
F    features that a feature map makes of it
M    dimensions of a value
===  ==========================================================

Every public tensor is laid out ``(N, length, H, dim)``; a single step drops the length.

With ``phi`` the feature map, every function here computes

    out_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j)

over all keys (:func:`linear_attention`) or over the keys j <= i
(:func:`causal_linear_attention`), in one of the forms listed in :mod:`.choose`.
"""

from .api import causal_linear_attention, linear_attention, linear_attention_step
from .choose import FORMS, explain, why_not
from .elementwise import register_elementwise
from .features import Composition, Features
from .formula import Formula
from .state import Attended, LinearState

__all__ = [
    "FORMS",
    "Attended",
    "Composition",
    "Features",
    "LinearState",
    "Formula",
    "causal_linear_attention",
    "explain",
    "linear_attention",
    "linear_attention_step",
    "register_elementwise",
    "why_not",
]
