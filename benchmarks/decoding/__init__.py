"""Decoding: whole steps and generations."""
