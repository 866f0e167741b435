"""Transfer between tasks whose relation is known."""
