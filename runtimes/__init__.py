"""Runtimes: each executes the decoder graph its own way."""
