"""Load on a server that runs, over HTTP, and how it bore it: what `ddetr bench` does.

For users, on their hosts and with their bundles. `benchmarks/` is another thing: the scripts behind our own figures.
It imports nothing of the server: one that it starts itself is a process like any other.
"""
