"""Trains a source classifier and a conditional generator."""
