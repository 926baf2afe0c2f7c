"""The choice of the teacher's checkpoint by mutual information: estimates, probes and their training, the decision. It
trains probes only, and reads no store.
"""
