"""Source `hub`: published data sets, read with the `datasets` library from the Hub or from a local copy.

`adapter.py` is the interface, `adapters/` has one small module per data set, and `registry.py` collects them.
`tables.py` reads rows, `media.py` finds and stores media, and `reader.read` makes raw samples of both.
docs/data.md has the table of data sets.
"""
