"""Networks: models by name, the losses of distillation, optimisers and schedules, forward passes. No data is read
here, and nothing is trained.
"""
