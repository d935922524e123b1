"""The pipeline: one package per stage (`python -m pipeline_steps.<stage>`), see dvc.yaml."""

import signal
import sys

if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends quietly; params.run takes over
