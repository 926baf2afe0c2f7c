"""Whole pipelines of commands, as a user would type them: the quickstart, the study of checkpoints, the table of
codecs.
"""
