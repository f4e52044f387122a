"""VIRST in JAX: a video and a sentence in, the masks of the object that the sentence means out."""

__version__ = "0.1.0"
