"""Linear attention with any kernel feature map: train in O(N), generate with constant memory.

Five files hold the core idea, in reading order: ``ops/chunked.py`` (the equations),
``feature_maps/base.py`` (what a map is), ``attention/causal_linear_attention.py`` (a map inside
an attention), ``recurrent/attention/self_attention/linear_attention.py`` (the same as an RNN) and
``builders/options.py`` (what can be built).
"""

__version__ = "1.0.0"
__author__ = __maintainer__ = "The fast-transformers authors"
__copyright__ = "Copyright (c) 2026 The fast-transformers authors"
__license__ = "MIT"
__email__ = ""
__url__ = ""
