"""Train a source classifier and a conditional generator."""
