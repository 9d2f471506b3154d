"""The paper's experiments as one command, for a machine that has the data and a GPU: python -m bench paper.

command (what is run, and the table) <- trainer (one run) <- settings, ranks, task <- archives, images, text (the data).
Everything about the paper and about the authors' scripts that is known, and what is not, stands in bench/README.md.
"""
