"""Source `hub`: published data sets, read with the `datasets` library from the Hub or from a local copy.

`adapter.py` is the interface, `adapters/` has one small module per data set, and `registry.py` collects them.
`tables.py` reads rows, `media.py` finds and stores media, and `reader.read` combines both into raw samples.
docs/data.md lists the data sets.
"""
