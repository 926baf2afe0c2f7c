"""Distributed knowledge distillation from a teacher's checkpoints."""
