"""Checkpoints as files: headers, tensors, side files; read in bounded memory, written whole or not at all."""
