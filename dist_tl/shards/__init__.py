"""Pseudo samples at rest and on the move: sample, order, manifest, writer, stream."""
