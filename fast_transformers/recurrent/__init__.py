"""The transformers of this package as recurrent networks: one token at a time."""
