"""Blocks as modules: `fuse` and `unfuse` (fusion.py), `ConvBlock` and how modules run as one block
(block.py), weights in another dtype (copies.py), Keras's BatchNorm (keras.py)."""
