"""What every other folder stands on: options and how they are read, errors, processes and ranks, files, identities,
the run folder, checkpoints, the console. It knows no command, no model and no image.
"""
