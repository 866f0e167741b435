"""How much labelled data each feature map needs."""
