"""Many students from one store: which there are, who trains them, and which setting is the best. Each student is
trained by `train`; nothing is trained here.
"""
