"""Training: the loop, the step, evaluation, and how a teacher's or a student's run is set up. Start at `loop`. Where
logits come from is `teachers`; which of them a student learns from in an epoch is `schedule`.
"""
