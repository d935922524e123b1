"""One module per published data set. A module `NAME.py` that defines `ADAPTER` adds the data set NAME.

`sources.hub[].dataset` accepts the names of these modules; they are listed nowhere else.
"""

import pkgutil

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))  # does not import the modules
