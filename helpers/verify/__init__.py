"""`python -m helpers verify`: the reader's own proof that this code computes what BAGEL's official code computes.

The official code runs in a process and an environment of its own (`official`), ours does the same works through the
verbs (`ours`), and what both found is compared (`comparing`). `exchange` has what passes between them.
"""
