"""One module per folder layout of a published action recognition data set, with a function `read(root, entry)`.

`read` returns the `Listing` of the folder `root`; entry: schema.Actions. `sources.actions[].layout` accepts the names
of these modules; they are listed nowhere else.
"""

import pkgutil

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))  # does not import the modules
