"""One module per published data set. A module `NAME.py` with a constant `ADAPTER` adds the data set NAME.

`sources.hub[].dataset` accepts exactly the names of these modules; no other file lists them.
"""

import pkgutil

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))  # imports none of the modules
