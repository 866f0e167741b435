"""Sharded training: engine, objectives, loop, checkpoints. Owns deepspeed and torch.distributed."""
