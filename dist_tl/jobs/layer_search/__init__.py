"""Selects the feature maps of a teacher for few-shot tasks."""
