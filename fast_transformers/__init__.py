"""Linear-time attention and the transformers, batch and recurrent, built from it."""

__version__ = "1.0.0"
