"""One page about a study: what runs left, what it says, pictures, the page. It reads files only; nothing is computed
anew.
"""
