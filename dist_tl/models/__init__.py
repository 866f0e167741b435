"""Networks that map images to class logits, and generators that map classes to images."""
