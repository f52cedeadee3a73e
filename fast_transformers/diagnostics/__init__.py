"""What a feature map does to your queries and keys, beside softmax and uniform attention."""

from .attention_report import AttentionReport, attention_report
from .capacity import CapacityReport, capacity
from .capture import Capture, capture
from .fit import fit
from .kernel_report import KernelReport, kernel_report
from .measures import Measures
from .sample import Sample, make_sample
from .scale import ScaleReport, scale_report
from .suggest import Suggestion, suggest
from .weights import attention_map

__all__ = [
    # reports on queries and keys
    "attention_map",
    "attention_report",
    "kernel_report",
    "scale_report",
    "suggest",
    # on models, and on nothing but the map
    "capture",
    "capacity",
    "fit",
    # what they return
    "AttentionReport",
    "Capture",
    "CapacityReport",
    "KernelReport",
    "Measures",
    "Sample",
    "ScaleReport",
    "Suggestion",
    "make_sample",
]
