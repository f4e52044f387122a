"""Data sets as ArrayRecord files: built from the official folders by TFDS, read back at random, without TensorFlow."""
